"""Everything that only a CUDA device can tell, in one command, ordered by value.

    python -m benchmarks.gpu [--out DIR] [--budget-s 480] [--only SECTION ...]

smoke       one test of each function of `pytest -m gpu`
decode      a decode step by rows and context, beside its floor and transformers
ttft        first token from encoded bytes, against transformers
tower       SigLIP at 1 to 37 views, against transformers (sdpa), eager and by graphs
vision      decoded picture or clip to rows of the language model's input, preprocessing included
preprocess  decoded picture or clip to device pixels, against transformers' processors
prefill     the language model by length of the prompt and by attention, against transformers
kernels     each kernel of the vision half at the model's shapes, against what torch has
gemv        each kernel of a decode step by rows, against cuBLAS
7b-decode, 7b-ttft, 7b-prefill, 7b-gemv
            the same of 7B
tiles       every tile of fused_linear at every shape, from which its table is to be made
launches    what a launch costs, with and without programmatic dependent launch
profile     kernels by their time: a tower encode, a prefill, a decode step, as text files
suite       what smoke left of `pytest -m gpu`, in the time that is left
compiled, 7b-compiled
            transformers' generate over a static cache, compiled

Rows go to DIR/gpu-DEVICE.jsonl as soon as they are known, in the format of `ovfast.bench.record`;
the header holds the copy and bf16 product rate of the device, beside which all is put. Weights are
random, at full size, made on the device, and the same for both sides; every picture is new. A
section that fails or gets stuck leaves a row that says so; where it takes the device with it, the
process starts again with the next one. There is no fallback: without a CUDA device it says so and
stops.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    gpu_kernels,
    gpu_language,
    gpu_launches,
    gpu_profile,
    gpu_requests,
    gpu_tests,
    gpu_vision,
)
from benchmarks.device_records import OutOfTime, Records
from benchmarks.device_timing import CudaTimer
from benchmarks.gpu_bench import Bench, is_lost
from ovfast.bench.calibration import Calibration
from ovfast.bench.limits import measure_limits
from ovfast.bench.machine import make_header, quiet_check
from ovfast.bench.record import Header, read
from tests.support.checkpoints import PRESETS

CUDA = torch.device("cuda")
SMOKE_S = 100  # of the smoke tests
SECTION_S = 150  # after which a section is stuck; a model is compiled in some 100
SUITE_LEAST_S = 20  # below which the rest of the suite is not begun


class Run:
    """What all sections get: the records, and the sizes of the model as they are asked for."""

    device = CUDA

    def __init__(self, records: Records, out: Path, directory: Path) -> None:
        self.records, self.out, self._directory = records, out, directory
        self._benches: dict[str, Bench] = {}

    def bench(self, name: str) -> Bench:
        if name not in self._benches:
            self._benches[name] = Bench(
                name,
                PRESETS[name],
                records=self.records,
                timer=CudaTimer(),
                out=self.out,
                directory=self._directory,
                device=self.device,
            )
        return self._benches[name]


Section = Callable[[Run], None]


def _of(size: str, section: Callable[[Bench], None]) -> Section:
    return lambda run: section(run.bench(size))


def _smoke(run: Run) -> None:
    gpu_tests.run_suite(run.records, run.out, "smoke", min(SMOKE_S, run.records.left_s))


def _suite(run: Run) -> None:
    gpu_tests.run_suite(run.records, run.out, "rest", max(SUITE_LEAST_S, run.records.left_s))


SECTIONS: dict[str, Section] = {
    "smoke": _smoke,
    "decode": _of("0.5b", gpu_language.decode),
    "ttft": _of("0.5b", gpu_requests.ttft),
    "tower": _of("0.5b", gpu_vision.tower),
    "vision": _of("0.5b", gpu_vision.vision),
    "preprocess": _of("0.5b", gpu_vision.preprocess),
    "prefill": _of("0.5b", gpu_language.prefill),
    "kernels": _of("0.5b", gpu_kernels.kernels),
    "gemv": _of("0.5b", gpu_launches.gemv),
    "7b-decode": _of("7b", gpu_language.decode),
    "7b-ttft": _of("7b", gpu_requests.ttft),
    "7b-prefill": _of("7b", gpu_language.prefill),
    "tiles": _of("0.5b", gpu_kernels.tiles),
    "7b-gemv": _of("7b", gpu_launches.gemv),
    "launches": _of("0.5b", gpu_launches.launches),
    "profile": lambda run: gpu_profile.profile(run.out),
    "suite": _suite,
    "compiled": _of("0.5b", gpu_language.compiled),
    "7b-compiled": _of("7b", gpu_language.compiled),
}
UNWATCHED = ("smoke", "suite")  # they have limits of their own


def run_sections(
    names: Sequence[str],
    run: Run,
    restart: Callable[[Sequence[str]], Any],
    sections: dict[str, Section] = SECTIONS,
) -> None:
    """Runs sections in turn; one that fails leaves a row, and the next goes on.

    Args:
        names: of the sections, in their order.
        run: what they get.
        restart: starts the process again with the sections that are left, where the device is lost.
        sections: by name.
    """
    for index, name in enumerate(names):
        if run.records.is_over:
            run.records.failed("latency", name, "left out: the time budget is over")
            continue
        print(f"== {name}, {run.records.left_s:.0f} s left", flush=True)
        start, rest = time.monotonic(), names[index + 1 :]
        with _watched(name, run.records, partial(restart, rest)):
            is_lost = _run_section(name, sections[name], run)
        print(f"== {name} took {time.monotonic() - start:.1f} s", flush=True)
        if is_lost:
            restart(rest)
            return


def _run_section(name: str, section: Section, run: Run) -> bool:
    """Whether the device is lost behind it."""
    try:
        section(run)
    except OutOfTime:
        run.records.failed("latency", name, "ended: the time budget is over")
    except Exception as error:  # noqa: BLE001 - the next section may still tell something
        traceback.print_exc()
        run.records.failed("latency", name, f"{type(error).__name__}: {error}")
    gc.collect()
    return is_lost(run.device)


@contextlib.contextmanager
def _watched(name: str, records: Records, restart: Callable[[], Any]) -> Any:
    """Starts the process again if what is inside takes too long: a kernel may never end."""

    def give_up() -> None:
        records.failed("latency", name, f"stuck: not done in {SECTION_S} s")
        restart()

    timer = threading.Timer(SECTION_S, give_up)
    timer.daemon = True
    if name not in UNWATCHED:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def start_again(args: argparse.Namespace, records: Records, names: Sequence[str]) -> None:
    """Replaces this process by one that goes on with the sections that are left."""
    if not names:
        os._exit(0)
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(args.out), "--continued"]
    command += ["--budget-s", str(records.left_s), "--only", *names]
    print(f"== the device is lost; going on with {' '.join(names)}", flush=True)
    os.closerange(3, 4096)  # the driver's files: closing them frees what the device holds
    os.execv(sys.executable, command)


def measured_header(words: list[str]) -> Header:
    """The header of a run on this device: its limits, no rates of ovfast."""
    quiet, threads = quiet_check(), torch.get_num_threads()
    limits = measure_limits(CUDA, threads)
    given = [Path(word).name if word.startswith("/") else word for word in words[1:]]
    command = " ".join(["python -m benchmarks.gpu", *given])
    return make_header(command, Calibration("cuda", "triton", threads, limits, {}), quiet)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--budget-s", type=float, default=480, help="no section starts after it")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections")
    parser.add_argument("--continued", action="store_true", help="adds to the record that is there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu measures a CUDA device, and none was found here")
    started = time.monotonic()
    path = args.out / f"gpu-{torch.cuda.get_device_name(0).replace(' ', '-')}.jsonl"
    header = read(path).header if args.continued else measured_header(sys.argv)
    budget_s = args.budget_s - (time.monotonic() - started)
    records = Records(path, budget_s, header, is_continued=args.continued)
    names = [name for name in SECTIONS if name in (args.only or SECTIONS)]
    with tempfile.TemporaryDirectory() as directory:
        run = Run(records, args.out, Path(directory))
        run_sections(names, run, partial(start_again, args, records))


if __name__ == "__main__":
    main()
