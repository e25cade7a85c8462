"""The decode projections with float8 weights: what they make of the same numbers in another dtype.

Where the scales are powers of two, a float8 weight is a weight in float16 or float32 too, and every
product and sum is the same. In the interpreter the order of a sum may differ with the layout.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import (
    test_decode_head,
    test_decode_mlp,
    test_decode_out,
    test_decode_qkv,
)
from tests.kernels.decode_oracle import ROWS, randn
from tests.support.devices import kernel_params, requires_cuda

decode_head = pytest.importorskip("ovfast.kernels.decode_head", reason="needs triton")
decode_mlp = pytest.importorskip("ovfast.kernels.decode_mlp", reason="needs triton")
decode_out = pytest.importorskip("ovfast.kernels.decode_out", reason="needs triton")
decode_qkv = pytest.importorskip("ovfast.kernels.decode_qkv", reason="needs triton")

FLOAT8 = torch.float8_e4m3fn
# Less than a tile of K, and more than one.
ODD, LOOP = 72, 1032


def qkv_case(device: str, dtype: torch.dtype, width: int) -> tuple[Any, dict[str, Any], list[str]]:
    sizes = test_decode_qkv.Sizes(width, num_heads=3, head_dim=16)
    arguments = test_decode_qkv.make_arguments(device, dtype, sizes, 5, 2)
    return decode_qkv.decode_qkv, arguments, ["q", "k_cache", "v_cache", "residual_out"]


def gate_up_case(
    device: str, dtype: torch.dtype, width: int
) -> tuple[Any, dict[str, Any], list[str]]:
    arguments = test_decode_mlp.gate_up_arguments(device, dtype, (width, 40), 2, 5)
    return decode_mlp.decode_gate_up, arguments, ["mlp", "residual_out"]


def down_case(device: str, dtype: torch.dtype, width: int) -> tuple[Any, dict[str, Any], list[str]]:
    arguments = test_decode_mlp.down_arguments(device, dtype, (24, width), 5)
    return decode_mlp.decode_down, arguments, ["partials_out"]


def out_case(device: str, dtype: torch.dtype, width: int) -> tuple[Any, dict[str, Any], list[str]]:
    heads = (72, 3, 16) if width == ODD else (72, 5, 128)
    arguments = test_decode_out.make_arguments(device, dtype, heads, [3, None, 700])
    return decode_out.decode_out, arguments | {"dtype": dtype}, ["partials_out"]


def head_case(device: str, dtype: torch.dtype, width: int) -> tuple[Any, dict[str, Any], list[str]]:
    arguments = test_decode_head.make_arguments(device, dtype, (width, 100), 1, 5)
    return decode_head.decode_head, arguments, ["logits", "block_max", "block_argmax"]


CASES = {
    "qkv": qkv_case,
    "gate_up": gate_up_case,
    "down": down_case,
    "out": out_case,
    "head": head_case,
}


def float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales are powers of two from 1/8 to 1, so that float16 holds the products."""
    scales = 2.0 ** -(torch.arange(len(weight), device=weight.device) % 4)
    return weight.float().mul(8).to(FLOAT8), scales


def run(function: Any, arguments: dict[str, Any], outs: list[str], **given: Any) -> list[Tensor]:
    fresh = {name: arguments[name].clone() for name in outs}
    function(**arguments | fresh | given)
    return [fresh[name] for name in outs]


@pytest.mark.parametrize("width", [ODD, LOOP])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_the_same_numbers_in_another_dtype(
    device: str, dtype: torch.dtype, name: str, width: int
) -> None:
    function, arguments, outs = CASES[name](device, dtype, width)
    weight, scales = float8(arguments["weight"])
    plain = (weight.float() * scales[:, None]).to(dtype)
    assert torch.equal(plain.float(), weight.float() * scales[:, None])
    expected = run(function, arguments, outs, weight=plain)
    found = run(function, arguments, outs, weight=weight, scales=scales)
    for out, one, other in zip(outs, found, expected, strict=True):
        if out == "block_argmax":
            assert torch.equal(one, other)
        else:
            bound = 4 * torch.finfo(dtype).eps * float(other.abs().max())
            assert float((one.float() - other.float()).abs().max()) <= bound, out


@pytest.mark.parametrize("name", ["down", "out"])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_any_scales(device: str, dtype: torch.dtype, name: str) -> None:
    """They multiply the finished sum."""
    function, arguments, outs = CASES[name](device, dtype, LOOP)
    weight, ones = arguments["weight"].float().mul(8).to(FLOAT8), torch.ones(1, device=device)
    scales = randn(len(weight), seed=9).exp().to(device)
    (sums,) = run(function, arguments, outs, weight=weight, scales=ones.expand(len(weight)).clone())
    (found,) = run(function, arguments, outs, weight=weight, scales=scales)
    rows = arguments["num_rows"]
    assert torch.equal(found[:, :rows], sums[:, :rows] * scales)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, requires_cuda])]
)
@pytest.mark.interpreter
def test_bfloat16_rows_of_any_size(device: str) -> None:
    """They become float16: exactly from 0.004 to 4 million, to the nearest 2^-18 below."""
    _, arguments, _ = CASES["down"](device, torch.bfloat16, LOOP)
    rows = arguments["num_rows"]
    sizes = 10.0 ** torch.linspace(-4, 6, ROWS, device=device)[:, None]
    mlp = (arguments["mlp"].nan_to_num(0.0).float().clamp(-3, 3) * sizes).bfloat16()
    weight = arguments["weight"].float().mul(8).to(FLOAT8)
    scales = randn(len(weight), seed=9).exp().to(device)
    (partials,) = run(
        decode_mlp.decode_down,
        arguments | {"num_rows": ROWS, "mlp": mlp},
        ["partials_out"],
        weight=weight,
        scales=scales,
    )
    assert rows < ROWS
    truth = mlp.double() @ (weight.double() * scales.double()[:, None]).t()
    magnitude = mlp.double().abs() @ (weight.double() * scales.double()[:, None]).abs().t()
    steps = (weight.double() * scales.double()[:, None]).abs().sum(1) * 2.0**-19
    assert bool(((partials.sum(0) - truth).abs() <= 1e-6 * magnitude + steps).all())


BAD = {
    "no-scales": ({"scales": None}, TypeError, "weight is torch.float8_e4m3fn without scales"),
    "scales-of-plain": ({"weight": "plain"}, TypeError, "weight is torch.float32 with scales"),
    "scales-f16": ({"scales": torch.ones(24).half()}, TypeError, "scales is torch.float16"),
    "scales-short": ({"scales": torch.ones(23)}, ValueError, "scales has shape"),
    "other-float8": ({"weight": torch.float8_e5m2}, TypeError, "weight is torch.float8_e5m2"),
    "mlp": ({"mlp": torch.zeros(ROWS, ODD).double()}, TypeError, "activations are torch.float64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    given, error, message = BAD[name]
    function, arguments, _ = CASES["down"]("cpu", torch.float32, ODD)
    plain = arguments["weight"]
    weight, scales = float8(plain)
    if given.get("weight") == "plain":
        given = given | {"weight": plain}
    elif "weight" in given:
        given = given | {"weight": plain.to(given["weight"])}
    with pytest.raises(error, match=message):
        function(**arguments | {"weight": weight, "scales": scales} | given)


@pytest.mark.parametrize(("extra", "first"), [(1, 0), (2, 2)], ids=["stride", "offset"])
def test_rows_that_begin_between_words_are_named(extra: int, first: int) -> None:
    """They are read as words of 32 bits: anything else would be another row, or no address."""
    function, arguments, _ = CASES["head"]("cpu", torch.float16, LOOP)
    num_ids = len(arguments["weight"])
    wide = torch.zeros(num_ids * (LOOP + extra) + first, dtype=torch.float16)[first // 2 :]
    weight = wide[: num_ids * (LOOP + extra)].view(num_ids, LOOP + extra)[:, :LOOP]
    with pytest.raises(ValueError, match=r"weight has row stride .* multiple of 4 bytes"):
        function(**arguments | {"weight": weight})


def test_heads_beside_float8_need_a_dtype() -> None:
    function, arguments, _ = CASES["out"]("cpu", torch.float32, ODD)
    weight, scales = float8(arguments["weight"])
    with pytest.raises(TypeError, match=r"activations are torch\.float8"):
        function(**arguments | {"weight": weight, "scales": scales, "dtype": None})
