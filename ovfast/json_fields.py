"""Typed access to the JSON files of a checkpoint; every complaint names the file and the key."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ovfast.errors import CheckpointError, ConfigError

__all__ = ["Fields", "load_json"]


class Fields:
    """A JSON object whose values are checked as they are read; None counts as missing."""

    def __init__(self, file: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.file = file
        self.values = values
        self.prefix = prefix

    def fail(self, key: str, allowed: str, advice: str = "correct the file") -> ConfigError:
        given = repr(self.values[key]) if key in self.values else "missing"
        if len(given) > 200:
            given = given[:200] + "…"
        return ConfigError(
            f"{self.file}: {self.prefix}{key} is {given}; expected {allowed}. "
            f"To use this checkpoint, {advice}."
        )

    def integer(self, key: str, default: int | None = None, *, at_least: int = 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise self.fail(key, f"an integer of at least {at_least}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.fail(key, "a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def section(self, key: str) -> "Fields":
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.fail(key, "a JSON object")
        return Fields(self.file, value, f"{self.prefix}{key}.")

    def require(
        self, key: str, allowed: Iterable[object], advice: str = "use one that ovfast computes"
    ) -> None:
        """Raise unless the key is absent or one of the values that ovfast computes."""
        options = tuple(allowed)
        value = self.values.get(key, options[0])
        if not any(type(value) is type(option) and value == option for option in options):
            raise self.fail(key, " or ".join(map(repr, options)), advice)


def load_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read as JSON ({error}); expected a JSON object. Download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}; expected a JSON object.")
    return value
