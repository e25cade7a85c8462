"""What adapters of evaluation kits share: flat arguments, answers that end with the context.

Kits pass one flat set of arguments. This module owns which names exist; values are checked by what
takes them: `load`, VisualOptions, SamplingParams.
"""

import difflib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from ovfast.anyres import VisualOptions
from ovfast.errors import OptionError
from ovfast.loading import load
from ovfast.sampling import SamplingParams

logger = logging.getLogger("ovfast")

# What an adapter sets itself.
_OF_THE_ADAPTER = frozenset({"model", "max_batch_size", "visual", "media_limits"})
# The name that wrappers of LLaVA-OneVision use.
_ALIASES = {"max_frames_num": "num_frames"}


class FlatOptions(NamedTuple):
    """Arguments by what takes them."""

    load: dict[str, Any]
    visual: VisualOptions
    sampling: dict[str, Any]


def sort_options(arguments: Mapping[str, Any], *, sampling: bool = False) -> FlatOptions:
    """Sorts arguments by their names.

    Args:
        arguments: of `load` but for the model and its batch, and fields of VisualOptions.
        sampling: whether fields of SamplingParams are taken too.

    Raises:
        OptionError: an unknown name, or two names of one argument.
    """
    load_names = inspect.signature(load).parameters.keys() - _OF_THE_ADAPTER
    visual_names = {field.name for field in fields(VisualOptions)}
    sampling_names = {field.name for field in fields(SamplingParams)} if sampling else set()
    kinds: dict[str, dict[str, Any]] = {"load": {}, "visual": {}, "sampling": {}}
    for given, value in arguments.items():
        name = _ALIASES.get(given, given)
        if name in kinds["visual"]:
            raise OptionError(f"{name} is given twice, also as an alias; expected one. Drop one.")
        if name in load_names:
            kinds["load"][name] = value
        elif name in visual_names:
            kinds["visual"][name] = value
        elif name in sampling_names:
            kinds["sampling"][name] = value
        else:
            raise _unknown(given, load_names | visual_names | sampling_names | _ALIASES.keys())
    return FlatOptions(kinds["load"], VisualOptions(**kinds["visual"]), kinds["sampling"])


def within_context(
    params: SamplingParams, num_prompt_tokens: int, max_seq_len: int
) -> SamplingParams:
    """Parameters whose answer ends at the end of the context, where a kit asks for more.

    Kits ask for thousands of tokens whatever the model; one prompt that leaves fewer must not end a
    run of thousands.

    Args:
        params: with `max_new_tokens`.
        num_prompt_tokens: of the prompt.
        max_seq_len: of the engine.
    """
    room, wanted = max_seq_len - num_prompt_tokens, params.max_new_tokens
    if wanted is None or wanted <= room or room < 1:
        return params
    logger.info("max_new_tokens=%d, but the context leaves %d; the answer ends there", wanted, room)
    return replace(params, max_new_tokens=room, min_new_tokens=min(room, params.min_new_tokens))


def _unknown(name: str, allowed: set[str]) -> OptionError:
    close = difflib.get_close_matches(name, allowed, 1)
    hint = f" Did you mean {close[0]!r}?" if close else " Leave it out."
    return OptionError(
        f"unknown model argument {name!r}; expected one of {', '.join(sorted(allowed))}.{hint}"
    )
