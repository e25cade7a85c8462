"""Decode runners: they own the step from one token to the next, sampling included.

The scheduler knows only `DecodeRunner`. `EagerRunner` is the synchronous one on plain operations;
runners on captured graphs or one native call a step have the same methods, and may run ahead
of `poll`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from ovfast.kv_cache import KVCache
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.out_of_memory import capacity_error
from ovfast.sampling import SamplingParams, TokenLogprob, sample, token_logprob


@dataclass(slots=True)
class SlotState:
    """What a runner needs to continue one prefilled request.

    Attributes:
        logits: (vocab_size,) float32 at the prompt's last position; None after the first token.
        params: how to sample.
        seed: key of the random numbers.
        stop_ids: ids that end the request.
        max_new_tokens: tokens to generate at most.
        seen: (vocab_size,) bool, ids the repetition penalty touches; None without a penalty.
        num_prompt: positions of the prompt; the runner sets it.
        last_token, num_tokens, is_over: the progress; the runner's.
    """

    logits: torch.Tensor | None
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_new_tokens: int
    seen: torch.Tensor | None = None
    num_prompt: int = 0
    last_token: int = -1
    num_tokens: int = 0
    is_over: bool = False


class StepResult(NamedTuple):
    """One token of one slot, or the error that ended it; `finished` is set on the last token."""

    slot: int
    token: int
    logprob: TokenLogprob | None
    finished: Literal["stop", "length"] | None
    error: Exception | None = None


class DecodeRunner(Protocol):
    """The interface between the scheduler and a way to decode."""

    def admit(self, slot: int, state: SlotState) -> None:
        """Starts decoding a slot whose prompt is in the cache."""

    def launch(self, n_steps: int) -> None:
        """Starts `n_steps` steps of all admitted slots; an interrupted launch can be repeated."""

    def poll(self) -> list[StepResult]:
        """Results since the last call, in order; errors of a slot among them, never raised."""

    def cancel(self, slot: int) -> None:
        """Forgets a slot; it yields nothing more. Unknown slots are fine."""

    def warmup(self) -> None:
        """Prepares what steps of other requests than the first ones would stop for."""


class EagerRunner:
    """Decodes slot by slot with the model's plain operations; results exist when `launch` returns.

    One slot at a time, because a library's matrix product picks its algorithm by the number of
    rows: so a request's bits never depend on its neighbours.

    Args:
        model: the model.
        cache: whose slots are decoded.
        forbidden: (vocab_size,) bool, ids never generated.
    """

    def __init__(self, model: LlavaOnevision, cache: KVCache, forbidden: torch.Tensor) -> None:
        self._model, self._cache, self._forbidden = model, cache, forbidden
        self._active: dict[int, SlotState] = {}
        self._results: list[StepResult] = []

    def admit(self, slot: int, state: SlotState) -> None:
        state.num_prompt = self._cache.lengths[slot]
        self._active[slot] = state

    def launch(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self._step_all()

    def poll(self) -> list[StepResult]:
        results, self._results = self._results, []
        return results

    def cancel(self, slot: int) -> None:
        self._active.pop(slot, None)
        self._results = [result for result in self._results if result.slot != slot]

    def warmup(self) -> None:
        """There is nothing to prepare."""

    def _step_all(self) -> None:
        for slot, state in list(self._active.items()):
            if not state.is_over:
                self._step(slot, state)

    def _step(self, slot: int, state: SlotState) -> None:
        try:
            result = self._next_token(slot, state)
        except Exception as error:  # noqa: BLE001 - a request's failure is not its neighbours'
            result = StepResult(slot, -1, None, None, capacity_error(error) or error)
        # Nothing so far keeps a repetition of the step from giving the same result, and from here
        # to the call of append CPython looks for no signal.
        state.is_over = result.finished is not None or result.error is not None
        state.logits, state.last_token, state.num_tokens = None, result.token, state.num_tokens + 1
        self._results.append(result)

    def _next_token(self, slot: int, state: SlotState) -> StepResult:
        params, logits = state.params, state.logits
        if logits is None:
            # An interrupted step may have come to the end of its decode.
            self._cache.truncate(slot, state.num_prompt + state.num_tokens - 1)
            logits = self._model.decode(state.last_token, self._cache, slot)
            if state.seen is not None:
                state.seen[state.last_token] = True
        token = self._sample(slot, state, logits)
        logprob = None if params.logprobs is None else token_logprob(logits, token, params.logprobs)
        if token in state.stop_ids:
            return StepResult(slot, token, logprob, "stop")
        is_last = state.num_tokens + 1 >= state.max_new_tokens
        return StepResult(slot, token, logprob, "length" if is_last else None)

    def _sample(self, slot: int, state: SlotState, logits: torch.Tensor) -> int:
        params = state.params
        suppressed = state.stop_ids if state.num_tokens < params.min_new_tokens else ()
        return sample(
            logits,
            params,
            forbidden=self._forbidden,
            seen=state.seen,
            seed=state.seed,
            index=state.num_tokens,
            suppress_stop=tuple(suppressed),
        )
