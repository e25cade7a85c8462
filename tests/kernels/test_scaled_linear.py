"""Triton scaled_linear against a float64 truth and float32 torch, from the same float8 numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ovfast.quantize import quantize_float8
from tests.kernels.decode_oracle import randn
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params

scaled_linear = pytest.importorskip("ovfast.kernels.scaled_linear", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]
SENTINEL = 7.0
# rows, out_features, in_features: none a multiple of a tile, one step of K with and without a
# mask, and several.
SHAPES = [(1, 5, 16), (3, 130, 128), (67, 40, 144), (5, 24, 400), (130, 72, 256)]
REAL = [(4755, 1152, 896), (1, 1152, 896), (300, 9728, 896), (1000, 3584, 18944)]
Shape = tuple[int, int, int]


def make_arguments(
    device: str, dtype: torch.dtype, shape: Shape, *, bias: bool = False, residual: bool = False
) -> dict[str, Any]:
    num_rows, width, depth = shape
    x, x_scales = quantize_float8(randn(num_rows, depth, seed=1) * 3)
    weight, scales = quantize_float8(randn(width, depth, seed=2, scale=depth**-0.5))
    out = torch.full((num_rows, width), SENTINEL, dtype=dtype)
    arguments = {
        "x": x,
        "x_scales": x_scales,
        "weight": weight,
        "scales": scales,
        "bias": randn(width, seed=3).to(dtype) if bias else None,
        "out": out,
        "residual": randn(num_rows, width, seed=4).to(dtype) if residual else None,
    }
    return {name: None if value is None else value.to(device) for name, value in arguments.items()}


def plain(arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    a = {name: None if t is None else t.to(dtype) for name, t in arguments.items()}
    out: Tensor = (a["x"] @ a["weight"].t()) * a["x_scales"][:, None] * a["scales"]
    for name in ("bias", "residual"):
        out = out if a[name] is None else out + a[name]
    return out


def check(arguments: dict[str, Any], **tile: Any) -> Tensor:
    out: Tensor = scaled_linear.scaled_linear(**arguments, **tile)
    truth = plain(arguments, torch.float64)
    if out.dtype == torch.float32 and out.is_cuda:
        # A tensor core keeps some 14 bits of the sum of 128 products: 2^-13 of their magnitudes.
        sizes = {name: None if t is None else t.double().abs() for name, t in arguments.items()}
        bound = 2.0**-13 * plain(sizes, torch.float64)
        assert bool(((out.double() - truth).abs() <= bound).all())
    else:
        assert_two_times_rule(out, plain(arguments, torch.float32).to(out.dtype), truth)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_shapes(device: str, dtype: torch.dtype, shape: Shape) -> None:
    check(make_arguments(device, dtype, shape))


@pytest.mark.parametrize(("bias", "residual"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_what_is_added(device: str, dtype: torch.dtype, bias: bool, residual: bool) -> None:
    check(make_arguments(device, dtype, (5, 40, 144), bias=bias, residual=residual))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_the_residual_in_place(device: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype, (5, 40, 144), residual=True)
    expected = check(arguments).clone()
    stream = arguments["residual"]
    out = scaled_linear.scaled_linear(**arguments | {"out": stream})
    assert out is stream
    assert torch.equal(stream, expected)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_row_does_not_know_its_neighbours(device: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype, (67, 40, 400))
    whole = check(arguments, tile=scaled_linear._TILES[0]).clone()
    for tile in scaled_linear._TILES if device == "cuda" else scaled_linear._TILES[:1]:
        for row in (0, 66):
            alone = arguments | {name: arguments[name][row : row + 1] for name in ("x", "x_scales")}
            alone["out"] = torch.empty_like(arguments["out"][:1])
            assert torch.equal(scaled_linear.scaled_linear(**alone, tile=tile)[0], whole[row])


@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_what_lies_behind_a_row_is_not_read(device: str, dtype: torch.dtype, name: str) -> None:
    """On a device NaN would show, 0 · NaN being NaN; the interpreter reads float8's as 480."""
    arguments = make_arguments(device, dtype, (5, 40, 144))
    expected = check(arguments).clone()
    rows, depth = arguments[name].shape
    wide = torch.full((rows, 2 * depth), float("nan"), device=device).to(torch.float8_e4m3fn)
    wide[:, :depth] = arguments[name]
    assert torch.equal(check(arguments | {name: wide[:, :depth]}), expected)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_no_rows(device: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype, (0, 40, 144))
    assert scaled_linear.scaled_linear(**arguments).shape == (0, 40)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_row_of_nan_stays_alone(device: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype, (3, 24, 144))
    arguments["x_scales"][1] = float("nan")
    out = scaled_linear.scaled_linear(**arguments)
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert not bool(out[[0, 2]].isnan().any())


@pytest.mark.parametrize("shape", REAL)
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_real_shapes(device: str, dtype: torch.dtype, shape: Shape) -> None:
    check(make_arguments(device, dtype, shape, residual=True))


BAD = {
    "x-f32": ("x", torch.zeros(3, 16), TypeError, "x is"),
    "x-flat": ("x", torch.zeros(16).to(torch.float8_e4m3fn), ValueError, "x has shape"),
    "x-scales": ("x_scales", torch.zeros(4), ValueError, "x_scales has shape"),
    "weight-f16": ("weight", torch.zeros(5, 16).half(), TypeError, "weight is"),
    "weight-deep": ("weight", torch.zeros(5, 32).to(torch.float8_e4m3fn), ValueError, "weight has"),
    "scales": ("scales", torch.zeros(5).half(), TypeError, "scales is"),
    "bias": ("bias", torch.zeros(4), ValueError, "bias has shape"),
    "residual": ("residual", torch.zeros(3, 5).half(), TypeError, "residual is"),
    "out-f64": ("out", torch.zeros(3, 5).double(), TypeError, "out is"),
    "out-transposed": ("out", torch.zeros(5, 3).t(), ValueError, "out has last"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    argument, value, error, message = BAD[name]
    arguments = make_arguments("cpu", torch.float32, (3, 5, 16)) | {argument: value}
    with pytest.raises(error, match=message):
        scaled_linear.scaled_linear(**arguments)
