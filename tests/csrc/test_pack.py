"""Packed weights: what they keep, and a clean error for every wrong argument."""

import re
from typing import Any

import numpy as np
import pytest
import torch

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
POOL = native.ThreadPool(2)

# Halves that round to even on both sides, the largest numbers of either kind and what rounds to or
# over them, subnormal numbers and what rounds to zero, signs, infinities.
SPECIAL = [
    *(0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf")),
    *(
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-8 + 2**-20,
        1 + 2**-11,
        1 + 3 * 2**-11,
        1 + 2**-11 + 2**-20,
    ),
    *(65504.0, 65519.0, 65519.996, 65520.0, -65520.0, 1e5, 3.3895e38, 3.3953e38, 3.4028e38),
    *(2.0**-14, 2.0**-14 - 2.0**-26, 2.0**-15, 2.0**-24, 2.0**-25, 2.0**-25 + 2.0**-40),
    *(3 * 2.0**-25, -(2.0**-26), 2.0**-126, 2.0**-133, 2.0**-134, 2.0**-149, -(2.0**-149)),
]


def embed(weights: Any, ids: list[int]) -> torch.Tensor:
    out = torch.full((len(ids), weights.cols), 77.0)
    native.embed(POOL, weights, np.array(ids, np.int32), out.numpy())
    return out


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def as_source(weight: torch.Tensor) -> Any:
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.int16).numpy().view(np.uint16)
    return weight.numpy()


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (17, 41), (48, 64)], ids=str)
def test_rows_come_back_rounded_once(kind: str, source: str, shape: tuple[int, int]) -> None:
    weight = randn(*shape).to(DTYPES[source])
    weights = native.pack(POOL, kind, [as_source(weight)])
    assert (weights.kind, weights.rows, weights.cols) == (kind, *shape)
    assert torch.equal(embed(weights, list(range(shape[0]))), weight.to(DTYPES[kind]).float())


@pytest.mark.parametrize("kind", DTYPES)
def test_rounding_of_special_values(kind: str) -> None:
    values = torch.tensor([SPECIAL])
    out = embed(native.pack(POOL, kind, [values.numpy()]), [0])
    expected = values.to(DTYPES[kind]).float()
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_every_value_of_a_short_kind(isa: str, kind: str) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).reshape(16, -1)
    values = bits.view(DTYPES[kind])
    source = bits.numpy().view(np.float16 if kind == "float16" else np.uint16)
    weights = native.pack(POOL, kind, [source])
    rows, expected = embed(weights, list(range(16))), values.float()
    is_nan = expected.isnan()
    assert torch.equal(rows.isnan(), is_nan)
    assert torch.equal(rows[~is_nan].view(torch.int32), expected[~is_nan].view(torch.int32))
    # The kernels read the weights by their own conversions: 1 · weight + 0 · the others.
    finite = torch.where(expected.isfinite(), expected, 0)
    source = as_source(finite.T.contiguous().to(DTYPES[kind]))
    weights = native.pack(POOL, kind, [source])
    for x in (torch.eye(16)[:1], torch.eye(16)):
        out = torch.empty(len(x), 4096)
        native.linear(POOL, x.numpy(), weights, None, "none", False, out.numpy())
        assert torch.equal(out, finite[: len(x)])


def test_not_a_number_stays_one() -> None:
    bits = np.array([[0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFC00000]], np.uint32)
    for kind in DTYPES:
        assert bool(embed(native.pack(POOL, kind, [bits.view(np.float32)]), [0]).isnan().all())


def test_sources_lie_one_below_the_other() -> None:
    parts = [randn(rows, 41) for rows in (3, 0, 20, 16)]
    weights = native.pack(POOL, "float32", [part.numpy() for part in parts])
    assert torch.equal(embed(weights, list(range(39))), torch.cat(parts))


def test_interleaved_blocks_alternate() -> None:
    gate, up = randn(20, 5), -randn(20, 5)
    weights = native.pack(POOL, "float32", [gate.numpy(), up.numpy()], interleaved=True)
    rows = torch.zeros(2, 32, 5)
    rows[0, :20], rows[1, :20] = gate, up
    expected = rows.reshape(2, 2, 16, 5).transpose(0, 1).reshape(64, 5)
    assert torch.equal(embed(weights, list(range(64))), expected)


def test_strided_sources_and_outputs() -> None:
    wide = randn(40, 50)
    source = wide.numpy()[::-2, 3:44]
    weights = native.pack(POOL, "float32", [source])
    base = np.full((3, 60), 77, np.float32)
    native.embed(POOL, weights, np.array([19, 0, 19], np.int32), base[:, 10:51])
    assert np.array_equal(base[:, 10:51], source[[19, 0, 19]])
    base[:, 10:51] = 77
    assert (base == 77).all()


@pytest.mark.parametrize("kind", DTYPES)
def test_bytes_round_trip(kind: str) -> None:
    weight = randn(17, 41)
    weights = native.pack(POOL, kind, [weight.numpy()])
    view = weights.bytes()
    assert view.nbytes == weights.nbytes == 32 * 64 * (4 if kind == "float32" else 2)
    assert not view.flags.writeable
    memory = np.zeros(view.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    buffer = memory[start : start + view.nbytes]
    buffer[:] = view
    again = native.PackedWeights(kind, 17, 41, buffer)
    assert torch.equal(embed(again, list(range(17))), embed(weights, list(range(17))))
    del weights
    assert np.array_equal(view, buffer), "the view keeps the weights alive"
    with pytest.raises(ValueError, match="does not begin at a multiple of 64 bytes"):
        native.PackedWeights(kind, 17, 41, memory[start + 1 : start + 1 + view.nbytes])
    with pytest.raises(ValueError, match=f"buffer has {view.nbytes - 1} bytes"):
        native.PackedWeights(kind, 17, 41, buffer[:-1])


def test_zero_weights_pad_a_block() -> None:
    # 17 rows of 5 inputs: 15 rows and 27 inputs of the two blocks are padding.
    weights = native.pack(POOL, "float32", [np.ones((17, 5), np.float32)])
    assert weights.bytes().view(np.float32).sum() == 17 * 5


def float32(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("kind", "sources", "interleaved", "error", "message"),
    [
        ("float64", [float32(2, 2)], False, ValueError, "kind is 'float64'; expected 'float32'"),
        ("float32", [], False, ValueError, "sources is empty"),
        ("float32", [[1.0]], False, TypeError, "sources[0] is not a numpy array"),
        ("float32", [np.zeros((2, 2))], False, TypeError, "sources[0] has dtype float64"),
        ("float32", [float32(2)], False, ValueError, "sources[0] has shape (2)"),
        ("float32", [float32(2, 0)], False, ValueError, "sources[0] has 0 columns"),
        ("float32", [float32(2, 3), float32(2, 4)], False, ValueError, "sources[1] has 4 columns"),
        (
            "float32",
            [float32(4, 4)[:, ::2]],
            False,
            ValueError,
            "sources[0] has stride 8 on axis 1",
        ),
        ("float32", [float32(2, 2)], True, ValueError, "interleaved needs two sources"),
        ("float32", [float32(2, 2), float32(3, 2)], True, ValueError, "interleaved needs two"),
    ],
)
def test_pack_errors(
    kind: str, sources: Any, interleaved: bool, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        native.pack(POOL, kind, sources, interleaved=interleaved)


def test_packed_weights_errors() -> None:
    empty = np.zeros(0, np.uint8)
    for arguments, error, message in (
        (("int2", 1, 1, empty), ValueError, "kind is 'int2'"),
        (("float32", -1, 1, empty), ValueError, "rows is -1"),
        (("float32", 1, 0, empty), ValueError, "cols is 0"),
        (("float32", 2**40, 1, empty), ValueError, "rows is 1099511627776"),
        (("float32", 1, 1, float32(3)), TypeError, "buffer has dtype float32"),
        (("float32", 1, 1, np.zeros(8192, np.uint8)[::2]), ValueError, "buffer has stride 2"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            native.PackedWeights(*arguments)


SHARED = float32(10, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": float32(2, 4)}, ValueError, "x has shape (2, 4); expected (any, 5)"),
        ({"x": np.zeros((2, 5))}, TypeError, "x has dtype float64"),
        ({"x": float32(2, 10)[:, ::2]}, ValueError, "x has stride 8 on axis 1"),
        ({"x": None}, TypeError, "x is a NoneType"),
        ({"bias": float32(6)}, ValueError, "bias has shape (6); expected (7)"),
        ({"bias": np.zeros(7, np.int32)}, TypeError, "bias has dtype int32"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'; expected 'none'"),
        ({"activation": "silu_mul"}, ValueError, "silu_mul needs weights that were packed"),
        ({"out": float32(3, 7)}, ValueError, "out has shape (3, 7); expected (2, any)"),
        ({"out": float32(2, 6)}, ValueError, "the number of columns of out is 6; expected 7"),
        ({"out": float32(2, 8)}, ValueError, "the number of columns of out is 8; expected 7"),
        ({"out": np.zeros((2, 7))}, TypeError, "out has dtype float64"),
        ({"out": read_only(float32(2, 7))}, ValueError, "out is read-only"),
        ({"out": float32(7, 2).T}, ValueError, "out has stride"),
        ({"x": SHARED[:2, :5], "out": SHARED[1:3, :7]}, ValueError, "x and out share memory"),
        ({"bias": SHARED[0, :7], "out": SHARED[:2, :7]}, ValueError, "bias and out share memory"),
        ({"weights": None}, TypeError, "incompatible function arguments"),
    ],
)
def test_linear_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "x": float32(2, 5),
        "weights": native.pack(POOL, "float32", [float32(7, 5)]),
        "bias": float32(7),
        "activation": "none",
        "accumulates": False,
        "out": float32(2, 7),
    }
    native.linear(POOL, **arguments)
    with pytest.raises(error, match=re.escape(message)):
        native.linear(POOL, **(arguments | changes))


def test_silu_mul_errors() -> None:
    weights = native.pack(POOL, "float32", [float32(7, 5), float32(7, 5)], interleaved=True)
    for columns in (0, 17):
        message = f"the number of columns of out is {columns}; expected 1 to 16"
        with pytest.raises(ValueError, match=message):
            native.linear(
                POOL, float32(2, 5), weights, None, "silu_mul", False, float32(2, columns)
            )


@pytest.mark.parametrize(
    ("ids", "out", "error", "message"),
    [
        (np.array([7], np.int32), float32(1, 5), ValueError, "ids[0] is 7; expected 0 to 6"),
        (np.array([0, -1], np.int32), float32(2, 5), ValueError, "ids[1] is -1"),
        (np.array([0]), float32(1, 5), TypeError, "ids has dtype int64"),
        (np.zeros((1, 1), np.int32), float32(1, 5), ValueError, "ids has shape (1, 1)"),
        (np.zeros(1, np.int32), float32(2, 5), ValueError, "out has shape (2, 5)"),
        (np.zeros(1, np.int32), float32(1, 4), ValueError, "out has shape (1, 4)"),
        (np.zeros(1, np.int32), read_only(float32(1, 5)), ValueError, "out is read-only"),
    ],
)
def test_embed_errors(ids: Any, out: Any, error: type[Exception], message: str) -> None:
    weights = native.pack(POOL, "float32", [float32(7, 5)])
    with pytest.raises(error, match=re.escape(message)):
        native.embed(POOL, weights, ids, out)


def test_embed_of_no_ids() -> None:
    assert embed(native.pack(POOL, "float32", [float32(7, 5)]), []).shape == (0, 5)
