"""Native linear layers that multiply bfloat16 with bfloat16: sums as exact as float32's."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.csrc.test_linear import (
    SHAPES,
    UNTOUCHED,
    activate,
    interleave,
    packed,
    randn,
    stored,
)
from tests.support.accuracy import assert_two_times_rule

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")


@pytest.fixture(autouse=True)
def products(isa: str) -> None:
    if not native.bfloat16_products():
        pytest.skip(f"{isa} on this CPU multiplies no bfloat16")


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def linear(
    x: torch.Tensor,
    weights: Any,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    accumulates: bool = False,
    out: torch.Tensor | None = None,
    threads: int = 1,
) -> torch.Tensor:
    if out is None:
        outputs = weights.rows // 2 if activation == "silu_mul" else weights.rows
        out = torch.full((len(x), outputs), UNTOUCHED)
    arrays = (weights, None if bias is None else bias.numpy(), activation, accumulates)
    pool = native.ThreadPool(threads)
    native.linear(pool, x.numpy(), *arrays, out.numpy(), bfloat16_inputs=True)
    return out


@pytest.mark.parametrize("shape", [*SHAPES, (0, 5, 3), (15, 4304, 33)], ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "gelu_erf"])
def test_two_times_rule(activation: str, shape: tuple[int, int, int]) -> None:
    num_rows, cols, outputs = shape
    x, bias = randn(num_rows, cols), randn(outputs)
    weight = stored("bfloat16", randn(outputs, cols) * 2 / cols**0.5)
    out = linear(x, packed("bfloat16", weight), bias, activation)
    x = rounded(x)
    expected = activate(functional.linear(x, weight, bias), activation)
    truth = activate(functional.linear(x.double(), weight.double(), bias.double()), activation)
    assert_two_times_rule(out, expected, truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul_two_times_rule(shape: tuple[int, int, int]) -> None:
    num_rows, cols, outputs = shape
    x = randn(num_rows, cols)
    gate, up = (
        stored("bfloat16", randn(outputs, cols, seed=seed) * 2 / cols**0.5) for seed in (1, 2)
    )
    biases = [randn(outputs, seed=seed) for seed in (3, 4)]

    def reference(dtype: torch.dtype) -> torch.Tensor:
        left, right = (
            functional.linear(rounded(x).to(dtype), weight.to(dtype), bias.to(dtype))
            for weight, bias in zip((gate, up), biases, strict=True)
        )
        return functional.silu(left) * right

    out = torch.full((num_rows, outputs), UNTOUCHED)
    linear(x, packed("bfloat16", gate, up), interleave(*biases), "silu_mul", out=out)
    assert_two_times_rule(out, reference(torch.float32), reference(torch.float64))


def test_inputs_are_rounded_as_torch_rounds() -> None:
    """To the nearest, halves to even; by weights of one, so that the output is the input."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (4000, 1), generator=generator)
    halves = torch.arange(0x3F800000, 0x40000000, 0x8000)[:, None]
    x = torch.cat([bits, halves, halves - 1, halves + 1]).to(torch.int32).view(torch.float32)
    x = torch.where(x.abs() < 2.0**-126, 0.0, x)  # subnormal numbers may count as 0
    out = linear(x, packed("bfloat16", torch.ones(1, 1)))
    assert torch.equal(torch.nan_to_num(out), torch.nan_to_num(rounded(x)))
    assert torch.equal(out.isnan(), x.isnan())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("cols", [1, 33, 701])
def test_what_is_not_finite_stays_in_its_row(bad: float, cols: int) -> None:
    x = randn(30, cols).abs()
    x[7, cols - 1] = bad
    out = linear(x, packed("bfloat16", randn(20, cols).abs() + 1))
    others = [row for row in range(30) if row != 7]
    assert bool(torch.isfinite(out[others]).all())
    assert torch.equal(torch.nan_to_num(out[7]), torch.nan_to_num(torch.full((20,), bad)))


@pytest.mark.parametrize("activation", ["none", "silu_mul"])
def test_bits_of_a_row_depend_on_the_row(activation: str) -> None:
    # Three panels of inputs; 200 rows are three chunks, 70 outputs are five blocks.
    x = randn(200, 701)
    sources = [randn(70, 701, seed=seed) for seed in (range(2) if activation != "none" else [0])]
    weights = packed("bfloat16", *sources)
    bias = randn(weights.rows)

    def run(first: int, num_rows: int, threads: int = 1) -> torch.Tensor:
        out = torch.empty(num_rows, 70)
        return linear(
            x[first : first + num_rows], weights, bias, activation, out=out, threads=threads
        )

    whole = run(0, 200)
    for num_rows in (1, 2, 5, 11, 12, 13, 97, 200):
        for first in {0, 40, 200 - num_rows}:
            if first + num_rows > 200:
                continue
            for threads in (1, 3):
                part = run(first, num_rows, threads)
                assert torch.equal(part, whole[first : first + num_rows]), (num_rows, first)


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "silu_mul"])
@pytest.mark.parametrize("num_rows", [1, 50])
def test_accumulates_and_strides(num_rows: int, activation: str) -> None:
    cols, outputs = 335, 41
    # Behind the inputs of a row lies NaN: it must not be read, not even times a zero weight.
    wide = torch.full((num_rows, cols + 9), float("nan"))
    wide[:, :cols] = randn(num_rows, cols)
    sources = [
        randn(outputs, cols, seed=seed) for seed in (range(2) if activation == "silu_mul" else [0])
    ]
    weights = packed("bfloat16", *sources)
    bias = randn(weights.rows)
    x = wide[:, :cols]
    plain = linear(x.clone(), weights, bias, activation, out=torch.empty(num_rows, outputs))
    base = torch.full((num_rows, outputs + 20), UNTOUCHED)
    before = randn(num_rows, outputs)
    base[:, 3 : 3 + outputs] = before
    linear(x, weights, bias, activation, True, out=base[:, 3 : 3 + outputs])
    assert torch.equal(base[:, 3 : 3 + outputs], before + plain)
    base[:, 3 : 3 + outputs] = UNTOUCHED
    assert torch.equal(base, torch.full_like(base, UNTOUCHED)), "wrote beside the output"


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "int4"])
def test_other_weights_are_refused(kind: str) -> None:
    weights = packed(kind, randn(16, 128))
    with pytest.raises(ValueError, match="bfloat16_inputs needs weights in bfloat16"):
        linear(randn(3, 128), weights)
