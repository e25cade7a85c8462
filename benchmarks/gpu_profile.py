"""Where the device's time goes: torch's profiler over a tower encode, a prefill and a decode step.

    python -m benchmarks.gpu_profile --out DIR

A text file of each, kernels by their time on the device, with what the host takes beside it; every
stage is launched eagerly, so that kernels have names. A process of its own: a profiler that has run
once slows what is launched after it, and where drivers are emulated it may not come back.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import Bench, random_pixels
from benchmarks.gpu_steps import Steps
from ovfast.pixels import view_pixels
from tests.support.checkpoints import PRESETS

NUM_VIEWS, PROMPT, CONTEXT = 7, 4096, 1024
ROUNDS = 3
TABLE_ROWS, NAME_WIDTH = 40, 90
PROCESS_S = 75
TAIL_LINES = 6


def profile(out: Path) -> None:
    """Starts the process.

    Raises:
        RuntimeError: it fails; with its last words.
        TimeoutExpired: it takes too long.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_profile", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_S, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-TAIL_LINES:]))


@torch.inference_mode()
def write_tables(bench: Bench) -> None:
    """Writes profile-MODEL-STAGE.txt of each stage."""
    for stage, work in _works(bench).items():
        path = bench.out / f"profile-{bench.name}-{stage}.txt"
        path.write_text(_table(work, bench.device) + "\n")
        print(f"profile of {stage}: {path}", flush=True)


def _works(bench: Bench) -> dict[str, Callable[[], Any]]:
    model, side = bench.model, bench.config.vision.image_size
    tower = model.vision_tower
    tower._graphs = None
    pixels = view_pixels(random_pixels(NUM_VIEWS, side, side), bench.device)
    embeds = bench.random(PROMPT, bench.config.text.hidden_size, scale=0.02)
    cache = model.new_cache(num_slots=1, max_positions=PROMPT)

    def prefill() -> None:
        slot = cache.allocate()
        model.language_model.prefill(embeds, cache, slot)
        cache.free(slot)

    return {
        "tower": lambda: tower.encode(pixels),
        "prefill": prefill,
        "step": Steps(bench, CONTEXT, 1),
    }


def _table(work: Callable[[], Any], device: torch.device) -> str:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    work()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(ROUNDS):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(
        sort_by=by, row_limit=TABLE_ROWS, max_name_column_width=NAME_WIDTH
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(
            "0.5b",
            PRESETS["0.5b"],
            records=None,
            timer=None,
            out=args.out,
            directory=Path(directory),
            device=torch.device("cuda"),
        )
        write_tables(bench)


if __name__ == "__main__":
    main()
