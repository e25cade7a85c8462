"""Native rope: the two-times rule, exact places in the cache, clean errors for wrong input."""

from typing import Any

import numpy as np
import pytest
import torch

from ovfast import reference
from tests.support.accuracy import assert_two_times_rule

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tables(positions: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.arange(positions).double()[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def random_qkv(rows: int, heads: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + head_dim)
    return torch.randn(rows, (heads + 2 * kv_heads) * head_dim, generator=generator)


def empty_cache(kv_heads: int, positions: int, head_dim: int) -> torch.Tensor:
    return torch.full((kv_heads, positions, head_dim), 77.0)


def store(qkv: torch.Tensor, start: int, heads: int, kv: int, threads: int = 1) -> Tensors:
    """The queries and both caches of 60 positions, after a prefill of all rows."""
    head_dim = qkv.shape[1] // (heads + 2 * kv)
    cos, sin = (table[start : start + len(qkv)].numpy() for table in tables(60, head_dim))
    qkv = qkv.clone()
    k, v = empty_cache(kv, 60, head_dim), empty_cache(kv, 60, head_dim)
    pool = native.ThreadPool(threads)
    native.rope_and_store(pool, qkv.numpy(), cos, sin, k.numpy(), v.numpy(), start, heads, kv)
    return qkv[:, : heads * head_dim], k, v


def expected_store(qkv: torch.Tensor, start: int, heads: int, kv: int, dtype: torch.dtype) -> Any:
    head_dim = qkv.shape[1] // (heads + 2 * kv)
    cos, sin = (table[start : start + len(qkv)].to(dtype) for table in tables(60, head_dim))
    k, v = (empty_cache(kv, 60, head_dim).to(dtype) for _ in range(2))
    q = reference.rope_and_store(qkv.to(dtype).clone(), cos, sin, k, v, start, heads, kv)
    return q.reshape(len(qkv), heads * head_dim), k, v


# Both language models' heads, the smallest, and halves around the width of a vector.
@pytest.mark.parametrize(
    ("heads", "kv", "head_dim"),
    [(14, 2, 64), (4, 1, 128), (1, 1, 2), (3, 3, 6), (2, 1, 30), (2, 1, 32), (2, 1, 34)],
)
@pytest.mark.parametrize(("rows", "start"), [(1, 0), (1, 59), (41, 19)])
def test_two_times_rule(
    isa: str, heads: int, kv: int, head_dim: int, rows: int, start: int
) -> None:
    qkv = random_qkv(rows, heads, kv, head_dim)
    outs = store(qkv, start, heads, kv)
    plain = expected_store(qkv, start, heads, kv, torch.float32)
    truth = expected_store(qkv, start, heads, kv, torch.float64)
    for out, same, true in zip(outs[:2], plain[:2], truth[:2], strict=True):
        assert_two_times_rule(out, same, true)
    assert torch.equal(outs[2], plain[2]), "values are copied"
    is_other = torch.ones(60, dtype=torch.bool)
    is_other[start : start + rows] = False
    assert bool((outs[1][:, is_other] == 77.0).all()), "other positions are left alone"


def test_zero_rows_write_nothing(isa: str) -> None:
    for start in (0, 60):
        q, k, v = store(random_qkv(0, 4, 2, 6), start, 4, 2)
        assert len(q) == 0
        assert bool((k == 77.0).all())
        assert bool((v == 77.0).all())


def test_bits_depend_on_the_row_alone(isa: str) -> None:
    qkv = random_qkv(41, 4, 2, 34)
    whole = store(qkv, 5, 4, 2)
    for threads in (2, 3):
        for out, same in zip(store(qkv, 5, 4, 2, threads=threads), whole, strict=True):
            assert torch.equal(out, same)
    q, k, v = store(qkv[7:9], 12, 4, 2)
    assert torch.equal(q, whole[0][7:9])
    assert torch.equal(k[:, 12:14], whole[1][:, 12:14])
    assert torch.equal(v[:, 12:14], whole[2][:, 12:14])


def test_strided_rows_and_heads(isa: str) -> None:
    """Rows inside a wider array, and a layer that is one of several in its cache."""
    qkv, (cos, sin) = random_qkv(9, 4, 2, 6), tables(9, 6)
    wide = torch.full((9, 70), 77.0)
    wide[:, 3:51] = qkv
    caches = torch.full((2, 2, 3, 60, 6), 77.0)  # (k or v, heads, layers, positions, head_dim)
    k, v = (cache[:, 1].numpy() for cache in caches)
    pool = native.ThreadPool(2)
    rows = wide[:, 3:51].numpy()
    native.rope_and_store(pool, rows, cos.numpy(), sin.numpy(), k, v, 0, 4, 2)
    q, expected_k, expected_v = store(qkv, 0, 4, 2)
    assert torch.equal(wide[:, 3:27], q)
    assert torch.equal(caches[0, :, 1], expected_k)
    assert torch.equal(caches[1, :, 1], expected_v)
    assert bool((caches[:, :, ::2] == 77.0).all())
    assert bool((wide[:, 51:] == 77.0).all())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_of_a_batch_equal_those_of_a_prefill(isa: str, threads: int) -> None:
    slots, positions = [4, 0, 2], [0, 59, 17]
    qkv, (cos, sin) = random_qkv(3, 4, 2, 34), tables(60, 34)
    k, v = torch.full((5, 2, 60, 34), 77.0), torch.full((5, 2, 60, 34), 77.0)
    rows = qkv.clone()
    native.rope_and_store_rows(
        native.ThreadPool(threads),
        *(array.numpy() for array in (rows, cos, sin, k, v)),
        np.array(slots, np.int32),
        np.array(positions, np.int32),
        4,
    )
    expected_k, expected_v = torch.full_like(k, 77.0), torch.full_like(v, 77.0)
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        q, expected_k[slot], expected_v[slot] = store(qkv[row : row + 1], position, 4, 2)
        assert torch.equal(rows[row : row + 1, : 4 * 34], q)
    assert torch.equal(k, expected_k)
    assert torch.equal(v, expected_v)


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def good_arguments() -> dict[str, object]:
    return {
        "pool": native.ThreadPool(1),
        "qkv": zeros(3, 32),
        "cos": zeros(3, 2),
        "sin": zeros(3, 2),
        "k_cache": zeros(2, 9, 4),
        "v_cache": zeros(2, 9, 4),
        "start": 6,
        "num_heads": 4,
        "num_kv_heads": 2,
    }


SHARED = zeros(2, 9, 4)

BAD_ARGUMENTS = {
    "qkv-none": ({"qkv": None}, TypeError, "qkv is a NoneType"),
    "qkv-width": ({"qkv": zeros(3, 31)}, ValueError, r"expected \(any, 32\)"),
    "cos-rows": ({"cos": zeros(2, 2)}, ValueError, r"cos has shape \(2, 2\); expected \(3, 2\)"),
    "sin-width": ({"sin": zeros(3, 4)}, ValueError, "sin has shape"),
    "sin-stride": ({"sin": zeros(3, 3)[:, :2]}, ValueError, "sin has another stride than cos"),
    "k-dtype": ({"k_cache": np.zeros((2, 9, 4))}, TypeError, "k_cache has dtype float64"),
    "k-heads": ({"k_cache": zeros(0, 9, 4), "v_cache": zeros(0, 9, 4)}, ValueError, "heads of k"),
    "k-dim": ({"k_cache": zeros(2, 9, 0), "v_cache": zeros(2, 9, 0)}, ValueError, "head_dim of k"),
    "v-shape": ({"v_cache": zeros(2, 8, 4)}, ValueError, r"v_cache has shape \(2, 8, 4\)"),
    "v-stride": ({"v_cache": zeros(2, 10, 4)[:, :9]}, ValueError, "another stride on axis 0"),
    "v-is-k": ({"k_cache": SHARED, "v_cache": SHARED}, ValueError, "k_cache and v_cache share"),
    "start-negative": ({"start": -1}, ValueError, "start is -1; expected 0 to 6"),
    "start-late": ({"start": 7}, ValueError, "start is 7; expected 0 to 6"),
    "rows": ({"qkv": zeros(10, 32)}, ValueError, "rows of qkv is 10; expected 0 to 9"),
    "heads": ({"num_heads": 0}, ValueError, "num_heads is 0"),
    "heads-huge": ({"num_heads": 2**40}, ValueError, "num_heads is"),
    "kv-heads": ({"num_kv_heads": 1}, ValueError, "num_kv_heads is 1; expected that of k_cache, 2"),
    "odd": (
        {"k_cache": zeros(2, 9, 5), "v_cache": zeros(2, 9, 5)},
        ValueError,
        "head_dim is 5; expected an even number",
    ),
    "qkv-in-cache": (
        {"qkv": SHARED.reshape(-1)[:64].reshape(2, 32), "cos": zeros(2, 2), "sin": zeros(2, 2)}
        | {"k_cache": SHARED},
        ValueError,
        "qkv and k_cache share memory",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    changes, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        native.rope_and_store(**(good_arguments() | changes))


def good_rows() -> dict[str, object]:
    return {
        "pool": native.ThreadPool(1),
        "qkv": zeros(2, 32),
        "cos": zeros(9, 2),
        "sin": zeros(9, 2),
        "k_cache": zeros(3, 2, 9, 4),
        "v_cache": zeros(3, 2, 9, 4),
        "slots": np.array([0, 2], np.int32),
        "positions": np.array([8, 0], np.int32),
        "num_heads": 4,
    }


BAD_ROWS = {
    "slots-dtype": ({"slots": np.zeros(2, np.int64)}, TypeError, "slots has dtype int64"),
    "slots-short": ({"slots": np.zeros(1, np.int32)}, ValueError, r"slots has shape \(1\)"),
    "slots-late": ({"slots": np.array([0, 3], np.int32)}, ValueError, r"slots\[1\] is 3"),
    "slots-negative": ({"slots": np.array([-1, 0], np.int32)}, ValueError, r"slots\[0\] is -1"),
    "slots-same": ({"slots": np.array([1, 1], np.int32)}, ValueError, "expected a slot a row"),
    "positions": ({"positions": np.array([0, 9], np.int32)}, ValueError, r"positions\[1\] is 9"),
    "cos-rows": ({"cos": zeros(8, 2)}, ValueError, "cos has shape"),
    "rows": ({"qkv": zeros(65, 32)}, ValueError, "rows of qkv is 65; expected 0 to 64"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(name: str) -> None:
    changes, error, message = BAD_ROWS[name]
    native.rope_and_store_rows(**good_rows())
    with pytest.raises(error, match=message):
        native.rope_and_store_rows(**(good_rows() | changes))
