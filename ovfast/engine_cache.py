"""Engines kept between calls, so that a model is loaded once, whatever it is called by."""

import os
import threading
from typing import Any

from ovfast.checkpoint import resolve_checkpoint
from ovfast.engine import Engine
from ovfast.forks import after_fork
from ovfast.loading import device_for, load


class EngineCache:
    """Engines already loaded, one a checkpoint, device and other options; for any thread.

    A forked child begins with none: it can use no engine of its parent.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: dict[tuple[str, ...], Engine] = {}
        # Of parents; not freed in a child, where a driver's objects cannot be.
        self._inherited: list[dict[tuple[str, ...], Engine]] = []
        after_fork(self._forget)

    def __len__(self) -> int:
        return len(self._engines)

    def get(self, model: str | os.PathLike[str], **load_options: Any) -> Engine:
        """The engine of a model; loads it at the first call, and again once it was closed.

        Args:
            model: as in `load`; paths that lead to the same directory are the same model.
            **load_options: as in `load`; "auto" and the device that it stands for are the same.

        Raises:
            As `load`.
        """
        key = _key(model, **load_options)
        with self._lock:
            engine = self._engines.get(key)
            if engine is None or engine.closed:
                engine = self._engines[key] = load(model, **load_options)
            return engine

    def _forget(self) -> None:
        """After a fork, where the lock may be a copy of a held one."""
        self._lock = threading.Lock()
        self._inherited.append(self._engines)
        self._engines = {}

    def close(self) -> None:
        """Closes all engines; `get` loads new ones."""
        with self._lock:
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()


def _key(model: object, device: Any = "auto", **others: Any) -> tuple[str, ...]:
    target = device_for(model, device)
    return _identity(model), str(target), *(f"{name}={others[name]!r}" for name in sorted(others))


def _identity(model: object) -> str:
    if not isinstance(model, str | os.PathLike):
        return repr(model)  # load says what is wrong with it
    given = resolve_checkpoint("demo") if model == "demo" else model
    path = os.path.expanduser(os.fspath(given))
    return os.path.realpath(path) if os.path.isdir(path) else repr(path)
