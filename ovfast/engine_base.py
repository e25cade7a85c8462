"""What every call of an engine stands on: opening and closing it, and laying requests out.

`EngineBase` turns the arguments of a call into `ModelInputs` and a `Request`; the calls themselves
are `engine`.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from ovfast.anyres import VisualOptions
from ovfast.cuda_graphs import GraphCache
from ovfast.encoded_media import DEFAULT_ENCODED_BYTES, EncodedMedia, EncodedStore
from ovfast.errors import CapacityError, OptionError, OVFastError, PromptError
from ovfast.media import MediaLimits
from ovfast.media_sources import decoding
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.ops import Ops
from ovfast.options import Item, batch_items, check_inputs, visual_options
from ovfast.outputs import GenerationOutput
from ovfast.processor import ModelInputs, Processor
from ovfast.reference_pixels import UInt8Array
from ovfast.request import Request
from ovfast.row_runner import make_runner
from ovfast.sampling import SamplingParams
from ovfast.scheduler import Loaded, Scheduler
from ovfast.storage import dtype_name


class _Begun(NamedTuple):
    """A request whose prompt has been read.

    Attributes:
        images: sources of its pictures.
        finish: lays it out; takes as many decoded ones.
    """

    images: Sequence[Any]
    finish: Callable[[Iterator[UInt8Array]], ModelInputs]


class EngineBase:
    """A loaded model, its requests' way in, and its end; `Engine` says what it offers."""

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
        encoded_memory_bytes: int = DEFAULT_ENCODED_BYTES,
        graphs: GraphCache | None = None,
    ) -> None:
        self.config, self.ops = model.config, ops
        self.device, self.dtype = model.device, model.dtype
        self.storage = ops.storage or ops.quantization or dtype_name(model.dtype)
        self.max_seq_len, self.max_batch_size = max_seq_len, max_batch_size
        self.visual, self.media_limits = visual, media_limits
        self._processor, self._vocab_size = processor, model.vocab_size
        self._forbidden = torch.zeros(model.vocab_size, dtype=torch.bool, device=model.device)
        self._forbidden[torch.from_numpy(processor.forbidden_ids).to(model.device)] = True
        cache = model.new_cache(num_slots=max_batch_size, max_positions=max_seq_len)
        runner = make_runner(model, cache, self._forbidden, ops, graphs)
        self._scheduler = Scheduler(Loaded(model, cache, runner))
        self._encoded = EncodedStore(encoded_memory_bytes)

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
        """Frees weights, cache and what handles hold; open streams and later calls raise
        BackendError. Repeatable.
        """
        self._scheduler.close()
        self._encoded.clear()  # no step runs any more that could add one

    def prepare(
        self,
        prompt: Any,
        *,
        images: Any = None,
        videos: Any = None,
        media: EncodedMedia | None = None,
        visual: VisualOptions | None = None,
        system: str | None = None,
        raw: bool = False,
    ) -> ModelInputs:
        """Lays one request out without running the model; arguments as `generate`.

        Returns:
            ModelInputs, which `generate`, `stream`, `score`, `choose`, `encode` and `forward` take
            in place of a prompt.
        """
        begun = self._begin(Item(prompt, images, videos, media), visual, system, raw)
        return self._finish([begun], visual)[0]

    def _begin(
        self, item: Item, visual: VisualOptions | None, system: str | None, raw: bool
    ) -> _Begun:
        """Reads the prompt of one request."""
        self._scheduler.loaded()
        prompt, images, videos, media = item
        if media is not None:
            if any(given is not None for given in (images, videos, visual)):
                raise OptionError(
                    "media= a handle with images, videos or visual; it stands for all of them. Pass"
                    " one or the other."
                )
            inputs = self._over_handle(prompt, media, system, raw)
            return _Begun([], lambda pictures: inputs)
        build = partial(
            self._processor.build,
            visual=visual_options(visual, self.visual),
            limits=self.media_limits,
            pack=self.ops.pack_views,
            lazy_views=self.ops.reads_pictures,
        )
        draft = self._processor.read(prompt, images=images, videos=videos, system=system, raw=raw)
        return _Begun(draft.images, partial(build, draft))

    def _finish(self, begun: Sequence[_Begun], visual: VisualOptions | None) -> list[ModelInputs]:
        """Lays requests out in order; their encoded pictures are decoded side by side meanwhile."""
        sources = [source for each in begun for source in each.images]
        # Of another type it was refused before: then there are no sources.
        exif = (visual if isinstance(visual, VisualOptions) else self.visual).exif
        with decoding(sources, limits=self.media_limits, exif=exif) as pictures:
            return [each.finish(pictures) for each in begun]

    def _over_handle(
        self, prompt: Any, media: EncodedMedia, system: str | None, raw: bool
    ) -> ModelInputs:
        started = time.perf_counter()
        self._check_handle(media)
        input_ids, spans, plans = self._processor.layout(
            prompt,
            images=media.image_sizes_hw,
            videos=media.video_sizes,
            visual=media.visual,
            system=system,
            raw=raw,
            bare=True,
        )
        side = self.config.vision.image_size
        return ModelInputs(
            input_ids,
            spans,
            plans,
            (),
            media.visual,
            preprocess_ms=1e3 * (time.perf_counter() - started),
            encoded=media,
            _views=[np.empty((0, side, side, 3), np.uint8)],
        )

    def _one(
        self,
        name: str,
        prompt: Any,
        images: Any,
        videos: Any,
        media: Any,
        visual: VisualOptions | None,
        system: str | None,
        raw: bool,
    ) -> ModelInputs:
        """The inputs of a call that takes no batch."""
        is_batch, items = batch_items(prompt, images, videos, media)
        if is_batch:
            raise PromptError(
                f"{name}() got a batch of prompts; it takes one prompt. Use generate(), or call"
                f" {name}() for each."
            )
        return self._inputs(items, visual, system, raw)[0]

    def _inputs(
        self, items: Sequence[Item], visual: VisualOptions | None, system: str | None, raw: bool
    ) -> list[ModelInputs]:
        """The inputs of some requests; the first that is not as it should be says so."""
        begun: list[_Begun] = []
        try:
            for item in items:
                begun.append(self._begin_or_take(item, visual, system, raw))  # noqa: PERF401 - kept
        except OVFastError:
            self._finish(begun, visual)  # media of a request before it may be wrong
            raise
        return self._finish(begun, visual)

    def _begin_or_take(
        self, item: Item, visual: VisualOptions | None, system: str | None, raw: bool
    ) -> _Begun:
        """As `_begin`, of ModelInputs too."""
        prompt, images, videos, media = item
        if not isinstance(prompt, ModelInputs):
            return self._begin(item, visual, system, raw)
        if any(given is not None for given in (images, videos, media, visual, system)) or raw:
            raise OptionError(
                "ModelInputs with images, videos, media, visual, system or raw; they are already"
                " part of the inputs. Pass them to prepare() instead."
            )
        self._check_inputs(prompt)
        return _Begun([], lambda pictures: prompt)

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

    def _answer(
        self, inputs: Sequence[ModelInputs], params: Sequence[SamplingParams], started: float
    ) -> list[GenerationOutput]:
        """Answers laid-out requests side by side, each by sampling parameters of its own."""
        requests = [
            self._request(each, own, started) for each, own in zip(inputs, params, strict=True)
        ]
        self._scheduler.run(requests)
        return [request.output() for request in requests]

    def _check_handle(self, media: Any) -> None:
        if not isinstance(media, EncodedMedia):
            raise OptionError(
                f"media={media!r:.100}; expected a handle that encode() returned. Pass pictures as"
                " images= and videos as videos=."
            )
        media.held()
        if media not in self._encoded:
            raise OptionError(
                "media= a handle of another engine; expected one of this engine. Call encode() of"
                " the engine that is asked."
            )

    def _check_inputs(self, inputs: ModelInputs) -> None:
        self._scheduler.loaded()
        check_inputs(inputs, self._vocab_size, self.config.vision.image_size)
        if inputs.encoded is not None:
            self._check_handle(inputs.encoded)

    def _check_capacity(self, num_tokens: int, max_new_tokens: int) -> None:
        if num_tokens + max_new_tokens > self.max_seq_len:
            raise CapacityError(
                f"the prompt has {num_tokens} tokens and needs room for {max_new_tokens} more; the"
                f" engine holds {self.max_seq_len} a request. Shorten the prompt, lower"
                " max_new_tokens, max_views or num_frames, or load with a larger max_seq_len."
            )
