"""One request in flight: from runner results to text, chunks, stops and the final output."""

import time
from collections import deque
from collections.abc import Collection, Iterable

import numpy as np
import torch

from ovfast.clock import Mark, elapsed_ms
from ovfast.errors import BackendError
from ovfast.model_inputs import ModelInputs
from ovfast.outputs import FinishReason, GenerationOutput, StreamChunk, Timings, Usage
from ovfast.runner import SlotState, StepResult
from ovfast.sampling import SamplingParams, StopStrings, TokenLogprob
from ovfast.staging import to_device
from ovfast.text_tokenizer import IncrementalDecoder


def milliseconds_since(start: float) -> float:
    """Milliseconds between `start` (of `time.perf_counter`) and now."""
    return 1e3 * (time.perf_counter() - start)


class Request:
    """State of one request from its admission to its last token.

    Not thread-safe by itself: results are accepted under the scheduler's lock.

    Args:
        inputs: the prompt.
        params: how to sample.
        seed: of the random numbers.
        stop_ids: ids that end the request.
        max_new_tokens: tokens to generate at most.
        decoder: of this request alone.
        started: when the call began, of `time.perf_counter`.

    Attributes:
        timings: filled in on the way.
        pending: chunks made and not yet taken.
        finish_reason: set with the last chunk.
        error: what ended the request instead of a last chunk.
        stages: when encoding began and ended, when the prefill began and ended.
        cached_tokens: prompt positions that a handle held.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        params: SamplingParams,
        *,
        seed: int,
        stop_ids: Collection[int],
        max_new_tokens: int,
        decoder: IncrementalDecoder,
        started: float,
    ) -> None:
        self.inputs, self.params, self.seed = inputs, params, seed
        self.timings = Timings(media_ms=inputs.media_ms, preprocess_ms=inputs.preprocess_ms)
        self.pending: deque[StreamChunk] = deque()
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.stages: tuple[Mark, Mark, Mark, Mark] | None = None
        self.cached_tokens = 0
        self._stop_ids, self._max_new_tokens = frozenset(stop_ids), max_new_tokens
        self._decoder, self._stops = decoder, StopStrings(params.stop)
        self._started = started
        self._first_token_at = 0.0
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._text: list[str] = []
        self._last: StepResult | None = None
        self._accepting = False

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be generated."""
        return self.finish_reason is not None or self.error is not None

    def slot_state(self, logits: torch.Tensor) -> SlotState:
        """What the runner continues from.

        Args:
            logits: (vocab_size,) float32 at the prompt's last position.
        """
        seen = None
        if self.params.repetition_penalty != 1.0:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            ids = torch.from_numpy(np.unique(self.inputs.input_ids))
            seen.index_fill_(0, to_device(ids, seen.device), True)
        return SlotState(logits, self.params, self.seed, self._stop_ids, self._max_new_tokens, seen)

    def accept(self, result: StepResult) -> None:
        """Takes one token; appends its chunk to `pending` and sets `finish_reason` on the last."""
        if result is self._last or self.is_over:
            return  # delivered before, and then the deliverer was interrupted
        if result.error is not None:
            self.error = result.error
            return
        if self._accepting:
            self.error = BackendError(
                "an interrupt (Ctrl-C) cut a step of this request in two; its text cannot be"
                " continued. Repeat the request."
            )
            return
        self._accepting = True
        self._append(result)
        self._last, self._accepting = result, False

    def output(self) -> GenerationOutput:
        """The whole output, after the last chunk."""
        inputs, num_tokens = self.inputs, len(self._token_ids)
        assert self.finish_reason is not None
        return GenerationOutput(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            usage=Usage(
                inputs.num_tokens,
                inputs.num_visual_tokens,
                num_tokens,
                inputs.num_views,
                self.cached_tokens,
            ),
            logprobs=tuple(self._logprobs) if self.params.logprobs is not None else None,
            timings=self.timings,
            seed=self.seed,
            visual=inputs.visual,
        )

    def _append(self, result: StepResult) -> None:
        if not self._token_ids:
            self._first_token_at = time.perf_counter()
            self.timings.ttft_ms = milliseconds_since(self._started)
            self._read_stages()
        self._token_ids.append(result.token)
        if result.logprob is not None:
            self._logprobs.append(result.logprob)
        text = "" if result.finished == "stop" else self._decoder.push(result.token)
        if result.finished is not None:
            text += self._decoder.flush()
        counts = len(self._token_ids) > self.params.min_new_tokens
        emit, stopped = self._stops.push(text, counts=counts)
        reason: FinishReason | None = "stop" if stopped else result.finished
        if reason is not None and not stopped:
            emit += self._stops.flush()
        self._text.append(emit)
        self.finish_reason = reason
        output = None
        if reason is not None:
            self._stop_clock()
            output = self.output()
        logprobs = None if result.logprob is None else (result.logprob,)
        self.pending.append(StreamChunk(emit, (result.token,), logprobs, output))

    def _read_stages(self) -> None:
        """Only now: the first token is on the host, so nothing has to be waited for."""
        if self.stages is not None:
            started, embedded, begun, prefilled = self.stages
            if self.inputs.num_views:
                self.timings.vision_ms = elapsed_ms(started, embedded)
            self.timings.prefill_ms = elapsed_ms(begun, prefilled)

    def _stop_clock(self) -> None:
        timings, num_steps = self.timings, len(self._token_ids) - 1
        timings.total_ms = milliseconds_since(self._started)
        if num_steps:
            timings.decode_ms = milliseconds_since(self._first_token_at)
            timings.tpot_ms = timings.decode_ms / num_steps


def side_by_side(requests: Iterable[Request], num_views: int) -> list[Request]:
    """The first request, and those behind it whose views make at most `num_views` with its own."""
    found, left = list[Request](), num_views
    for request in requests:
        left -= request.inputs.num_views
        if found and left < 0:
            break
        found.append(request)
        if request.inputs.num_views == 0:
            return found[:-1] or found  # without views it has nothing to share
    return found
