"""What every surface does with arguments: unknown and unsupported ones raise."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any

from ovfast.anyres import VisualOptions
from ovfast.errors import OptionError

__all__ = ["refuse_given", "refuse_unknown", "visual_with"]


def refuse_given(hint: str, **arguments: Any) -> None:
    """Refuses arguments of the host that ovfast has nothing for, unless they ask for nothing.

    Args:
        hint: what to do, the end of the message.
        **arguments: by their names.

    Raises:
        OptionError: one is neither None, False nor empty.
    """
    for name, value in arguments.items():
        if value is not None and value is not False and value not in ({}, []):
            raise OptionError(f"{name}={value!r:.100} is not supported. {hint}")


def refuse_unknown(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuses arguments that have no meaning here.

    Raises:
        OptionError: with the nearest name that has one.
    """
    for name, value in given.items():
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {close[0]!r}?" if close else " Leave it out."
        raise OptionError(f"{name}={value!r:.100} is not supported by {where}.{hint}")


def visual_with(visual: VisualOptions, overrides: Any) -> VisualOptions:
    """Options with mm_processor_kwargs, which here are fields of VisualOptions, or None.

    Raises:
        OptionError: something else.
    """
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise OptionError(f"mm_processor_kwargs={overrides!r:.100}; expected a dict.")
    refuse_unknown(overrides, [each.name for each in fields(VisualOptions)], "mm_processor_kwargs")
    return replace(visual, **overrides)
