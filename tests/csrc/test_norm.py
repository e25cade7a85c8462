"""Native norms: the two-times rule, bits that depend on the row alone, clean errors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ovfast import reference
from tests.support.accuracy import assert_two_times_rule

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

EPS = 1e-6
Norm = Callable[..., torch.Tensor]


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, threads: int = 1) -> Any:
    out = torch.full_like(x, 77.0)
    pool = native.ThreadPool(threads)
    native.layer_norm(pool, *(array.numpy() for array in (x, weight, bias)), EPS, out.numpy())
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, threads: int = 1) -> Any:
    out = torch.full_like(x, 77.0)
    native.rms_norm(native.ThreadPool(threads), x.numpy(), weight.numpy(), EPS, out.numpy())
    return out


def reference_layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **kw: Any
) -> Any:
    return reference.layer_norm(x, weight, bias, EPS, **kw)


def reference_rms_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **kw: Any) -> Any:
    return reference.rms_norm(x, weight, EPS, **kw)


NORMS = {
    "layer": (layer_norm, reference_layer_norm),
    "rms": (rms_norm, reference_rms_norm),
}


def random_input(rows: int, hidden: int, scale: float = 1.0, shift: float = 0.0) -> Any:
    generator = torch.Generator().manual_seed(rows * 10_007 + hidden)
    x = torch.randn(rows, hidden, generator=generator) * scale + shift
    weight = 1 + 0.1 * torch.randn(hidden, generator=generator)
    return x, weight, torch.randn(hidden, generator=generator)


# The tower's and the language models' widths, one that no vector divides, 1, and the edges of the
# loops: 15 to 17 and 63 to 65.
@pytest.mark.parametrize("hidden", [1, 2, 15, 16, 17, 41, 63, 64, 65, 896, 1152, 3584])
@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("name", NORMS)
def test_two_times_rule(isa: str, name: str, rows: int, hidden: int) -> None:
    norm, expected = NORMS[name]
    arrays = random_input(rows, hidden)
    assert_two_times_rule(norm(*arrays), expected(*arrays), expected(*arrays, upcast=True))


# A mean far from zero cancels; tiny rows make eps count; large ones must not overflow.
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 100.0), (1e-4, 0.0), (1e4, 0.0), (0.0, 3.0)])
@pytest.mark.parametrize("name", NORMS)
def test_scales(isa: str, name: str, scale: float, shift: float) -> None:
    norm, expected = NORMS[name]
    arrays = random_input(5, 896, scale, shift)
    assert_two_times_rule(norm(*arrays), expected(*arrays), expected(*arrays, upcast=True))


@pytest.mark.parametrize("name", NORMS)
def test_bits_depend_on_the_row_alone(isa: str, name: str) -> None:
    norm, _ = NORMS[name]
    x, weight, bias = random_input(41, 121)
    whole = norm(x, weight, bias)
    for threads in (2, 3):
        assert torch.equal(norm(x, weight, bias, threads=threads), whole)
    for row in (0, 3, 40):
        assert torch.equal(norm(x[row : row + 1], weight, bias), whole[row : row + 1])
    wide = torch.full((41, 150), float("nan"))
    wide[:, 7:128] = x
    assert torch.equal(norm(wide[:, 7:128], weight, bias), whole), "rows at another stride"


@pytest.mark.parametrize("name", NORMS)
def test_writes_nothing_beside_the_rows(isa: str, name: str) -> None:
    x, weight, bias = random_input(6, 21)
    guarded = torch.full((6, 40), 77.0)
    pool, out = native.ThreadPool(2), guarded[:, 3:24]
    if name == "layer":
        native.layer_norm(pool, x.numpy(), weight.numpy(), bias.numpy(), EPS, out.numpy())
    else:
        native.rms_norm(pool, x.numpy(), weight.numpy(), EPS, out.numpy())
    assert torch.equal(out, NORMS[name][0](x, weight, bias))
    guarded[:, 3:24] = 77.0
    assert bool((guarded == 77.0).all())


def test_nan_stays_in_its_row(isa: str) -> None:
    for name in NORMS:
        x, weight, bias = random_input(4, 41)
        x[2, 40] = float("nan")
        is_nan = NORMS[name][0](x, weight, bias).isnan()
        assert bool(is_nan[2].all())
        assert int(is_nan.sum()) == 41


def good_arguments() -> dict[str, object]:
    return {
        "pool": native.ThreadPool(1),
        "x": np.ones((4, 8), np.float32),
        "weight": np.ones(8, np.float32),
        "bias": np.ones(8, np.float32),
        "eps": EPS,
        "out": np.ones((4, 8), np.float32),
    }


SHARED = np.ones((4, 8), np.float32)

BAD_ARGUMENTS = {
    "x-list": ({"x": [[1.0]]}, TypeError, "x is a list; expected a numpy array of float32"),
    "x-double": ({"x": np.ones((4, 8))}, TypeError, "x has dtype float64; expected float32"),
    "x-rank": ({"x": np.ones(8, np.float32)}, ValueError, r"x has shape \(8\)"),
    "x-narrow": ({"x": np.ones((4, 0), np.float32)}, ValueError, "the width of x is 0"),
    "x-strided": ({"x": np.ones((4, 16), np.float32)[:, ::2]}, ValueError, "x has stride 8"),
    "weight-short": ({"weight": np.ones(7, np.float32)}, ValueError, r"weight has shape \(7\)"),
    "weight-int": ({"weight": np.ones(8, np.int32)}, TypeError, "weight has dtype int32"),
    "eps-negative": ({"eps": -1e-6}, ValueError, "eps is -0.000001; expected 0 or more"),
    "eps-nan": ({"eps": float("nan")}, ValueError, "eps is nan"),
    "eps-text": ({"eps": "small"}, TypeError, "incompatible"),
    "out-rows": ({"out": np.ones((3, 8), np.float32)}, ValueError, r"out has shape \(3, 8\)"),
    "out-is-x": ({"x": SHARED, "out": SHARED}, ValueError, "x and out share memory"),
    "out-weight": ({"weight": SHARED[0], "out": SHARED}, ValueError, "weight and out share"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_bad_arguments_are_named(norm: str, name: str) -> None:
    changes, error, message = BAD_ARGUMENTS[name]
    arguments = good_arguments() | changes
    if norm == "rms_norm":
        del arguments["bias"]
    with pytest.raises(error, match=message):
        getattr(native, norm)(**arguments)


def test_bad_bias_and_read_only_out_are_named() -> None:
    with pytest.raises(ValueError, match=r"bias has shape \(9\)"):
        native.layer_norm(**(good_arguments() | {"bias": np.ones(9, np.float32)}))
    shared = {"bias": SHARED[0], "out": SHARED}
    with pytest.raises(ValueError, match="bias and out share memory"):
        native.layer_norm(**(good_arguments() | shared))
    out = np.ones((4, 8), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        native.layer_norm(**(good_arguments() | {"out": out}))
