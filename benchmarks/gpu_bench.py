"""What the sections of `benchmarks.gpu` share: a model's two sides, the timer, the records."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import gpu_models
from benchmarks.device_records import PEERS, OutOfTime, Records
from benchmarks.device_timing import Samples, Work
from ovfast.anyres import VisualGeometry, VisualOptions, VisualPlan, plan_image, plan_video
from ovfast.config import ModelConfig
from ovfast.cuda_graphs import DEFAULT_GRAPH_BYTES, CudaCapture, GraphCache
from ovfast.engine import Engine
from ovfast.media import MediaLimits
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.ops import Ops, make_ops
from ovfast.processor import Processor
from tests.support.checkpoints import CheckpointSpec
from tests.support.requests import Request, Span


class Bench:
    """One size of the model; what is large is made when first asked for, and kept.

    Args:
        name: of the size, in the rows.
        spec: its sizes.
        records: takes the rows; None for a process that writes none.
        timer: `device_timing.CudaTimer` or its stand-in.
        out: directory for text files.
        directory: for configuration and tokenizer.
        device: of everything.
        dtype: of weights and activations.
    """

    def __init__(
        self,
        name: str,
        spec: CheckpointSpec,
        *,
        records: Records | None,
        timer: Any,
        out: Path,
        directory: Path,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.name, self.records, self.timer, self.out = name, records, timer, out
        self.spec = replace(spec, dtype=dtype)
        self.device, self.dtype = device, dtype
        self.files = gpu_models.write_files(directory / name, self.spec)
        self.config = ModelConfig.from_checkpoint(self.files)

    @cached_property
    def ops(self) -> Ops:
        return make_ops(self.device, "triton")

    @cached_property
    def model(self) -> LlavaOnevision:
        weights = gpu_models.RandomWeights(self.config, self.spec)
        with torch.inference_mode(False), torch.no_grad():
            return LlavaOnevision(
                self.config, weights, self.ops, self.dtype, self.device, self.new_graphs()
            )

    @cached_property
    def theirs(self) -> Any:
        """Transformers' model with the same weights."""
        with torch.inference_mode(False), torch.no_grad():
            return gpu_models.transformers_model(self.files, self.spec, self.device)

    @cached_property
    def pil_processor(self) -> Any:
        return gpu_models.pil_processor(self.files)

    @cached_property
    def processor(self) -> Processor:
        return Processor(self.files, self.config)

    @property
    def geometry(self) -> VisualGeometry:
        return self.config.geometry

    def new_graphs(self) -> GraphCache | None:
        """Graphs of one model or one engine; engines must not share them."""
        if self.device.type != "cuda":
            return None
        return GraphCache(CudaCapture(self.device), DEFAULT_GRAPH_BYTES)

    def open_engine(self, max_seq_len: int, max_batch_size: int = 1) -> Engine:
        """An engine over the model; closing it leaves the model."""
        return Engine(
            self.model,
            self.processor,
            self.ops,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            visual=VisualOptions(),
            media_limits=MediaLimits(),
            graphs=self.new_graphs(),
        )

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device) * scale

    def plan(self, pixels: np.ndarray) -> VisualPlan:
        """Of a picture (height, width, 3) alone in its request, or of frames."""
        if pixels.ndim == 4:
            size_hw = (pixels.shape[1], pixels.shape[2])
            return plan_video(len(pixels), size_hw, self.geometry, VisualOptions())
        size_hw = (pixels.shape[0], pixels.shape[1])
        return plan_image(size_hw, self.geometry, VisualOptions(), num_images=1)

    def request(self, pixels: np.ndarray) -> Request:
        """A prompt of one medium and nothing else."""
        plan, side = self.plan(pixels), self.config.vision.image_size
        ids = np.zeros(plan.num_tokens, np.int64)
        nothing = np.empty((0, side, side, 3), np.uint8)
        return Request(ids, (Span(0, plan.num_tokens, 0),), (plan,), nothing, (), (pixels,))

    def race(
        self,
        suite: str,
        workload: str,
        samples: Mapping[str, list[float]],
        *,
        parameters: Mapping[str, int | float | str] | None = None,
        **given: Any,
    ) -> None:
        """As `Records.race`; the rows name the model."""
        own = {"model": self.name, **(parameters or {})}
        self.records.race(suite, workload, samples, parameters=own, **given)

    def each(self, workload: str, function: Callable[..., None], *arguments: Any) -> None:
        """Calls function(self, *arguments); if that fails, a row says so and the section goes on.

        Raises:
            OutOfTime: of the function.
            Exception: of the function, where it took the device with it.
        """
        try:
            function(self, *arguments)
        except OutOfTime:
            raise
        except Exception as error:
            traceback.print_exc()
            self.failed(workload, "ovfast", error)
            if is_lost(self.device):
                raise

    def time_device(self, workload: str, works: Mapping[str, Work], **options: Any) -> Samples:
        """As `CudaTimer.device`, of the sides that run; one that fails leaves a row."""
        return self.timer.device(self._able(workload, works), **options)

    def time_host(self, workload: str, works: Mapping[str, Work], **options: Any) -> Samples:
        """As `CudaTimer.host`, of the sides that run; one that fails leaves a row."""
        return self.timer.host(self._able(workload, works), **options)

    def _able(self, workload: str, works: Mapping[str, Work]) -> dict[str, Work]:
        able: dict[str, Work] = {}
        for name, work in works.items():
            try:
                work()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                traceback.print_exc()
                self.failed(workload, name, error)
                if is_lost(self.device):
                    raise
            else:
                able[name] = work
        return able

    def failed(self, workload: str, side: str, error: Exception) -> None:
        """A row of a side, or of a variant of ovfast, that could not be measured."""
        is_variant = side != "ovfast" and side not in PEERS
        self.records.write(
            "ovfast" if is_variant else side,
            "call_ms",
            "ms",
            suite="latency",
            workload=workload,
            error=f"{type(error).__name__}: {error}",
            parameters={"model": self.name} | ({"variant": side} if is_variant else {}),
        )


def is_lost(device: torch.device) -> bool:
    """Whether the device answers no more in this process, as after an illegal access."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def random_pixels(*shape: int) -> np.ndarray:
    """(…, 3) uint8, of no pattern."""
    return np.random.default_rng().integers(0, 256, (*shape, 3), np.uint8)
