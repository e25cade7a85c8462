"""The shape of transformers' LlavaOnevisionProcessor, which itself cannot do without torchvision.

Texts go through transformers' tokenizer, pictures become views as everywhere in ovfast: the tensors
are those of the official processor on Pillow, to the bit. Frames of videos are resized by Pillow
too, as the original code does; transformers' video processor differs by a level here and there.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ovfast.anyres import plan_video
from ovfast.chat_template import template_source
from ovfast.checkpoint import resolve_checkpoint
from ovfast.config import ModelConfig
from ovfast.errors import OptionError, PromptError
from ovfast.image import build_video_views, build_views
from ovfast.integrations.arguments import refuse_unknown
from ovfast.integrations.chats import is_chat
from ovfast.integrations.hf_loading import import_transformers
from ovfast.integrations.hf_tensors import ANYRES, image_plans, normalise
from ovfast.media import MediaLimits, load_image, load_video
from ovfast.reference_pixels import UInt8Array

__all__ = ["OVFastProcessor"]

MARKER = re.compile("(<image>|<video>)")
# Arguments of from_pretrained that are accepted without effect: there is one way to do it here.
NO_EFFECT = ("trust_remote_code", "use_fast", "backend")
SOURCE_KEYS = ("image", "video", "url", "path", "base64")


class OVFastProcessor:
    """Texts, pictures and videos to the tensors that `generate` takes.

    Attributes:
        tokenizer: transformers' own; its padding_side counts.
        chat_template: Jinja source; None where the checkpoint has none.
        media_limits: sizes that are refused before decoding.
    """

    image_token, video_token = "<image>", "<video>"

    def __init__(self, path: Path) -> None:
        self._transformers = import_transformers()
        self._config = ModelConfig.from_checkpoint(path)
        self.tokenizer = self._transformers.AutoTokenizer.from_pretrained(path)
        self.chat_template = template_source(path)
        self.media_limits = MediaLimits()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: Any = None,
        **kwargs: Any,
    ) -> Self:
        """The processor of a checkpoint.

        Args:
            pretrained_model_name_or_path: a directory, a Hub id or "demo".
            revision: of a Hub id.
            token: for a gated Hub id.
            cache_dir: of the Hub's files.
            **kwargs: of NO_EFFECT.

        Raises:
            OVFastError: the checkpoint cannot be used; OptionError for another argument.
        """
        refuse_unknown(kwargs, NO_EFFECT, "from_pretrained")
        path = resolve_checkpoint(
            pretrained_model_name_or_path, revision=revision, token=token, cache_dir=cache_dir
        )
        return cls(path)

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        *,
        padding: bool | str = False,
        return_tensors: str | None = "pt",
        num_frames: int = 32,
        fps: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Tensors of a batch.

        Args:
            images: a picture, a flat list, which costs AnyRes for each, or a list for each text,
                which makes squares of several; as `engine.generate` takes pictures.
            text: a full prompt with an <image> and a <video> for each medium, or a list of them.
            videos: a list of videos of equally many frames, as `engine.generate` takes them.
            padding: fill up texts of a batch, on the tokenizer's side.
            return_tensors: "pt".
            num_frames: at most so many frames of a video file.
            fps: frames per second to take instead.
            **kwargs: nothing else.

        Returns:
            transformers' BatchFeature.

        Raises:
            OVFastError: see `ovfast.errors`.
        """
        refuse_unknown(kwargs, (), "the processor")
        texts = [text] if isinstance(text, str) else text
        known = isinstance(texts, list | tuple) and all(isinstance(each, str) for each in texts)
        if return_tensors != "pt" or not known or not texts:
            raise OptionError(
                f"return_tensors={return_tensors!r} and text={text!r:.100}; expected 'pt', and a"
                " text or a list of texts."
            )
        data, image_tokens = self._pictures(images)
        clips, video_tokens = self._clips(videos, num_frames, fps)
        texts = _expanded(texts, {"<image>": image_tokens, "<video>": video_tokens})
        encoded = self.tokenizer(texts, padding=padding, return_tensors="pt")
        names = ("input_ids", "attention_mask")
        return self._transformers.BatchFeature({n: encoded[n] for n in names} | data | clips)

    def apply_chat_template(
        self,
        conversation: Any,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A chat, or a list of chats, as the checkpoint's template writes it.

        Args:
            conversation: messages of {"role", "content"}; pictures and videos of parts are read
                where the text is tokenised.
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: leave the last message open.
            tokenize: tensors instead of text.
            return_dict: all tensors; otherwise input_ids alone.
            return_tensors: "pt".
            processor_kwargs: padding, num_frames, fps of a call.
            **kwargs: these too.

        Returns:
            A str, or a list of them for a list of chats; or tensors.

        Raises:
            OVFastError: see `ovfast.errors`.
        """
        kwargs |= processor_kwargs or {}
        if self.chat_template is None:
            raise PromptError("the checkpoint has no chat template; write the prompt yourself.")
        several = isinstance(conversation, list | tuple) and not is_chat(conversation)
        chats = list(conversation) if several else [conversation]
        if not chats or not all(map(is_chat, chats)):
            raise PromptError(
                f"conversation={conversation!r:.100}; expected messages as dicts, or a list of"
                " chats."
            )
        texts = [
            self.tokenizer.apply_chat_template(
                list(chat),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            for chat in chats
        ]
        if not tokenize:
            refuse_unknown(kwargs, ("padding", "num_frames", "fps"), "apply_chat_template")
            return texts if several else texts[0]
        images = [_sources(chat, "image") for chat in chats]
        videos = [video for chat in chats for video in _sources(chat, "video")]
        batch = self(
            images if any(images) else None,
            texts,
            videos or None,
            return_tensors=return_tensors,
            **{"padding": len(chats) > 1} | kwargs,
        )
        return batch if return_dict else batch["input_ids"]

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's decode."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's batch_decode."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def _pictures(self, images: Any) -> tuple[dict[str, Tensor], list[int]]:
        """The tensors of pictures, and the tokens of each."""
        if images is None:
            return {}, []
        given = list(images) if isinstance(images, list | tuple) else [images]
        nested = any(isinstance(each, list | tuple) for each in given)
        groups = [list(each) for each in given] if nested else [[each] for each in given]
        if not any(groups):
            return {}, []
        counts = [len(group) for group in groups]
        pictures = [self._picture(each) for group in groups for each in group]
        sizes = [[int(side) for side in picture.shape[:2]] for picture in pictures]
        plans = image_plans(self._config, np.array(sizes).reshape(-1, 2), np.array(counts))
        views = [build_views(p, plan) for p, plan in zip(pictures, plans, strict=True)]
        data = {
            "pixel_values": torch.nn.utils.rnn.pad_sequence(
                [normalise(each) for each in views], batch_first=True
            ),
            "image_sizes": torch.tensor(sizes),
            "batch_num_images": torch.tensor(counts),
        }
        return data, [plan.num_tokens for plan in plans]

    def _picture(self, source: Any) -> UInt8Array:
        # As transformers: files are turned as their EXIF says, PIL images are taken as they are.
        exif = not isinstance(source, Image.Image)
        return load_image(source, limits=self.media_limits, exif=exif)

    def _clips(
        self, videos: Any, num_frames: int, fps: float | None
    ) -> tuple[dict[str, Tensor], list[int]]:
        """The tensors of videos, and the tokens of each."""
        if videos is None:
            return {}, []
        if not isinstance(videos, list | tuple):
            videos = [videos]
        if not videos:
            return {}, []
        clips = [
            load_video(each, limits=self.media_limits, num_frames=num_frames, fps=fps)
            for each in videos
        ]
        if len({len(clip) for clip in clips}) != 1:
            raise OptionError(
                f"videos of {[len(clip) for clip in clips]} frames; one tensor holds as many of"
                " each. Choose frames with num_frames, or call engine.generate()."
            )
        plans = [plan_video(len(c), c.shape[1:3], self._config.geometry, ANYRES) for c in clips]
        views = [build_video_views(c, plan) for c, plan in zip(clips, plans, strict=True)]
        frames = torch.stack([normalise(each) for each in views])
        return {"pixel_values_videos": frames}, [plan.num_tokens for plan in plans]


def _expanded(texts: Sequence[str], tokens: dict[str, list[int]]) -> list[str]:
    """Texts with each marker repeated once a visual token."""
    pieces = [MARKER.split(text) for text in texts]
    for marker, counts in tokens.items():
        found = sum(part == marker for parts in pieces for part in parts)
        if found != len(counts):
            raise PromptError(
                f"the texts have {found} {marker} for {len(counts)} media; expected one for each."
                " Write the marker where the medium belongs."
            )
    rest = {marker: iter(counts) for marker, counts in tokens.items()}
    return ["".join(p * next(rest[p]) if p in rest else p for p in parts) for parts in pieces]


def _sources(chat: Any, kind: str) -> list[Any]:
    """Sources of a kind in a chat's parts, in order."""
    found = []
    for message in chat:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if not isinstance(part, dict) or part.get("type") != kind:
                continue
            keys = [key for key in SOURCE_KEYS if key in part]
            if len(keys) != 1:
                raise PromptError(f"a {kind} part with keys {sorted(part)}; expected one source.")
            uri = keys == ["base64"]
            found.append(f"data:{kind};base64,{part['base64']}" if uri else part[keys[0]])
    return found
