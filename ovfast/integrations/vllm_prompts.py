"""vLLM's prompts, as texts, ids or dicts with media, turned into requests of an engine."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ovfast.anyres import VisualOptions, VisualPlan, plan_image, plan_video
from ovfast.engine import Engine
from ovfast.errors import PromptError
from ovfast.integrations.arguments import visual_with
from ovfast.integrations.token_prompts import Kind, expand
from ovfast.media_sources import image_list, load_media
from ovfast.model_inputs import ModelInputs

__all__ = ["as_prompts", "check_counts", "prepare_prompt"]

TEXT_KEYS = ("prompt", "prompt_token_ids")
KEYS = (*TEXT_KEYS, "multi_modal_data", "mm_processor_kwargs")
NO_EFFECT_KEYS = ("multi_modal_uuids", "cache_salt")


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or several as a list; a list of ids is one prompt."""
    if isinstance(prompts, str | dict) or _is_ids(prompts):
        return [prompts]
    if not isinstance(prompts, Sequence) or not prompts:
        raise PromptError(
            f"prompts={prompts!r:.100}; expected a text, a list of ids, a dict with 'prompt' or"
            " 'prompt_token_ids', or a list of these."
        )
    return list(prompts)


def prepare_prompt(
    engine: Engine, prompt: Any, visual: VisualOptions, limits: Mapping[str, int]
) -> tuple[str | None, ModelInputs]:
    """Lays a prompt out.

    Args:
        engine: of the checkpoint.
        prompt: one of `as_prompts`.
        visual: how pictures become tokens, unless the prompt says.
        limits: most pictures ("image") and videos ("video") of a prompt.

    Returns:
        The prompt's text, None for ids; the request.

    Raises:
        PromptError, OptionError, MediaError: something is wrong with the prompt.
    """
    if not isinstance(prompt, dict):
        prompt = {"prompt_token_ids": prompt} if _is_ids(prompt) else {"prompt": prompt}
    unknown = [key for key in prompt if key not in KEYS + NO_EFFECT_KEYS]
    texts = [key for key in TEXT_KEYS if prompt.get(key) is not None]
    if unknown or len(texts) != 1:
        raise PromptError(
            f"a prompt with keys {sorted(map(str, prompt))}; expected one of"
            f" {', '.join(TEXT_KEYS)}, and of {', '.join((*KEYS[2:], *NO_EFFECT_KEYS))}."
        )
    images, videos = _media(prompt.get("multi_modal_data") or {})
    check_counts({"image": len(images), "video": len(videos)}, limits)
    visual = visual_with(visual, prompt.get("mm_processor_kwargs"))
    if texts == ["prompt"]:
        text = prompt["prompt"]
        return text, engine.prepare(text, images=images, videos=videos, visual=visual, raw=True)
    ids = prompt["prompt_token_ids"]
    if not _is_ids(ids):
        raise PromptError(f"prompt_token_ids={ids!r:.100}; expected a list of integers.")
    vocab_size = engine.config.text.vocab_size
    if wrong := [each for each in ids if not 0 <= each < vocab_size]:
        raise PromptError(
            f"prompt_token_ids holds {wrong[0]}; expected ids from 0 to {vocab_size - 1}. Use ids"
            " of this checkpoint's tokenizer."
        )
    return None, _from_ids(engine, [int(each) for each in ids], images, videos, visual)


def check_counts(counts: Mapping[str, int], limits: Mapping[str, int]) -> None:
    """Refuses more media than limit_mm_per_prompt allows."""
    for kind, count in counts.items():
        if count > limits.get(kind, count):
            raise PromptError(
                f"{count} {kind}s in a prompt; limit_mm_per_prompt allows {limits[kind]}. Raise it."
            )


def _from_ids(
    engine: Engine, ids: list[int], images: list[Any], videos: list[Any], visual: VisualOptions
) -> ModelInputs:
    """As `Engine.prepare` of a raw prompt, whose ids are given."""
    geometry = engine.config.geometry
    pictures, clips = load_media(images, videos, limits=engine.media_limits, visual=visual)
    count = len(pictures)
    plans: dict[Kind, list[VisualPlan]] = {
        "image": [plan_image(p.shape[:2], geometry, visual, num_images=count) for p in pictures],
        "video": [plan_video(len(c), c.shape[1:3], geometry, visual) for c in clips],
    }
    input_ids, spans, ordered = expand(ids, plans, engine.config)
    media: dict[Kind, Iterator[Any]] = {"image": iter(pictures), "video": iter(clips)}
    # Copies, as a caller may go on to write into its own arrays.
    pixels = tuple(np.array(next(media[span.kind])) for span in spans)
    return ModelInputs(input_ids, spans, ordered, pixels, visual)


def _media(data: Any) -> tuple[list[Any], list[Any]]:
    if not isinstance(data, dict) or set(data) - {"image", "video"}:
        given = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise PromptError(f"multi_modal_data with {given}; expected 'image' and 'video' alone.")
    images = data.get("image")
    if isinstance(images, dict):
        raise PromptError("multi_modal_data with embeddings; expected pictures.")
    return image_list(images), _clips(data.get("video"))


def _clips(videos: Any) -> list[Any]:
    """A list of clips; (frames, metadata) pairs lose their metadata, as frames are chosen."""
    if videos is None:
        return []
    if _is_pair(videos):
        return [videos[0]]
    if getattr(videos, "ndim", None) == 5:
        return list(videos)
    is_one = not isinstance(videos, list | tuple) or not any(map(_is_clip, videos))
    clips = [videos] if is_one else list(videos)
    return [clip[0] if _is_pair(clip) else clip for clip in clips]


def _is_clip(value: Any) -> bool:
    """Whether a list of such values is several videos, not the frames of one."""
    is_source = isinstance(value, str | bytes | list | tuple)
    return is_source or getattr(value, "ndim", None) == 4


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict)


def _is_ids(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and bool(value)
    return is_list and all(isinstance(each, int | np.integer) for each in value)
