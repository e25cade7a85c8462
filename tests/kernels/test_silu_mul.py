"""Triton silu_mul_pairs against a float64 truth and plain torch, by the accuracy rule."""

import pytest
import torch

from ovfast import reference
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params

silu_mul = pytest.importorskip("ovfast.kernels.silu_mul", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]


def random_pairs(
    device: str, dtype: torch.dtype, num_rows: int, width: int, scale: float = 3.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(17 * num_rows + width)
    return (torch.randn(num_rows, 2 * width, generator=generator) * scale).to(device, dtype)


def expected(pairs: torch.Tensor, upcast: bool = False) -> torch.Tensor:
    gate_then_up = pairs.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
    return reference.silu_mul(gate_then_up, upcast=upcast)


def check_case(pairs: torch.Tensor) -> None:
    out = pairs.new_full((pairs.shape[0], pairs.shape[1] // 2), float("nan"))
    assert silu_mul.silu_mul_pairs(pairs, out) is out
    assert_two_times_rule(out, expected(pairs), expected(pairs, upcast=True))


# 1: one pair; 41: odd; 64: the block without a mask; 1100: two blocks, the second mostly masked.
@pytest.mark.parametrize("width", [1, 41, 64, 1100])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_widths(device: str, dtype: torch.dtype, width: int) -> None:
    check_case(random_pairs(device, dtype, 5, width))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_large_gates(device: str, dtype: torch.dtype) -> None:
    # exp of 1000 is beyond float32: silu is then gate itself or 0.
    gates = torch.tensor([-1000.0, -100.0, -20.0, 0.0, 20.0, 100.0, 1000.0])
    pairs = torch.stack([gates, torch.full((7,), 3.0)], dim=1).flatten()[None].to(device, dtype)
    check_case(pairs)
    assert silu_mul.silu_mul_pairs(pairs)[0, [0, 3, 6]].tolist() == [0.0, 0.0, 3000.0]


@pytest.mark.parametrize(
    ("device", "dtype"), [param for param in kernel_params() if param.values[1] != torch.float32]
)
def test_rounds_before_up(device: str, dtype: torch.dtype) -> None:
    pairs = random_pairs(device, dtype, 64, 256)
    out, twice = silu_mul.silu_mul_pairs(pairs), expected(pairs)
    once = expected(pairs.float()).to(dtype)
    # exp may differ by an ulp, and so may a rounding here and there.
    assert float((out != twice).float().mean()) < 0.01
    assert float((once != twice).float().mean()) > 0.05


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_rows_at_any_stride(device: str, dtype: torch.dtype) -> None:
    pairs = random_pairs(device, dtype, 5, 41)
    wide = pairs.new_full((6, 99), float("nan"))
    wide[:5, 7:89] = pairs
    wide_out = pairs.new_full((7, 50), 9.0)
    silu_mul.silu_mul_pairs(wide[:5, 7:89], wide_out[1:6, 5:46])
    assert torch.equal(wide_out[1:6, 5:46], silu_mul.silu_mul_pairs(pairs))
    wide_out[1:6, 5:46] = 9
    assert bool((wide_out == 9).all())


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_row_does_not_see_the_others(device: str, dtype: torch.dtype) -> None:
    pairs = random_pairs(device, dtype, 3, 144)
    whole = silu_mul.silu_mul_pairs(pairs)
    pairs[[0, 2]] = float("nan")
    assert torch.equal(silu_mul.silu_mul_pairs(pairs)[1], whole[1])
    assert torch.equal(silu_mul.silu_mul_pairs(pairs[1:2])[0], whole[1])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_no_rows(device: str, dtype: torch.dtype) -> None:
    out = silu_mul.silu_mul_pairs(random_pairs(device, dtype, 0, 41))
    assert (out.shape, out.dtype) == ((0, 41), dtype)


# 0.5B, 7B, 72B.
@pytest.mark.parametrize("width", [4864, 18944, 29568])
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_model_sizes(device: str, dtype: torch.dtype, width: int) -> None:
    check_case(random_pairs(device, dtype, 729, width))


F16 = torch.float16
BAD_ARGUMENTS = {
    "f64": (torch.zeros(5, 8).double(), None, TypeError, "gate_up is"),
    "1d": (torch.zeros(8), None, ValueError, "gate_up has shape"),
    "odd": (torch.zeros(5, 7), None, ValueError, "gate_up has shape"),
    "no-columns": (torch.zeros(5, 0), None, ValueError, "gate_up has shape"),
    "transposed": (torch.zeros(8, 5).t(), None, ValueError, "gate_up has last-dim"),
    "out-f16": (torch.zeros(5, 8), torch.zeros(5, 4, dtype=F16), TypeError, "out is"),
    "out-wide": (torch.zeros(5, 8), torch.zeros(5, 8), ValueError, "out has shape"),
    "out-meta": (torch.zeros(5, 8), torch.zeros(5, 4, device="meta"), ValueError, "out is on"),
    "out-transposed": (torch.zeros(5, 8), torch.zeros(4, 5).t(), ValueError, "out has last-dim"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    gate_up, out, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        silu_mul.silu_mul_pairs(gate_up, out)
