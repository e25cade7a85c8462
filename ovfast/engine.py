"""The engine: one loaded model and its public calls.

`Engine` checks and lays requests out, hands them to the scheduler and returns what comes back. How
steps of many threads share the model is `scheduler`; how a model gets into an engine is `loading`;
how likelihoods and logits of a prompt are computed is `scoring`.
"""

import secrets
import time
from collections.abc import Generator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from ovfast.anyres import VisualOptions
from ovfast.cuda_graphs import GraphCache
from ovfast.errors import CapacityError, OptionError, PromptError
from ovfast.media import MediaLimits
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.ops import Ops
from ovfast.options import (
    batch_items,
    check_inputs,
    continuation_texts,
    make_sampling,
    token_positions,
    visual_options,
)
from ovfast.outputs import ScoreOutput, StreamChunk
from ovfast.processor import ModelInputs, Processor
from ovfast.request import Request
from ovfast.roofline import Estimate, Machine, estimate_request
from ovfast.row_runner import make_runner
from ovfast.sampling import SamplingParams
from ovfast.scheduler import Loaded, Scheduler
from ovfast.scoring import (
    continuation_ids,
    empty_logits,
    fill_logits,
    score_continuations,
)
from ovfast.storage import bytes_per_param, dtype_name


class Engine:
    """A loaded model that answers requests; made by `ovfast.load`, closed by `close` or `with`.

    Any number of threads may call it.

    Attributes:
        config: of the checkpoint.
        ops: where each operation runs.
        device, dtype: of activations and cache.
        storage: of linear layers: "float32", "float16", "bfloat16", "int8" or "int4".
        max_seq_len: positions of a request, prompt and answer.
        max_batch_size: requests decoded at a time.
        visual: how pictures become tokens by default.
        media_limits: sizes that are refused before decoding.
    """

    def __init__(
        self,
        model: LlavaOnevision,
        processor: Processor,
        ops: Ops,
        *,
        max_seq_len: int,
        max_batch_size: int,
        visual: VisualOptions,
        media_limits: MediaLimits,
        graphs: GraphCache | None = None,
    ) -> None:
        self.config, self.ops = model.config, ops
        self.device, self.dtype = model.device, model.dtype
        self.storage = ops.storage or dtype_name(model.dtype)
        self.max_seq_len, self.max_batch_size = max_seq_len, max_batch_size
        self.visual, self.media_limits = visual, media_limits
        self._processor, self._vocab_size = processor, model.vocab_size
        self._forbidden = torch.zeros(model.vocab_size, dtype=torch.bool, device=model.device)
        self._forbidden[torch.from_numpy(processor.forbidden_ids).to(model.device)] = True
        cache = model.new_cache(num_slots=max_batch_size, max_positions=max_seq_len)
        runner = make_runner(model, cache, self._forbidden, ops, graphs)
        self._scheduler = Scheduler(Loaded(model, cache, runner))

    @property
    def closed(self) -> bool:
        return self._scheduler.closed

    @property
    def _model(self) -> LlavaOnevision:
        return self._scheduler.loaded().model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees weights and cache; open streams and later calls raise BackendError. Repeatable."""
        self._scheduler.close()

    def generate(
        self,
        prompt: Any,
        *,
        images: Any = None,
        videos: Any = None,
        sampling: SamplingParams | None = None,
        visual: VisualOptions | None = None,
        system: str | None = None,
        raw: bool = False,
        **sampling_kwargs: Any,
    ) -> Any:
        """Answers one prompt or a batch of prompts.

        Args:
            prompt: a question (`<image>` and `<video>` mark places), a chat (list of dicts),
                ModelInputs, or a list of questions, of chats or of ModelInputs, which is a batch.
            images: a picture or a list of them (path, bytes, data URI, PIL image, uint8 array or
                tensor (height, width, 3)); for a batch a list with one entry a prompt.
            videos: a video (path, bytes, (frames, height, width, 3) uint8 array, list of frames)
                or a list of them; for a batch a list with one entry a prompt.
            sampling: how to sample; `sampling_kwargs` override its fields.
            visual: how pictures become tokens; default the engine's.
            system: a system message.
            raw: the text is already a full prompt, special tokens in it are special.
            **sampling_kwargs: fields of SamplingParams.

        Returns:
            A GenerationOutput; a list of them, in order, for a batch.

        Raises:
            OVFastError: see `ovfast.errors`; the engine stays usable. What is wrong with a prompt
                is raised before anything has run.
        """
        started = time.perf_counter()
        params = make_sampling(sampling, sampling_kwargs)
        is_batch, items = batch_items(prompt, images, videos)
        laid_out = [self._inputs(item, visual, system, raw) for item in items]
        requests = [self._request(inputs, params, started) for inputs in laid_out]
        self._scheduler.run(requests)
        outputs = [request.output() for request in requests]
        return outputs if is_batch else outputs[0]

    def stream(
        self,
        prompt: Any,
        *,
        images: Any = None,
        videos: Any = None,
        sampling: SamplingParams | None = None,
        visual: VisualOptions | None = None,
        system: str | None = None,
        raw: bool = False,
        **sampling_kwargs: Any,
    ) -> Generator[StreamChunk, None, None]:
        """Answers one prompt token by token; arguments as `generate`, but no batch.

        Returns:
            An iterator with one StreamChunk a token; the last one carries `output`. Closing or
            dropping it frees its slot.

        Raises:
            OVFastError: at the call for what is wrong with the request, at the first `next` for
                what needs the model.
        """
        started = time.perf_counter()
        params = make_sampling(sampling, sampling_kwargs)
        inputs = self._one("stream", prompt, images, videos, visual, system, raw)
        return self._scheduler.stream(self._request(inputs, params, started))

    def score(
        self,
        prompt: Any,
        continuations: Iterable[str],
        *,
        images: Any = None,
        videos: Any = None,
        include_terminator: bool = False,
        visual: VisualOptions | None = None,
        system: str | None = None,
        raw: bool = False,
    ) -> list[ScoreOutput]:
        """Log-likelihoods of continuations of one prompt, over one shared prefill.

        Args:
            prompt: as in `generate`, not a batch.
            continuations: candidate answers; tokenised as they follow the prompt.
            images: as in `generate`.
            videos: as in `generate`.
            include_terminator: also score the end of the turn, `<|im_end|>` and a newline; the
                mean then is the negative of lmms-eval's loss.
            visual: as in `generate`.
            system: as in `generate`.
            raw: as in `generate`.

        Returns:
            One ScoreOutput a continuation.

        Raises:
            OVFastError: see `ovfast.errors`.
        """
        texts = continuation_texts(continuations)
        inputs = self._one("score", prompt, images, videos, visual, system, raw)
        self._check_capacity(inputs.num_tokens, 1)
        full = continuation_ids(
            self._processor,
            inputs,
            texts,
            include_terminator=include_terminator,
            max_seq_len=self.max_seq_len,
        )
        with self._scheduler.hold_slot() as slot:
            return score_continuations(self._scheduler, slot, inputs, full)

    def prepare(
        self,
        prompt: Any,
        *,
        images: Any = None,
        videos: Any = None,
        visual: VisualOptions | None = None,
        system: str | None = None,
        raw: bool = False,
    ) -> ModelInputs:
        """Lays one request out without running the model; arguments as `generate`.

        Returns:
            ModelInputs, which `generate`, `stream`, `score` and `forward` take in place of a
            prompt.
        """
        self._scheduler.loaded()
        return self._processor.prepare(
            prompt,
            images=images,
            videos=videos,
            visual=visual_options(visual, self.visual),
            limits=self.media_limits,
            system=system,
            raw=raw,
            pack=self.ops.pack_views,
            lazy_views=self.ops.reads_pictures,
        )

    def forward(
        self, inputs: ModelInputs, *, positions: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Logits of a laid-out request.

        Args:
            inputs: of `prepare`.
            positions: the positions wanted, from 0; None for all.

        Returns:
            float32 (num_tokens, vocab_size), or (len(positions), vocab_size) in the order given;
            nothing is masked.

        Raises:
            OptionError: a position out of range, or inputs of another type.
            CapacityError: the request is longer than `max_seq_len`, or the logits do not fit.
        """
        self._check_inputs(inputs)
        self._check_capacity(inputs.num_tokens, 0)
        wanted = token_positions(positions, inputs.num_tokens)
        logits = empty_logits(len(wanted), self._vocab_size, self.device)
        with self._scheduler.hold_slot() as slot:
            fill_logits(self._scheduler, slot, inputs, wanted, logits)
        return logits

    def estimate(
        self,
        prompt: Any,
        *,
        image_sizes_hw: Sequence[tuple[int, int]] = (),
        num_frames: Sequence[int] = (),
        max_new_tokens: int = 128,
        visual: VisualOptions | None = None,
        system: str | None = None,
        raw: bool = False,
        machine: Machine | None = None,
    ) -> Estimate:
        """The Estimate of a request, from sizes alone: token counts, bytes, work, times.

        Args:
            prompt: as in `generate`, not a batch; sources in a chat's parts are not read.
            image_sizes_hw: (height, width) of each picture.
            num_frames: frames of each video.
            max_new_tokens: tokens to be generated.
            visual: as in `generate`.
            system: as in `generate`.
            raw: as in `generate`.
            machine: of `ovfast.bench.calibration.measure_machine`; None gives no times.
        """
        self._scheduler.loaded()
        make_sampling(None, {"max_new_tokens": max_new_tokens})
        side = self.config.vision.image_size  # a video's tokens do not depend on its frames' size
        input_ids, _, plans = self._processor.layout(
            prompt,
            images=list(image_sizes_hw),
            videos=[(frames, (side, side)) for frames in num_frames],
            visual=visual_options(visual, self.visual),
            system=system,
            raw=raw,
        )
        text_tokens = len(input_ids) - sum(plan.num_tokens for plan in plans)
        sizes = bytes_per_param(self.storage), self.dtype.itemsize
        return estimate_request(self.config, plans, text_tokens, max_new_tokens, *sizes, machine)

    def warmup(self) -> None:
        """Runs one small request twice, so that the first real one pays for no set-up.

        The second time captures the graphs of its shape.
        """
        side = self.config.vision.image_size
        picture = np.zeros((side, side, 3), np.uint8)
        inputs = self.prepare("<image>Hello", images=picture, raw=True)
        if inputs.num_tokens + 2 > self.max_seq_len:
            inputs = self.prepare("Hello", raw=True)
        for _ in range(2):
            self.generate(inputs, max_new_tokens=1 + (inputs.num_tokens + 2 <= self.max_seq_len))

    def _one(
        self,
        name: str,
        prompt: Any,
        images: Any,
        videos: Any,
        visual: VisualOptions | None,
        system: str | None,
        raw: bool,
    ) -> ModelInputs:
        """The inputs of a call that takes no batch."""
        is_batch, items = batch_items(prompt, images, videos)
        if is_batch:
            raise PromptError(
                f"{name}() got a batch of prompts; it takes one prompt. Use generate(), or call"
                f" {name}() for each."
            )
        return self._inputs(items[0], visual, system, raw)

    def _inputs(
        self,
        item: tuple[Any, Any, Any],
        visual: VisualOptions | None,
        system: str | None,
        raw: bool,
    ) -> ModelInputs:
        prompt, images, videos = item
        if not isinstance(prompt, ModelInputs):
            return self.prepare(
                prompt, images=images, videos=videos, visual=visual, system=system, raw=raw
            )
        if any(given is not None for given in (images, videos, visual, system)) or raw:
            raise OptionError(
                "ModelInputs with images, videos, visual, system or raw; they are already part of"
                " the inputs. Pass them to prepare() instead."
            )
        self._check_inputs(prompt)
        return prompt

    def _request(self, inputs: ModelInputs, params: SamplingParams, started: float) -> Request:
        self._check_capacity(inputs.num_tokens, params.max_new_tokens or 1)
        stop_ids = set(params.stop_token_ids)
        if any(token_id >= self._vocab_size for token_id in stop_ids):
            raise OptionError(
                f"stop_token_ids={params.stop_token_ids}; expected ids below the vocabulary's"
                f" {self._vocab_size}. Use ids of this checkpoint's tokenizer."
            )
        if not params.ignore_eos:
            stop_ids |= set(self.config.stop_token_ids)
        return Request(
            inputs,
            params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            stop_ids=stop_ids,
            max_new_tokens=params.max_new_tokens or self.max_seq_len - inputs.num_tokens,
            decoder=self._processor.new_decoder(),
            started=started,
        )

    def _check_inputs(self, inputs: ModelInputs) -> None:
        self._scheduler.loaded()
        check_inputs(inputs, self._vocab_size, self.config.vision.image_size)

    def _check_capacity(self, num_tokens: int, max_new_tokens: int) -> None:
        if num_tokens + max_new_tokens > self.max_seq_len:
            raise CapacityError(
                f"the prompt has {num_tokens} tokens and needs room for {max_new_tokens} more; the"
                f" engine holds {self.max_seq_len} a request. Shorten the prompt, lower"
                " max_new_tokens, max_views or num_frames, or load with a larger max_seq_len."
            )
