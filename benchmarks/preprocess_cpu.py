"""Preprocessing on a CPU: a decoded picture to the bytes the tower reads, beside transformers.

    python -m benchmarks.preprocess_cpu [--sizes 1024x768,640x480] [--threads 2] [--pairs 40]
    [--out FILE.json]

Ours ends with uint8 pictures in one buffer and the windows of all views, theirs with float32 views
(its Pillow processor: resize, pad, crop, rescale, normalise); their pixels are compared first. The
two run in turn (A B A B) in one process on a new picture each time. "new size" is ours where no
picture of that size came before, so that the tables of the resize are made as well. The floor is
what has to be moved, the picture once and the buffer once, at the copy rate measured here; a cache
that holds both goes below it.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.side_by_side import commit, cpu_name, write_record
from ovfast.anyres import VisualGeometry, VisualOptions, plan_image
from ovfast.ops import make_ops
from ovfast.pixels import PixelLoader, Pixels
from ovfast.reference_pixels import cut_view
from ovfast.resize_table import resize_table

SIDE, PATCH = 384, 14
WARM_UP = 3
CPU = torch.device("cpu")


class Ours:
    """Plans and loads one picture, as an engine with the native back end does."""

    def __init__(self, pinpoints_hw: list[list[int]], threads: int) -> None:
        self._ops = make_ops(CPU, "native", threads=threads)
        assert self._ops.where["resample"] == "native"
        grid = tuple((height, width) for height, width in pinpoints_hw)
        self._geometry = VisualGeometry(SIDE, PATCH, grid, 9)
        self._loader = PixelLoader(self._ops, CPU)

    def forget_sizes(self) -> None:
        """As if no picture had come before."""
        resize_table.cache_clear()
        self._loader = PixelLoader(self._ops, CPU)

    def load(self, picture: NDArray[np.uint8]) -> Pixels:
        size_hw = (picture.shape[0], picture.shape[1])
        plan = plan_image(size_hw, self._geometry, VisualOptions(), num_images=1)
        return self._loader.load([picture], [plan])


def random_picture(size_wh: tuple[int, int], seed: int) -> Image.Image:
    """Smooth random colours with a little noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize(size_wh, Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + rng.integers(-8, 9, smooth.shape, dtype=np.int16)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*arguments)
    return 1e3 * (time.perf_counter() - start), result


def copy_rate() -> float:
    """Bytes read and written a second, the best of several copies of 256 MB."""
    source = torch.ones(64 * 1024 * 1024)
    target = torch.empty_like(source)
    return max(2 * source.nbytes / 1e-3 / timed(target.copy_, source)[0] for _ in range(6))


def same_pixels(ours: Pixels, theirs: torch.Tensor) -> bool:
    views = torch.stack([cut_view(ours.buffer, window, SIDE) for window in ours.windows.tolist()])
    normalised = (views.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    return torch.allclose(normalised, theirs, rtol=0, atol=1e-6)


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p90": ordered[round(0.9 * (len(ordered) - 1))],
        "min": ordered[0],
        "max": ordered[-1],
    }


def compare(
    size_wh: tuple[int, int], pairs: int, ours: Ours, processor: Any, bytes_per_s: float
) -> dict[str, Any]:
    """One size of pictures: the times of both sides and the ratio of each pair."""
    times: dict[str, list[float]] = {"transformers": [], "ovfast": [], "ovfast, new size": []}
    num_bytes = 0

    def process(image: Image.Image) -> torch.Tensor:
        return processor([image], return_tensors="pt")["pixel_values"]

    for pair in range(pairs + WARM_UP):
        image = random_picture(size_wh, pair)
        picture = np.array(image)
        their_ms, theirs = timed(process, image)
        our_ms, pixels = timed(ours.load, picture)
        if pair == 0:
            assert same_pixels(pixels, theirs[0]), f"pixels of {size_wh} differ"
            num_bytes = picture.nbytes + pixels.buffer.nbytes
        ours.forget_sizes()
        new_ms, _ = timed(ours.load, picture)
        if pair >= WARM_UP:
            for name, taken in zip(times, (their_ms, our_ms, new_ms), strict=True):
                times[name].append(taken)
    base = times["transformers"]
    return {
        "size": "x".join(map(str, size_wh)),
        "ms": {name: quantiles(values) for name, values in times.items()},
        "ratio": {
            name: quantiles([a / b for a, b in zip(base, values, strict=True)])
            for name, values in times.items()
            if name != "transformers"
        },
        "floor_ms": 1e3 * num_bytes / bytes_per_s,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import LlavaOnevisionImageProcessorPil

    torch.set_num_threads(args.threads)
    processor = LlavaOnevisionImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    ours = Ours(processor.image_grid_pinpoints, args.threads)
    rate = copy_rate()
    rows = []
    for text in args.sizes.split(","):
        width, height = map(int, text.split("x"))
        rows.append(compare((width, height), args.pairs, ours, processor, rate))
        report(rows[-1])
    return {
        "command": f"python -m benchmarks.preprocess_cpu --sizes {args.sizes}"
        f" --threads {args.threads} --pairs {args.pairs}",
        "machine": {
            "cpu": cpu_name(),
            "python": platform.python_version(),
            "copy_gb_per_s": rate / 1e9,
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "pillow", "numpy")},
        "commit": commit(),
        "rows": rows,
    }


def report(row: dict[str, Any]) -> None:
    for name, ms in row["ms"].items():
        line = f"{row['size']:>10} {name:17} p50 {ms['p50']:7.2f} p90 {ms['p90']:7.2f} ms"
        if name in row["ratio"]:
            ratio = row["ratio"][name]
            line += f"   {ratio['p50']:5.1f}x ({ratio['min']:.1f} to {ratio['max']:.1f})"
        print(line)
    print(f"{row['size']:>10} {'floor':17} {row['floor_ms']:11.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="1024x768,640x480", help="width x height, by commas")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file for the record")
    args = parser.parse_args()
    record = run(args)
    write_record(record, args.out)


if __name__ == "__main__":
    main()
