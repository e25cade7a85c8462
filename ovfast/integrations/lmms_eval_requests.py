"""Requests of lmms-eval in ovfast's terms: generation arguments, media of a document.

Needs no lmms-eval.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ovfast.errors import OptionError
from ovfast.sampling import SamplingParams

# As lmms-eval tells a picture's path from a video's (ConfigurableMessagesTask).
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp"})
# Same name, same meaning.
_KEPT = ("max_new_tokens", "min_new_tokens", "repetition_penalty", "seed")
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# lmms-eval's llava_onevision reads it where it never is, then drops it: tasks carry it for others.
WITHOUT_EFFECT = frozenset({"image_aspect_ratio"})
GEN_KWARGS = (*_KEPT, *_OF_SAMPLING, "do_sample", "until", "num_beams", *WITHOUT_EFFECT)


def sampling_params(gen_kwargs: Mapping[str, Any], default_new_tokens: int) -> SamplingParams:
    """SamplingParams of a task's `generation_kwargs`.

    Greedy unless `do_sample` is true, or absent beside a positive temperature; a temperature of 0
    is greedy in any case. What shapes sampling (temperature, top_k, top_p, min_p) means nothing
    when greedy, as in transformers.

    Args:
        gen_kwargs: names of GEN_KWARGS; None stands for absent.
        default_new_tokens: max_new_tokens where the task names none.

    Raises:
        OptionError: an unknown name, more than one beam, or a value that means nothing here.
    """
    given = {name: value for name, value in gen_kwargs.items() if value is not None}
    if unknown := sorted(map(str, given.keys() - set(GEN_KWARGS))):
        raise OptionError(
            f"generation_kwargs {unknown}; expected {', '.join(GEN_KWARGS)}. Leave them"
            " out of the task."
        )
    if given.get("num_beams", 1) != 1:
        raise OptionError(
            f"num_beams={given['num_beams']!r}; ovfast has no beam search. Use --gen_kwargs"
            " num_beams=1."
        )
    fields = {name: given[name] for name in _KEPT if name in given}
    fields.setdefault("max_new_tokens", default_new_tokens)
    fields["stop"] = given.get("until", ())
    if _is_sampled(given):
        fields |= {name: given[name] for name in _OF_SAMPLING if name in given}
        fields.setdefault("temperature", 1.0)
        if fields.get("top_k") == 0:  # transformers' word for all
            del fields["top_k"]
    return SamplingParams(**fields)


def _is_sampled(given: Mapping[str, Any]) -> bool:
    do_sample = given.get("do_sample", bool(given.get("temperature", 0)))
    if not isinstance(do_sample, bool):
        raise OptionError(f"do_sample={do_sample!r}; expected true or false. Change the task.")
    return do_sample and given.get("temperature", 1.0) != 0


class Prompt(NamedTuple):
    """Arguments of `Engine.prepare`."""

    prompt: Any
    images: list[Any] | None = None
    videos: list[Any] | None = None


def simple_prompt(
    context: str, visuals: Sequence[Any] | None, metadata: Mapping[str, Any]
) -> Prompt:
    """A request of the simple kind, as lmms-eval's llava_onevision reads it.

    Media go before the text, unless the context has as many <image> and <video> as there are media
    of each; other markers are text. A str is a picture's or a video's path, by its suffix. A task
    whose metadata says `task_type: video` and `sample_frames` gives the frames of one video as
    pictures.

    Args:
        context: the question.
        visuals: what `doc_to_visual` gave.
        metadata: of the request.
    """
    media = list(visuals or ())
    if media and metadata.get("task_type") == "video" and "sample_frames" in metadata:
        chosen = np.linspace(0, len(media) - 1, int(metadata["sample_frames"]), dtype=int)
        media = [[media[index] for index in chosen]]
    images = [medium for medium in media if not _is_video(medium)]
    videos = [medium for medium in media if _is_video(medium)]
    markers = (context.count("<image>"), context.count("<video>"))
    if media and context and markers in ((0, 0), (len(images), len(videos))):
        return Prompt(context, images or None, videos or None)
    parts = [{"type": "text", "text": context}] if context else []
    return Prompt([{"role": "user", "content": [*_parts(media), *parts]}])


def _parts(media: Sequence[Any]) -> list[dict[str, Any]]:
    kinds = ["video" if _is_video(medium) else "image" for medium in media]
    return [{"type": kind, kind: medium} for kind, medium in zip(kinds, media, strict=True)]


def _is_video(medium: Any) -> bool:
    """Whether it is the path of a video, or frames of one."""
    if not isinstance(medium, str):
        return isinstance(medium, list)
    return os.path.splitext(medium)[1].lower() not in PICTURE_SUFFIXES
