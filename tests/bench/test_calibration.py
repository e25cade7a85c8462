"""The calibration: rates are those that explain the times, whatever they are."""

import dataclasses
import json
import math

import pytest

from ovfast.anyres import VisualOptions, plan_image
from ovfast.bench import calibration
from ovfast.bench.calibration import AttentionRates, Calibration, Timed, calibrate, measure_machine
from ovfast.bench.limits import Limits, best_of
from ovfast.bench.slice_engine import open_slice, slice_config
from ovfast.checkpoint import resolve_checkpoint
from ovfast.config import ModelConfig
from ovfast.loading import load
from ovfast.outputs import Timings
from ovfast.roofline import decode_stage, megapixels, request_stages
from ovfast.stage_cost import Rates, StageRates
from ovfast.storage import bytes_per_param
from tests.bench.records import header

RATES = Rates(
    tower=StageRates(gflops=90, attention_gflops=60, layer_ms=0.3),
    prefill=StageRates(gflops=80, attention_gflops=50, layer_ms=0.35),
    weights_gb_per_s=18,
    cache_gb_per_s=9,
    step_layer_ms=0.03,
    request_ms=0.7,
    picture_ms_per_megapixel=20,
    views_a_step=1,
)
LIMITS = Limits({"1": 15.0, "2": 25.0}, float32_gflops=150.0, int8_gops=250.0)
DEMO = ModelConfig.from_checkpoint(resolve_checkpoint("demo"))
SLICE = slice_config()


def timed(config: ModelConfig, size_hw: tuple[int, int] | None, text_tokens: int, storage: str):
    """A request that takes exactly what RATES say."""
    options = VisualOptions(max_views=1 if config is SLICE else None)
    plans = (
        () if size_hw is None else (plan_image(size_hw, config.geometry, options, num_images=1),)
    )
    per_param = bytes_per_param(storage)
    stages = request_stages(config, plans, text_tokens, per_param)
    prompt_tokens = text_tokens + sum(plan.num_tokens for plan in plans)
    context = prompt_tokens + calibration.NEW_TOKENS // 2
    vision = sum(stage.predicted_ms(RATES) for stage in stages[:-1])
    prefill = stages[-1].predicted_ms(RATES)
    timings = Timings(
        media_ms=RATES.picture_ms_per_megapixel * megapixels(plans),
        preprocess_ms=0.2,
        vision_ms=vision,
        prefill_ms=prefill,
        ttft_ms=vision + prefill + RATES.request_ms,
        tpot_ms=decode_stage(config.text, context, per_param, 4).predicted_ms(RATES),
    )
    return Timed(config, plans, prompt_tokens, timings)


@pytest.mark.parametrize("storage", ["float32", "int4"])
def test_solving_gives_back_the_rates(storage):
    attention = AttentionRates(60, 50, 9)
    got = calibration.solve(
        timed(SLICE, (384, 384), 14, storage),
        timed(DEMO, (480, 640), 14, storage),
        timed(DEMO, None, 14, storage),
        attention,
        bytes_per_param(storage),
        4,
        1,
    )
    for name, want in dataclasses.asdict(RATES).items():
        have = getattr(got, name)
        if isinstance(want, dict):
            assert dataclasses.asdict(have) == pytest.approx(want, rel=0.05), name
        else:
            assert have == pytest.approx(want, rel=0.05), name


def test_solving_survives_times_that_make_no_sense():
    """On a busy machine attention by itself may take longer than the stage it is part of."""
    requests = (
        timed(SLICE, (384, 384), 14, "int8"),
        timed(DEMO, (480, 640), 14, "int8"),
        timed(DEMO, None, 14, "int8"),
    )
    got = calibration.solve(*requests, AttentionRates(0.1, 0.1, 0.001), 1, 4, 1)
    for values in (got.tower, got.prefill):
        assert values.gflops > 0
        assert values.layer_ms >= 0
    assert math.isfinite(got.weights_gb_per_s)
    assert got.weights_gb_per_s > 0
    assert got.step_layer_ms >= 0


def test_a_record_s_header_gives_the_calibration_back():
    made = Calibration("cpu", "native", 2, LIMITS, {"int8": RATES})
    line = json.loads(json.dumps(header(machine=made.as_dict()).machine))
    assert Calibration.from_dict(line) == made


def test_machines_by_storage():
    made = Calibration("cpu", "native", 2, LIMITS, {"int8": RATES})
    exact, quantized = made.machine("bfloat16"), made.machine("int8")
    assert (exact.read_gb_per_s, exact.gflops, exact.attention_gflops) == (25, 150, 150)
    assert (quantized.gflops, quantized.attention_gflops) == (250, 300)
    assert exact.rates is None
    assert quantized.rates == RATES
    fast = dataclasses.replace(LIMITS, int8_gops=500.0)
    quantized = Calibration("cpu", "native", 2, fast, {}).machine("int8")
    assert (quantized.gflops, quantized.attention_gflops) == (500, 300)
    slow = dataclasses.replace(LIMITS, int8_gops=100.0)
    assert Calibration("cpu", "native", 2, slow, {}).machine("int8").gflops == 150
    cuda = Limits({"copy": 4300.0}, bfloat16_gflops=790e3, launch_us=2.0)
    assert Calibration("cuda", "triton", 2, cuda, {}).machine("bfloat16").gflops == 790e3
    float8 = Calibration("cuda", "triton", 2, cuda, {}).machine("fp8")
    assert (float8.gflops, float8.attention_gflops) == (1580e3, 790e3)


def test_slice_answers_and_layers_share_no_memory():
    """Shared layers would be read from a cache, and be faster than the model is."""
    import torch

    with open_slice(torch.device("cpu"), "reference", "float32", None) as engine:
        layers = engine._model.language_model.layers
        pointers = {layer.down_proj.weight.data_ptr() for layer in layers}
        assert len(pointers) == len(layers)
        output = engine.generate("Hi", max_new_tokens=2, ignore_eos=True)
        assert len(output.token_ids) == 2


@pytest.mark.long
@pytest.mark.slow
def test_calibrating_this_machine():
    """Also as an engine uses it; times stay those of this machine, so that only signs are sure."""
    made = calibrate("cpu", threads=1, storages=("int4",))
    assert made.backend in ("native", "reference")
    assert made.limits.read_gb_per_s.keys() == {"1"}
    assert min(made.limits.read_gb_per_s["1"], made.limits.float32_gflops) > 0.1
    assert made.rates["int4"].weights_gb_per_s > 0
    with load("demo", device="cpu", threads=1) as engine:
        machine = measure_machine(engine)
        estimate = engine.estimate("Hi", image_sizes_hw=[(50, 60)], machine=machine)
    assert estimate.ttft_floor_ms > 0
    assert estimate.tpot_floor_ms > 0
    assert 0 < estimate.ttft_ms < math.inf
    assert 0 < estimate.tpot_ms < math.inf


def test_limits_are_the_better_of_two_measurements() -> None:
    first = Limits({"1": 15.0, "2": 19.0}, float32_gflops=107.0, int8_gops=None, launch_us=3.0)
    second = Limits({"1": 14.0, "2": 24.0}, float32_gflops=171.0, int8_gops=None, launch_us=2.0)
    expected = Limits({"1": 15.0, "2": 24.0}, float32_gflops=171.0, int8_gops=None, launch_us=2.0)
    assert best_of(first, second) == best_of(second, first) == expected
