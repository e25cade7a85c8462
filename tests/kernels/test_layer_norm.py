"""Triton layer_norm against a float64 truth and plain torch, by the accuracy rule."""

import pytest
import torch

from ovfast import reference
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params

layer_norm = pytest.importorskip("ovfast.kernels.layer_norm", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]
EPS = 1e-6

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_inputs(
    device: str, dtype: torch.dtype, num_rows: int, width: int, offset: float = 0.0
) -> Inputs:
    generator = torch.Generator().manual_seed(17 * num_rows + width)
    x = torch.randn(num_rows, width, generator=generator) + offset
    weight = torch.randn(width, generator=generator) + 1.0
    bias = torch.randn(width, generator=generator)
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def check_case(inputs: Inputs, eps: float = EPS) -> None:
    out = torch.full_like(inputs[0], float("nan"))
    assert layer_norm.layer_norm(*inputs, eps, out) is out
    same_dtype = reference.layer_norm(*inputs, eps)
    assert_two_times_rule(out, same_dtype, reference.layer_norm(*inputs, eps, upcast=True))


# 1: variance 0; 41: odd; 144: the demo; 1152: the tower; 1024: no column masked.
@pytest.mark.parametrize("width", [1, 41, 144, 1024, 1152])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_widths(device: str, dtype: torch.dtype, width: int) -> None:
    check_case(random_inputs(device, dtype, 5, width))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_widest_row(device: str, dtype: torch.dtype) -> None:
    check_case(random_inputs(device, dtype, 2, layer_norm.MAX_WIDTH))


# mean(x²) − mean² in float32 would lose the variance of 1 beside 1e6. 64 rows: what is left is how
# the mean is rounded, which is luck in one row.
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_large_common_offset(device: str, dtype: torch.dtype) -> None:
    check_case(random_inputs(device, dtype, 64, 1152, offset=1e3))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_eps_counts(device: str, dtype: torch.dtype) -> None:
    x, weight, bias = random_inputs(device, dtype, 4, 144)
    check_case((x * 1e-3, weight, bias), eps=1e-5)
    check_case((torch.ones_like(x), weight, bias))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_in_place(device: str, dtype: torch.dtype) -> None:
    x, weight, bias = random_inputs(device, dtype, 5, 144)
    out = layer_norm.layer_norm(x, weight, bias, EPS)
    assert out.data_ptr() != x.data_ptr()
    assert layer_norm.layer_norm(x, weight, bias, EPS, x) is x
    assert torch.equal(x, out)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_rows_at_any_stride(device: str, dtype: torch.dtype) -> None:
    x, weight, bias = random_inputs(device, dtype, 5, 41)
    # Misaligned rows, with NaN around them and behind the last: masked columns must not count.
    wide = x.new_full((7, 60), float("nan"))
    wide[:5, 7:48] = x
    wide_weight = x.new_full((64,), float("nan"))
    wide_weight[3:44] = weight
    wide_out = x.new_full((7, 50), 9.0)
    layer_norm.layer_norm(wide[:5, 7:48], wide_weight[3:44], bias, EPS, wide_out[1:6, 5:46])
    assert torch.equal(wide_out[1:6, 5:46], layer_norm.layer_norm(x, weight, bias, EPS))
    wide_out[1:6, 5:46] = 9
    assert bool((wide_out == 9).all())


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_row_does_not_see_the_others(device: str, dtype: torch.dtype) -> None:
    x, weight, bias = random_inputs(device, dtype, 3, 144)
    whole = layer_norm.layer_norm(x, weight, bias, EPS)
    x[[0, 2]] = float("nan")
    assert torch.equal(layer_norm.layer_norm(x, weight, bias, EPS)[1], whole[1])
    assert torch.equal(layer_norm.layer_norm(x[1:2], weight, bias, EPS)[0], whole[1])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_no_rows(device: str, dtype: torch.dtype) -> None:
    x, weight, bias = random_inputs(device, dtype, 0, 1152)
    out = layer_norm.layer_norm(x, weight, bias, EPS)
    assert (out.shape, out.dtype) == ((0, 1152), dtype)


# One view and a picture of 37.
@pytest.mark.parametrize("num_rows", [729, 37 * 729])
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_tower_size(device: str, dtype: torch.dtype, num_rows: int) -> None:
    check_case(random_inputs(device, dtype, num_rows, 1152))


BAD_ARGUMENTS = {
    "x-f64": (0, torch.zeros(5, 8, dtype=torch.float64), TypeError, "x is"),
    "x-1d": (0, torch.zeros(8), ValueError, "x has shape"),
    "x-no-columns": (0, torch.zeros(5, 0), ValueError, "x has shape"),
    "x-too-wide": (0, torch.zeros(5, 8193), ValueError, "x has shape"),
    "x-transposed": (0, torch.zeros(8, 5).t(), ValueError, "x has last-dim"),
    "weight-f16": (1, torch.zeros(8, dtype=torch.float16), TypeError, "weight is"),
    "weight-long": (1, torch.zeros(9), ValueError, "weight has shape"),
    "weight-strided": (1, torch.zeros(16)[::2], ValueError, "weight has last-dim"),
    "bias-f16": (2, torch.zeros(8, dtype=torch.float16), TypeError, "bias is"),
    "bias-2d": (2, torch.zeros(1, 8), ValueError, "bias has shape"),
    "bias-meta": (2, torch.zeros(8, device="meta"), ValueError, "bias is on meta"),
    "out-f16": (4, torch.zeros(5, 8, dtype=torch.float16), TypeError, "out is"),
    "out-narrow": (4, torch.zeros(5, 7), ValueError, "out has shape"),
    "out-transposed": (4, torch.zeros(8, 5).t(), ValueError, "out has last-dim"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    position, value, error, message = BAD_ARGUMENTS[name]
    arguments = [torch.zeros(5, 8), torch.zeros(8), torch.zeros(8), EPS, torch.zeros(5, 8)]
    arguments[position] = value
    with pytest.raises(error, match=message):
        layer_norm.layer_norm(*arguments)
