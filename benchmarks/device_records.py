"""The record of a run on a CUDA device: rows written as soon as they are known, and printed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovfast.bench.calibration import Calibration
from ovfast.bench.record import Header, Row, append_row, write_header
from ovfast.bench.statistics import paired_ratio, summarize, verdict
from ovfast.roofline import Machine

STORAGE = "bfloat16"
# What is not ours; any other name of a race is a variant of ovfast.
PEERS = ("transformers", "transformers-static", "transformers-fast", "torch", "sdpa", "cublas")
UNSAID = ("device", "threads")  # parameters that are the same for all rows


class OutOfTime(Exception):
    """The budget of the run is over."""


class Records:
    """Rows of one run.

    Args:
        path: of the file, `ovfast.bench.record`'s format.
        budget_s: no section starts after it, and a race is the last of its section.
        header: of the file.
        is_continued: the file is there, with this header; rows are added.
    """

    def __init__(
        self, path: Path, budget_s: float, header: Header, *, is_continued: bool = False
    ) -> None:
        self._path, self._deadline = path, time.monotonic() + budget_s
        self._threads = header.threads
        self.machine: Machine = Calibration.from_dict(header.machine).machine(STORAGE)
        if not is_continued:
            write_header(path, header)

    @property
    def left_s(self) -> float:
        """Seconds left of the budget, negative behind it."""
        return self._deadline - time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.left_s < 0

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
        words = (f"{key}={value}" for key, value in parameters.items() if key not in UNSAID)
        said = f"{' '.join((side, *words))} {metric}: {self._said(row)}"
        print(f"{row.workload:36} {said}", flush=True)

    def _said(self, row: Row) -> str:
        """The figure, and what was attained of what the machine can do."""
        if row.error:
            return row.error
        median = summarize(row.samples).median
        said = f"{median:.4g} {row.unit}"
        if row.unit != "ms" or row.floor is None or median == 0:
            return said
        said += f", limit {row.floor:.4g} ({row.floor / median:.0%})"
        if row.flops:
            said += f", {row.flops / median / 1e9:.4g} of {self.machine.gflops / 1e3:.4g} TFLOP/s"
        if row.num_bytes:
            rate, most = row.num_bytes / median / 1e6, self.machine.read_gb_per_s
            said += f", {rate:.4g} of {most:.4g} GB/s"
        return said

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

        Raises:
            OutOfTime: the rows are written, and the budget is over.
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
                flops=flop or None,
                num_bytes=num_bytes or None,
                parameters=dict(parameters or {}) | ({"variant": name} if is_variant else {}),
            )
            if name != "ovfast" and "ovfast" in samples:
                ratio = paired_ratio(samples["ovfast"], values)
                print(
                    f"{workload:36} ovfast against {name}: {ratio.median:.3g} times"
                    f" ({ratio.low:.3g} to {ratio.high:.3g}), {verdict(ratio)}",
                    flush=True,
                )
        if self.is_over:
            raise OutOfTime
