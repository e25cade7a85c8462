"""The engine: one loaded model and its public calls.

`Engine` lays requests out, hands them to the scheduler and returns what comes back. How arguments
become requests is `engine_base`; how steps of many threads share the model is `scheduler`; how a
model gets into an engine is `loading`; how likelihoods and logits of a prompt are computed is
`scoring` and `choices`.
"""

import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ovfast.anyres import VisualOptions
from ovfast.choices import check_options, choose_best, score_options
from ovfast.encoded_media import EncodedMedia
from ovfast.encoding import encode_media
from ovfast.engine_base import EngineBase
from ovfast.media_sources import media_turn
from ovfast.options import (
    batch_items,
    check_estimate,
    choice_texts,
    continuation_texts,
    encode_options,
    make_sampling,
    token_positions,
    visual_options,
)
from ovfast.outputs import ChoiceOutput, ScoreOutput, StreamChunk
from ovfast.processor import ModelInputs
from ovfast.roofline import Estimate, Machine, estimate_request
from ovfast.sampling import SamplingParams
from ovfast.scoring import continuation_ids, empty_logits, fill_logits, score_continuations
from ovfast.storage import bytes_per_param


class Engine(EngineBase):
    """A loaded model that answers requests; made by `ovfast.load`, closed by `close` or `with`.

    Any number of threads may call it. On CUDA it works on the stream that was current when it was
    loaded; callers on other streams are kept in order with it.

    Attributes:
        config: of the checkpoint.
        ops: where each operation runs.
        device, dtype: of activations and cache.
        storage: of linear layers: "float32", "float16", "bfloat16", "bfloat16-matmul" (bfloat16
            and products of bfloat16), "int8", "int4" or "fp8".
        max_seq_len: positions of a request, prompt and answer.
        max_batch_size: requests decoded at a time.
        visual: how pictures become tokens by default.
        media_limits: sizes that are refused before decoding.
    """

    def generate(
        self,
        prompt: Any,
        *,
        images: Any = None,
        videos: Any = None,
        media: Any = None,
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
            media: a handle of `encode` in place of images and videos; for a batch one for all, or a
                list with one entry a prompt.
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
        is_batch, items = batch_items(prompt, images, videos, media)
        laid_out = self._inputs(items, visual, system, raw)
        outputs = self._answer(laid_out, [params] * len(laid_out), started)
        return outputs if is_batch else outputs[0]

    def stream(
        self,
        prompt: Any,
        *,
        images: Any = None,
        videos: Any = None,
        media: Any = None,
        sampling: SamplingParams | None = None,
        visual: VisualOptions | None = None,
        system: str | None = None,
        raw: bool = False,
        **sampling_kwargs: Any,
    ) -> Generator[StreamChunk, None, None]:
        """Answers one prompt token by token; arguments as `generate`, but no batch.

        Returns:
            An iterator with one StreamChunk a token; the last one carries `output`. Closing or
            dropping it frees its slot. It belongs to one thread at a time: to end it early, break
            out of the loop that reads it, or close it in that thread; while one thread reads it,
            `close` in another raises Python's ValueError.

        Raises:
            OVFastError: at the call for what is wrong with the request, at the first `next` for
                what needs the model.
        """
        started = time.perf_counter()
        params = make_sampling(sampling, sampling_kwargs)
        inputs = self._one("stream", prompt, images, videos, media, visual, system, raw)
        return self._scheduler.stream(self._request(inputs, params, started))

    def score(
        self,
        prompt: Any,
        continuations: Iterable[str],
        *,
        images: Any = None,
        videos: Any = None,
        media: Any = None,
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
            media: as in `generate`.
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
        inputs = self._one("score", prompt, images, videos, media, visual, system, raw)
        self._check_capacity(inputs.num_tokens, 1)
        full = continuation_ids(
            self._processor,
            inputs,
            texts,
            include_terminator=include_terminator,
            max_seq_len=self.max_seq_len,
        )
        with self._scheduler.hold_slot(inputs) as slot:
            return score_continuations(self._scheduler, slot, inputs, full)

    def choose(
        self,
        prompt: Any,
        options: Iterable[str],
        *,
        images: Any = None,
        videos: Any = None,
        media: Any = None,
        normalize: str = "sum",
        include_terminator: bool = False,
        visual: VisualOptions | None = None,
        system: str | None = None,
        raw: bool = False,
    ) -> ChoiceOutput:
        """The likeliest of several answers to one prompt, at little more than its first token.

        Args:
            prompt: as in `generate`, not a batch.
            options: the answers, at least two; tokenised as they follow the prompt.
            images: as in `generate`.
            videos: as in `generate`.
            media: as in `generate`.
            normalize: "sum" compares the probabilities of whole options; "mean" the mean
                log-probabilities of their tokens, which does not favour short options.
            include_terminator: an option is the whole answer, the end of the turn scored with it;
                otherwise the answer begins with it.
            visual: as in `generate`.
            system: as in `generate`.
            raw: as in `generate`.

        Returns:
            A ChoiceOutput.

        Raises:
            OVFastError: see `ovfast.errors`.
        """
        texts = choice_texts(options, normalize)
        inputs = self._one("choose", prompt, images, videos, media, visual, system, raw)
        self._check_capacity(inputs.num_tokens, 1)
        full = continuation_ids(
            self._processor,
            inputs,
            texts,
            include_terminator=include_terminator,
            max_seq_len=self.max_seq_len,
        )
        check_options(inputs.num_tokens, full, texts)
        with self._scheduler.hold_slot(inputs) as slot:
            scores = score_options(self._scheduler, slot, inputs, full)
        return choose_best(texts, scores, normalize)

    def encode(
        self,
        prompt: Any = None,
        *,
        images: Any = None,
        videos: Any = None,
        keep: str = "features",
        visual: VisualOptions | None = None,
        system: str | None = None,
        raw: bool = False,
    ) -> EncodedMedia:
        """Encodes pictures and videos once, for many questions.

        A question over the handle equals one over the media. With keep="prefix" it also skips the
        positions that it shares with the kept prompt, which `usage.cached_tokens` tells.

        Args:
            prompt: how questions will begin, as in `generate`: kept up to its last picture or
                video. None is the media before any text, as a plain question has them.
            images: as in `generate`.
            videos: as in `generate`.
            keep: "features", the visual rows; "prefix", also the keys and values of the prompt.
            visual: as in `generate`.
            system: as in `generate`; of a prefix only.
            raw: as in `generate`.

        Returns:
            An EncodedMedia, which `generate`, `stream`, `score`, `choose` and `prepare` take as
            `media`. Release it, or use it in a `with`.

        Raises:
            CapacityError: handles would hold more than the engine's `encoded_memory_bytes`.
            OVFastError: see `ovfast.errors`.
        """
        encode_options(keep, prompt, system, raw, images, videos)
        if prompt is None:
            prompt = media_turn(images, videos)
        inputs = self._one("encode", prompt, images, videos, None, visual, system, raw)
        self._check_capacity(inputs.num_tokens, 1)
        return encode_media(self._scheduler, self._encoded, inputs, keep)

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
        with self._scheduler.hold_slot(inputs) as slot:
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

        Raises:
            OVFastError: see `ovfast.errors`.
        """
        self._scheduler.loaded()
        make_sampling(None, {"max_new_tokens": max_new_tokens})
        check_estimate(image_sizes_hw, num_frames, machine)
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
        return estimate_request(
            self.config,
            plans,
            text_tokens,
            max_new_tokens,
            bytes_per_param(self.storage),
            self.dtype.itemsize,
            machine,
            other_bytes_per_param=self.dtype.itemsize if self.ops.quantization else None,
        )

    def warmup(self) -> None:
        """Runs one small request twice, so that the first real one pays for no set-up.

        The second time captures the graphs of its shape. Then greedy steps are captured for any
        length up to `max_seq_len` and any number of requests side by side, at most 16 of them, as
        far as `graph_memory_bytes` reaches.
        """
        side = self.config.vision.image_size
        picture = np.zeros((side, side, 3), np.uint8)
        inputs = self.prepare("<image>Hello", images=picture, raw=True)
        if inputs.num_tokens + 2 > self.max_seq_len:
            inputs = self.prepare("Hello", raw=True)
        for _ in range(2):
            self.generate(inputs, max_new_tokens=1 + (inputs.num_tokens + 2 <= self.max_seq_len))
        self._scheduler.step(lambda loaded: loaded.runner.warmup())
