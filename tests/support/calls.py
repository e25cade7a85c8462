"""Notes of the calls of a method, which runs as it would."""

from collections.abc import Callable
from typing import Any

import pytest


def note_calls(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, note: Callable[..., Any]
) -> list[Any]:
    """What `note`, called with the arguments before the method runs, returned for each call."""
    seen: list[Any] = []
    method = getattr(owner, name)

    def noting(*arguments: Any) -> Any:
        seen.append(note(*arguments))
        return method(*arguments)

    monkeypatch.setattr(owner, name, noting)
    return seen
