"""What this machine has: versions, devices, which operation runs on which back end, and a short
self-test.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from typing import Any

import torch

import ovfast
from ovfast.demo_run import ask, demo_questions
from ovfast.loading import load

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pillow",
    "safetensors",
    "tokenizers",
    "av",
    "transformers",
    "flash-attn",
)


def examine() -> dict[str, dict[str, Any]]:
    """Looks at the machine and answers one demo question.

    Returns:
        Sections "versions", "devices", "operations" (name → back end) and "self-test" (passed,
        answer, milliseconds).
    """
    devices: dict[str, Any] = {
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} torch threads"
    }
    devices["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        devices[f"cuda:{index}"] = (
            f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {capability}"
        )
    start = time.perf_counter()
    with load("demo") as engine:
        result = ask(engine, demo_questions()[0])
        operations = dict(engine.ops.where)
        operations["decode step"] = engine.ops.backend if engine.ops.decode else "reference"
        chosen = f"{engine.device}, back end {engine.ops.backend}, {engine.dtype}"
    test = {
        "passed": result.correct,
        "engine": chosen,
        "question": result.question,
        "answer": result.answer,
        "load and answer": f"{1e3 * (time.perf_counter() - start):.0f} ms",
    }
    return {
        "versions": _versions(),
        "devices": devices,
        "operations": operations,
        "self-test": test,
    }


def _versions() -> dict[str, Any]:
    versions = {"ovfast": ovfast.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
