"""Every number of views that one picture can have, and clips: pixels to patches, features to rows.

On the smallest tower, of 2 × 2 tokens a view: what a launch gets wrong by its number of views does
not hang on their size.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from ovfast import reference, reference_pixels
from ovfast.anyres import VisualGeometry, VisualOptions, VisualPlan, plan_image, plan_video
from ovfast.models.visual_rows import row_table
from ovfast.ops import PackedLinear, RowTable, make_ops
from ovfast.pixels import PixelLoader
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params

kernel = pytest.importorskip("ovfast.kernels.patch_embed", reason="needs triton")
ops_triton = pytest.importorskip("ovfast.ops_triton", reason="needs triton")

CPU = torch.device("cpu")
SIDE, PATCH, TOKENS = 28, 14, 4
VISION, HIDDEN, NUM_WORDS = 32, 48, 9
GRID = tuple((SIDE * row, SIDE * col) for row in range(1, 7) for col in range(1, 7))
GEOMETRY = VisualGeometry(SIDE, PATCH, GRID, 9)
FRAMES = (1, 2, 3, 8, 32, 64)


def picture_of(canvas_hw: tuple[int, int]) -> VisualPlan:
    """A little lower than the canvas, so that there is padding."""
    size_hw = (canvas_hw[0] - 3, canvas_hw[1])
    return plan_image(size_hw, GEOMETRY, VisualOptions(), num_images=1)


# The flattest canvas of each number of views, by number.
PICTURES = {f"{plan.num_views}_views": plan for plan in map(picture_of, reversed(GRID))}
CLIPS = {f"{n}_frames": plan_video(n, (20, 30), GEOMETRY, VisualOptions()) for n in FRAMES}
PLANS = PICTURES | CLIPS
QUICK_VIEWS = 3  # the interpreter takes a tenth of a second a view


def counted() -> list[object]:
    slow = () if torch.cuda.is_available() else (pytest.mark.slow,)
    return [
        pytest.param(name, marks=() if plan.num_views <= QUICK_VIEWS else slow)
        for name, plan in PLANS.items()
    ]


def test_every_number_of_views_is_there():
    sides = range(1, 7)
    reachable = {1 + rows * cols for rows, cols in itertools.product(sides, sides)}
    assert len(reachable) == 18
    assert {plan.num_views for plan in PICTURES.values()} == reachable


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load_pixels(plan: VisualPlan) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*(plan.num_frames,) * (plan.kind == "video"), *plan.size_hw, 3)
    media = np.random.default_rng(plan.num_views).integers(0, 256, shape, np.uint8)
    pixels = PixelLoader(make_ops(CPU, "reference"), CPU).load([media], [plan])
    assert pixels.num_views == plan.num_views
    return pixels.buffer, pixels.windows


@pytest.mark.parametrize("name", counted())
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_patch_embed(device, dtype, name):
    buffer, windows = load_pixels(PLANS[name])
    weight = (normal(VISION, 3 * PATCH * PATCH) / PATCH).to(dtype)
    offset = reference_pixels.patch_offset(weight, normal(VISION), normal(TOKENS, VISION, seed=1))
    arguments = (buffer, windows, weight.float(), offset, SIDE, dtype)
    out = torch.full((len(windows) * TOKENS, VISION), math.nan, dtype=dtype, device=device)
    packed = kernel.pack_patch_weight(weight)
    on_device = (tensor.to(device) for tensor in (buffer, windows, packed, offset))
    kernel.patch_embed(*on_device, out, patch_size=PATCH, image_size=SIDE)
    truth = reference_pixels.patch_embed(*arguments, upcast=True)
    assert_two_times_rule(out.cpu(), reference_pixels.patch_embed(*arguments), truth)


@pytest.mark.parametrize("name", counted())
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_project_and_pack(device, dtype, name):
    """Three text tokens before the picture or clip and one after it."""
    plan = PLANS[name]
    host = row_table(3 + plan.num_tokens + 1, ((3, 0, plan.table),))
    tables = [torch.from_numpy(x) for x in (host.source_rows, host.index, host.weight)]
    numbers = {
        "features": normal(plan.num_views * TOKENS, VISION),
        "weight_1": normal(HIDDEN, VISION) * VISION**-0.5,
        "bias_1": normal(HIDDEN),
        "weight_2": normal(HIDDEN, HIDDEN, seed=1) * HIDDEN**-0.5,
        "bias_2": normal(HIDDEN, seed=1),
        "newline": normal(HIDDEN, seed=2),
        "words": normal(NUM_WORDS, HIDDEN, seed=3),
    }
    stored = {key: value.to(dtype) for key, value in numbers.items()}
    token_ids = torch.arange(len(host.index), dtype=torch.int32) % NUM_WORDS

    def run(project_and_pack, where: str, wanted: torch.dtype) -> torch.Tensor:
        x = {key: value.to(where, wanted) for key, value in stored.items()}
        out = torch.full((len(token_ids), HIDDEN), math.nan, dtype=wanted, device=where)
        return project_and_pack(
            x["features"],
            RowTable(*(table.to(where) for table in tables), has_pooled=host.has_pooled),
            PackedLinear(x["weight_1"], x["bias_1"]),
            PackedLinear(x["weight_2"], x["bias_2"]),
            x["newline"],
            token_ids.to(where),
            PackedLinear(x["words"], None),
            out,
        ).cpu()

    ours = run(ops_triton._project_and_pack, device, dtype)
    plain = run(reference.project_and_pack, "cpu", dtype)
    assert_two_times_rule(ours, plain, run(reference.project_and_pack, "cpu", torch.float64))
    is_copied = tables[1][:, 0] < 0
    assert torch.equal(ours[is_copied], plain[is_copied])
