"""The gather tables against a straight port of upstream's packing, and against torch itself."""

import math
import random

import numpy as np
import pytest
import torch

from ovfast.anyres import VisualGeometry, VisualOptions, VisualPlan, plan_image, plan_video
from ovfast.pack_table import PackTable, grid_table

GEOMETRY = VisualGeometry(
    384, 14, tuple((384 * rows, 384 * cols) for rows in range(1, 7) for cols in range(1, 7)), 9
)
TINY = VisualGeometry(
    56, 14, tuple((56 * rows, 56 * cols) for rows in range(1, 7) for cols in range(1, 7)), 9
)
NEWLINE_VALUE = -7.0
# One of each: no padding, padding on either axis, shrunk maps, thin maps, one pixel.
SIZES = [
    (336, 336),
    (480, 640),
    (640, 480),
    (384, 385),
    (1080, 1920),
    (1920, 1080),
    (2160, 3840),
    (4000, 3000),
    (2304, 2304),
    (1153, 945),
    (100, 5000),
    (5000, 1),
    (1, 1),
]


def gather(table: PackTable, features: torch.Tensor) -> torch.Tensor:
    """Applies a table as an operation would: (views, tokens, width) to (num_tokens, width)."""
    rows = torch.cat([features.flatten(0, 1), torch.zeros(1, features.shape[2])])
    parts = rows[torch.from_numpy(table.index).long()]
    packed = (parts * torch.from_numpy(table.weight)[..., None]).sum(1)
    packed[torch.from_numpy(table.index[:, 0] == -1)] = NEWLINE_VALUE
    return packed


def unpad_image(tensor: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """As transformers v5.23 unpad_image, for (channels, height, width)."""
    height, width = size_hw
    current_height, current_width = tensor.shape[1:]
    if width / height > current_width / current_height:
        new_height = int(round(height * (current_width / width), 7))
        padding = (current_height - new_height) // 2
        return tensor[:, padding : current_height - padding, :]
    new_width = int(round(width * (current_height / height), 7))
    padding = (current_width - new_width) // 2
    return tensor[:, :, padding : current_width - padding]


def pack_image_features(
    features: torch.Tensor, plan: VisualPlan, newline: torch.Tensor, anyres_max: int = 9
) -> torch.Tensor:
    """As transformers v5.23 pack_image_features, for one picture of several views."""
    if len(features) == 1:
        return torch.cat((features[0], newline[None]), dim=0)
    base, crops = features[0], features[1:]
    side = math.isqrt(base.shape[0])
    crops = crops.view(*plan.grid_hw, side, side, -1)
    crops = crops.permute(4, 0, 2, 1, 3).contiguous().flatten(1, 2).flatten(2, 3)
    crops = unpad_image(crops, plan.size_hw)
    _, height, width = crops.shape
    ratio = math.sqrt(height * width / (anyres_max * side**2))
    if ratio > 1.1:
        size = [int(height // ratio), int(width // ratio)]
        crops = torch.nn.functional.interpolate(crops[None], size, mode="bilinear")[0]
    column = newline[:, None, None].expand(*crops.shape[:-1], 1)
    crops = torch.cat((crops, column), dim=-1).flatten(1, 2).transpose(0, 1)
    return torch.cat((base, crops), dim=0)


def coded(num_views: int, tokens_per_view: int) -> torch.Tensor:
    """Features that say where they come from: view · tokens_per_view + position."""
    codes = torch.arange(num_views * tokens_per_view, dtype=torch.float32)
    return codes.view(num_views, tokens_per_view, 1)


@pytest.mark.parametrize("geometry", [GEOMETRY, TINY], ids=["384", "56"])
@pytest.mark.parametrize("size_hw", SIZES, ids=str)
def test_order_as_upstream(geometry: VisualGeometry, size_hw: tuple[int, int]) -> None:
    check_order(plan_image(size_hw, geometry, VisualOptions(), num_images=1))


def test_order_as_upstream_over_random_sizes() -> None:
    rng = random.Random(0)
    for _ in range(60):
        size_hw = (int(2 ** rng.uniform(0, 13)), int(2 ** rng.uniform(0, 13)))
        check_order(plan_image(size_hw, TINY, VisualOptions(), num_images=1))


def check_order(plan: VisualPlan) -> None:
    features = coded(plan.num_views, plan.tokens_per_view)
    expected = pack_image_features(features, plan, torch.tensor([NEWLINE_VALUE]))
    got = gather(plan.table, features)
    assert got.shape == expected.shape == (plan.num_tokens, 1)
    if plan.final_hw == plan.kept_hw:
        assert torch.equal(got, expected)
    else:  # codes reach 27 000, of which float32 keeps 2e-7
        assert (got - expected).abs().max() <= 4e-6 * features.max()
    newlines = int((plan.table.index[:, 0] == -1).sum())
    assert newlines == plan.num_newlines == int((expected == NEWLINE_VALUE).sum())


SHRINKS = [(27, 14), (4, 2), (5, 3), (121, 93), (162, 81), (135, 108), (75, 60), (162, 107)]


@pytest.mark.parametrize(("size_in", "size_out"), SHRINKS)
def test_shares_as_torch_bilinear(size_in: int, size_out: int) -> None:
    """Random features in [-1, 1): a table of a map without crops against torch's own weights."""
    geometry = VisualGeometry(size_in, 1, (), 9)
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(1, size_in * size_in, 8, generator=generator) * 2 - 1
    if size_out == math.ceil(size_in / 2):
        table = plan_video(1, (9, 9), geometry, VisualOptions()).table
        got = gather(table, features)[:-1]
    else:
        table = grid_table(1, size_in, (0, size_in, 0, size_in), (size_out, size_out))
        both = torch.cat([torch.zeros_like(features), features])
        got = gather(table, both)[size_in * size_in :].view(size_out, size_out + 1, 8)
        got = got[:, :-1].reshape(-1, 8)
    square = features.view(size_in, size_in, 8).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(square, (size_out, size_out), mode="bilinear")
    assert (got - expected[0].flatten(1).T).abs().max() <= 4e-6


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_video_order(num_frames: int) -> None:
    plan = plan_video(num_frames, (720, 1280), GEOMETRY, VisualOptions())
    features = coded(num_frames, 729)
    squares = features.view(num_frames, 1, 27, 27)
    pooled = torch.nn.functional.interpolate(squares, (14, 14), mode="bilinear").flatten()
    got = gather(plan.table, features)[:, 0]
    assert got[-1] == NEWLINE_VALUE
    assert (got[:-1] - pooled).abs().max() <= 4e-6 * features.max()


def test_single_views_are_copied() -> None:
    features = coded(1, 729)
    newline = torch.tensor([NEWLINE_VALUE])
    base_only = plan_image((480, 640), GEOMETRY, VisualOptions(max_views=1), num_images=1)
    square = plan_image((480, 640), GEOMETRY, VisualOptions(), num_images=2)
    for plan in (base_only, square):
        assert torch.equal(
            gather(plan.table, features), pack_image_features(features, plan, newline)
        )
    plain = plan_image((480, 640), GEOMETRY, VisualOptions(token_policy="lmms_eval"), num_images=2)
    assert torch.equal(gather(plain.table, features), features[0])


@pytest.mark.parametrize("size_hw", SIZES, ids=str)
def test_compact_index_names_the_same_rows(size_hw: tuple[int, int]) -> None:
    plan = plan_image(size_hw, GEOMETRY, VisualOptions(), num_images=1)
    table = plan.table
    newline = table.index[:, 0] == -1
    assert (table.index[newline] == -1).all()
    assert (table.index_compact[newline] == -1).all()
    assert (table.weight[newline] == 0).all()
    assert np.allclose(table.weight[~newline].sum(1), 1, atol=2e-7)
    assert np.array_equal(table.source_rows[table.index_compact[~newline]], table.index[~newline])
    assert np.array_equal(table.source_rows, np.unique(table.index[~newline]))
    for array in (table.index, table.source_rows, table.index_compact):
        assert array.dtype == np.int32
    assert table.weight.dtype == np.float32
    copied = table.index[: plan.tokens_per_view]
    assert (copied == np.arange(plan.tokens_per_view)[:, None]).all()
    assert (table.weight[: plan.tokens_per_view] == [1, 0, 0, 0]).all()


def test_padding_rows_are_not_sources() -> None:
    """What unpadding drops is not computed: exactly the base view and the kept map remain."""
    plan = plan_image((100, 5000), GEOMETRY, VisualOptions(), num_images=1)
    assert len(plan.table.source_rows) == 729 + 3 * 162
    rows = plan.table.source_rows[729:]
    assert set(((rows % 729) // 27).tolist()) == {12, 13, 14}
