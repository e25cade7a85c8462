"""Unknown arguments raise, whatever surface they were given to."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from ovfast.errors import OptionError

__all__ = ["refuse_unknown"]


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
