"""Native linear layers on float weights: the two-times rule, and bits that no tiling changes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.support.accuracy import assert_two_times_rule

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
UNTOUCHED = 77.0

# (num_rows, cols, outputs): one row to a full register tile, more than one tile, more than one
# chunk of 96 rows; inputs of less than a chain, of an odd number, of several panels; outputs that
# fill no block, several blocks, more than a task's 48. 41 inputs come with more than a few rows:
# for a few, torch sums in eight lanes where the kernel sums in one, and is 2.4 times as exact.
SHAPES = [
    (1, 1, 1),
    (1, 896, 41),
    (2, 587, 41),
    (3, 588, 64),
    (4, 33, 100),
    (5, 1001, 15),
    (6, 320, 160),
    (7, 641, 33),
    (13, 41, 800),
    (41, 588, 48),
    (100, 325, 50),
]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator)


def stored(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight as the kind keeps it, in float32."""
    return weight.to(DTYPES[kind]).float()


def packed(kind: str, *sources: torch.Tensor) -> Any:
    arrays = [source.contiguous().numpy() for source in sources]
    return native.pack(native.ThreadPool(1), kind, arrays, interleaved=len(arrays) == 2)


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Biases in the order of the rows that pack(interleaved=True) makes."""
    padding = (0, -len(gate) % 16)
    blocks = [functional.pad(bias, padding).reshape(-1, 1, 16) for bias in (gate, up)]
    return torch.cat(blocks, 1).reshape(-1)


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
    bias_array = None if bias is None else bias.numpy()
    pool = native.ThreadPool(threads)
    native.linear(pool, x.numpy(), weights, bias_array, activation, accumulates, out.numpy())
    return out


def activate(sums: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "none":
        return sums
    return functional.gelu(sums, approximate="tanh" if activation == "gelu_tanh" else "none")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "gelu_erf"])
def test_two_times_rule(isa: str, activation: str, kind: str, shape: tuple[int, int, int]) -> None:
    num_rows, cols, outputs = shape
    x, bias = randn(num_rows, cols), randn(outputs)
    weight = stored(kind, randn(outputs, cols) * 2 / cols**0.5)
    out = linear(x, packed(kind, weight), bias, activation)
    expected = activate(functional.linear(x, weight, bias), activation)
    truth = activate(functional.linear(x.double(), weight.double(), bias.double()), activation)
    assert_two_times_rule(out, expected, truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", DTYPES)
def test_silu_mul_two_times_rule(isa: str, kind: str, shape: tuple[int, int, int]) -> None:
    num_rows, cols, outputs = shape
    x = randn(num_rows, cols)
    gate, up = (stored(kind, randn(outputs, cols, seed=seed) * 2 / cols**0.5) for seed in (1, 2))
    biases = [randn(outputs, seed=seed) for seed in (3, 4)]

    def reference(dtype: torch.dtype) -> torch.Tensor:
        both = [
            functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
            for weight, bias in zip((gate, up), biases, strict=True)
        ]
        return functional.silu(both[0]) * both[1]

    out = torch.full((num_rows, outputs), UNTOUCHED)
    linear(x, packed(kind, gate, up), interleave(*biases), "silu_mul", out=out)
    assert_two_times_rule(out, reference(torch.float32), reference(torch.float64))


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "gelu_erf", "silu_mul"])
def test_activation_far_out(isa: str, activation: str) -> None:
    values = torch.tensor([-1e30, -1e4, -104.0, -89.0, -20.0, -5.0, -1e-20, 0.0, 3.0, 30.0, 1e30])
    one = torch.ones(1, 1)
    weights = packed("float32", one, one) if activation == "silu_mul" else packed("float32", one)
    out = linear(values[:, None], weights, None, activation, out=torch.empty(len(values), 1))
    if activation == "silu_mul":
        values = values.clamp(-1e15, 1e15)  # the product overflows beyond
        linear(values[:, None], weights, None, activation, out=out)
        truth = functional.silu(values.double()) * values.double()
    else:
        truth = activate(values.double(), activation)
    # Far below zero the activations are tiny; what counts there is that nothing blows up.
    torch.testing.assert_close(out[:, 0].double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("activation", ["none", "silu_mul"])
def test_bits_of_a_row_depend_on_the_row(isa: str, activation: str, kind: str) -> None:
    # Three panels of inputs; 200 rows are three chunks, 70 outputs are five blocks.
    x = randn(200, 701)
    sources = [randn(70, 701, seed=seed) for seed in (range(2) if activation != "none" else [0])]
    weights = packed(kind, *sources)
    bias = randn(weights.rows)

    def run(first: int, num_rows: int, threads: int = 1) -> torch.Tensor:
        out = torch.empty(num_rows, 70)
        return linear(
            x[first : first + num_rows], weights, bias, activation, out=out, threads=threads
        )

    whole = run(0, 200)
    for threads in (2, 3):
        assert torch.equal(run(0, 200, threads), whole)
    for num_rows in (1, 2, 3, 4, 5, 6, 7, 11, 16, 97):
        for first in (0, 40, 200 - num_rows):
            for threads in (1, 3):
                part = run(first, num_rows, threads)
                assert torch.equal(part, whole[first : first + num_rows]), (num_rows, first)


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "gelu_erf", "silu_mul"])
@pytest.mark.parametrize("num_rows", [1, 5, 50])
def test_accumulates_and_strides(isa: str, num_rows: int, activation: str) -> None:
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
    linear(x, weights, bias, activation, out=base[:, 3 : 3 + outputs])
    assert torch.equal(base[:, 3 : 3 + outputs], plain)
    base[:, 3 : 3 + outputs] = UNTOUCHED
    assert torch.equal(base, torch.full_like(base, UNTOUCHED)), "wrote beside the output"


def test_rows_in_any_order(isa: str) -> None:
    x, weight = randn(9, 41), randn(17, 41)
    weights = packed("float32", weight)
    plain = linear(x, weights)
    backwards = np.ascontiguousarray(x.numpy())[::-1]
    out = np.empty((9, 17), np.float32)
    native.linear(native.ThreadPool(1), backwards, weights, None, "none", False, out[::-1])
    assert np.array_equal(out, plain.numpy())
    repeated = np.broadcast_to(x[:1].numpy(), (9, 41))
    native.linear(native.ThreadPool(1), repeated, weights, None, "none", False, out)
    assert np.array_equal(out, np.broadcast_to(plain[:1].numpy(), (9, 17)))


@pytest.mark.parametrize("threads", [1, 3])
def test_silu_mul_writes_only_the_columns_of_out(isa: str, threads: int) -> None:
    gate, up = randn(50, 41, seed=1), randn(50, 41, seed=2)
    x, weights = randn(20, 41), packed("float16", gate, up)
    assert weights.rows == 2 * 64
    whole = linear(x, weights, None, "silu_mul")
    assert torch.equal(whole[:, 50:], torch.zeros(20, 14)), "the padding is zero"
    for num_rows in (2, 20):
        for columns in (1, 16, 17, 33, 50):
            base = torch.full((num_rows, 80), UNTOUCHED)
            out = base[:, :columns]
            linear(x[:num_rows], weights, None, "silu_mul", out=out, threads=threads)
            assert torch.equal(out, whole[:num_rows, :columns])
            assert bool((base[:, columns:] == UNTOUCHED).all())


@pytest.mark.parametrize("kind", DTYPES)
def test_no_rows(isa: str, kind: str) -> None:
    out = linear(torch.empty(0, 41), packed(kind, randn(17, 41)), randn(17), threads=2)
    assert out.shape == (0, 17)
    nothing = packed(kind, torch.empty(0, 41))
    assert (nothing.rows, nothing.nbytes) == (0, 0)
    assert linear(randn(3, 41), nothing).shape == (3, 0)


def test_not_a_number_stays_in_its_row_and_output(isa: str) -> None:
    x, weight = randn(30, 41), randn(20, 41)
    weights = packed("float32", weight)
    plain = linear(x, weights)
    x[7, 40] = float("nan")
    out = linear(x, weights)
    assert bool(out[7].isnan().all())
    out[7] = plain[7]
    assert torch.equal(out, plain)
