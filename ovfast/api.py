"""The module-level one-liners: ``ovfast.generate`` and ``ovfast.stream`` over one engine a
checkpoint.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

from ovfast.engine import Engine
from ovfast.loading import load
from ovfast.outputs import StreamChunk


class _Engines:
    """Engines already loaded, by model and load arguments. One for the process: loading takes
    seconds and gigabytes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: dict[str, Engine] = {}

    def get(self, model: str | os.PathLike[str], device: str) -> Engine:
        key = f"{model!r} {device!r}"
        with self._lock:
            engine = self._engines.get(key)
            if engine is None or engine.closed:
                engine = self._engines[key] = load(model, device=device)
            return engine


_engines = _Engines()


def generate(
    prompt: Any,
    *,
    images: Any = None,
    videos: Any = None,
    model: str | os.PathLike[str] = "demo",
    device: str = "auto",
    **kwargs: Any,
) -> Any:
    """Answers one prompt or a batch; loads the model at the first call and keeps it.

    Args:
        prompt: as in ``Engine.generate``.
        images: as in ``Engine.generate``.
        videos: as in ``Engine.generate``.
        model: a directory, a Hub id, or ``"demo"``.
        device: as in ``load``.
        **kwargs: as in ``Engine.generate``.

    Returns:
        A GenerationOutput, or a list of them for a batch.

    Raises:
        OVFastError: see ``ovfast.errors``.
    """
    return _engines.get(model, device).generate(prompt, images=images, videos=videos, **kwargs)


def stream(
    prompt: Any,
    *,
    images: Any = None,
    videos: Any = None,
    model: str | os.PathLike[str] = "demo",
    device: str = "auto",
    **kwargs: Any,
) -> Iterator[StreamChunk]:
    """Answers one prompt token by token; arguments as ``generate``, chunks as ``Engine.stream``."""
    return _engines.get(model, device).stream(prompt, images=images, videos=videos, **kwargs)
