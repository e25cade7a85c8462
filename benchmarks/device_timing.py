"""Timing on a CUDA device: interleaved races by events, and the record of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ovfast.bench.calibration import Calibration
from ovfast.bench.record import Header, Row, append_row, write_header
from ovfast.bench.statistics import paired_ratio, summarize, verdict
from ovfast.roofline import Machine

Work = Callable[[], Any]
STORAGE = "bfloat16"
# What is not ours; any other name of a race is a variant of ovfast.
PEERS = ("transformers", "transformers-static", "transformers-fast", "torch", "sdpa", "cublas")
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


class Records:
    """Rows of one run, written as soon as they are known, and printed.

    Args:
        path: of the file, `ovfast.bench.record`'s format.
        budget_s: no section starts after it.
        header: of the file.
    """

    def __init__(self, path: Path, budget_s: float, header: Header) -> None:
        self._path, self._deadline = path, time.monotonic() + budget_s
        self._threads = header.threads
        self.machine: Machine = Calibration.from_dict(header.machine).machine(STORAGE)
        write_header(path, header)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._deadline

    def write(self, side: str, metric: str, unit: str, **given: Any) -> None:
        """Appends one row and prints it.

        Args:
            side: "ovfast" or the name of a peer.
            metric: of `record.Row`.
            unit: of `record.Row`.
            **given: other fields of `record.Row`.
        """
        parameters = {"device": "cuda", "threads": self._threads} | given.pop("parameters", {})
        given.setdefault("samples", ())
        row = Row(
            side=side, metric=metric, unit=unit, storage=STORAGE, parameters=parameters, **given
        )
        append_row(self._path, row)
        said = row.error or f"{summarize(row.samples).median:.4g} {unit}"
        if row.floor is not None and row.samples:
            said += f", limit {row.floor:.4g} {unit}"
        variant = row.parameters.get("variant", "")
        print(f"{row.workload:32} {side} {variant} {metric}: {said}", flush=True)

    def failed(self, suite: str, workload: str, error: str) -> None:
        """A row of something that could not be measured."""
        self.write("ovfast", "call_ms", "ms", suite=suite, workload=workload, error=error)

    def race(
        self,
        suite: str,
        workload: str,
        samples: Mapping[str, list[float]],
        *,
        metric: str = "call_ms",
        flop: float = 0.0,
        num_bytes: float = 0.0,
        parameters: Mapping[str, int | float | str] | None = None,
    ) -> None:
        """A row for each side of a race, and how the others compare with "ovfast".

        Args:
            suite: of the rows.
            workload: their name.
            samples: milliseconds by side; names that are no peer's are variants of ovfast.
            metric: of the rows.
            flop: arithmetic that must be done.
            num_bytes: that must be moved.
            parameters: of the rows.
        """
        floor = self.machine.floor_ms(flop, num_bytes) or None
        for name, values in samples.items():
            is_variant = name != "ovfast" and name not in PEERS
            self.write(
                name if name in PEERS else "ovfast",
                metric,
                "ms",
                suite=suite,
                workload=workload,
                samples=tuple(values),
                floor=floor,
                parameters=dict(parameters or {}) | ({"variant": name} if is_variant else {}),
            )
            if name != "ovfast":
                ratio = paired_ratio(samples["ovfast"], values)
                print(
                    f"{workload:32} ovfast against {name}: {ratio.median:.3g} times"
                    f" ({ratio.low:.3g} to {ratio.high:.3g}), {verdict(ratio)}",
                    flush=True,
                )
