"""The definition of int8, int4 and float8: scales, rounding and edge cases, by the words of it."""

import math

import pytest
import torch

from ovfast.quantize import (
    InputBits,
    QuantizedKind,
    dequantize,
    fake_float8,
    fake_quantized_linear,
    halve_large_groups,
    input_factors,
    quantize,
    quantize_float8,
    quantize_rows,
)
from ovfast.storage import GROUPS

KINDS: tuple[QuantizedKind, ...] = ("int8", "int4")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# One group, a short last group, a group of one, a single weight.
@pytest.mark.parametrize("cols", [128, 32, 176, 129, 33, 41, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_each_group_by_the_definition(kind: QuantizedKind, cols: int) -> None:
    weight = gaussian(5, cols, seed=cols)
    q, scales, factors = quantize(weight, kind)
    assert torch.equal(factors, input_factors(weight))
    weight = weight / factors
    group = GROUPS[kind]
    assert q.shape == weight.shape
    assert scales.shape == (5, -(-cols // group))
    assert torch.equal(scales, scales.bfloat16().float())
    for row in range(5):
        for index in range(scales.shape[1]):
            values = weight[row, index * group : (index + 1) * group]
            largest = max(values.tolist(), key=abs)
            exact = abs(largest) / 127 if kind == "int8" else largest / -8
            scale = float(scales[row, index])
            spacing = 2.0**-7 * abs(exact)
            if kind == "int8":
                assert exact * (1 - 2**-20) <= scale <= exact + spacing
            else:
                assert abs(scale - exact) <= spacing / 2
            low, high = (-127, 127) if kind == "int8" else (-8, 7)
            expected = [min(max(round(v / scale), low), high) for v in values.double().tolist()]
            assert q[row, index * group : (index + 1) * group].tolist() == expected


def test_factors_bring_the_largest_weights_of_inputs_together() -> None:
    weight = gaussian(64, 41).clamp(-2, 2)
    weight[0] = 2.0  # so that all inputs have the same largest weight
    assert torch.equal(input_factors(weight), torch.ones(41))
    sizes = {3: 100.0, 7: 0.01, 11: 1.4, 12: 1.42, 13: 0.71, 14: 0.70, 20: 2.0**40, 21: 2.0**-40}
    for col, size in sizes.items():
        weight[:, col] *= size
    weight[:, 30] = 0
    expected = torch.ones(41)
    for col, size in sizes.items():
        expected[col] = 2.0 ** min(30, max(-30, round(math.log2(size))))
    assert torch.equal(input_factors(weight), expected)
    assert torch.equal(input_factors(torch.zeros(3, 5)), torch.ones(5))
    assert torch.equal(input_factors(torch.zeros(0, 5)), torch.ones(5))


# A channel a hundred times the others and its weights as much smaller, and the other way round.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 16])
def test_outlier_channels_cost_nothing(kind: QuantizedKind, bits: InputBits) -> None:
    x, weight = gaussian(16, 256), gaussian(64, 256, seed=1)

    def error() -> float:
        truth = x.double() @ weight.double().T
        out = fake_quantized_linear(x, weight, None, kind, input_bits=bits)
        return float((out - truth).norm() / truth.norm())

    before = error()
    x[:, 9], weight[:, 9] = x[:, 9] * 128, weight[:, 9] / 128
    x[:, 70], weight[:, 70] = x[:, 70] / 128, weight[:, 70] * 128
    assert error() == pytest.approx(before, rel=1e-5)


def test_int8_weights_stay_within_half_a_scale() -> None:
    q, scales, factors = quantize(gaussian(64, 896), "int8")
    weight = gaussian(64, 896) / factors
    error = (dequantize(q, scales, 128) - weight).abs()
    assert bool((error <= 0.5001 * scales.repeat_interleave(128, 1)).all())


def test_the_largest_weight_of_int4_becomes_minus_eight() -> None:
    weight = torch.zeros(4, 32)
    weight[0, 5], weight[1, 5] = 4.0, -4.0
    weight[2, 3], weight[2, 9] = 2.0, -2.0  # the first of two
    weight[3] = 4.0  # all factors are 1
    q, scales, _ = quantize(weight, "int4")
    assert scales[:3, 0].tolist() == [-0.5, 0.5, -0.25]
    assert (q[0, 5], q[1, 5], q[2, 3], q[2, 9]) == (-8, -8, -8, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_halves_go_to_even(kind: QuantizedKind) -> None:
    largest = -127.0 if kind == "int8" else -8.0
    weight = torch.tensor([[largest, 0.5, 1.5, 2.5, -0.5, -1.5], [largest] * 6])
    q, scales, _ = quantize(weight, kind)
    assert scales.tolist() == [[1.0], [1.0]]
    assert q[0, 1:].tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_vanishing_groups(kind: QuantizedKind) -> None:
    weight = torch.zeros(2, 32)
    weight[1, 0] = 1e-45  # its scale is 0 or the smallest number
    q, scales, _ = quantize(weight, kind)
    assert torch.isfinite(scales).all()
    assert torch.equal(q[0], torch.zeros(32, dtype=torch.int8))
    assert float(dequantize(q, scales, GROUPS[kind]).abs().max()) <= 1e-38


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.int8), (16, torch.int16)])
def test_rows_of_zeros_subnormals_and_outliers(bits: InputBits, dtype: torch.dtype) -> None:
    most = 2 ** (bits - 1) - 1
    x = gaussian(4, 41)
    x[0] = 0
    x[1] *= 1e-43
    x[2, 7] = 1e30
    q, scales = quantize_rows(x, 32, bits)
    assert q.dtype == dtype
    assert torch.isfinite(scales).all()
    assert not q[0].any()
    assert int(q.abs().max()) <= most
    assert q[2].tolist()[7] == most
    assert q[2, :7].abs().max() == 0
    assert (dequantize(q, scales, 32)[3] - x[3]).abs().max() <= float(scales[3].max()) / 2 * 1.001


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_row_that_is_not_finite_gives_nan(bad: float) -> None:
    x = gaussian(2, 64)
    x[1, 40] = bad
    out = fake_quantized_linear(x, gaussian(3, 64), None, "int4")
    assert torch.isfinite(out[0]).all()
    assert torch.isnan(out[1]).all()


def test_groups_whose_sums_of_four_are_too_large_are_halved() -> None:
    q = torch.zeros(6, 256, dtype=torch.int8)
    q[:, 10:14], q[:, 200:208] = 3, 60  # neighbours of eight: 200…207; 60 · 4 is not too large
    q[1, [200, 201, 204, 205]] = torch.tensor([127, 127, 3, 1], dtype=torch.int8)  # 258
    q[2, [200, 201, 204, 205]] = torch.tensor([127, 127, 3, 2], dtype=torch.int8)
    q[3, [202, 203, 206, 207]] = torch.tensor([-125, -126, -3, -5], dtype=torch.int8)
    q[4, [202, 203, 206, 207]] = torch.tensor([-125, 126, -127, -5], dtype=torch.int8)  # -257
    q[5, 8:12], q[5, 12:14] = 127, 2  # two and two
    scales = torch.arange(1.0, 13).view(6, 2)
    halved, doubled = halve_large_groups(q, scales)
    assert halved.dtype == torch.int8
    for row in (0, 1, 4, 5):
        assert torch.equal(halved[row], q[row])
        assert torch.equal(doubled[row], scales[row])
    assert halved[2, 200:208].tolist() == [64, 64, 30, 30, 2, 1, 30, 30]
    assert halved[3, 200:208].tolist() == [30, 30, -62, -63, 30, 30, -2, -2]
    assert torch.equal(halved[2:4, :128], q[2:4, :128])  # the other group stays
    assert doubled[2:4].tolist() == [[5.0, 12.0], [7.0, 16.0]]


# Errors of Gaussian weights: a uniform error of a scale has 1/√12 of it. 2.9 σ is the largest of
# 128 in the mean, 2.1 σ of 32: 2.7 / 127 / √12 = 0.6 % and 2.1 / 8 / √12 = 7.7 % of σ.
@pytest.mark.parametrize(
    ("kind", "bits", "bound"),
    [
        ("int8", 16, 0.008),
        ("int8", 8, 0.012),
        ("int8", 7, 0.018),
        ("int4", 16, 0.09),
        ("int4", 8, 0.09),
    ],
)
def test_relative_error_of_the_scheme(kind: QuantizedKind, bits: InputBits, bound: float) -> None:
    x, weight, bias = gaussian(64, 896), gaussian(128, 896, seed=1), gaussian(128, seed=2)
    truth = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    out, upcast = (
        fake_quantized_linear(x, weight, bias, kind, input_bits=bits, upcast=upcast)
        for upcast in (False, True)
    )
    relative = float((out.double() - truth).norm() / truth.norm())
    assert bound / 3 < relative < bound
    assert float((out.double() - upcast).abs().max()) < 1e-3


def test_float8_has_the_largest_number_of_every_row() -> None:
    x = gaussian(5, 40) * torch.logspace(-9, 9, 5)[:, None]
    q, scales = quantize_float8(x)
    assert q.dtype == torch.float8_e4m3fn
    assert torch.equal(q.float().abs().amax(1), torch.full((5,), 448.0))
    # Four significant bits, and below 2^-6 of them steps of 2^-9.
    error, kept = (fake_float8(x) - x.double()).abs(), scales.double()[:, None]
    assert bool((error <= torch.maximum(x.double().abs() / 16, kept * 2.0**-10) * 1.0001).all())


def test_float8_of_zeros_and_of_nan() -> None:
    x = torch.zeros(3, 4)
    x[1, 2], x[2, 0] = math.nan, math.inf
    kept = fake_float8(x)
    assert torch.equal(kept[0], torch.zeros(4).double())
    assert bool(kept[1:].isnan().all())
