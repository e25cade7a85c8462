"""Native place against float64 and the reference; copies, newlines and text exactly."""

from typing import Any

import numpy as np
import pytest
import torch

from ovfast import reference
from tests.support.accuracy import assert_two_times_rule
from tests.support.row_tables import TEXT, Table, pooled_table, random_table, with_text

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

POOL = native.ThreadPool(1)
NUM_WORDS = 7
UNREAD = (9999, -9, 0)  # further indices of a text row


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def place(
    projected: torch.Tensor, table: Table, embedding: torch.Tensor | None = None, pool: Any = POOL
) -> torch.Tensor:
    """Rows of NaN where nothing was written; text row r is word r % NUM_WORDS."""
    index, weight = table
    out = np.full((len(index), projected.shape[1]), np.nan, np.float32)
    ids = packed = None
    if embedding is not None:
        # Ids that nobody may read are out of range.
        words = np.arange(len(index)) % NUM_WORDS
        ids = np.where(index[:, 0].numpy() == TEXT, words, 10**6).astype(np.int32)
        packed = native.pack(POOL, "float32", [embedding.numpy()])
    newline = normal(projected.shape[1]).numpy()
    arrays = (projected.numpy(), index.numpy(), weight.numpy(), newline)
    native.place(pool, *arrays, ids, packed, out)
    return torch.from_numpy(out)


def check(projected: torch.Tensor, table: Table) -> None:
    """Against pool_and_pack, whose rows are all features or newlines."""
    newline, out = normal(projected.shape[1]), torch.empty(len(table[0]), projected.shape[1])
    placed = place(projected, table)
    truth = reference.pool_and_pack(projected, *table, newline, out, upcast=True)
    same_dtype = reference.pool_and_pack(projected, *table, newline, out)
    assert_two_times_rule(placed, same_dtype, truth)
    is_exact = (table[1][:, 1:] == 0).all(dim=1)
    assert torch.equal(placed[is_exact], same_dtype[is_exact])


# 1 and 41: less than a vector and a part of one; 896: the model's.
@pytest.mark.parametrize("hidden", [1, 16, 41, 896])
def test_features_and_newlines(isa: str, hidden: int) -> None:
    check(normal(81, hidden), pooled_table(9, 5))
    check(normal(30, hidden), random_table(43, 30, seed=hidden))


def test_copies_keep_every_bit(isa: str) -> None:
    projected = normal(5, 41)
    projected[2, 7:11] = torch.tensor([-0.0, float("inf"), float("nan"), 1e-45])
    index = torch.tensor([[2, -9, 99, 7], [0, 0, 0, 0]], dtype=torch.int32)
    weight = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    out = place(projected, (index, weight))
    assert torch.equal(out.view(torch.int32), projected[[2, 0]].view(torch.int32))


# The whole weight on one feature that is not the first.
@pytest.mark.parametrize("tap", [1, 2, 3])
def test_each_feature_counts(isa: str, tap: int) -> None:
    projected, weight = normal(4, 41), torch.zeros(1, 4)
    weight[0, tap] = 1.0
    out = place(projected, (torch.arange(4, dtype=torch.int32)[None], weight))
    assert torch.equal(out[0], projected[tap])


def test_features_without_weight_are_not_read(isa: str) -> None:
    projected = normal(4, 41)
    projected[3] = float("nan")
    index = torch.tensor([[0, 1, 3, 2], [0, 1, 2**31 - 1, -5]], dtype=torch.int32)
    weight = torch.tensor([[0.5, 0.25, 0.0, 0.25], [0.5, 0.5, 0.0, 0.0]])
    out = place(projected, (index, weight))
    expected = torch.stack(
        [projected[0] * 0.5 + projected[1] * 0.25 + projected[2] * 0.25, projected[:2].mean(0)]
    )
    assert torch.allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_text_between_features(isa: str) -> None:
    embedding, projected = normal(NUM_WORDS, 41), normal(30, 41)
    table = random_table(20, 30, seed=1)
    plain = place(projected, table)
    mixed = with_text(table, 3, 2, 4, UNREAD)
    out = place(projected, mixed, embedding)
    is_text = mixed[0][:, 0] == TEXT
    words = torch.arange(len(out)) % NUM_WORDS
    assert int(is_text.sum()) == 9
    assert torch.equal(out[is_text], embedding[words[is_text]])
    assert torch.equal(out[~is_text], plain)


def test_text_is_left_alone_without_an_embedding(isa: str) -> None:
    mixed = with_text(random_table(20, 30, seed=1), 3, 2, 4, UNREAD)
    out = place(normal(30, 41), mixed)
    is_text = mixed[0][:, 0] == TEXT
    assert bool(out[is_text].isnan().all())
    assert bool(out[~is_text].isfinite().all())


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_embeddings_in_half_precision(isa: str, kind: str) -> None:
    embedding = normal(NUM_WORDS, 41).to(getattr(torch, kind))
    source = embedding.view(torch.uint16) if kind == "bfloat16" else embedding
    packed = native.pack(POOL, kind, [source.numpy()])
    index = np.full((NUM_WORDS, 4), TEXT, np.int32)
    out, ids = np.empty((NUM_WORDS, 41), np.float32), np.arange(NUM_WORDS, dtype=np.int32)
    features, newline = np.zeros((0, 41), np.float32), np.zeros(41, np.float32)
    weight = np.zeros((NUM_WORDS, 4), np.float32)
    native.place(POOL, features, index, weight, newline, ids, packed, out)
    assert torch.equal(torch.from_numpy(out), embedding.float())


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_bits_depend_on_neither_threads_nor_neighbours(isa: str, num_threads: int) -> None:
    projected, (index, weight) = normal(30, 41), random_table(100, 30, seed=2)
    out = place(projected, (index, weight), pool=native.ThreadPool(num_threads))
    alone = torch.cat([place(projected, (index[i : i + 1], weight[i : i + 1])) for i in range(100)])
    assert torch.equal(out, alone)


def test_rows_at_any_stride(isa: str) -> None:
    wide, table = normal(30, 50), random_table(20, 30, seed=3)
    wide_out = np.full((20, 60), 9.0, np.float32)
    arrays = (wide[:, 4:45].numpy(), table[0].numpy(), table[1].numpy(), normal(41).numpy())
    native.place(POOL, *arrays, None, None, wide_out[:, 5:46])
    expected = place(wide[:, 4:45].contiguous(), table)
    assert torch.equal(torch.from_numpy(wide_out[:, 5:46]), expected)
    assert (wide_out[:, :5] == 9).all()
    assert (wide_out[:, 46:] == 9).all()


def test_no_rows() -> None:
    nothing = (torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 4))
    assert place(normal(5, 41), nothing).shape == (0, 41)
    assert place(normal(0, 41), nothing, normal(NUM_WORDS, 41)).shape == (0, 41)


def good_arguments() -> dict[str, Any]:
    return {
        "pool": POOL,
        "projected": np.zeros((6, 8), np.float32),
        "index": np.array([[0, 1, 2, 5], [-1] * 4, [-2] * 4, [5] * 4], np.int32),
        "weight": np.full((4, 4), 0.25, np.float32),
        "newline": np.zeros(8, np.float32),
        "token_ids": np.array([9, 9, 2, 9], np.int32),
        "embedding": native.pack(POOL, "float32", [np.zeros((3, 8), np.float32)]),
        "out": np.zeros((4, 8), np.float32),
    }


def index_with(row: int, tap: int, value: int) -> np.ndarray:
    index: np.ndarray = good_arguments()["index"].copy()
    index[row, tap] = value
    return index


SHARED = np.zeros((10, 8), np.float32)

BAD_ARGUMENTS = {
    "projected-f64": ({"projected": np.zeros((6, 8))}, TypeError, "projected has dtype float64"),
    "projected-1d": ({"projected": np.zeros(8, np.float32)}, ValueError, "projected has shape"),
    "projected-transposed": (
        {"projected": np.zeros((8, 6), np.float32).T},
        ValueError,
        "projected has stride",
    ),
    "index-int64": ({"index": np.zeros((4, 4), np.int64)}, TypeError, "index has dtype int64"),
    "index-3": ({"index": np.zeros((4, 3), np.int32)}, ValueError, r"expected \(any, 4\)"),
    "index-strided": ({"index": np.zeros((8, 4), np.int32)[::2]}, ValueError, "index has stride"),
    "weight-rows": ({"weight": np.zeros((5, 4), np.float32)}, ValueError, "weight has shape"),
    "weight-f64": ({"weight": np.zeros((4, 4))}, TypeError, "weight has dtype"),
    "newline-size": ({"newline": np.zeros(9, np.float32)}, ValueError, "newline has shape"),
    "newline-none": ({"newline": None}, TypeError, "newline is a NoneType"),
    "token-ids-int64": ({"token_ids": np.zeros(4, np.int64)}, TypeError, "token_ids has dtype"),
    "token-ids-rows": ({"token_ids": np.zeros(3, np.int32)}, ValueError, "token_ids has shape"),
    "token-ids-none": ({"token_ids": None}, ValueError, "token_ids is None; an embedding needs"),
    "embedding-array": ({"embedding": np.zeros((3, 8), np.float32)}, TypeError, "incompatible"),
    "embedding-cols": (
        {"embedding": native.pack(POOL, "float32", [np.zeros((3, 9), np.float32)])},
        ValueError,
        "embedding has 9 columns; expected 8",
    ),
    "out-rows": ({"out": np.zeros((5, 8), np.float32)}, ValueError, "out has shape"),
    "out-f64": ({"out": np.zeros((4, 8))}, TypeError, "out has dtype"),
    "out-repeated": (
        {"out": np.lib.stride_tricks.as_strided(np.zeros(8, np.float32), (4, 8), (0, 4))},
        ValueError,
        "out repeats its elements",
    ),
    "id-large": (
        {"token_ids": np.array([0, 0, 3, 0], np.int32)},
        ValueError,
        r"token_ids\[2\] is 3; expected 0 to 2",
    ),
    "id-negative": (
        {"token_ids": np.array([0, 0, -1, 0], np.int32)},
        ValueError,
        r"token_ids\[2\] is -1",
    ),
    "index-large": (
        {"index": index_with(0, 0, 6)},
        ValueError,
        r"index\[0, 0\] is 6; expected a row of the 6 of projected, -1 for the newline or -2",
    ),
    "index-of-a-later-tap": (
        {"index": index_with(0, 3, 6)},
        ValueError,
        r"index\[0, 3\] is 6; expected a row of the 6 of projected$",
    ),
    "index-negative-tap": ({"index": index_with(0, 2, -1)}, ValueError, r"index\[0, 2\] is -1"),
    "index-minus-3": ({"index": index_with(3, 0, -3)}, ValueError, r"index\[3, 0\] is -3"),
    "index-least": ({"index": index_with(3, 1, -(2**31))}, ValueError, r"index\[3, 1\] is -214"),
    "index-of-nothing": ({"projected": np.zeros((0, 8), np.float32)}, ValueError, "of the 0 of"),
    "shared-projected": (
        {"projected": SHARED[:6], "out": SHARED[5:9]},
        ValueError,
        "projected and out share memory",
    ),
    "shared-newline": ({"newline": SHARED[6], "out": SHARED[5:9]}, ValueError, "newline and out"),
    "shared-weight": (
        {"weight": SHARED[:2].reshape(4, 4), "out": SHARED[1:5]},
        ValueError,
        "weight and out",
    ),
    "shared-index": (
        {"index": SHARED[:2].reshape(4, 4).view(np.int32), "out": SHARED[1:5]},
        ValueError,
        "index and out",
    ),
    "shared-ids": (
        {"token_ids": SHARED[0, :4].view(np.int32), "out": SHARED[:4]},
        ValueError,
        "token_ids and out",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    changes, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        native.place(**(good_arguments() | changes))


def test_good_arguments_are_good() -> None:
    native.place(**good_arguments())
