"""Triton rms_norm against a float64 truth and plain torch, by the accuracy rule."""

import pytest
import torch

from ovfast import reference
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params

rms_norm = pytest.importorskip("ovfast.kernels.rms_norm", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]
EPS = 1e-6


def random_inputs(
    device: str, dtype: torch.dtype, num_rows: int, width: int, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(17 * num_rows + width)
    x = torch.randn(num_rows, width, generator=generator) * scale
    weight = torch.randn(width, generator=generator) + 1.0
    return x.to(device, dtype), weight.to(device, dtype)


def check_case(x: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> None:
    out = torch.full_like(x, float("nan"))
    assert rms_norm.rms_norm(x, weight, eps, out) is out
    same_dtype = reference.rms_norm(x, weight, eps)
    assert_two_times_rule(out, same_dtype, reference.rms_norm(x, weight, eps, upcast=True))


# 1: x / |x|; 41: odd; 256: the demo; 896: 0.5B; 1024: no column masked.
@pytest.mark.parametrize("width", [1, 41, 256, 896, 1024])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_widths(device: str, dtype: torch.dtype, width: int) -> None:
    check_case(*random_inputs(device, dtype, 5, width))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_widest_row(device: str, dtype: torch.dtype) -> None:
    check_case(*random_inputs(device, dtype, 2, rms_norm.MAX_WIDTH))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_squares_are_float32(device: str, dtype: torch.dtype) -> None:
    # Their sum is beyond float16.
    check_case(*random_inputs(device, dtype, 5, 896, scale=3000.0))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_eps_counts(device: str, dtype: torch.dtype) -> None:
    x, weight = random_inputs(device, dtype, 4, 144, scale=1e-3)
    check_case(x, weight, eps=1e-5)
    check_case(torch.zeros_like(x), weight)


@pytest.mark.parametrize(
    ("device", "dtype"), [param for param in kernel_params() if param.values[1] != torch.float32]
)
def test_rounds_before_the_weight(device: str, dtype: torch.dtype) -> None:
    x, weight = random_inputs(device, dtype, 64, 896)
    out = rms_norm.rms_norm(x, weight, EPS)
    twice = reference.rms_norm(x, weight, EPS)
    once = reference.rms_norm(x.float(), weight.float(), EPS).to(dtype)
    # The sum of squares may differ by an ulp, and so may a rounding here and there.
    assert float((out != twice).float().mean()) < 0.01
    assert float((once != twice).float().mean()) > 0.05


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_in_place(device: str, dtype: torch.dtype) -> None:
    x, weight = random_inputs(device, dtype, 5, 144)
    out = rms_norm.rms_norm(x, weight, EPS)
    assert out.data_ptr() != x.data_ptr()
    assert rms_norm.rms_norm(x, weight, EPS, x) is x
    assert torch.equal(x, out)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_rows_at_any_stride(device: str, dtype: torch.dtype) -> None:
    x, weight = random_inputs(device, dtype, 5, 41)
    # Misaligned rows, with NaN around them and behind the last: masked columns must not count.
    wide = x.new_full((7, 60), float("nan"))
    wide[:5, 7:48] = x
    wide_weight = x.new_full((64,), float("nan"))
    wide_weight[3:44] = weight
    wide_out = x.new_full((7, 50), 9.0)
    rms_norm.rms_norm(wide[:5, 7:48], wide_weight[3:44], EPS, wide_out[1:6, 5:46])
    assert torch.equal(wide_out[1:6, 5:46], rms_norm.rms_norm(x, weight, EPS))
    wide_out[1:6, 5:46] = 9
    assert bool((wide_out == 9).all())


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_row_does_not_see_the_others(device: str, dtype: torch.dtype) -> None:
    x, weight = random_inputs(device, dtype, 3, 144)
    whole = rms_norm.rms_norm(x, weight, EPS)
    x[[0, 2]] = float("nan")
    assert torch.equal(rms_norm.rms_norm(x, weight, EPS)[1], whole[1])
    assert torch.equal(rms_norm.rms_norm(x[1:2], weight, EPS)[0], whole[1])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_no_rows(device: str, dtype: torch.dtype) -> None:
    out = rms_norm.rms_norm(*random_inputs(device, dtype, 0, 896), EPS)
    assert (out.shape, out.dtype) == ((0, 896), dtype)


# 0.5B, 7B, 72B; a picture of 10 views.
@pytest.mark.parametrize("width", [896, 3584, 8192])
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_model_sizes(device: str, dtype: torch.dtype, width: int) -> None:
    check_case(*random_inputs(device, dtype, 7300, width))


BAD_ARGUMENTS = {
    "x-f64": (0, torch.zeros(5, 8, dtype=torch.float64), TypeError, "x is"),
    "x-1d": (0, torch.zeros(8), ValueError, "x has shape"),
    "x-no-columns": (0, torch.zeros(5, 0), ValueError, "x has shape"),
    "x-too-wide": (0, torch.zeros(5, 8193), ValueError, "x has shape"),
    "x-transposed": (0, torch.zeros(8, 5).t(), ValueError, "x has last-dim"),
    "weight-f16": (1, torch.zeros(8, dtype=torch.float16), TypeError, "weight is"),
    "weight-long": (1, torch.zeros(9), ValueError, "weight has shape"),
    "weight-strided": (1, torch.zeros(16)[::2], ValueError, "weight has last-dim"),
    "weight-meta": (1, torch.zeros(8, device="meta"), ValueError, "weight is on meta"),
    "out-f16": (3, torch.zeros(5, 8, dtype=torch.float16), TypeError, "out is"),
    "out-short": (3, torch.zeros(4, 8), ValueError, "out has shape"),
    "out-transposed": (3, torch.zeros(8, 5).t(), ValueError, "out has last-dim"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    position, value, error, message = BAD_ARGUMENTS[name]
    arguments = [torch.zeros(5, 8), torch.zeros(8), EPS, torch.zeros(5, 8)]
    arguments[position] = value
    with pytest.raises(error, match=message):
        rms_norm.rms_norm(*arguments)
