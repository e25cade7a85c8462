"""Arguments of the public calls turned into one form: sampling fields, visual options, batches."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, NamedTuple

from ovfast.anyres import VisualOptions
from ovfast.encoded_media import KEEP, EncodedMedia
from ovfast.errors import OptionError, PromptError
from ovfast.media_sources import image_list, video_list
from ovfast.processor import ModelInputs
from ovfast.roofline import Machine
from ovfast.sampling import SamplingParams

NORMALIZE = ("sum", "mean")


class Item(NamedTuple):
    """One request's prompt and media, as the caller gave them."""

    prompt: Any
    images: Any
    videos: Any
    media: Any


def make_sampling(sampling: SamplingParams | None, overrides: dict[str, Any]) -> SamplingParams:
    """Merges sampling parameters and keyword arguments.

    Args:
        sampling: the base; None for the defaults.
        overrides: fields of SamplingParams.

    Raises:
        OptionError: an unknown field, a wrong type or value.
    """
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise OptionError(
            f"sampling={sampling!r}; expected SamplingParams or None. Fields can also be"
            " passed by name."
        )
    allowed = [field.name for field in fields(SamplingParams)]
    for name in overrides:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise OptionError(
                f"unknown option {name!r}; expected one of {', '.join(allowed)}.{hint}"
            )
    return SamplingParams(**overrides) if sampling is None else replace(sampling, **overrides)


def visual_options(visual: VisualOptions | None, default: VisualOptions) -> VisualOptions:
    """The options of a call, or the engine's."""
    if visual is None:
        return default
    if not isinstance(visual, VisualOptions):
        raise OptionError(
            f"visual={visual!r}; expected VisualOptions or None. Build one, for example"
            " VisualOptions(max_views=1)."
        )
    return visual


def batch_items(prompt: Any, images: Any, videos: Any, media: Any) -> tuple[bool, list[Item]]:
    """Splits the arguments of a call into requests.

    Returns:
        Whether it is a batch, and the requests.

    Raises:
        PromptError: an empty batch, or media that are not one entry a prompt.
    """
    if not isinstance(prompt, list) or (prompt and all(isinstance(item, dict) for item in prompt)):
        return False, [Item(prompt, images, videos, media)]
    kinds = (str, list, ModelInputs)
    if not prompt or not all(
        isinstance(item, kinds) and type(item) is type(prompt[0]) for item in prompt
    ):
        raise PromptError(
            f"prompt={prompt!r:.200}; expected a str, a chat (list of dicts), ModelInputs, or a"
            " non-empty list of one of these kinds. A single prompt needs no list."
        )
    if isinstance(media, EncodedMedia):
        media = [media] * len(prompt)
    columns = []
    for name, given in (("images", images), ("videos", videos), ("media", media)):
        if given is not None and (not isinstance(given, list | tuple) or len(given) != len(prompt)):
            count = len(given) if isinstance(given, list | tuple) else type(given).__name__
            raise PromptError(
                f"{len(prompt)} prompts and {name} of {count}; expected a list with one entry a"
                " prompt. An entry is None, one medium, or a list of them."
            )
        columns.append([None] * len(prompt) if given is None else list(given))
    return True, [Item(*item) for item in zip(prompt, *columns, strict=True)]


def continuation_texts(given: Any, name: str = "continuations") -> list[str]:
    """The texts to score, from any iterable of str.

    Raises:
        OptionError: anything else.
    """
    is_list = isinstance(given, Iterable) and not isinstance(given, str)
    texts = list(given) if is_list else [given]
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise OptionError(
            f"{name}={given!r:.200}; expected a list of str. Put a single one in a list."
        )
    return texts


def choice_texts(options: Any, normalize: Any) -> list[str]:
    """The options of a choice.

    Raises:
        OptionError: not two str or more, two alike, or an unknown way to normalise.
    """
    texts = continuation_texts(options, "options")
    if len(texts) < 2 or len(set(texts)) < len(texts):
        raise OptionError(
            f"options={texts!r:.200}; expected at least two, all different. Use score() for one."
        )
    if normalize not in NORMALIZE:
        raise OptionError(f"normalize={normalize!r}; expected 'sum' or 'mean'.")
    return texts


def encode_options(keep: Any, prompt: Any, system: Any, raw: Any, images: Any, videos: Any) -> None:
    """Checks what `encode` keeps.

    Raises:
        OptionError: unknown, or a system message that nothing would be kept of.
        PromptError: nothing to encode, or no prompt where it has to be complete.
    """
    if keep not in KEEP:
        raise OptionError(f"keep={keep!r:.100}; expected 'features' or 'prefix'.")
    if system is not None and keep != "prefix":
        raise OptionError(
            "system= with keep='features'; only a prefix keeps text. Pass it with the questions, or"
            " use keep='prefix'."
        )
    if prompt is None and raw:
        raise PromptError(
            "encode() with raw=True and no prompt; expected how the questions will begin, up to the"
            " last picture or video. Pass it as one str."
        )
    if prompt is None and not (image_list(images) or video_list(videos)):
        raise PromptError(
            "encode() got no pictures and no videos; expected at least one. Text alone needs none."
        )


def token_positions(positions: Any, num_tokens: int) -> list[int]:
    """Positions of a prompt, None meaning all.

    Raises:
        OptionError: not a list of integers from 0 to num_tokens - 1.
    """
    if positions is None:
        return list(range(num_tokens))
    try:
        wanted = [operator.index(position) for position in positions]
    except TypeError:
        wanted = [-1]
    if any(not 0 <= position < num_tokens for position in wanted):
        raise OptionError(
            f"positions={positions!r:.200}; expected a list of integers from 0 to {num_tokens - 1}."
            " Pass None for all positions."
        )
    return wanted


def check_estimate(image_sizes_hw: Any, num_frames: Any, machine: Any) -> None:
    """Refuses what `Engine.estimate` cannot reckon with.

    Raises:
        OptionError: not lists, not a Machine.
    """
    for name, given in (("image_sizes_hw", image_sizes_hw), ("num_frames", num_frames)):
        if not isinstance(given, Iterable) or isinstance(given, str):
            raise OptionError(
                f"{name}={given!r:.100}; expected a list: a (height, width) for each picture, a"
                " number of frames for each video."
            )
    if machine is not None and not isinstance(machine, Machine):
        raise OptionError(
            f"machine={machine!r:.100}; expected a Machine of"
            " ovfast.bench.calibration.measure_machine, or None for no times."
        )


def check_inputs(inputs: Any, vocab_size: int, image_size: int) -> None:
    """Refuses inputs that this engine did not lay out.

    Raises:
        OptionError: not ModelInputs.
        PromptError: ids or views of another checkpoint.
    """
    if not isinstance(inputs, ModelInputs):
        raise OptionError(
            f"inputs of type {type(inputs).__name__}; expected ModelInputs. Call engine.prepare()."
        )
    ids, side = inputs.input_ids, image_size
    if len(ids) == 0 or ids.min() < 0 or ids.max() >= vocab_size:
        raise PromptError(
            f"ModelInputs of {len(ids)} ids; expected at least one, and all from 0 to"
            f" {vocab_size - 1}. Call prepare() of this engine."
        )
    for plan in inputs.plans:
        if plan.image_size != side:
            raise PromptError(
                f"ModelInputs with views of {plan.image_size}×{plan.image_size} pixels; expected"
                f" {side}×{side}. Call prepare() of this engine."
            )
