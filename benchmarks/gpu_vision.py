"""The vision half of `benchmarks.gpu` by its stages: preprocessing, tower, pixels to rows.

All by the host's clock, from the call to the end of the device's work. Both sides get pictures of
the same sizes; where tables are cached by size every round has a size of its own, as in real life,
and the variant "same size" tells what a repeated size takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_models
from benchmarks.device_timing import cycled
from benchmarks.gpu_bench import Bench, random_pixels
from ovfast.pixels import view_pixels
from ovfast.roofline import vision_flops
from tests.support.requests import Request

VIEWS = (1, 2, 5, 7, 10, 16, 32, 37)
PICTURES_HW = ((384, 384), (480, 640), (768, 1024), (1080, 1920))
NUM_FRAMES, FRAME_HW = 32, (360, 640)
REPEATS, WARM = 8, 2  # transformers takes 0.1 s and more
NEW_SIZES = REPEATS + WARM
Upstream = dict[str, Callable[[np.ndarray], Any]]


@torch.inference_mode()
def tower(bench: Bench) -> None:
    """By graphs and launch by launch, against transformers (sdpa) on normalised pixels."""
    for num_views in VIEWS:
        bench.each(f"tower, {num_views} views", _race_tower, num_views)


def _race_tower(bench: Bench, num_views: int) -> None:
    ours = bench.model.vision_tower
    graphs, side = ours._graphs, bench.config.vision.image_size
    views = random_pixels(num_views, side, side)
    pixels = view_pixels(views, bench.device)
    normalised = normalise(views, bench)

    def run(used: Any) -> torch.Tensor:
        ours._graphs = used
        return ours.encode(pixels)

    works: dict[str, Callable[[], Any]] = {
        "ovfast": lambda: run(graphs),
        "eager": lambda: run(None),
        "transformers": lambda: bench.theirs.model.vision_tower(
            normalised, output_hidden_states=True
        ),
    }
    try:
        samples = bench.time_host(f"tower, {num_views} views", works)
    finally:
        ours._graphs = graphs
    flop = float(vision_flops(bench.config.vision, num_views))
    bench.race("latency", f"tower, {num_views} views", samples, metric="tower_ms", flop=flop)


def normalise(views: np.ndarray, bench: Bench) -> torch.Tensor:
    """(views, side, side, 3) uint8 as transformers' tower takes them."""
    floats = torch.from_numpy(views).to(bench.device).permute(0, 3, 1, 2).float()
    return (floats / 127.5 - 1).to(bench.dtype)


def sizes(size_hw: tuple[int, int], index: int) -> tuple[int, int]:
    """A size of its own for each round, with as many views."""
    return size_hw[0] - index, size_hw[1] - index


@torch.inference_mode()
def vision(bench: Bench) -> None:
    """From decoded pixels to rows; transformers' side is its Pillow processor and its features."""
    for size_hw in PICTURES_HW:
        bench.each(f"vision, {size_hw[1]}x{size_hw[0]}", _race_vision, size_hw, 0)
    bench.each(f"vision, {NUM_FRAMES} frames", _race_vision, FRAME_HW, NUM_FRAMES)


def _race_vision(bench: Bench, size_hw: tuple[int, int], num_frames: int) -> None:
    frames = (num_frames,) if num_frames else ()

    def make(index: int) -> Request:
        return bench.request(random_pixels(*frames, *sizes(size_hw, index)))

    new, same, others = cycled(make, NEW_SIZES), make(0), cycled(make, NEW_SIZES)
    upstream = _clip_features if num_frames else _picture_features
    works: dict[str, Callable[[], Any]] = {
        "ovfast": lambda: bench.model.build_inputs_embeds(next(new)),
        "same size": lambda: bench.model.build_inputs_embeds(same),
        "transformers": lambda: upstream(bench, next(others).media[0]),
    }
    what = f"{num_frames} frames" if num_frames else f"{size_hw[1]}x{size_hw[0]}"
    samples = bench.time_host(f"vision, {what}", works, repeats=REPEATS, warm=WARM)
    num_views = same.plans[0].num_views
    flop = float(vision_flops(bench.config.vision, num_views))
    name = f"vision, {what}, {num_views} views"
    bench.race("latency", name, samples, metric="vision_ms", flop=flop)


def _picture_features(bench: Bench, pixels: np.ndarray) -> Any:
    made = bench.pil_processor([pixels], return_tensors="pt")
    return bench.theirs.model.get_image_features(
        made["pixel_values"].to(bench.device, bench.dtype), made["image_sizes"].to(bench.device)
    )


def _clip_features(bench: Bench, pixels: np.ndarray) -> Any:
    return bench.theirs.model.get_video_features(clip_pixels(bench, pixels))


def clip_pixels(bench: Bench, frames: Any) -> torch.Tensor:
    """Frames (decoded, or arrays) as transformers' model takes a video: its processor needs
    torchvision, so Pillow resizes them as it does.
    """
    from PIL import Image

    side = bench.config.vision.image_size
    pictures = (Image.fromarray(f) if isinstance(f, np.ndarray) else f for f in frames)
    resized = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized]))
    floats = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    return floats[None].to(bench.device, bench.dtype)


@torch.inference_mode()
def preprocess(bench: Bench) -> None:
    """Decoded picture or clip to pixels on the device; transformers' Pillow and fast processors."""
    upstream: Upstream = {"transformers": partial(_processed, bench, bench.pil_processor)}
    try:
        fast = gpu_models.fast_processor(bench.files)
        upstream["transformers-fast"] = partial(_processed, bench, fast, device=str(bench.device))
    except (ImportError, AttributeError, OSError) as error:
        bench.failed("preprocess", "transformers-fast", error)
    for size_hw in PICTURES_HW:
        name = f"preprocess {size_hw[1]}x{size_hw[0]}"
        bench.each(name, _race_preprocess, name, size_hw, 0, upstream)
    name, by_pillow = f"preprocess {NUM_FRAMES} frames", partial(clip_pixels, bench)
    bench.each(name, _race_preprocess, name, FRAME_HW, NUM_FRAMES, {"transformers": by_pillow})


def _processed(bench: Bench, processor: Any, pixels: np.ndarray, **options: Any) -> torch.Tensor:
    made = processor([pixels], return_tensors="pt", **options)
    return made["pixel_values"].to(bench.device, bench.dtype)


def _race_preprocess(
    bench: Bench, name: str, size_hw: tuple[int, int], num_frames: int, upstream: Upstream
) -> None:
    frames = (num_frames,) if num_frames else ()

    def make(index: int) -> tuple[np.ndarray, Any]:
        pixels = random_pixels(*frames, *sizes(size_hw, index))
        return pixels, bench.plan(pixels)

    def ours(pixels: np.ndarray, plan: Any) -> Any:
        return bench.model._pixel_loader.load([pixels], [plan])

    new, same = cycled(make, NEW_SIZES), make(0)
    works: dict[str, Callable[[], Any]] = {
        "ovfast": lambda: ours(*next(new)),
        "same size": lambda: ours(*same),
    }
    for side, run in upstream.items():
        others = cycled(make, NEW_SIZES)
        works[side] = lambda run=run, others=others: run(next(others)[0])
    samples = bench.time_host(name, works, repeats=REPEATS, warm=WARM)
    num_bytes = float(same[0].nbytes) + 3.0 * same[1].num_views * _view_pixels(bench)
    bench.race("latency", name, samples, metric="preprocess_ms", num_bytes=num_bytes)


def _view_pixels(bench: Bench) -> int:
    return bench.config.vision.image_size**2
