"""Measures a machine once: its limits, and the rates that ovfast attains on it.

Rates come from requests to two small engines, timed as users see them: a slice of the 0.5B model,
whose time is that of its products, and the demo model, whose time is that of everything else.
Attention is timed by itself, because in a slice it is too small a part. Nothing is kept: what is
measured goes into the record of a run, or to `Engine.estimate`.
"""

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ovfast.anyres import VisualOptions, VisualPlan
from ovfast.bench.limits import Limits, best_of, measure_limits, seconds, torch_threads
from ovfast.bench.slice_engine import TEXT, VISION, open_slice
from ovfast.config import ModelConfig
from ovfast.cpu_threads import available_threads
from ovfast.engine import Engine
from ovfast.home_stream import use_device
from ovfast.loading import load, resolve_device
from ovfast.ops import Ops, make_ops
from ovfast.outputs import Timings
from ovfast.roofline import (
    Machine,
    decode_stage,
    kv_bytes_per_token,
    megapixels,
    prefill_stage,
    projector_stage,
    tower_stage,
)
from ovfast.stage_cost import Rates, StageRates
from ovfast.storage import BFLOAT16_MATMUL, GROUPS, bytes_per_param, load_options

__all__ = ["Calibration", "calibrate", "measure_machine"]

# The demo's milliseconds are often cut by others: so many that their median is not.
SLICE_REPEATS, PICTURE_REPEATS, TEXT_REPEATS, ATTENTION_REPEATS = 3, 9, 31, 5
NEW_TOKENS = 17
DEMO_PICTURE_HW = (480, 640)
PROMPT_TOKENS = 1024  # of the causal attention
CACHED_TOKENS, CACHES = 2048, 32  # of single queries: together more than a cache holds
LEAST_SHARE = 0.5  # of the slice's time that is left to its products, however noisy the rest


@dataclass(frozen=True, slots=True)
class Calibration:
    """One machine with so many threads.

    Attributes:
        device: "cpu" or "cuda".
        backend: that was measured.
        threads: of the native back end, or of plain torch.
        limits: the most that the machine was seen to do.
        rates: storage → what ovfast attains.
    """

    device: str
    backend: str
    threads: int
    limits: Limits
    rates: Mapping[str, Rates]

    def machine(self, storage: str) -> Machine:
        """Limits at the precision of a storage, and rates where it was measured."""
        limits = self.limits
        exact = limits.bfloat16_gflops if self.device == "cuda" else limits.float32_gflops
        assert exact is not None
        gflops = exact
        if storage in GROUPS:
            gflops = max(exact, limits.int8_gops or 0.0)
        elif storage == BFLOAT16_MATMUL:
            gflops = max(exact, limits.bfloat16_gflops or 0.0)
        # Quantised attention multiplies 16 bits: two products in the lane of one in float32.
        attention = 2 * exact if storage in (*GROUPS, BFLOAT16_MATMUL) else exact
        if storage == "fp8":
            gflops = 2 * exact  # of tensor cores, beside bfloat16; attention is not float8
        read = max(limits.read_gb_per_s.values())
        return Machine(read, gflops, attention, self.rates.get(storage))

    def as_dict(self) -> dict[str, Any]:
        """For the header of a record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """As the header of a record holds it."""
        rates = {}
        for storage, entry in values["rates"].items():
            stages = {name: StageRates(**entry[name]) for name in ("tower", "prefill")}
            rates[storage] = Rates(**(entry | stages))
        return cls(**(dict(values) | {"limits": Limits(**values["limits"]), "rates": rates}))


def calibrate(
    device: str = "auto",
    *,
    backend: str = "auto",
    threads: int | None = None,
    storages: Sequence[str] = ("float32",),
) -> Calibration:
    """Measures this machine: about three seconds, and five for each storage on two cores.

    Args:
        device: as for `ovfast.load`.
        backend: as for `ovfast.load`.
        threads: as for `ovfast.load`, and of torch.
        storages: of weights: "float32", "bfloat16", "float16", "bfloat16-matmul", "int8",
            "int4".

    Raises:
        BackendError, QuantizationError: what is asked for is not here.
    """
    target = resolve_device(device)
    count = available_threads() if threads is None else threads
    limits = measure_limits(target, count)
    ops = make_ops(target, backend, threads=count)
    # As `load` has it: torch's threads are those of plain torch, and else left alone.
    plain = ops.backend == "reference" and target.type == "cpu"
    with use_device(target), torch_threads(count if plain else torch.get_num_threads()):
        rates = {name: _measure_rates(target, ops.backend, name, count) for name in storages}
    # Again at the end: one slow moment at the start would make limits that are then exceeded.
    limits = best_of(limits, measure_limits(target, count))
    return Calibration(target.type, ops.backend, count, limits, rates)


def measure_machine(engine: Engine) -> Machine:
    """This machine as an engine uses it, for `engine.estimate(..., machine=...)`.

    Args:
        engine: gives device, back end, threads and storage.
    """
    threads = engine.ops.pool.num_threads if engine.ops.pool else torch.get_num_threads()
    calibration = calibrate(
        str(engine.device),
        backend=engine.ops.backend,
        threads=threads,
        storages=(engine.storage,),
    )
    return calibration.machine(engine.storage)


@dataclass(frozen=True, slots=True)
class Timed:
    """Medians of a request's timings.

    Attributes:
        config: of the model that answered.
        plans: of its pictures.
        prompt_tokens: of the request.
        timings: NEW_TOKENS tokens were generated.
    """

    config: ModelConfig
    plans: tuple[VisualPlan, ...]
    prompt_tokens: int
    timings: Timings


@dataclass(frozen=True, slots=True)
class AttentionRates:
    """Of attention by itself."""

    view_gflops: float
    causal_gflops: float
    cache_gb_per_s: float


def _measure_rates(device: torch.device, backend: str, storage: str, threads: int) -> Rates:
    with open_slice(device, backend, storage, threads) as engine:
        picture = _noise((VISION.image_size, VISION.image_size))
        visual = VisualOptions(max_views=1)
        wide = _timed(engine, SLICE_REPEATS, images=picture, visual=visual)
        attention = _attention_rates(engine.ops, engine.device, engine.dtype)
        ops, element_bytes = engine.ops, engine.dtype.itemsize
    kept: dict[str, Any] = load_options(storage)
    with load("demo", device=device, backend=backend, threads=threads, **kept) as engine:
        text = _timed(engine, TEXT_REPEATS)
        narrow = _timed(engine, PICTURE_REPEATS, images=_jpeg(DEMO_PICTURE_HW))
    sizes = bytes_per_param(storage), element_bytes
    return solve(wide, narrow, text, attention, *sizes, ops.views_a_step)


def solve(
    wide: Timed,
    narrow: Timed,
    text: Timed,
    attention: AttentionRates,
    weight_bytes_per_param: float,
    kv_bytes_per_element: float,
    views_a_step: int,
) -> Rates:
    """The rates under which `Stage.predicted_ms` gives what was timed.

    Products take most of the wide model's time and layers most of the narrow one's, so two rounds
    from layers that cost nothing are enough.

    Args:
        wide: a picture, to the slice.
        narrow: a picture, to the demo model.
        text: text alone, to the demo model.
        attention: measured by itself.
        weight_bytes_per_param: of the storage.
        kv_bytes_per_element: of the cache.
        views_a_step: of the back end.
    """
    sizes = weight_bytes_per_param, kv_bytes_per_element
    tower = StageRates(1.0, attention.view_gflops, 0.0)
    prefill = StageRates(1.0, attention.causal_gflops, 0.0)
    step_layer_ms = 0.0
    for _ in range(2):
        step = _step_rates(wide, text, sizes, attention.cache_gb_per_s, step_layer_ms)
        weights_gb_per_s, step_layer_ms = step
        weight_ms = weight_bytes_per_param / (weights_gb_per_s * 1e6)
        tower = _tower_rates(wide, narrow, tower, views_a_step, weight_ms)
        prefill = _prefill_rates(wide, text, prefill, weight_ms)
    before_model = narrow.timings.media_ms + narrow.timings.preprocess_ms
    pictures_ms = before_model - text.timings.preprocess_ms
    return Rates(
        tower=tower,
        prefill=prefill,
        weights_gb_per_s=weights_gb_per_s,
        cache_gb_per_s=attention.cache_gb_per_s,
        step_layer_ms=step_layer_ms,
        request_ms=max(0.0, text.timings.ttft_ms - text.timings.prefill_ms),
        picture_ms_per_megapixel=max(0.0, pictures_ms) / megapixels(narrow.plans),
        views_a_step=views_a_step,
    )


def _tower_rates(
    wide: Timed, narrow: Timed, before: StageRates, views_a_step: int, weight_ms: float
) -> StageRates:
    """`weight_ms`: to read a weight."""
    stages, times = [], []
    for timed in (wide, narrow):
        views = sum(plan.num_views for plan in timed.plans)
        tower = tower_stage(timed.config.vision, views, 1)
        projector = projector_stage(timed.config, timed.plans, 1)
        products = tower.product_flops + projector.product_flops
        weights = tower.weight_bytes + projector.weight_bytes
        groups = -(-views // views_a_step)
        stages.append((products, tower.attention_flops, groups * tower.num_layers))
        times.append(timed.timings.vision_ms - weights * weight_ms)
    return _solve_stage(stages, times, before)


def _prefill_rates(wide: Timed, text: Timed, before: StageRates, weight_ms: float) -> StageRates:
    work, times = [], []
    for timed in (wide, text):
        stage = prefill_stage(timed.config.text, timed.prompt_tokens, 1)
        work.append((stage.product_flops, stage.attention_flops, stage.num_layers))
        times.append(timed.timings.prefill_ms - stage.weight_bytes * weight_ms)
    return _solve_stage(work, times, before)


def _solve_stage(
    work: Sequence[tuple[int, int, int]], times_ms: Sequence[float], before: StageRates
) -> StageRates:
    """From (products, attention, layers) of a wide and a narrow model and their times."""
    rest: list[float] = []
    for (_, attention, layers), time_ms in zip(work, times_ms, strict=True):
        others_ms = attention / (before.attention_gflops * 1e6)
        rest.append(time_ms - others_ms - (layers * before.layer_ms if not rest else 0.0))
    gflops = work[0][0] / (max(rest[0], LEAST_SHARE * times_ms[0]) * 1e6)
    products, _, layers = work[1]
    layer_ms = max(0.0, rest[1] - products / (gflops * 1e6)) / layers
    return StageRates(gflops, before.attention_gflops, layer_ms)


def _step_rates(
    wide: Timed,
    text: Timed,
    sizes: tuple[float, float],
    cache_gb_per_s: float,
    layer_ms: float,
) -> tuple[float, float]:
    """(weights_gb_per_s, step_layer_ms)."""
    steps = [
        decode_stage(timed.config.text, timed.prompt_tokens + NEW_TOKENS // 2, *sizes)
        for timed in (wide, text)
    ]
    wide_ms, narrow_ms = (
        timed.timings.tpot_ms - step.cache_bytes / (cache_gb_per_s * 1e6)
        for timed, step in zip((wide, text), steps, strict=True)
    )
    left_ms = max(wide_ms - steps[0].num_layers * layer_ms, LEAST_SHARE * wide.timings.tpot_ms)
    rate = steps[0].weight_bytes / (left_ms * 1e6)
    own_ms = max(0.0, narrow_ms - steps[1].weight_bytes / (rate * 1e6))
    return rate, own_ms / steps[1].num_layers


def _timed(engine: Engine, repeats: int, **media: Any) -> Timed:
    """A request some times over, after one that does not count."""
    inputs = engine.prepare("What is shown here?", **media)
    runs = [
        engine.generate(
            "What is shown here?", max_new_tokens=NEW_TOKENS, ignore_eos=True, **media
        ).timings
        for _ in range(repeats + 1)
    ]
    medians = {
        name: statistics.median(getattr(run, name) for run in runs[1:])
        for name in Timings.__dataclass_fields__
    }
    return Timed(engine.config, tuple(inputs.plans), inputs.num_tokens, Timings(**medians))


def _attention_rates(ops: Ops, device: torch.device, dtype: torch.dtype) -> AttentionRates:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    qkv = random(VISION.tokens_per_view, 3 * VISION.hidden_size)
    q = random(PROMPT_TOKENS, TEXT.num_heads, TEXT.head_dim)
    k, v = random(2, TEXT.num_kv_heads, PROMPT_TOKENS, TEXT.head_dim)
    caches = random(2, CACHES, TEXT.num_kv_heads, CACHED_TOKENS, TEXT.head_dim)
    works = (
        lambda: ops.view_attention(qkv, VISION.num_heads, VISION.tokens_per_view),
        lambda: ops.causal_attention(q, k, v, range(PROMPT_TOKENS)),
        lambda: _attend_caches(ops, q[-1:], *caches),
    )
    with torch.inference_mode():
        times = [statistics.median(seconds(work, device, ATTENTION_REPEATS)) for work in works]
    tower = tower_stage(VISION, 1, 0).attention_flops / VISION.num_layers
    prompt = 2 * PROMPT_TOKENS**2 * TEXT.num_heads * TEXT.head_dim
    read = CACHES * CACHED_TOKENS * kv_bytes_per_token(TEXT, dtype.itemsize) / TEXT.num_layers
    return AttentionRates(tower / times[0] / 1e9, prompt / times[1] / 1e9, read / times[2] / 1e9)


def _attend_caches(ops: Ops, q: Tensor, k_caches: Tensor, v_caches: Tensor) -> None:
    """A query over each of some caches, by the kernel of the decode step where it can be called."""
    if ops.native is None:
        for k, v in zip(k_caches, v_caches, strict=True):
            ops.decode_attention(q, k, v)
        return
    out = torch.empty(1, q.shape[1] * q.shape[2]).numpy()
    arrays = q.numpy(), k_caches.numpy(), v_caches.numpy()
    last = np.array([k_caches.shape[2] - 1], np.int32)
    for slot in range(len(k_caches)):
        slots = np.array([slot], np.int32)
        ops.native.decode_attention(ops.pool, *arrays, slots, last, out)


def _noise(size_hw: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (*size_hw, 3), np.uint8)


def _jpeg(size_hw: tuple[int, int]) -> bytes:
    """A picture as smooth as photographs are, encoded."""
    height, width = size_hw
    small = Image.fromarray(_noise((height // 8, width // 8)))
    stream = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()
