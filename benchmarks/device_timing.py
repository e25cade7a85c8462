"""Timing on a CUDA device: interleaved races by events, ceilings of the machine, the records."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]
FLUSH_BYTES = 256 << 20  # more than any L2: what a race reads is cold, as in a request


def race(works: Mapping[str, Work], *, repeats: int = 15, warm: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each work, taken in turn (A B A B), the L2 flushed before each.

    Args:
        works: name → what to time; the first calls compile and are not counted.
        repeats: counted runs of each.
        warm: runs of each before.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(warm + repeats):
        for name, work in works.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            end.synchronize()
            if repeat >= warm:
                samples[name].append(start.elapsed_time(end))
    return samples


def host_race(works: Mapping[str, Work], *, repeats: int = 15, warm: int = 3) -> dict[str, Any]:
    """As `race`, by the host's clock from the call to the end of the device's work."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(warm + repeats):
        for name, work in works.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            if repeat >= warm:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return samples


def summary(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median_ms": statistics.median(ordered),
        "p10_ms": ordered[round(0.1 * last)],
        "p90_ms": ordered[round(0.9 * last)],
    }


class Ceilings:
    """What this device can do, measured once: copy rate and bf16 product rate."""

    def __init__(self) -> None:
        self.bytes_per_s, self.flop_per_s = _copy_rate(), _product_rate()

    def floor_ms(self, flop: float, num_bytes: float) -> float:
        return 1e3 * max(flop / self.flop_per_s, num_bytes / self.bytes_per_s)


def _copy_rate() -> float:
    data = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    out = torch.empty_like(data)
    copy = race({"copy": lambda: out.copy_(data)})["copy"]
    return 2 * data.nbytes / (1e-3 * statistics.median(copy))


def _product_rate(size: int = 8192) -> float:
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = race({"product": lambda: a @ b})["product"]
    return 2 * size**3 / (1e-3 * statistics.median(product))


class Records:
    """Rows of one run, written as soon as they are known, and what they were measured on."""

    def __init__(self, path: Path, budget_s: float) -> None:
        self._path, self._deadline = path, time.monotonic() + budget_s
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._deadline

    def write(self, section: str, **row: Any) -> None:
        """Appends one row and prints it."""
        with self._path.open("a") as stream:
            stream.write(json.dumps({"section": section, **row}) + "\n")
        shown = " ".join(f"{key}={_short(value)}" for key, value in row.items() if key != "samples")
        print(f"{section:12} {shown}", flush=True)

    def race(
        self,
        section: str,
        name: str,
        samples: Mapping[str, list[float]],
        ceilings: Ceilings,
        *,
        flop: float = 0.0,
        num_bytes: float = 0.0,
    ) -> None:
        """One row of a race: "ovfast" beside the others, the floor, and the share of it."""
        times = {who: summary(values) for who, values in samples.items()}
        ours = times["ovfast"]["median_ms"]
        row: dict[str, Any] = {"name": name, "times": times}
        floor = ceilings.floor_ms(flop, num_bytes)
        if floor > 0:
            row |= {"floor_ms": floor, "share_of_limit": floor / ours}
        if flop:
            row["tflop_per_s"] = flop / ours / 1e9
        if num_bytes:
            row["gb_per_s"] = num_bytes / ours / 1e6
        for who, values in samples.items():
            if who != "ovfast":
                pairs = [b / a for a, b in zip(samples["ovfast"], values, strict=True)]
                row[f"times_faster_than_{who}"] = [statistics.median(pairs), min(pairs), max(pairs)]
        self.write(section, **row, samples=dict(samples))


def environment() -> dict[str, Any]:
    """Device, driver, versions and commit."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "pillow", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": run("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader"),
        "versions": versions,
        "commit": run("git", "rev-parse", "--short", "HEAD"),
    }


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)
