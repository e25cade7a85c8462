"""Formulas against published parameter counts and against floors worked out for one H200."""

import dataclasses

import pytest

from ovfast import roofline
from ovfast.anyres import VisualGeometry, VisualOptions, VisualPlan, plan_image, plan_video
from ovfast.config import ModelConfig, TextConfig, VisionConfig
from ovfast.roofline import Machine, estimate_request
from ovfast.stage_cost import Rates, StageRates

SIGLIP = VisionConfig(1152, 4304, 26, 16, 384, 14, 1e-6)
PINPOINTS = tuple((384 * rows, 384 * cols) for rows in range(1, 7) for cols in range(1, 7))
GEOMETRY = VisualGeometry(384, 14, PINPOINTS, 9)
POST_LAYERNORM = 2 * 1152  # stored in checkpoints, never computed
H200 = Machine(read_gb_per_s=4300, gflops=790e3)
H200_FP8 = Machine(read_gb_per_s=4300, gflops=1.5e6)


def text(hidden: int, layers: int, heads: tuple[int, int, int], mlp: int, tied: bool) -> TextConfig:
    num_heads, num_kv_heads, head_dim = heads
    vocab = 152_000 if tied else 152_128
    return TextConfig(
        hidden, mlp, layers, num_heads, num_kv_heads, head_dim, vocab, 1e-6, 1e6, 32768, tied
    )


TEXTS = {
    "0.5B": text(896, 24, (14, 2, 64), 4864, tied=True),
    "7B": text(3584, 28, (28, 4, 128), 18944, tied=False),
    "72B": text(8192, 80, (64, 8, 128), 29568, tied=False),
}


def model(name: str) -> ModelConfig:
    return ModelConfig(
        vision=SIGLIP,
        text=TEXTS[name],
        dialect="hf",
        image_token_id=151646,
        video_token_id=151647,
        grid_pinpoints_hw=PINPOINTS,
        anyres_max=9,
        torch_dtype="bfloat16",
        stop_token_ids=(151645,),
        ignored_generation_fields=(),
        name=name,
    )


def image_plan(size_hw: tuple[int, int]) -> VisualPlan:
    return plan_image(size_hw, GEOMETRY, VisualOptions(), num_images=1)


@pytest.mark.parametrize(
    ("name", "vocab", "total", "resized_total"),
    [
        ("0.5B", 151_936, 893_618_208, 893_675_552),
        ("7B", 152_064, 8_030_348_832, 8_030_807_584),
        ("72B", 152_064, 73_180_522_016, 73_181_570_592),
    ],
)
def test_parameter_totals(name: str, vocab: int, total: int, resized_total: int) -> None:
    config = model(name)
    assert config.num_parameters + POST_LAYERNORM == resized_total
    original = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocab))
    assert original.num_parameters + POST_LAYERNORM == total


@pytest.mark.parametrize(
    ("name", "body", "head", "kv_bytes"),
    [
        ("0.5B", 357.8e6, 136.2e6, 12_288),
        ("7B", 6.525e9, 545.2e6, 57_344),
        ("72B", 70.21e9, 1.246e9, 327_680),
    ],
)
def test_text_sizes(name: str, body: float, head: float, kv_bytes: int) -> None:
    assert roofline.text_body_params(TEXTS[name]) == pytest.approx(body, rel=1e-3)
    assert roofline.text_head_params(TEXTS[name]) == pytest.approx(head, rel=1e-3)
    assert roofline.kv_bytes_per_token(TEXTS[name], 2) == kv_bytes


@pytest.mark.parametrize(
    ("num_views", "tflop", "floor_ms"),
    [(1, 0.642, 0.81), (7, 4.49, 5.69), (10, 6.42, 8.12), (32, 20.5, 26.0), (37, 23.7, 30.1)],
)
def test_tower_floors(num_views: int, tflop: float, floor_ms: float) -> None:
    assert roofline.vision_body_params(SIGLIP) == pytest.approx(395.8e6, rel=1e-3)
    flops = roofline.vision_flops(SIGLIP, num_views)
    assert flops == pytest.approx(tflop * 1e12, rel=5e-3)
    assert H200.floor_ms(flops, 795e6) == pytest.approx(floor_ms, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "num_tokens", "floor_ms"),
    [
        ("0.5B", 1024, 0.99),
        ("0.5B", 4755, 5.5),
        ("0.5B", 32_768, 88),
        ("7B", 1024, 17.2),
        ("7B", 4755, 84.3),
        ("7B", 8192, 152),
        ("72B", 1024, 184),
        ("72B", 4755, 880),
        ("72B", 32_768, 7606),
    ],
)
def test_prefill_floors(name: str, num_tokens: int, floor_ms: float) -> None:
    """The worked figures count the last layer for all positions."""
    flops = roofline.prefill_flops(TEXTS[name], num_tokens) + skipped(TEXTS[name], num_tokens)
    assert H200.floor_ms(flops, 0) == pytest.approx(floor_ms, rel=1e-2)


def skipped(text: TextConfig, num_tokens: int) -> int:
    """FLOPs of the last layer that the last position's logits do not need: all but k and v."""
    layer = roofline.text_body_params(text) / text.num_layers
    needed = 2 * text.hidden_size * text.num_kv_heads * text.head_dim
    attention = 2 * (num_tokens**2 - 2 * num_tokens) * text.num_heads * text.head_dim
    return round(2 * (num_tokens - 1) * (layer - needed)) + attention


@pytest.mark.parametrize(("name", "share"), [("0.5B", 0.040), ("7B", 0.035)])
def test_the_last_layer_s_saving(name: str, share: float) -> None:
    saved = skipped(TEXTS[name], 2000)
    whole = roofline.prefill_flops(TEXTS[name], 2000) + saved
    assert saved / whole == pytest.approx(share, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "weight_bytes", "batch_size", "context", "floor_ms"),
    [
        ("0.5B", 2, 1, 1024, 0.233),
        ("0.5B", 2, 1, 8192, 0.253),
        ("0.5B", 2, 8, 32_768, 0.979),
        ("0.5B", 0.5195, 1, 1024, 0.063),
        ("7B", 2, 1, 1024, 3.30),
        ("7B", 2, 64, 8192, 10.3),
        ("7B", 1, 1, 32_768, 2.08),
        ("7B", 0.5195, 1, 1024, 0.868),
        ("72B", 2, 1, 1024, 33.3),
        ("72B", 1, 8, 8192, 21.6),
        ("72B", 0.5195, 1, 8192, 9.26),
    ],
)
def test_decode_floors(
    name: str, weight_bytes: float, batch_size: int, context: int, floor_ms: float
) -> None:
    num_bytes = roofline.decode_bytes(TEXTS[name], context, weight_bytes, 2, batch_size)
    flops = roofline.decode_flops(TEXTS[name], context, batch_size)
    machine = H200 if weight_bytes == 2 else H200_FP8
    assert machine.floor_ms(flops, num_bytes) == pytest.approx(floor_ms, rel=1e-2)


@pytest.mark.parametrize(("name", "floor_ms"), [("0.5B", 0.017), ("7B", 0.157), ("72B", 0.71)])
def test_projector_floors_of_3645_tokens(name: str, floor_ms: float) -> None:
    plans = [image_plan((384, 384))] * 2  # 2 · (729 + 729) rows and one square make 3 645
    plans.append(plan_image((9, 9), GEOMETRY, VisualOptions(), num_images=2))
    flops = roofline.projector_flops(model(name), plans)
    assert H200.floor_ms(flops, 0) == pytest.approx(floor_ms, rel=3e-2)


def test_pooling_between_the_linears_is_counted() -> None:
    """32 frames at 7B: 0.45 ms, and 1.00 ms had pooling come last."""
    video = plan_video(32, (720, 1280), GEOMETRY, VisualOptions())
    flops = roofline.projector_flops(model("7B"), [video])
    assert flops == 2 * 32 * 729 * 1152 * 3584 + 2 * 32 * 196 * 3584 * 3584
    assert H200.floor_ms(flops, 0) == pytest.approx(0.45, rel=2e-2)


def test_shrunk_picture_skips_rows_in_both_linears() -> None:
    plan = image_plan((1080, 1920))
    flops = roofline.projector_flops(model("0.5B"), [plan])
    assert flops == 2 * (729 + 75 * 135) * 1152 * 896 + 2 * (729 + 60 * 108) * 896 * 896


def test_estimate_of_a_picture() -> None:
    """TTFT floors of 1024 × 768 with 30 text tokens: 5.7 ms tower and 5.5 (84.3) ms prefill,
    4 (3.5) % of which the last layer saves.
    """
    plan = image_plan((768, 1024))
    small = estimate_request(model("0.5B"), [plan], 30, 128, 2, 2, H200)
    assert (small.num_views, small.visual_tokens, small.text_tokens) == (7, 4725, 30)
    assert small.prompt_tokens == 4755
    assert small.kv_cache_bytes == (4755 + 128) * 12_288
    assert small.weight_bytes == pytest.approx(1.79e9, rel=5e-3)
    assert small.ttft_floor_ms == pytest.approx(5.69 + 0.024 + 5.5 * 0.96, rel=1e-2)
    assert small.tpot_floor_ms == pytest.approx(0.24, rel=2e-2)
    large = estimate_request(model("7B"), [plan], 30, 128, 2, 2, H200)
    assert large.ttft_floor_ms == pytest.approx(5.69 + 0.22 + 84.3 * 0.965, rel=1e-2)
    assert large.tpot_floor_ms == pytest.approx(3.35, rel=1e-2)


def test_estimate_without_a_machine_has_counts_but_no_times() -> None:
    plan = image_plan((768, 1024))
    with_times = estimate_request(model("7B"), [plan], 30, 128, 2, 2, H200)
    without = estimate_request(model("7B"), [plan], 30, 128, 2, 2)
    assert without.ttft_floor_ms is None
    assert without.tpot_floor_ms is None
    expected = dataclasses.replace(with_times, ttft_floor_ms=None, tpot_floor_ms=None)
    assert without == expected
    assert without.as_dict()["visual_tokens"] == 4725


def test_attention_may_have_a_rate_of_its_own() -> None:
    stage = roofline.prefill_stage(TEXTS["0.5B"], 2000, 1)
    both = stage.product_flops / 1e9 + stage.attention_flops / 0.5e9
    assert stage.floor_ms(Machine(1e6, 1e3, attention_gflops=500)) == pytest.approx(both)
    reads = stage.weight_bytes / 1e6
    assert stage.floor_ms(Machine(1, 1e6, attention_gflops=500)) == pytest.approx(reads)


RATES = Rates(
    tower=StageRates(gflops=100, attention_gflops=50, layer_ms=0.5),
    prefill=StageRates(gflops=80, attention_gflops=40, layer_ms=0.25),
    weights_gb_per_s=20,
    cache_gb_per_s=10,
    step_layer_ms=0.125,
    request_ms=2,
    picture_ms_per_megapixel=30,
)
CPU = Machine(read_gb_per_s=25, gflops=150, rates=RATES)


def test_predictions_are_sums_at_the_machine_s_rates() -> None:
    plan, config = image_plan((768, 1024)), model("0.5B")
    tower, projector, prefill = roofline.request_stages(config, [plan], 30, 2)
    assert [stage.name for stage in (tower, projector, prefill)] == [
        "tower",
        "projector",
        "prefill",
    ]
    weights_ms = [stage.weight_bytes / 20e6 for stage in (tower, projector, prefill)]
    tower_ms = tower.product_flops / 100e6 + tower.attention_flops / 50e6 + 7 * 26 * 0.5
    tower_ms += weights_ms[0]
    assert tower.predicted_ms(RATES) == pytest.approx(tower_ms)
    together = dataclasses.replace(RATES, views_a_step=4)
    assert tower.predicted_ms(together) == pytest.approx(tower_ms - 5 * 26 * 0.5)
    projector_ms = projector.flops / 100e6 + weights_ms[1]
    assert projector.predicted_ms(RATES) == pytest.approx(projector_ms)
    prefill_ms = prefill.product_flops / 80e6 + prefill.attention_flops / 40e6 + 24 * 0.25
    prefill_ms += weights_ms[2]
    assert prefill.predicted_ms(RATES) == pytest.approx(prefill_ms)
    step = roofline.decode_stage(config.text, 4755 + 64, 2, 4)
    step_ms = step.weight_bytes / 20e6 + step.cache_bytes / 10e6 + 24 * 0.125
    assert step.predicted_ms(RATES) == pytest.approx(step_ms)
    got = estimate_request(config, [plan], 30, 128, 2, 4, CPU)
    ttft_ms = 2 + 0.786432 * 30 + tower_ms + projector_ms + prefill_ms
    assert got.ttft_ms == pytest.approx(ttft_ms)
    assert got.tpot_ms == pytest.approx(step_ms)
    assert got.ttft_ms > got.ttft_floor_ms
    assert estimate_request(config, [plan], 30, 128, 2, 4, H200).ttft_ms is None


def test_a_short_prompt_and_a_step_take_the_time_of_their_weights() -> None:
    """Until a step has so many rows that products take longer."""
    prefill = roofline.prefill_stage(TEXTS["0.5B"], 2, 2)
    products_ms = prefill.product_flops / 80e6
    prefill_ms = prefill.weight_bytes / 20e6 + products_ms + 24 * 0.25
    assert prefill.predicted_ms(RATES) == pytest.approx(prefill_ms, rel=1e-2)
    assert products_ms < 0.4 * prefill_ms
    steps = [roofline.decode_stage(TEXTS["0.5B"], 1, 2, 4, rows) for rows in (1, 2, 16)]
    times = [step.predicted_ms(RATES) for step in steps]
    assert times[0] == pytest.approx(times[1], rel=1e-2)
    assert times[2] == pytest.approx(steps[2].product_flops / 80e6 + 3, rel=1e-2)


def test_estimate_of_text_alone_reads_the_language_model_only() -> None:
    """Below some 250 tokens reading the weights takes longer than multiplying with them."""
    got = estimate_request(model("7B"), [], 10, 0, 2, 2, H200)
    assert (got.num_views, got.visual_tokens, got.vision_flops, got.projector_flops) == (0, 0, 0, 0)
    weights = roofline.text_weight_bytes(TEXTS["7B"], 2)
    assert got.ttft_floor_ms == pytest.approx(weights / 4.3e9)
    assert got.decode_bytes_per_token == weights + 10 * 57_344
