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
from ovfast.ops import Ops, has_native, make_ops
from ovfast.storage import dtype_name

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
READ_BYTES = 128 << 20  # more than the caches of most CPUs; reading them takes 0.2 s


def examine() -> dict[str, dict[str, Any]]:
    """Looks at the machine and answers one demo question.

    Returns:
        Sections "versions", "devices", "native back end" (instruction sets, threads, read
        bandwidth), "operations" (name → back end) and "self-test" (passed, answer, milliseconds).
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
        own_step = engine.ops.decode is not None or engine.ops.native is not None
        operations["decode step"] = engine.ops.backend if own_step else "reference"
        native = _native(engine.ops)
        kept = f"weights in {engine.storage}, {dtype_name(engine.dtype)} arithmetic"
        chosen = f"{engine.device}, back end {engine.ops.backend}, {kept}"
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
        "native back end": native,
        "operations": operations,
        "self-test": test,
    }


def _native(ops: Ops) -> dict[str, Any]:
    """Of the engine's native back end; on a device that does not use it, of one made for this."""
    if not has_native():
        return {"built": "no: install a C++17 compiler and reinstall ovfast"}
    if ops.native is None:
        ops = make_ops(torch.device("cpu"), "native")
    native = ops.native
    others = ", ".join(name for name in native.isas() if name != native.isa()) or "none"
    bandwidth = native.read_bandwidth(ops.pool, READ_BYTES)
    return {
        "instruction set": f"{native.isa()} (also here: {others}; OVFAST_ISA chooses)",
        "products of bfloat16": "yes" if native.bfloat16_products() else "no",
        "threads": ops.pool.num_threads,
        "memory read": f"{bandwidth / 1e9:.1f} GB/s with these threads",
    }


def _versions() -> dict[str, Any]:
    versions = {"ovfast": ovfast.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
