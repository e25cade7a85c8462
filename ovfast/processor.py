"""From a prompt and its media to ModelInputs: ids with explicit visual spans, plans, views.

Token counts come from plans, never from pixels: `layout` needs sizes only, and `build` lays out the
same way before it builds views. Between `read` and `build` the caller has the pictures decoded, of
one prompt or of several. Prompts and templates: chat.py. Text: text_tokenizer.py.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ovfast.anyres import VisualOptions, VisualPlan, plan_image, plan_video
from ovfast.chat import (
    MARKERS,
    Message,
    Part,
    Segment,
    mark_places,
    parse_chat,
    parse_question,
)
from ovfast.chat_template import load_template
from ovfast.config import ModelConfig
from ovfast.errors import CheckpointError, PromptError
from ovfast.image import Pack, build_media_views
from ovfast.media import MediaLimits
from ovfast.media_sources import image_list, load_clips, take_sources, video_list
from ovfast.model_inputs import ModelInputs, VisualSpan
from ovfast.text_tokenizer import IncrementalDecoder, TextTokenizer

__all__ = ["Draft", "IncrementalDecoder", "ModelInputs", "Processor", "VisualSpan"]

SizeHW = tuple[int, int]


class Draft(NamedTuple):
    """A prompt in segments, and the sources or sizes of its media in the order of the segments."""

    segments: list[Segment]
    images: list[Any]
    videos: list[Any]


class Processor:
    """Tokenizer, chat template and picture geometry of a checkpoint; safe to share by threads.

    Args:
        path: the checkpoint's directory.
        config: its configuration, with the real vocab_size.

    Raises:
        CheckpointError: tokenizer or template files are missing or unusable.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        path = Path(path)
        self.config = config
        self.geometry = config.geometry
        self._text = TextTokenizer(path, tuple(MARKERS.values()))
        video_id = config.image_token_id if config.video_token_id is None else config.video_token_id
        self._placeholder_ids = {"image": config.image_token_id, "video": video_id}
        for kind, marker in MARKERS.items():
            known = self._text.special_ids.get(marker, self._placeholder_ids[kind])
            if known != self._placeholder_ids[kind]:
                raise CheckpointError(
                    f"{path}: the tokenizer has {marker} as id {known}, config.json as id "
                    f"{self._placeholder_ids[kind]}; expected the same. Download both again."
                )
        self._template = load_template(path, config)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself; it takes special tokens in text for plain text."""
        return self._text.tokenizer

    @property
    def num_known_ids(self) -> int:
        """Ids with a tokenizer entry."""
        return len(self._text.known_ids)

    @property
    def forbidden_ids(self) -> NDArray[np.int64]:
        """Sorted ids below vocab_size that are never generated: placeholders, no entry."""
        allowed = self._text.known_ids - set(self._placeholder_ids.values())
        ids = np.arange(self.config.text.vocab_size)
        return ids[~np.isin(ids, np.fromiter(allowed, np.int64))]

    @property
    def terminator_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: "<|im_end|>" and a newline."""
        return tuple(self._encode([Segment("template", "<|im_end|>\n")]))

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; nothing in it is special."""
        return self._text.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens; what is no UTF-8 becomes U+FFFD."""
        return self._text.decode(ids)

    def new_decoder(self) -> IncrementalDecoder:
        """A decoder for the ids of one answer."""
        return IncrementalDecoder(self._text)

    def continue_ids(self, prompt_ids: Sequence[int], text: str) -> list[int]:
        """Ids of a prompt followed by text; the prompt's last plain ids may merge with it.

        Args:
            prompt_ids: a laid-out prompt.
            text: plain text; nothing in it is special.

        Returns:
            All ids.
        """
        placeholders = self._placeholder_ids.values()
        start = len(prompt_ids)
        while start and not (
            self._text.is_special(prompt_ids[start - 1]) or prompt_ids[start - 1] in placeholders
        ):
            start -= 1
        head, tail = list(prompt_ids[:start]), list(prompt_ids[start:])
        before = self._text.decode(tail)
        if self._text.encode(before) != tail:  # ids that no text has
            return head + tail + self._text.encode(text)
        return head + self._text.encode(before + text)

    def layout(
        self,
        prompt: str | Sequence[object],
        *,
        images: Sequence[SizeHW] = (),
        videos: Sequence[tuple[int, SizeHW]] = (),
        visual: VisualOptions,
        system: str | None = None,
        raw: bool = False,
        bare: bool = False,
    ) -> tuple[NDArray[np.int64], tuple[VisualSpan, ...], tuple[VisualPlan, ...]]:
        """Lay a prompt out from sizes alone; the same ids and plans as `build`.

        Args:
            prompt: as for `read`; sources inside a chat's media parts are not read.
            images: (height, width) of each picture, in the prompt's order.
            videos: (frames, (height, width)) of each video, in the prompt's order.
            visual: how pictures become views and tokens.
            system: text of a system turn.
            raw: the prompt is complete and its special tokens are special.
            bare: refuse sources inside a chat's media parts.

        Returns:
            input_ids (num_tokens,) int64, spans, plans.

        Raises:
            PromptError: the prompt cannot be laid out.
            MediaError: a size that no picture has.
        """
        sizes = list(images), list(videos)
        parsed = self._read(prompt, *sizes, system, raw, from_sizes=not bare)
        if (len(parsed.images), len(parsed.videos)) != (len(sizes[0]), len(sizes[1])):
            raise PromptError(
                "media= a handle, with a chat whose parts bring pictures or videos of their own;"
                " expected parts with a type alone. Write {'type': 'image'} or {'type': 'video'}."
            )
        return self._lay_out(parsed, visual)

    def read(
        self,
        prompt: str | Sequence[object],
        *,
        images: Any = None,
        videos: Any = None,
        system: str | None = None,
        raw: bool = False,
    ) -> Draft:
        """Check a prompt and bring its media into order; none is loaded.

        Args:
            prompt: a question, in which <image> and <video> mark places, or a chat.
            images: one picture or a list of them, each as `load_image` takes it.
            videos: one video or a list of them, each as `load_video` takes it.
            system: text of a system turn.
            raw: the prompt is complete and its special tokens are special.

        Returns:
            What `build` takes.

        Raises:
            PromptError: the prompt is not as it should be.
        """
        return self._read(prompt, image_list(images), video_list(videos), system, raw)

    def build(
        self,
        draft: Draft,
        images: Iterator[NDArray[np.uint8]],
        *,
        visual: VisualOptions,
        limits: MediaLimits,
        pack: Pack | None = None,
        lazy_views: bool = False,
    ) -> ModelInputs:
        """Lay a prompt out with its media, and build their views.

        Args:
            draft: of `read`.
            images: gives its pictures, and perhaps those of others behind them, as `decoding` does.
            visual: how pictures become views and tokens.
            limits: of videos, which are loaded here.
            pack: `pack_views` of an Ops; None takes the reference.
            lazy_views: leave the views to whoever asks for them.

        Returns:
            The laid-out request.

        Raises:
            PromptError: the prompt cannot be laid out.
            MediaError: a medium cannot be read or breaks a limit.
        """
        started = time.perf_counter()
        pictures = list(islice(images, len(draft.images)))
        clips = load_clips(draft.videos, limits=limits, visual=visual)
        loaded = time.perf_counter()
        sizes = Draft(
            draft.segments,
            [picture.shape[:2] for picture in pictures],
            [(len(clip), clip.shape[1:3]) for clip in clips],
        )
        input_ids, spans, plans = self._lay_out(sizes, visual)
        media = {"image": iter(pictures), "video": iter(clips)}
        ordered = [next(media[span.kind]) for span in spans]
        if lazy_views:  # a caller may go on to write into its own arrays
            ordered = [pixels.copy() for pixels in ordered]
        views = [] if lazy_views and plans else [self._build_views(ordered, plans, pack)]
        done = time.perf_counter()
        return ModelInputs(
            input_ids,
            spans,
            plans,
            tuple(ordered),
            visual,
            media_ms=1e3 * (loaded - started),
            preprocess_ms=1e3 * (done - loaded),
            _views=views,
        )

    def _build_views(
        self,
        media: list[NDArray[np.uint8]],
        plans: tuple[VisualPlan, ...],
        pack: Pack | None,
    ) -> NDArray[np.uint8]:
        if not plans:
            side = self.geometry.image_size
            return np.empty((0, side, side, 3), np.uint8)
        return build_media_views(media, plans, pack=pack)

    def _read(
        self,
        prompt: object,
        images: list[Any],
        videos: list[Any],
        system: object,
        raw: object,
        *,
        from_sizes: bool = False,
    ) -> Draft:
        """Check a prompt, render it, and bring its media into order."""
        if not isinstance(raw, bool):
            raise PromptError(f"raw={raw!r}; expected True or False.")
        if system is not None and not isinstance(system, str):
            raise PromptError(f"system={system!r:.100}; expected a str or None.")
        if raw:
            return self._read_raw(prompt, images, videos, system)
        if isinstance(prompt, str):
            messages = [parse_question(prompt, len(images), len(videos))]
        elif isinstance(prompt, list | tuple) and prompt:
            messages = parse_chat(prompt)
        else:
            raise PromptError(
                f"the prompt is {prompt!r:.100}; expected a str, or a list of messages such as "
                "{'role': 'user', 'content': 'What is this?'}."
            )
        if system is not None:
            if messages[0].role == "system":
                raise PromptError("system= with a chat that has a system turn; expected one.")
            turn = Message("system", (Part("text", (Segment("text", system),)),))
            messages = [turn, *messages]
        images = take_sources(messages, "image", images, from_sizes=from_sizes)
        videos = take_sources(messages, "video", videos, from_sizes=from_sizes)
        if self._template is None:
            raise PromptError(
                "the checkpoint has no chat template (chat_template.jinja, chat_template.json or "
                "tokenizer_config.json); expected one. Write the full prompt with raw=True."
            )
        return Draft(self._template.render(messages), images, videos)

    def _read_raw(
        self, prompt: object, images: list[Any], videos: list[Any], system: str | None
    ) -> Draft:
        if not isinstance(prompt, str) or system is not None:
            raise PromptError(
                f"raw=True with {type(prompt).__name__} prompt and system={system!r:.100}; "
                "expected the complete prompt as one str, the system turn included."
            )
        segments = list(mark_places(prompt, "template"))
        for kind, media in (("image", images), ("video", videos)):
            marked = sum(segment.kind == kind for segment in segments)
            if marked != len(media):
                raise PromptError(
                    f"the raw prompt has {marked} <{kind}> markers for {len(media)} {kind}s; "
                    "expected as many. Place each marker where its medium belongs."
                )
        return Draft(segments, images, videos)

    def _lay_out(
        self, layout: Draft, visual: VisualOptions
    ) -> tuple[NDArray[np.int64], tuple[VisualSpan, ...], tuple[VisualPlan, ...]]:
        num_images = len(layout.images)
        plan_of = {
            "image": iter(
                [
                    plan_image(size, self.geometry, visual, num_images=num_images)
                    for size in layout.images
                ]
            ),
            "video": iter(
                [plan_video(n, size, self.geometry, visual) for n, size in layout.videos]
            ),
        }
        ids: list[NDArray[np.int64]] = []
        spans: list[VisualSpan] = []
        plans: list[VisualPlan] = []
        position = 0
        text: list[Segment] = []
        for segment in (*layout.segments, None):
            if segment is not None and segment.kind not in plan_of:
                text.append(segment)
                continue
            ids.append(np.array(self._encode(text), np.int64))
            position += len(ids[-1])
            text = []
            if segment is not None and (segment.kind == "image" or segment.kind == "video"):
                plan = next(plan_of[segment.kind])
                end = position + plan.num_tokens
                spans.append(VisualSpan(position, end, len(plans), segment.kind))
                plans.append(plan)
                placeholder = self._placeholder_ids[segment.kind]
                ids.append(np.full(plan.num_tokens, placeholder, np.int64))
                position = end
        return np.concatenate(ids), tuple(spans), tuple(plans)

    def _encode(self, segments: Sequence[Segment]) -> list[int]:
        """Ids of text segments. Special tokens split the text; what lies between them is one
        string for the tokenizer, so that ids are those of the whole prompt.
        """
        ids: list[int] = []
        plain: list[str] = []
        for segment in segments:
            trusted = segment.kind == "template"
            pieces = self._text.split_special(segment.text) if trusted else [(segment.text, False)]
            for piece, special in pieces:
                if not special:
                    plain.append(piece)
                    continue
                ids += self._text.encode("".join(plain))
                ids.append(self._text.special_ids[piece])
                plain = []
        return ids + self._text.encode("".join(plain))
