"""The module-level one-liners: ``ovfast.generate`` and ``ovfast.stream`` over one engine a
checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ovfast.engine_cache import EngineCache
from ovfast.outputs import StreamChunk

# One for the process: loading takes seconds and gigabytes.
_engines = EngineCache()


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
    engine = _engines.get(model, device=device)
    return engine.generate(prompt, images=images, videos=videos, **kwargs)


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
    engine = _engines.get(model, device=device)
    return engine.stream(prompt, images=images, videos=videos, **kwargs)
