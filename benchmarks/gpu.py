"""Everything that only a CUDA device can tell, in one command, ordered by value.

    python -m benchmarks.gpu [--out DIR] [--budget-s 480] [--only SECTION ...]

tests      the correctness suite, `pytest -m gpu`
decode     a decode step by rows and context, beside its floor and transformers' generate
ttft       first token from JPEG bytes, against transformers
tower      SigLIP at 1 to 37 views, against transformers (sdpa, bf16), eager and by graphs
vision     decoded picture to rows of the language model's input, preprocessing included
preprocess decoded picture to device pixels, against transformers' Pillow processor
kernels    each kernel of the vision half at the tower's shapes, against what torch has
tiles      every tile of fused_linear at every shape, from which its table is to be made

Rows go to DIR/gpu-DEVICE.jsonl as soon as they are known, in the format of `ovfast.bench.record`;
the header holds the copy and bf16 product rate of the device, beside which all is put. Weights are
random, at the full size of 0.5B; every picture is new. There is no fallback: without a CUDA device
it says so and stops.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import gpu_language
from benchmarks.device_timing import Records, host_race, race
from ovfast.anyres import VisualGeometry, VisualOptions, plan_image, plan_video
from ovfast.bench.calibration import Calibration
from ovfast.bench.limits import measure_limits
from ovfast.bench.machine import make_header, quiet_check
from ovfast.bench.record import Header
from ovfast.checkpoint import CheckpointWeights
from ovfast.config import ModelConfig
from ovfast.cuda_graphs import DEFAULT_GRAPH_BYTES, CudaCapture, GraphCache
from ovfast.kernels import attention, fused_linear, layer_norm
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.ops import make_ops
from ovfast.pixels import view_pixels
from ovfast.roofline import vision_flops
from tests.support.checkpoints import PRESETS, make_checkpoint
from tests.support.requests import Request, Span

CUDA = torch.device("cuda")
DTYPE = torch.bfloat16
TESTS_TIMEOUT_S = 240
VIEWS = (1, 2, 5, 7, 10, 16, 37)
PICTURES_HW = ((384, 384), (480, 640), (768, 1024), (1080, 1920))
NUM_FRAMES, FRAME_HW = 32, (360, 640)


@dataclass(frozen=True, slots=True)
class Bench:
    """What the sections share."""

    records: Records
    checkpoint: Path
    model: LlavaOnevision

    @property
    def geometry(self) -> VisualGeometry:
        config = self.model.config
        return VisualGeometry(
            config.vision.image_size,
            config.vision.patch_size,
            config.grid_pinpoints_hw,
            config.anyres_max,
        )

    def theirs(self) -> Any:
        """Transformers' model with the same weights, made when a section needs it."""
        from transformers import LlavaOnevisionForConditionalGeneration

        loaded = LlavaOnevisionForConditionalGeneration.from_pretrained(
            self.checkpoint, dtype=DTYPE, attn_implementation="sdpa"
        )
        return loaded.to(CUDA).eval()

    def processor(self) -> Any:
        """Transformers' Pillow image processor."""
        from transformers import LlavaOnevisionImageProcessorPil

        return LlavaOnevisionImageProcessorPil.from_pretrained(self.checkpoint)


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (*shape, 3), np.uint8)


@torch.inference_mode()
def tower(bench: Bench) -> None:
    theirs = bench.theirs().model.vision_tower
    for num_views in (*VIEWS, NUM_FRAMES):
        _race_tower(bench, theirs, num_views)


def _race_tower(bench: Bench, theirs: Any, num_views: int) -> None:
    ours = bench.model.vision_tower
    graphs = ours._graphs
    views = random_pixels(num_views, 384, 384)
    pixels = view_pixels(views, CUDA)
    floats = torch.from_numpy(views).to(CUDA).permute(0, 3, 1, 2).float()
    normalised = (floats / 127.5 - 1).to(DTYPE)

    def eager() -> torch.Tensor:
        ours._graphs = None
        return ours.encode(pixels)

    def replayed() -> torch.Tensor:
        ours._graphs = graphs
        return ours.encode(pixels)

    def upstream() -> Any:
        return theirs(normalised, output_hidden_states=True)

    try:
        samples = race({"ovfast": replayed, "eager": eager, "transformers": upstream})
    finally:
        ours._graphs = graphs
    flop = float(vision_flops(bench.model.config.vision, num_views))
    bench.records.race(
        "latency", f"tower, {num_views} views", samples, metric="tower_ms", flop=flop
    )


def _request(bench: Bench, pixels: np.ndarray) -> Any:
    """A prompt of one medium alone."""
    if pixels.ndim == 4:
        plan = plan_video(len(pixels), pixels.shape[1:3], bench.geometry, VisualOptions())
    else:
        plan = plan_image(pixels.shape[:2], bench.geometry, VisualOptions(), num_images=1)
    ids = np.zeros(plan.num_tokens, np.int64)
    nothing = np.empty((0, 384, 384, 3), np.uint8)
    return Request(ids, (Span(0, plan.num_tokens, 0),), (plan,), nothing, (), (pixels,))


@torch.inference_mode()
def vision(bench: Bench) -> None:
    """From decoded pixels to rows; transformers' side is its Pillow processor and its features."""
    theirs = bench.theirs().model
    for size_hw in PICTURES_HW:
        _race_vision(bench, theirs, random_pixels(*size_hw))
    clip = _request(bench, random_pixels(NUM_FRAMES, *FRAME_HW))
    samples = host_race({"ovfast": lambda: bench.model.build_inputs_embeds(clip)})
    flop = float(vision_flops(bench.model.config.vision, NUM_FRAMES))
    bench.records.race(
        "latency", f"vision, {NUM_FRAMES} frames", samples, metric="vision_ms", flop=flop
    )


def _race_vision(bench: Bench, theirs: Any, pixels: np.ndarray) -> None:
    request, processor = _request(bench, pixels), bench.processor()

    def upstream() -> Any:
        made = processor([pixels], return_tensors="pt")
        return theirs.get_image_features(
            made["pixel_values"].to(CUDA, DTYPE), made["image_sizes"].to(CUDA)
        )

    def ours() -> torch.Tensor:
        return bench.model.build_inputs_embeds(request)

    samples = host_race({"ovfast": ours, "transformers": upstream})
    num_views = request.plans[0].num_views
    flop = float(vision_flops(bench.model.config.vision, num_views))
    name = f"vision, {pixels.shape[1]}x{pixels.shape[0]}, {num_views} views"
    bench.records.race("latency", name, samples, metric="vision_ms", flop=flop)


@torch.inference_mode()
def preprocess(bench: Bench) -> None:
    for size_hw in PICTURES_HW:
        _race_preprocess(bench, random_pixels(*size_hw))


def _race_preprocess(bench: Bench, pixels: np.ndarray) -> None:
    plan = plan_image(pixels.shape[:2], bench.geometry, VisualOptions(), num_images=1)
    processor = bench.processor()
    works: dict[str, Callable[[], Any]] = {
        "ovfast": lambda: bench.model._pixel_loader.load([pixels], [plan]),
        "transformers": lambda: processor([pixels], return_tensors="pt")["pixel_values"].to(
            CUDA, DTYPE
        ),
    }
    name = f"preprocess {pixels.shape[1]}x{pixels.shape[0]}"
    try:
        from transformers import LlavaOnevisionImageProcessorFast

        fast = LlavaOnevisionImageProcessorFast.from_pretrained(bench.checkpoint)
        works["transformers-fast"] = lambda: fast([pixels], return_tensors="pt", device="cuda")
    except ImportError as error:
        bench.records.write(
            "transformers-fast",
            "preprocess_ms",
            "ms",
            suite="latency",
            workload=name,
            error=f"{error}",
        )
    samples, num_bytes = host_race(works), 2 * pixels.nbytes
    bench.records.race("latency", name, samples, metric="preprocess_ms", num_bytes=num_bytes)


@torch.inference_mode()
def kernels(bench: Bench) -> None:
    for num_views in VIEWS:
        _race_layer_norm(bench, num_views)
        _race_attention(bench, num_views)


def _race_layer_norm(bench: Bench, num_views: int) -> None:
    vision = bench.model.config.vision
    width = vision.hidden_size
    x = torch.randn(num_views * vision.tokens_per_view, width, dtype=DTYPE, device=CUDA)
    gain, shift = (torch.randn(width, dtype=DTYPE, device=CUDA) for _ in range(2))
    samples = race(
        {
            "ovfast": lambda: layer_norm.layer_norm(x, gain, shift, 1e-6),
            "torch": lambda: F.layer_norm(x, (width,), gain, shift, 1e-6),
        }
    )
    name, num_bytes = f"layer_norm, {num_views} views", 2 * x.nbytes
    bench.records.race("kernels", name, samples, num_bytes=num_bytes)


def _race_attention(bench: Bench, num_views: int) -> None:
    vision = bench.model.config.vision
    heads, tokens, width = vision.num_heads, vision.tokens_per_view, vision.hidden_size
    qkv = torch.randn(num_views * tokens, 3 * width, dtype=DTYPE, device=CUDA)
    q, k, v = qkv.view(num_views, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    samples = race(
        {
            "ovfast": lambda: attention.attention(qkv, num_heads=heads, tokens_per_view=tokens),
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        }
    )
    name, flop = f"view_attention, {num_views} views", 4.0 * num_views * tokens**2 * width
    bench.records.race("kernels", name, samples, flop=flop)


@torch.inference_mode()
def tiles(bench: Bench) -> None:
    """Every tile at every shape, and whether it gives the same bits as the others."""
    vision = bench.model.config.vision
    width, wide = vision.hidden_size, vision.intermediate_size
    for num_views in VIEWS:
        rows = num_views * vision.tokens_per_view
        _race_tiles(
            bench, f"fused_linear qkv, {num_views} views", (rows, 3 * width, width), None, False
        )
        _race_tiles(bench, f"fused_linear out, {num_views} views", (rows, width, width), None, True)
        _race_tiles(
            bench, f"fused_linear fc1, {num_views} views", (rows, wide, width), "gelu_tanh", False
        )
        _race_tiles(bench, f"fused_linear fc2, {num_views} views", (rows, width, wide), None, True)


def _race_tiles(
    bench: Bench, name: str, shape: tuple[int, int, int], activation: Any, has_residual: bool
) -> None:
    rows, n, k = shape
    weight = torch.randn(n, k, dtype=DTYPE, device=CUDA) * k**-0.5
    bias = torch.randn(n, dtype=DTYPE, device=CUDA)
    x = torch.randn(rows, k, dtype=DTYPE, device=CUDA)
    residual = torch.randn(rows, n, dtype=DTYPE, device=CUDA) if has_residual else None

    def ours(tile: Any = None) -> torch.Tensor:
        return fused_linear.fused_linear(
            x, weight, bias, activation=activation, residual=residual, tile=tile
        )

    works: dict[str, Callable[[], Any]] = {
        "ovfast": ours,
        "cublas": lambda: F.linear(x, weight, bias),
    }
    candidates = [tile for tile, _ in fused_linear._HALF_TILES]
    for tile in candidates:
        works[f"{tile.block_m}x{tile.block_n}"] = partial(ours, tile)
    bench.records.race("kernels", name, race(works), flop=2.0 * rows * n * k)
    equal = all(torch.equal(ours(tile), ours()) for tile in candidates)
    bench.records.write(
        "ovfast", "same_bits", "%", suite="accuracy", workload=name, samples=(100.0 * equal,)
    )


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "decode": gpu_language.decode,
    "ttft": gpu_language.ttft,
    "tower": tower,
    "vision": vision,
    "preprocess": preprocess,
    "kernels": kernels,
    "tiles": tiles,
}


def run_tests(records: Records) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x", "--no-header"]
    row = {"suite": "accuracy", "workload": "pytest -m gpu"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TESTS_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        records.write("ovfast", "passed", "%", **row, error=f"not done in {TESTS_TIMEOUT_S} s")
        return
    if done.returncode:
        said = "\n".join(done.stdout.strip().splitlines()[-12:])
        records.write("ovfast", "passed", "%", **row, error=said or f"code {done.returncode}")
    else:
        records.write("ovfast", "passed", "%", **row, samples=(100.0,))


def load_model(checkpoint: Path) -> LlavaOnevision:
    config = ModelConfig.from_checkpoint(checkpoint)
    weights = CheckpointWeights(checkpoint, config)
    graphs = GraphCache(CudaCapture(CUDA), DEFAULT_GRAPH_BYTES)
    model = LlavaOnevision(config, weights, make_ops(CUDA, "triton"), DTYPE, CUDA, graphs)
    weights.finish()
    return model


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
    parser.add_argument("--only", nargs="+", choices=["tests", *SECTIONS], help="these sections")
    parser.add_argument("--checkpoint", type=Path, help="of 0.5B; None makes a random one")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu measures a CUDA device, and none was found here")
    device = torch.cuda.get_device_name(0).replace(" ", "-")
    records = Records(args.out / f"gpu-{device}.jsonl", args.budget_s, measured_header(sys.argv))
    wanted = args.only or ["tests", *SECTIONS]
    if "tests" in wanted:
        run_tests(records)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = args.checkpoint or make_checkpoint(Path(directory), PRESETS["0.5b"])
        bench = Bench(records, checkpoint, load_model(checkpoint))
        for name, section in SECTIONS.items():
            if name not in wanted:
                continue
            if records.is_over:
                records.failed("latency", name, "left out: the time budget is over")
                continue
            try:
                section(bench)
            except Exception as error:  # noqa: BLE001 - the next section may still tell something
                records.failed("latency", name, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
