"""Triton pool_and_pack against a float64 oracle and plain torch, by the accuracy rule."""

import numpy as np
import pytest
import torch

from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params

pool = pytest.importorskip("ovfast.kernels.pool", reason="needs triton")

NEWLINE = -1


def pooled_table(side: int, pooled: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear table of side × side tokens to pooled × pooled, then one newline."""
    centre = (np.arange(pooled, dtype=np.float32) + 0.5) * np.float32(side / pooled) - 0.5
    centre = np.maximum(centre, 0).astype(np.float32)
    low = np.minimum(centre.astype(np.int32), side - 1)
    high = np.minimum(low + 1, side - 1)
    share = centre - low
    rows = np.stack([low, low, high, high], -1)[:, None] * side
    cols = np.stack([low, high, low, high], -1)[None]
    row_weight = np.stack([1 - share, 1 - share, share, share], -1)[:, None]
    col_weight = np.stack([1 - share, share, 1 - share, share], -1)[None]
    index = np.full((pooled * pooled + 1, 4), NEWLINE, np.int32)
    weight = np.zeros((pooled * pooled + 1, 4), np.float32)
    index[:-1] = (rows + cols).reshape(-1, 4)
    weight[:-1] = (row_weight * col_weight).reshape(-1, 4)
    return torch.from_numpy(index), torch.from_numpy(weight)


def random_table(num_out: int, num_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled, copied and newline rows, mixed."""
    rng = np.random.default_rng(seed)
    index = rng.integers(0, num_rows, (num_out, 4), dtype=np.int32)
    weight = rng.dirichlet(np.ones(4), num_out).astype(np.float32)
    kind = rng.integers(0, 3, num_out)
    index[kind == 1] = index[kind == 1, :1]
    weight[kind == 1] = (1, 0, 0, 0)
    index[kind == 2] = NEWLINE
    weight[kind == 2] = 0
    return torch.from_numpy(index), torch.from_numpy(weight)


def oracle(
    features: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    newline: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same sum in `dtype`, step by step as plain torch rounds it."""
    taps = features.to(dtype)[index.clamp(min=0).long()]
    pooled = (taps * weight.to(dtype)[..., None]).sum(1)
    return torch.where(index[:, :1] < 0, newline.to(dtype), pooled)


def check_case(
    device: str, dtype: torch.dtype, table: tuple[torch.Tensor, torch.Tensor], num_rows: int, d: int
) -> None:
    generator = torch.Generator().manual_seed(17 * num_rows + d)
    features = torch.randn(num_rows, d, generator=generator).to(dtype)
    newline = torch.randn(d, generator=generator).to(dtype)
    index, weight = table
    arguments = (features, index, weight, newline)
    out = torch.full((index.shape[0], d), float("nan"), dtype=dtype, device=device)
    returned = pool.pool_and_pack(*(value.to(device) for value in arguments), out)
    assert returned is out
    out = out.cpu()
    assert_two_times_rule(out, oracle(*arguments, dtype), oracle(*arguments, torch.float64))
    copied = (weight[:, 0] == 1) & (index[:, 0] >= 0)
    assert torch.equal(out[copied], features[index[copied, 0].long()])
    newlines = index[:, 0] < 0
    assert torch.equal(out[newlines], newline.expand(int(newlines.sum()), d))


# 1: one lane; 41: odd; 64: a whole block; 1100: two blocks, the second mostly masked.
@pytest.mark.parametrize("d", [1, 41, 64, 1100])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_random_table(device: str, dtype: torch.dtype, d: int) -> None:
    check_case(device, dtype, random_table(13, 9, seed=d), num_rows=9, d=d)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_video_pooling_27_to_14(device: str, dtype: torch.dtype) -> None:
    check_case(device, dtype, pooled_table(27, 14), num_rows=27 * 27, d=48)


# The widths of the language models; too much work for the interpreter.
@pytest.mark.parametrize("d", [896, 3584, 8192])
@pytest.mark.parametrize(
    ("device", "dtype"), [param for param in kernel_params() if param.values[0] == "cuda"]
)
def test_model_widths(device: str, dtype: torch.dtype, d: int) -> None:
    check_case(device, dtype, pooled_table(27, 14), num_rows=27 * 27, d=d)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_rows_at_any_stride(device: str, dtype: torch.dtype) -> None:
    index, weight = (value.to(device) for value in random_table(7, 5, seed=3))
    wide = torch.randn(5, 50, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    newline = torch.ones(20, dtype=dtype, device=device)
    wide_out = torch.full((7, 33), 9.0, dtype=dtype, device=device)
    pool.pool_and_pack(wide[:, 11:31], index, weight, newline, wide_out[:, 4:24])
    out = torch.empty(7, 20, dtype=dtype, device=device)
    pool.pool_and_pack(wide[:, 11:31].contiguous(), index, weight, newline, out)
    assert torch.equal(wide_out[:, 4:24], out)
    assert bool((wide_out[:, :4] == 9).all())
    assert bool((wide_out[:, 24:] == 9).all())


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_unused_taps_are_not_read(device: str, dtype: torch.dtype) -> None:
    features = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]], dtype=dtype, device=device)
    index = torch.tensor([[0, 1, 1, 1]], dtype=torch.int32, device=device)
    weight = torch.tensor([[1.0, 0, 0, 0]], device=device)
    out = torch.empty(1, 2, dtype=dtype, device=device)
    pool.pool_and_pack(features, index, weight, features[0], out)
    assert out.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_empty_tables(device: str, dtype: torch.dtype) -> None:
    newline = torch.arange(3, dtype=dtype, device=device)
    no_rows = torch.empty(0, 3, dtype=dtype, device=device)
    index = torch.full((2, 4), NEWLINE, dtype=torch.int32, device=device)
    weight = torch.zeros(2, 4, device=device)
    assert pool.pool_and_pack(no_rows, index[:0], weight[:0], newline, no_rows).shape == (0, 3)
    out = torch.empty(2, 3, dtype=dtype, device=device)
    pool.pool_and_pack(no_rows, index, weight, newline, out)
    assert out.tolist() == [[0, 1, 2], [0, 1, 2]]


BAD_ARGUMENTS = {
    "features-f64": (0, torch.zeros(5, 8, dtype=torch.float64), TypeError, "features is"),
    "features-1d": (0, torch.zeros(8), ValueError, "features has shape"),
    "features-no-columns": (0, torch.zeros(5, 0), ValueError, "features has shape"),
    "features-transposed": (0, torch.zeros(8, 5).t(), ValueError, "stride"),
    "index-int64": (1, torch.zeros(3, 4, dtype=torch.int64), TypeError, "index is"),
    "index-3-taps": (1, torch.zeros(3, 3, dtype=torch.int32), ValueError, "index has shape"),
    "weight-f16": (2, torch.zeros(3, 4, dtype=torch.float16), TypeError, "weight is"),
    "weight-short": (2, torch.zeros(2, 4), ValueError, "weight has shape"),
    "newline-long": (3, torch.zeros(9), ValueError, "newline has shape"),
    "newline-f16": (3, torch.zeros(8, dtype=torch.float16), TypeError, "newline is"),
    "newline-meta": (3, torch.zeros(8, device="meta"), ValueError, "newline is on meta"),
    "out-narrow": (4, torch.zeros(3, 7), ValueError, "out has shape"),
    "out-3d": (4, torch.zeros(1, 3, 8), ValueError, "out has shape"),
    "out-transposed": (4, torch.zeros(8, 3).t(), ValueError, "stride"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    position, value, error, message = BAD_ARGUMENTS[name]
    arguments = [
        torch.zeros(5, 8),
        torch.zeros(3, 4, dtype=torch.int32),
        torch.zeros(3, 4),
        torch.zeros(8),
        torch.zeros(3, 8),
    ]
    arguments[position] = value
    with pytest.raises(error, match=message):
        pool.pool_and_pack(*arguments)
