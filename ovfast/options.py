"""Arguments of the public calls turned into one form: sampling fields, visual options, batches."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from ovfast.anyres import VisualOptions
from ovfast.errors import OptionError, PromptError
from ovfast.processor import ModelInputs
from ovfast.sampling import SamplingParams


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


def batch_items(prompt: Any, images: Any, videos: Any) -> tuple[bool, list[tuple[Any, Any, Any]]]:
    """Splits the arguments of a call into requests.

    Returns:
        Whether it is a batch, and (prompt, images, videos) of each request.

    Raises:
        PromptError: an empty batch, or media that are not one entry a prompt.
    """
    if not isinstance(prompt, list) or (prompt and all(isinstance(item, dict) for item in prompt)):
        return False, [(prompt, images, videos)]
    kinds = (str, list, ModelInputs)
    if not prompt or not all(
        isinstance(item, kinds) and type(item) is type(prompt[0]) for item in prompt
    ):
        raise PromptError(
            f"prompt={prompt!r:.200}; expected a str, a chat (list of dicts), ModelInputs, or a"
            " non-empty list of one of these kinds. A single prompt needs no list."
        )
    columns = []
    for name, media in (("images", images), ("videos", videos)):
        if media is not None and (not isinstance(media, list | tuple) or len(media) != len(prompt)):
            given = len(media) if isinstance(media, list | tuple) else type(media).__name__
            raise PromptError(
                f"{len(prompt)} prompts and {name} of {given}; expected a list with one entry a"
                " prompt. An entry is None, one medium, or a list of them."
            )
        columns.append([None] * len(prompt) if media is None else list(media))
    return True, list(zip(prompt, *columns, strict=True))


def continuation_texts(continuations: Any) -> list[str]:
    """The texts to score, from any iterable of str.

    Raises:
        OptionError: anything else.
    """
    is_list = isinstance(continuations, Iterable) and not isinstance(continuations, str)
    texts = list(continuations) if is_list else [continuations]
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise OptionError(
            f"continuations={continuations!r:.200}; expected a list of str. Put a single one in a"
            " list."
        )
    return texts


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
