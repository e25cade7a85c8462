"""Logits and greedy tokens against transformers, over picture sizes, media and head layouts."""

from pathlib import Path

import pytest
import torch

from ovfast.anyres import VisualOptions, plan_image
from ovfast.config import ModelConfig
from tests.support import hf, runtime
from tests.support.checkpoints import CheckpointSpec
from tests.support.requests import Image, Text, Video, geometry_of, make_request

LOGITS_BOUND = 2e-4  # of the largest magnitude, float32 rounding through the whole model
NUM_GREEDY = 32

SPECS = {
    "tied": CheckpointSpec(),
    "untied_8_to_1_head128": CheckpointSpec(
        hidden=192, heads=8, kv_heads=1, head_dim=128, tie=False, seed=1
    ),
    "tied_7_to_1_head64": CheckpointSpec(hidden=448, heads=7, kv_heads=1, head_dim=64, seed=2),
    # Nothing a multiple of 8 or 16: heads of 10 and 14, an MLP of 41, three of everything.
    "odd": CheckpointSpec(
        hidden=30, mlp=41, layers=3, heads=3, kv_heads=3, head_dim=10, tie=False, seed=3,
        vision_hidden=42, vision_mlp=41, vision_layers=1, vision_heads=3,
    ),
    # The real geometry: 384 × 384 views of 729 tokens, tower heads of 72.
    "real_views": CheckpointSpec(image_size=384, vision_layers=1, heads=2, kv_heads=1, head_dim=64),
}  # fmt: skip

# Views of one picture → sizes (height, width) in units of a tower of 84 pixels.
SIZES = {
    2: [(84, 84), (17, 84), (84, 11)],
    3: [(84, 150), (160, 70)],
    4: [(80, 250)],
    5: [(150, 160), (168, 168)],
    6: [(84, 420), (400, 70)],
    7: [(165, 240), (240, 165)],
    9: [(160, 330), (336, 150)],
    10: [(240, 250)],
    11: [(165, 410)],
    13: [(250, 330), (336, 201)],
    16: [(245, 415), (420, 240)],
}
MEDIA = {
    "text": [Text(23)],
    "one_token": [Text(1)],
    "image": [Text(3), Image(165, 240), Text(5)],
    "three_images": [Text(3), Image(150, 60), Image(40, 300), Text(2), Image(84, 84), Text(5)],
    "video_1": [Text(3), Video(1), Text(5)],
    "video_8": [Text(3), Video(8), Text(5)],
    "video_32": [Video(32), Text(5)],
    "interleaved": [Text(4), Image(165, 240), Text(6), Video(4), Text(5)],
    "video_first": [Video(2), Text(3), Image(84, 60), Image(50, 90), Text(5)],
}


def assert_same(path: Path, parts: list) -> None:
    """All logits and the greedy continuation agree with transformers'."""
    ours, theirs = runtime.load_model(path), hf.load_model(path)
    request = make_request(parts, ours.config)
    inputs = hf.make_inputs(path, request)
    assert_logits_close(runtime.all_logits(ours, request), hf.all_logits(theirs, inputs))
    expected = hf.greedy(theirs, inputs, NUM_GREEDY)
    assert runtime.greedy(ours, request, NUM_GREEDY) == expected


def assert_logits_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert logits.shape == expected.shape
    error = float((logits - expected).abs().max() / expected.abs().max())
    assert error <= LOGITS_BOUND, f"logits differ by {error:.2e} of their largest magnitude"


def test_sizes_cover_every_view_count(tiny_checkpoint):
    config = ModelConfig.from_checkpoint(tiny_checkpoint)
    for num_views, sizes in SIZES.items():
        for size_hw in sizes:
            plan = plan_image(size_hw, geometry_of(config), VisualOptions(), num_images=1)
            assert plan.num_views == num_views, size_hw


@pytest.mark.parametrize(
    "size_hw", [size for sizes in SIZES.values() for size in sizes], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_one_picture(tiny_checkpoint, size_hw):
    assert_same(tiny_checkpoint, [Text(4), Image(*size_hw), Text(7)])


@pytest.mark.parametrize("spec", ["tied", "untied_8_to_1_head128", "tied_7_to_1_head64", "odd"])
@pytest.mark.parametrize("media", MEDIA)
def test_media(random_checkpoint, spec, media):
    assert_same(random_checkpoint(SPECS[spec]), MEDIA[media])


@pytest.mark.parametrize("parts", [[Text(3), Image(480, 640), Text(5)], [Video(2), Text(5)]])
def test_real_views(random_checkpoint, parts):
    assert_same(random_checkpoint(SPECS["real_views"]), parts)


@pytest.mark.parametrize("layout", ["classic", "orig"])
def test_older_layouts_give_the_same_logits(random_checkpoint, tiny_checkpoint, layout):
    ours = runtime.load_model(tiny_checkpoint)
    other = runtime.load_model(random_checkpoint(layout=layout))
    request = make_request([Text(3), Image(150, 160), Text(2)], ours.config)
    logits = runtime.all_logits(ours, request)
    assert torch.equal(runtime.all_logits(other, request), logits)


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# Ours keeps float32 in the patch embedding and the pooling, where upstream rounds, and may lose a
# little elsewhere: measured ratios lie between 0.93 and 1.02.
HALF_RATIO = 1.15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("media", ["image", "video_8", "text"])
def test_half_precision_is_as_exact_as_upstream(random_checkpoint, dtype, media):
    # Weights stored in the narrow dtype: all three models compute with the same numbers.
    path = random_checkpoint(CheckpointSpec(dtype=dtype, seed=4))
    ours = runtime.load_model(path, dtype)
    request = make_request(MEDIA[media], ours.config)
    truth = hf.all_logits(hf.load_model(path), hf.make_inputs(path, request))
    theirs = hf.all_logits(hf.load_model(path, dtype), hf.make_inputs(path, request, dtype))
    ratio = rms(runtime.all_logits(ours, request) - truth) / rms(theirs - truth)
    assert ratio <= HALF_RATIO, f"error {ratio:.2f} times upstream's"
