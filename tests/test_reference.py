"""The reference operations against independent formulas, their float64 truth and its purity."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ovfast import reference, reference_pixels
from ovfast.pack_table import copy_table, grid_table, video_table
from ovfast.pixels import view_pixels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def assert_near(out: torch.Tensor, expected: torch.Tensor, ulps: float = 4) -> None:
    """Within some units in the last place of the largest value."""
    assert out.shape == expected.shape
    if out.numel() == 0:
        return
    bound = ulps * torch.finfo(out.dtype).eps * float(expected.abs().max())
    assert float((out.double() - expected.double()).abs().max()) <= bound


@pytest.mark.parametrize("rows", [0, 1, 41])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(rows, with_bias):
    x, weight = randn(rows, 20), randn(7, 20)
    bias = randn(7) if with_bias else None
    truth = reference.linear(x, weight, bias, upcast=True)
    assert truth.dtype == torch.float64
    assert_near(reference.linear(x, weight, bias), truth, ulps=16)
    packed = reference.PackedLinear(weight, bias)
    assert torch.equal(reference.packed_linear(x, packed), reference.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 41, 144])
def test_rms_norm_casts_before_the_weight(dtype, width):
    x, weight = randn(5, width, dtype=dtype), randn(width, dtype=dtype, seed=1)
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = weight * (wide * scale).to(dtype)
    out = reference.rms_norm(x, weight, 1e-6)
    assert out.dtype == dtype
    assert_near(out, expected, ulps=2)
    assert_near(reference.rms_norm(x, weight, 1e-6, upcast=True).to(dtype), expected, ulps=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype):
    x, weight, bias = randn(5, 41, dtype=dtype), randn(41, dtype=dtype), randn(41, dtype=dtype)
    wide = x.double()
    normed = (wide - wide.mean(-1, keepdim=True)) / (
        wide.var(-1, False, keepdim=True) + 1e-6
    ) ** 0.5
    expected = normed * weight.double() + bias.double()
    assert_near(reference.layer_norm(x, weight, bias, 1e-6), expected)
    assert_near(reference.layer_norm(x, weight, bias, 1e-6, upcast=True), expected)


@pytest.mark.parametrize("upcast", [False, True])
def test_silu_mul(upcast):
    gate_up = randn(3, 14)
    gate, up = gate_up.double().chunk(2, -1)
    out = reference.silu_mul(gate_up.clone(), upcast=upcast)
    assert_near(out, gate / (1 + (-gate).exp()) * up)


# As transformers v5.23 rotate_half and apply_rotary_pos_emb, written out.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 10, 64])
def test_rope(dtype, head_dim):
    x, angles = randn(4, 3, head_dim, dtype=dtype), randn(4, head_dim // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    full_cos, full_sin = torch.cat([cos, cos], -1)[:, None], torch.cat([sin, sin], -1)[:, None]
    first, second = x.chunk(2, -1)
    expected = x * full_cos + torch.cat([-second, first], -1) * full_sin
    truth = reference.rope(x, cos, sin, upcast=True)
    out = reference.rope(x, cos, sin)  # in place: last
    assert out is x
    assert torch.equal(out, expected)
    assert_near(out, truth)


@pytest.mark.parametrize(("side", "patch"), [(28, 14), (20, 6), (7, 7)])
def test_patch_embed_equals_a_convolution_of_normalised_pixels(side, patch):
    generator = np.random.default_rng(side)
    view = torch.from_numpy(generator.integers(0, 256, (side, side, 3), np.uint8))
    weight, bias = randn(41, 3, patch, patch) * 0.1, randn(41)
    position = randn((side // patch) ** 2, 41)
    pixels = (view.permute(2, 0, 1)[None].double() / 255 - 0.5) / 0.5
    convolved = F.conv2d(pixels, weight.double(), bias.double(), stride=patch)
    expected = convolved[0].flatten(1).t() + position.double()
    pixels = view_pixels(view[None].numpy(), torch.device("cpu"))
    offset = reference_pixels.patch_offset(weight.flatten(1), bias, position)
    args = (pixels.buffer, pixels.windows, weight.flatten(1), offset, side)
    out = reference_pixels.patch_embed(*args, torch.float32)
    assert float((out - expected).abs().max()) <= 1e-5
    truth = reference_pixels.patch_embed(*args, torch.float32, upcast=True)
    assert float((truth - expected).abs().max()) <= 1e-6
    half = reference_pixels.patch_embed(*args, torch.bfloat16)
    assert torch.equal(half, out.bfloat16())  # one rounding, at the end


def softmax_attention(q, k, v, visible):
    """(rows, heads, d) over (heads, keys, d), float64; visible: (rows, keys) bool."""
    scores = torch.einsum("rhd,hkd->hrk", q.double(), k.double()) * q.shape[-1] ** -0.5
    shares = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hrk,hkd->rhd", shares, v.double()).flatten(1)


@pytest.mark.parametrize("rows", [1, 41])
@pytest.mark.parametrize("upcast", [False, True])
def test_attention(rows, upcast):
    qkv = randn(rows, 3, 4, 18)  # strided, as the tower's fused projection gives it
    q, k, v = qkv.unbind(1)
    visible = torch.ones(rows, rows, dtype=torch.bool)
    expected = softmax_attention(q, k.transpose(0, 1), v.transpose(0, 1), visible)
    assert_near(reference.attention(q, k, v, upcast=upcast), expected, ulps=8)


POSITIONS = {
    "whole": range(300),  # more than one block of rows
    "one": range(1),
    "continued": range(7, 300),
    "continued_by_one": range(40, 41),
    "chosen": [0, 3, 4, 77],
    "none": [],
}


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(7, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("upcast", [False, True])
def test_causal_attention(name, num_heads, num_kv_heads, upcast):
    positions = POSITIONS[name]
    num_keys = max(positions, default=4) + 1
    # Keys of a longer slot: nothing past num_keys may be read.
    k, v = torch.full((2, num_kv_heads, num_keys + 9, 10), torch.nan)
    k[:, :num_keys] = randn(num_kv_heads, num_keys, 10)
    v[:, :num_keys] = randn(num_kv_heads, num_keys, 10, seed=1)
    k, v = k[:, :num_keys], v[:, :num_keys]
    qkv = randn(len(positions), num_heads + 2, 10)
    q = qkv[:, :num_heads]
    out = reference.causal_attention(q, k, v, positions, upcast=upcast)
    at = torch.tensor(list(positions), dtype=torch.long)[:, None]
    visible = torch.arange(num_keys) <= at
    group = num_heads // num_kv_heads
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    assert_near(out, softmax_attention(q, k, v, visible), ulps=8)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(7, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("upcast", [False, True])
def test_decode_attention(num_heads, num_kv_heads, upcast):
    q, k, v = randn(1, num_heads, 10), randn(num_kv_heads, 33, 10), randn(num_kv_heads, 33, 10)
    out = reference.decode_attention(q, k, v, upcast=upcast)
    assert_near(out, reference.causal_attention(q, k, v, range(32, 33), upcast=True), ulps=8)


TABLES = {
    "copy": copy_table(9, False),
    "copy_newline": copy_table(9, True),
    "grid": grid_table(2, 3, (0, 6, 1, 5), (6, 4)),
    "shrunk": grid_table(2, 3, (0, 6, 1, 5), (4, 3)),
    "video": video_table(2, 3, (2, 2)),
}
NUM_SOURCES = 5 * 9


def no_text(table):
    """Ids and embeddings where no row is text."""
    token_ids = torch.zeros(len(table.index), dtype=torch.int32)
    return token_ids, reference.PackedLinear(torch.zeros(1, 6), None)


def row_table(table):
    names = (table.source_rows, table.index_compact, table.weight)
    return reference.RowTable(*map(torch.from_numpy, names), has_pooled=True)


def pack(table, features, newline, **kwargs):
    out = torch.full((len(table.index), features.shape[1]), torch.nan, dtype=features.dtype)
    index, weight = torch.from_numpy(table.index), torch.from_numpy(table.weight)
    return reference.pool_and_pack(features, index, weight, newline, out, **kwargs)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_and_pack(name, dtype):
    table, width = TABLES[name], 6
    features, newline = randn(NUM_SOURCES, width, dtype=dtype), randn(width, dtype=dtype, seed=1)
    out, truth = pack(table, features, newline), pack(table, features, newline, upcast=True)
    assert_near(out, truth, ulps=2)
    for row, (index, weight) in enumerate(zip(table.index, table.weight, strict=True)):
        if index[0] < 0:
            assert torch.equal(out[row], newline)
        elif weight[0] == 1:
            assert torch.equal(out[row], features[index[0]])


def test_pooling_equals_interpolation():
    """The video's 2 × 2 stencil on 27 × 27 tokens, against torch's own bilinear resize."""
    features, newline = randn(2 * 729, 4), randn(4)
    out = pack(video_table(2, 27, (14, 14)), features, newline)
    maps = features.view(2, 27, 27, 4).permute(0, 3, 1, 2)
    pooled = F.interpolate(maps, size=(14, 14), mode="bilinear").permute(0, 2, 3, 1)
    assert float((out[:-1] - pooled.reshape(-1, 4)).abs().max()) <= 4e-6


@pytest.mark.parametrize("name", TABLES)
def test_project_and_pack_skips_unused_rows_only(name):
    table = TABLES[name]
    features, newline = randn(NUM_SOURCES, 7), randn(6)
    linear_1 = reference.PackedLinear(randn(6, 7), randn(6, seed=1))
    linear_2 = reference.PackedLinear(randn(6, 6), randn(6, seed=2))
    hidden = F.gelu(F.linear(features, linear_1.weight, linear_1.bias))
    expected = pack(table, F.linear(hidden, linear_2.weight, linear_2.bias), newline)
    unused = torch.ones(NUM_SOURCES, dtype=torch.bool)
    unused[torch.from_numpy(table.source_rows).long()] = False
    features[unused] = torch.nan
    args = (features, row_table(table), linear_1, linear_2, newline, *no_text(table))
    out = reference.project_and_pack(*args, torch.empty_like(expected))
    assert_near(out, expected, ulps=8)


def test_project_and_pack_places_text_between_pictures():
    """Rows that the table calls text are copies of embeddings, and change nothing else."""
    table = TABLES["grid"]
    features, newline = randn(NUM_SOURCES, 7), randn(6)
    linear_1 = reference.PackedLinear(randn(6, 7), randn(6))
    args = (linear_1, reference.PackedLinear(randn(6, 6), None), newline)
    plain = row_table(table)
    alone = torch.empty(len(table.index), 6)
    reference.project_and_pack(features, plain, *args, *no_text(table), alone)
    text = torch.full((2, 4), reference.TEXT_ROW, dtype=torch.int32)
    index = torch.cat([text, plain.index, text[:1]])
    weight = torch.cat([torch.zeros(2, 4), plain.weight, torch.zeros(1, 4)])
    token_ids = torch.zeros(len(index), dtype=torch.int32)
    token_ids[:2], token_ids[-1] = torch.tensor([3, 1]), 2
    embed_tokens, out = randn(5, 6, seed=9), torch.empty(len(index), 6)
    joined = reference.RowTable(plain.source_rows, index, weight, has_pooled=False)
    reference.project_and_pack(
        features, joined, *args, token_ids, reference.PackedLinear(embed_tokens, None), out
    )
    assert torch.equal(out[2:-1], alone)
    assert torch.equal(out[[0, 1, -1]], embed_tokens[[3, 1, 2]])


def test_project_and_pack_blocks_do_not_change_the_result(monkeypatch):
    table = video_table(3, 27, (14, 14))
    features, newline = randn(3 * 729, 7), randn(6)
    linear_1 = reference.PackedLinear(randn(6, 7), randn(6, seed=1))
    linear_2 = reference.PackedLinear(randn(6, 6), randn(6, seed=2))
    args = (features, row_table(table), linear_1, linear_2, newline, *no_text(table))
    blocked = reference.project_and_pack(*args, torch.empty(len(table.index), 6))
    monkeypatch.setattr(reference, "PROJECT_ROWS", 10**6)
    whole = reference.project_and_pack(*args, torch.empty(len(table.index), 6))
    assert_near(blocked, whole, ulps=4)


def test_upcast_never_writes_its_arguments():
    for dtype in (torch.float32, torch.float64):
        x, cos = randn(3, 2, 4, dtype=dtype), randn(3, 2, dtype=dtype)
        before = x.clone()
        reference.rope(x, cos, cos, upcast=True)
        reference.silu_mul(x[:, 0], upcast=True)
        reference.rms_norm(x[:, 0], x[0, 0], 1e-6, upcast=True)
        reference.causal_attention(x, x.transpose(0, 1), x.transpose(0, 1), range(3), upcast=True)
        assert torch.equal(x, before)
