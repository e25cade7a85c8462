"""Every wrong input of the native attention raises an error that names it."""

from typing import Any

import numpy as np
import pytest

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


SHARED = zeros(6, 12)

BAD_VIEWS = {
    "qkv-list": ({"qkv": []}, TypeError, "qkv is a list; expected a numpy array of float32"),
    "qkv-double": ({"qkv": np.zeros((6, 36))}, TypeError, "qkv has dtype float64"),
    "qkv-rank": ({"qkv": zeros(36)}, ValueError, r"qkv has shape \(36\); expected \(any, any\)"),
    "qkv-width": ({"qkv": zeros(6, 35)}, ValueError, "qkv has 35 columns; expected a multiple"),
    "qkv-empty": ({"qkv": zeros(6, 0)}, ValueError, "qkv has 0 columns"),
    "qkv-rows": ({"qkv": zeros(7, 36)}, ValueError, "qkv has 7 rows; expected a multiple"),
    "qkv-columns": ({"qkv": zeros(6, 72)[:, ::2]}, ValueError, "qkv has stride 8 on axis 1"),
    "heads": ({"num_heads": 0}, ValueError, "num_heads is 0; expected 1 or more"),
    "heads-many": ({"num_heads": 5}, ValueError, "multiple of 3 · num_heads, 5"),
    "tokens": ({"tokens_per_view": -3}, ValueError, "tokens_per_view is -3"),
    "tokens-huge": ({"tokens_per_view": 2**62}, ValueError, "multiple of tokens_per_view"),
    "tokens-text": ({"tokens_per_view": "3"}, TypeError, "incompatible"),
    "out-shape": ({"out": zeros(6, 36)}, ValueError, r"out has shape \(6, 36\)"),
    "out-read-only": ({"out": read_only(zeros(6, 12))}, ValueError, "out is read-only"),
    "out-broadcast": (
        {"out": np.lib.stride_tricks.as_strided(zeros(12), (6, 12), (0, 4))},
        ValueError,
        "out repeats its elements on axis 0",
    ),
    "shared": (
        {"qkv": SHARED.reshape(2, 36), "tokens_per_view": 1, "out": SHARED[:2]},
        ValueError,
        "qkv and out share memory",
    ),
}


@pytest.mark.parametrize("name", BAD_VIEWS)
def test_bad_views_are_named(name: str) -> None:
    changes, error, message = BAD_VIEWS[name]
    good = {"pool": native.ThreadPool(1), "qkv": zeros(6, 36), "num_heads": 2}
    good |= {"tokens_per_view": 3, "out": zeros(6, 12)}
    native.view_attention(**good)
    with pytest.raises(error, match=message):
        native.view_attention(**(good | changes))


def ints(dtype: type, *values: int) -> Any:
    return np.array(values, dtype)


BAD_CAUSAL = {
    "q-rank": ({"q": zeros(3, 24)}, ValueError, r"q has shape \(3, 24\)"),
    "q-dim": ({"q": zeros(3, 4, 5)}, ValueError, r"expected \(any, any, 6\)"),
    "q-heads": ({"q": zeros(3, 3, 6)}, ValueError, "q has 3 heads; expected a multiple of 2"),
    "q-no-heads": ({"q": zeros(3, 0, 6)}, ValueError, "heads of q is 0"),
    "q-strided": ({"q": zeros(3, 8, 6)[:, ::2]}, ValueError, "q has stride 48 on axis 1"),
    "k-none": ({"k": None}, TypeError, "k is a NoneType"),
    "k-heads": ({"k": zeros(0, 9, 6), "v": zeros(0, 9, 6)}, ValueError, "heads of k is 0"),
    "k-dim": ({"k": zeros(2, 9, 0), "v": zeros(2, 9, 0)}, ValueError, "head_dim of k is 0"),
    "k-positions": ({"k": zeros(2, 18, 6)[:, ::2]}, ValueError, "k has stride 48 on axis 1"),
    "v-shape": ({"v": zeros(2, 8, 6)}, ValueError, r"v has shape \(2, 8, 6\)"),
    "v-dtype": ({"v": np.zeros((2, 9, 6), np.float16)}, TypeError, "v has dtype float16"),
    "v-stride": ({"v": zeros(2, 10, 6)[:, :9]}, ValueError, "v has another stride on axis 0"),
    "start": ({"positions": 7}, ValueError, "positions is 7; expected 0 to 6"),
    "start-negative": ({"positions": -1}, ValueError, "positions is -1"),
    "start-huge": ({"positions": 2**64}, ValueError, "positions is out of the range of int64"),
    "rows": ({"q": zeros(10, 4, 6), "positions": 0}, ValueError, "rows of q is 10; expected 0 to"),
    "positions-list": ({"positions": [1, 2, 3]}, TypeError, "positions is a list"),
    "positions-dtype": ({"positions": ints(np.int32, 1, 2, 3)}, TypeError, "dtype int32"),
    "positions-short": ({"positions": ints(np.int64, 1, 2)}, ValueError, "positions has shape"),
    "positions-late": ({"positions": ints(np.int64, 1, 2, 9)}, ValueError, r"\[2\] is 9"),
    "positions-negative": ({"positions": ints(np.int64, -1, 2, 3)}, ValueError, r"\[0\] is -1"),
    "positions-fall": ({"positions": ints(np.int64, 1, 3, 2)}, ValueError, "less than the one"),
    "out-shape": ({"out": zeros(3, 4, 6)}, ValueError, "out has shape"),
    "out-k": ({"out": SHARED[:3, :8].reshape(-1)[:24]}, ValueError, "out has shape"),
}


def good_causal() -> dict[str, Any]:
    good = {"pool": native.ThreadPool(1), "q": zeros(3, 4, 6), "k": zeros(2, 9, 6)}
    return good | {"v": zeros(2, 9, 6), "positions": 6, "out": zeros(3, 24)}


@pytest.mark.parametrize("name", BAD_CAUSAL)
def test_bad_causal_arguments_are_named(name: str) -> None:
    changes, error, message = BAD_CAUSAL[name]
    with pytest.raises(error, match=message):
        native.causal_attention(**(good_causal() | changes))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_shared_memory_is_named(name: str) -> None:
    good = good_causal()
    native.causal_attention(**good)
    good["out"] = good[name].reshape(-1)[:72].reshape(3, 24)
    with pytest.raises(ValueError, match=f"{name} and out share memory"):
        native.causal_attention(**good)


BAD_DECODE = {
    "q-rows": (
        {"q": zeros(65, 4, 6), "slots": np.zeros(65, np.int32)},
        ValueError,
        "rows of q is 65; expected 0 to 64",
    ),
    "q-heads": ({"q": zeros(2, 5, 6)}, ValueError, "q has 5 heads"),
    "k-rank": ({"k_cache": zeros(2, 9, 6)}, ValueError, "k_cache has shape"),
    "v-shape": ({"v_cache": zeros(3, 2, 9, 7)}, ValueError, "v_cache has shape"),
    "v-stride": ({"v_cache": zeros(3, 3, 9, 6)[:, :2]}, ValueError, "another stride on axis 0"),
    "slots-dtype": ({"slots": ints(np.int64, 0, 1)}, TypeError, "slots has dtype int64"),
    "slots-late": ({"slots": ints(np.int32, 0, 3)}, ValueError, r"slots\[1\] is 3; expected 0 to"),
    "slots-negative": ({"slots": ints(np.int32, -1, 0)}, ValueError, r"slots\[0\] is -1"),
    "positions-late": ({"positions": ints(np.int32, 9, 0)}, ValueError, r"positions\[0\] is 9"),
    "positions-short": ({"positions": ints(np.int32, 1)}, ValueError, "positions has shape"),
    "out-shape": ({"out": zeros(2, 25)}, ValueError, "out has shape"),
}


@pytest.mark.parametrize("name", BAD_DECODE)
def test_bad_decode_arguments_are_named(name: str) -> None:
    changes, error, message = BAD_DECODE[name]
    good = {"pool": native.ThreadPool(1), "q": zeros(2, 4, 6), "k_cache": zeros(3, 2, 9, 6)}
    good |= {"v_cache": zeros(3, 2, 9, 6), "slots": ints(np.int32, 0, 2)}
    good |= {"positions": ints(np.int32, 8, 0), "out": zeros(2, 24)}
    native.decode_attention(**good)
    with pytest.raises(error, match=message):
        native.decode_attention(**(good | changes))
