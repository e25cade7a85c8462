"""Quantised linear layers of the native back end, against ovfast/quantize.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ovfast.quantize import InputBits, QuantizedKind, dequantize, fake_quantized_linear, quantize
from ovfast.storage import GROUPS
from tests.support.accuracy import assert_two_times_rule

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

KINDS: tuple[QuantizedKind, ...] = ("int8", "int4")
MODES: tuple[tuple[QuantizedKind, bool], ...] = (("int8", True), ("int8", False), ("int4", False))
# Demo-like and odd widths, the patch (588), a short last group of both kinds, half a padding.
COLS = (41, 80, 176, 588, 896)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pack(kind: str, *parts: torch.Tensor, interleaved: bool = False) -> native.PackedWeights:
    return native.pack(native.ThreadPool(1), kind, [part.numpy() for part in parts], interleaved)


def run(
    x: torch.Tensor,
    packed: native.PackedWeights,
    *,
    wide: bool,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    columns: int | None = None,
    out: torch.Tensor | None = None,
    num_threads: int = 1,
) -> torch.Tensor:
    accumulates = out is not None
    if out is None:
        out = torch.full((len(x), packed.rows if columns is None else columns), torch.nan)
    native.linear(
        native.ThreadPool(num_threads),
        x.numpy(),
        packed,
        None if bias is None else bias.numpy(),
        activation,
        accumulates,
        out.numpy(),
        wide,
    )
    return out


def reference(
    x: torch.Tensor, weight: torch.Tensor, kind: QuantizedKind, *, wide: bool, upcast: bool
) -> torch.Tensor:
    bits: InputBits = 16 if wide else 7 if kind == "int8" and native.isa() == "avx2" else 8
    return fake_quantized_linear(x, weight, None, kind, input_bits=bits, upcast=upcast)


def check(x: torch.Tensor, weight: torch.Tensor, kind: QuantizedKind, *, wide: bool) -> None:
    out = run(x, pack(kind, weight), wide=wide)
    plain, truth = (reference(x, weight, kind, wide=wide, upcast=u) for u in (False, True))
    assert_two_times_rule(out, plain, truth)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cols", [*COLS, 1, 32, 128, 4304])
def test_packing_equals_the_definition(kind: QuantizedKind, cols: int) -> None:
    weight = gaussian(41, cols, seed=cols)
    weight[3] = 0
    weight[5] *= 1e-42  # subnormal scales
    weight[7] *= 1e30
    weight[9, ::2] = 0.5  # ties of the largest magnitude
    weight[9, 1::2] = -0.5
    weight[:, cols // 2] *= 300  # factors of their own
    weight[:, cols // 3] /= 50
    weight[:, cols // 5] = 0
    packed = pack(kind, weight)
    out = torch.full(weight.shape, torch.nan)
    native.embed(native.ThreadPool(1), packed, np.arange(41, dtype=np.int32), out.numpy())
    q, scales, factors = quantize(weight, kind)
    assert torch.equal(out, dequantize(q, scales, GROUPS[kind]) * factors)


# 17 outputs: a block and a bit; 70: more than a task of four blocks. 41 rows: several tiles.
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize(("kind", "wide"), MODES)
def test_accuracy(isa: str, kind: QuantizedKind, wide: bool, cols: int) -> None:
    rows = 70 if cols < 500 else 17
    check(gaussian(41, cols), gaussian(rows, cols, seed=1), kind, wide=wide)


@pytest.mark.parametrize(("kind", "wide"), MODES)
def test_accuracy_of_a_wide_row(isa: str, kind: QuantizedKind, wide: bool) -> None:
    check(gaussian(2, 4304), gaussian(41, 4304, seed=1), kind, wide=wide)


@pytest.mark.parametrize(("kind", "wide"), MODES)
def test_accuracy_with_outliers(isa: str, kind: QuantizedKind, wide: bool) -> None:
    x = gaussian(41, 176)
    x[:, 60] *= 100
    x[:, 7] = 0
    x[5] *= 1e-40
    x[6] = 0
    x[7:16] *= 1e20
    weight = gaussian(70, 176, seed=1)
    weight[4::8] *= 100
    weight[:, 33] *= 100
    for rows in (slice(0, 6), slice(6, 7), slice(7, 16), slice(16, 41)):  # of like size each
        check(x[rows], weight, kind, wide=wide)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("kind", "wide"), MODES)
def test_extreme_integers_do_not_saturate(
    isa: str, kind: QuantizedKind, wide: bool, sign: float
) -> None:
    # Inputs and weights at both ends, all of one sign and alternating: exact in any order, but that
    # a sum with inputs of 16 bits is rounded to a float32.
    most = 32767.0 if wide else 63.0 if kind == "int8" and isa == "avx2" else 127.0
    cols, x = 256, torch.full((7, 256), most)
    x[1] *= -1
    x[2, ::2] *= -1
    x[3, 1::2] *= -1
    x[4, ::4] *= -1
    top = 127.0 if kind == "int8" else 8.0
    weight = torch.full((40, cols), -top * sign)
    weight[1] *= -1
    weight[2, 1::2] = top * sign if kind == "int8" else 7 * sign
    weight[3, 2::3] = 0
    # The most that seven bits of inputs allow, and one more; the other sign does not count.
    weight[4:6] = 0
    weight[4:6, ::8], weight[4:6, 1::8], weight[4:6, 5::8] = top, top, -50 * top / 127
    weight[4, 4::8], weight[5, 4::8] = 4 * top / 127, 5 * top / 127
    weight[4:6] *= sign
    packed = pack(kind, weight)
    expected = reference(x, weight, kind, wide=wide, upcast=True)
    for first, last in ((0, 1), (0, 7)):
        out = run(x[first:last], packed, wide=wide)
        rtol = 1.2e-7 if wide else 0.0  # two groups, each half a unit
        torch.testing.assert_close(out.double(), expected[first:last], rtol=rtol, atol=0.0)


@pytest.mark.parametrize(("kind", "wide"), MODES)
def test_bits_do_not_depend_on_rows_and_threads(isa: str, kind: QuantizedKind, wide: bool) -> None:
    # 403 rows: two chunks, of 204 and 199.
    x, packed = gaussian(403, 176), pack(kind, gaussian(70, 176, seed=1))
    whole = run(x, packed, wide=wide)
    parts = ((0, 1), (7, 2), (50, 3), (9, 4), (100, 5), (30, 16), (2, 31), (0, 101), (150, 240))
    for first, count in parts:
        part = x[first : first + count]
        for num_threads in (1, 2, 3):
            out = run(part, packed, wide=wide, num_threads=num_threads)
            assert torch.equal(out, whole[first : first + count]), (first, count, num_threads)
    assert torch.equal(run(x, packed, wide=wide, num_threads=3), whole)


# 67 and 41 blocks: one thread takes 16 or 8 a task, so four or two a stream, and fewer in the last
# task; two and three threads take half of that, or one a stream.
@pytest.mark.parametrize("rows", [1, 2, 3, 21])
@pytest.mark.parametrize("outputs", [66 * 16 + 5, 40 * 16 + 5])
@pytest.mark.parametrize(("kind", "wide"), [("int8", True), ("int4", False)])
def test_streams_of_several_blocks(
    isa: str, kind: QuantizedKind, wide: bool, outputs: int, rows: int
) -> None:
    x, weight = gaussian(rows, 176), gaussian(outputs, 176, seed=1)
    check(x, weight, kind, wide=wide)
    packed = pack(kind, weight)
    whole = run(x, packed, wide=wide)
    for num_threads in (2, 3):
        assert torch.equal(run(x, packed, wide=wide, num_threads=num_threads), whole)
    gate, up = weight[: outputs // 2], weight[outputs // 2 : outputs // 2 * 2]
    out = run(
        x, pack(kind, gate, up, interleaved=True), wide=wide, activation="silu_mul", columns=len(up)
    )
    plain = run(x, pack(kind, gate, up), wide=wide).double()
    gated, raised = plain.split(len(up), dim=1)
    torch.testing.assert_close(out.double(), F.silu(gated) * raised, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "wide"), MODES)
def test_bits_do_not_depend_on_outputs(isa: str, kind: QuantizedKind, wide: bool) -> None:
    # A block beside others, alone, and as the last one of an odd number.
    x, weight = gaussian(5, 80), gaussian(5 * 16, 80, seed=1).clamp(-2, 2)
    weight[::16] = 2.0  # the factors of the inputs are those of a part's weights
    whole = run(x, pack(kind, weight), wide=wide)
    for first, last in ((0, 16), (16, 64), (64, 80), (32, 80)):
        out = run(x, pack(kind, weight[first:last]), wide=wide)
        assert torch.equal(out, whole[:, first:last])


def apply(activation: str, values: torch.Tensor) -> torch.Tensor:
    if activation == "none":
        return values
    return F.gelu(values, approximate="tanh" if activation == "gelu_tanh" else "none")


@pytest.mark.parametrize("rows", [1, 7, 41])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize(("kind", "wide"), MODES)
def test_bias_and_activation(
    isa: str, kind: QuantizedKind, wide: bool, activation: str, rows: int
) -> None:
    x, weight, bias = gaussian(rows, 80), gaussian(41, 80, seed=1) / 9, gaussian(41, seed=2)
    sums = run(x, pack(kind, weight), wide=wide)
    out = run(x, pack(kind, weight), wide=wide, bias=bias, activation=activation)
    # What comes before is tested elsewhere, so only the end is compared: torch's on the same sums.
    plain = apply(activation, sums + bias)
    assert_two_times_rule(out, plain, apply(activation, sums.double() + bias.double()))
    before = gaussian(rows, 41, seed=3)
    added = run(
        x, pack(kind, weight), wide=wide, bias=bias, activation=activation, out=before.clone()
    )
    assert torch.equal(added, before + out)


@pytest.mark.parametrize("rows", [1, 7, 41])
@pytest.mark.parametrize(("kind", "wide"), MODES)
def test_silu_mul(isa: str, kind: QuantizedKind, wide: bool, rows: int) -> None:
    x, gate, up = gaussian(rows, 176), gaussian(41, 176, seed=1) / 13, gaussian(41, 176, seed=2)
    out = run(
        x, pack(kind, gate, up, interleaved=True), wide=wide, activation="silu_mul", columns=41
    )
    gated, raised = run(x, pack(kind, gate, up), wide=wide).split(41, dim=1)
    truth = F.silu(gated.double()) * raised.double()
    assert_two_times_rule(out, F.silu(gated) * raised, truth)


@pytest.mark.parametrize(("kind", "wide"), MODES)
def test_strided_rows_and_memory_beside_them(isa: str, kind: QuantizedKind, wide: bool) -> None:
    broad, weight = gaussian(7, 100), gaussian(41, 41, seed=1)
    broad[:, 41:] = torch.nan  # never read
    packed, out = pack(kind, weight), torch.full((7, 60), 5.0)
    expected = run(broad[:, :41].contiguous(), packed, wide=wide)
    pool = native.ThreadPool(2)
    native.linear(
        pool, broad[:, :41].numpy(), packed, None, "none", False, out[:, :41].numpy(), wide
    )
    assert torch.equal(out[:, :41], expected)
    assert torch.equal(out[:, 41:], torch.full((7, 19), 5.0))


@pytest.mark.parametrize(("kind", "wide"), MODES)
def test_zero_rows_and_single_ones(isa: str, kind: QuantizedKind, wide: bool) -> None:
    assert run(torch.empty(0, 80), pack(kind, gaussian(41, 80)), wide=wide).shape == (0, 41)
    assert run(gaussian(3, 80), pack(kind, torch.empty(0, 80)), wide=wide).shape == (3, 0)
    one = run(torch.tensor([[3.0]]), pack(kind, torch.tensor([[-2.0]])), wide=wide)
    assert float(one) == pytest.approx(-6.0, rel=0.01)  # a scale has eight bits


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize(("kind", "wide"), MODES)
@pytest.mark.parametrize("rows", [9, 21])  # of int4 a few, and many
def test_a_row_that_is_not_finite_spoils_no_other(
    isa: str, rows: int, kind: QuantizedKind, wide: bool, bad: float
) -> None:
    x, packed = gaussian(rows, 176), pack(kind, gaussian(41, 176, seed=1))
    clean = run(x, packed, wide=wide)
    x[4, 150] = bad
    out = run(x, packed, wide=wide)
    assert torch.isnan(out[4]).all()
    keep = [row for row in range(rows) if row != 4]
    assert torch.equal(out[keep], clean[keep])


@pytest.mark.parametrize("rows", [3, 17])
def test_inputs_of_int4_are_always_quantised(isa: str, rows: int) -> None:
    x, packed = gaussian(rows, 80), pack("int4", gaussian(41, 80, seed=1))
    assert torch.equal(run(x, packed, wide=True), run(x, packed, wide=False))


@pytest.mark.parametrize("kind", KINDS)
def test_errors(kind: QuantizedKind) -> None:
    pool, x, packed = native.ThreadPool(1), gaussian(3, 80), pack(kind, gaussian(41, 80))
    out = torch.empty(3, 41)
    with pytest.raises(ValueError, match="expected"):
        native.linear(pool, x[:, :79].numpy(), packed, None, "none", False, out.numpy(), True)
    with pytest.raises(ValueError, match="packed interleaved"):
        native.linear(pool, x.numpy(), packed, None, "silu_mul", False, out.numpy(), True)
    with pytest.raises(ValueError, match="bytes; expected"):
        native.PackedWeights(kind, 41, 112, packed.bytes())
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.linear(pool, x.numpy(), packed, None, "none", False, out.numpy(), "yes")
    again = native.PackedWeights(kind, 41, 80, packed.bytes())
    assert torch.equal(run(x, again, wide=False), run(x, packed, wide=False))
