"""The kernels of a decode step by themselves, the device alone: bandwidth, and cost of a launch.

`gemv` times every projection at a model's shapes beside cuBLAS, which multiplies and does nothing
else; the floor is the weights over the copy rate. `launches` tells what a launch costs within a
graph with and without programmatic dependent launch, and from the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_steps import DecodeLayer, KernelWork, Steps
from ovfast import ops_triton
from ovfast.decode_kernels import DecodeKernels

ROWS = (1, 4, 16)
CONTEXT = 1024
CHAINS = 20  # layers behind one another in one graph
TINY_WIDTH = 256  # columns of a layer whose work is nothing beside its launches


@torch.inference_mode()
def gemv(bench: Bench) -> None:
    """Every projection, the head and attention by rows; weights come from memory."""
    for num_rows in ROWS:
        layer = _layer(bench, bench.ops.decode, num_rows)
        for name, work in (layer.works() | {"decode_head": layer.head()}).items():
            bench.each(f"{name}, {num_rows} rows", _race_kernel, name, work, num_rows)


def _race_kernel(bench: Bench, name: str, work: KernelWork, num_rows: int) -> None:
    works: dict[str, Callable[[], Any]] = {"ovfast": work.run}
    if work.product is not None:
        works["cublas"] = work.product
    bench.race(
        "kernels",
        f"{name}, {num_rows} rows",
        bench.time_device(f"{name}, {num_rows} rows", works),
        num_bytes=work.num_bytes,
        parameters={"rows": num_rows},
    )


def _layer(bench: Bench, kernels: DecodeKernels | None, num_rows: int, **sizes: int) -> DecodeLayer:
    assert kernels is not None
    return DecodeLayer(
        replace(bench.config.text, **sizes),
        kernels,
        num_rows=num_rows,
        context=CONTEXT if not sizes else 1,
        dtype=bench.dtype,
        device=bench.device,
    )


@torch.inference_mode()
def launches(bench: Bench) -> None:
    """A launch of a chain of five tiny kernels, a layer at full width, and a whole step."""
    plain = ops_triton._decode_kernels(pdl=False)
    tiny = {"hidden_size": TINY_WIDTH, "intermediate_size": TINY_WIDTH}
    for what, sizes in (("tiny", tiny), ("full", {})):
        bench.each(f"launches, {what}", _race_launches, what, sizes, plain)
    bench.each("launches, a step", _race_steps, plain)


def _race_launches(bench: Bench, what: str, sizes: dict[str, int], plain: DecodeKernels) -> None:
    kinds = {"ovfast": bench.ops.decode, "without PDL": plain}
    chains = {name: _chain(_layer(bench, kernels, 1, **sizes)) for name, kernels in kinds.items()}
    name, count = f"launch of a {what} layer's kernels", 5 * CHAINS
    for source, timed in (("graph", bench.time_device), ("host", bench.time_host)):
        samples = {
            side: [value / count for value in values]
            for side, values in timed(name, chains).items()
        }
        parameters = {"launches": count, "from": source}
        bench.race("kernels", name, samples, metric="launch_ms", parameters=parameters)


def _race_steps(bench: Bench, plain: DecodeKernels) -> None:
    steps = {"ovfast": Steps(bench, CONTEXT, 1), "without PDL": Steps(bench, CONTEXT, 1, plain)}
    samples = bench.time_device("launches of a step", steps)
    for step in steps.values():
        step.check()
    bench.race("kernels", f"launches of a step at {CONTEXT}", samples, metric="step_ms")


def _chain(layer: DecodeLayer) -> Callable[[], None]:
    runs = [work.run for work in layer.works().values()]

    def chain() -> None:
        for _ in range(CHAINS):
            for run in runs:
                run()

    return chain
