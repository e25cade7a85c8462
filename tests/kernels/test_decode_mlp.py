"""Triton decode_gate_up and decode_down against a float64 truth and plain torch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.decode_oracle import (
    EPS,
    ROWS,
    randn,
    residual_and_partials,
    rms_norm,
    rms_norm_truth,
    summed,
)
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params

decode_mlp = pytest.importorskip("ovfast.kernels.decode_mlp", reason="needs triton")
decode_tiles = pytest.importorskip("ovfast.kernels.decode_tiles", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]
SENTINEL = 7.0

# hidden_size, intermediate_size. ODD: the last program has 16 of 32 rows of gate_up, and down 8 of
# 16; LOOP: more columns than one tile, and 8 of its last.
DEMO, ODD, LOOP = (192, 512), (72, 40), (1032, 40)
REAL = {"0.5b": (896, 4864), "7b": (3584, 18944)}


def gate_up_arguments(
    device: str, dtype: torch.dtype, sizes: tuple[int, int], num_partials: int, num_rows: int
) -> dict[str, Any]:
    """The weight as upstream has it: gate, then up."""
    hidden_size, intermediate_size = sizes
    residual, partials = residual_and_partials(device, hidden_size, num_partials)
    weight = randn(2 * intermediate_size, hidden_size, seed=4, scale=2 * hidden_size**-0.5)
    return {
        "residual_in": residual,
        "partials": partials,
        "residual_out": torch.full_like(residual, SENTINEL),
        "norm_weight": (1 + randn(hidden_size, seed=3, scale=0.2)).to(device, dtype),
        "eps": EPS,
        "weight": weight.to(device, dtype),
        "mlp": torch.full((ROWS, intermediate_size), SENTINEL, dtype=dtype, device=device),
        "num_rows": num_rows,
    }


def gate_up(arguments: dict[str, Any]) -> dict[str, Any]:
    permutation = decode_mlp.pack_gate_up_rows(arguments["mlp"].shape[1])
    weight = arguments["weight"][permutation.to(arguments["weight"].device)]
    decode_mlp.decode_gate_up(**arguments | {"weight": weight})
    return arguments


def expected_mlp(arguments: dict[str, Any], upcast: bool) -> Tensor:
    a = arguments
    if upcast:
        x = rms_norm_truth(a["residual_in"], a["partials"], a["norm_weight"])
        gate, up = F.linear(x, a["weight"].double()).chunk(2, 1)
    else:
        x = rms_norm(summed(a["residual_in"], a["partials"]), a["norm_weight"])
        gate, up = F.linear(x, a["weight"]).chunk(2, 1)
    return F.silu(gate) * up


def check_gate_up(arguments: dict[str, Any]) -> None:
    a, rows = gate_up(arguments), arguments["num_rows"]
    same_dtype, truth = expected_mlp(a, upcast=False), expected_mlp(a, upcast=True)
    assert_two_times_rule(a["mlp"][:rows], same_dtype[:rows], truth[:rows])
    assert bool((a["mlp"][rows:] == SENTINEL).all())
    assert torch.equal(a["residual_out"][:rows], summed(a["residual_in"], a["partials"])[:rows])
    assert bool((a["residual_out"][rows:] == SENTINEL).all())


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_gate_up_batches(device: str, dtype: torch.dtype, num_rows: int) -> None:
    check_gate_up(gate_up_arguments(device, dtype, DEMO, 1, num_rows))


@pytest.mark.parametrize("num_partials", [0, 5])
@pytest.mark.parametrize("sizes", [ODD, LOOP], ids=["odd", "loop"])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_gate_up_sizes(
    device: str, dtype: torch.dtype, sizes: tuple[int, int], num_partials: int
) -> None:
    check_gate_up(gate_up_arguments(device, dtype, sizes, num_partials, 5))


@pytest.mark.parametrize("sizes", [ODD, LOOP], ids=["odd", "loop"])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_gate_up_of_a_row_alone(device: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    whole = gate_up(gate_up_arguments(device, dtype, sizes, 2, 16))
    for row in (6, 15):
        alone = gate_up_arguments(device, dtype, sizes, 2, 1)
        for name in ("residual_in", "partials"):
            alone[name][..., 0, :] = whole[name][..., row, :]
            alone[name][..., 1:, :] = float("nan")
        gate_up(alone)
        assert torch.equal(alone["mlp"][0], whole["mlp"][row])
        assert torch.equal(alone["residual_out"][0], whole["residual_out"][row])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_gate_up_of_zeros_is_zero(device: str, dtype: torch.dtype) -> None:
    # What a row without a request computes: it must stay finite from layer to layer.
    arguments = gate_up_arguments(device, dtype, ODD, 1, 16)
    arguments["residual_in"].zero_()
    arguments["partials"].zero_()
    assert bool((gate_up(arguments)["mlp"] == 0).all())


def down_arguments(
    device: str, dtype: torch.dtype, sizes: tuple[int, int], num_rows: int
) -> dict[str, Any]:
    hidden_size, intermediate_size = sizes
    mlp = randn(ROWS, intermediate_size, seed=1)
    mlp[num_rows:] = float("nan")
    weight = randn(hidden_size, intermediate_size, seed=2, scale=intermediate_size**-0.5)
    splits = decode_mlp.down_splits(hidden_size, intermediate_size)
    return {
        "mlp": mlp.to(device, dtype),
        "weight": weight.to(device, dtype),
        "partials_out": torch.full((splits, ROWS, hidden_size), SENTINEL, device=device),
        "num_rows": num_rows,
    }


def check_down(arguments: dict[str, Any]) -> None:
    decode_mlp.decode_down(**arguments)
    partials, rows = arguments["partials_out"], arguments["num_rows"]
    mlp, weight = arguments["mlp"][:rows], arguments["weight"]
    # The sum stays float32: torch's product of half floats would round it.
    same_dtype, truth = F.linear(mlp.float(), weight.float()), mlp.double() @ weight.double().t()
    assert_two_times_rule(partials.sum(0)[:rows], same_dtype, truth)
    assert bool((partials[:, rows:] == SENTINEL).all())


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16])
@pytest.mark.parametrize("sizes", [DEMO, ODD, (24, 1288)], ids=["demo", "odd", "three-splits"])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_down(device: str, dtype: torch.dtype, sizes: tuple[int, int], num_rows: int) -> None:
    check_down(down_arguments(device, dtype, sizes, num_rows))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_down_with_several_tiles_a_program(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 5 tiles in 2 splits of 3.
    monkeypatch.setattr(decode_tiles, "_MAX_PROGRAMS", 2)
    arguments = down_arguments(device, dtype, (16, 2312), 5)
    assert arguments["partials_out"].shape[0] == 2
    check_down(arguments)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_down_of_a_row_alone(device: str, dtype: torch.dtype) -> None:
    whole = down_arguments(device, dtype, (24, 1288), 16)
    decode_mlp.decode_down(**whole)
    for row in (0, 15):
        alone = down_arguments(device, dtype, (24, 1288), 1)
        alone["mlp"][0] = whole["mlp"][row]
        decode_mlp.decode_down(**alone)
        assert torch.equal(alone["partials_out"][:, 0], whole["partials_out"][:, row])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_weights_at_any_stride(device: str, dtype: torch.dtype) -> None:
    for arguments, check in (
        (gate_up_arguments(device, dtype, ODD, 1, 5), decode_mlp.decode_gate_up),
        (down_arguments(device, dtype, ODD, 5), decode_mlp.decode_down),
    ):
        weight = arguments["weight"]
        wide = weight.new_full((weight.shape[0] + 32, weight.shape[1] + 40), float("nan"))
        view = wide[: weight.shape[0], 8 : 8 + weight.shape[1]]
        view.copy_(weight)
        out = "mlp" if "residual_in" in arguments else "partials_out"
        check(**arguments)
        plain = arguments[out].clone()
        arguments[out].fill_(SENTINEL)
        check(**arguments | {"weight": view})
        assert torch.equal(arguments[out], plain)


@pytest.mark.parametrize("num_rows", [1, 5, 16])
@pytest.mark.parametrize("sizes", REAL.values(), ids=REAL)
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_real_sizes(device: str, dtype: torch.dtype, sizes: tuple[int, int], num_rows: int) -> None:
    check_gate_up(gate_up_arguments(device, dtype, sizes, 4, num_rows))
    check_down(down_arguments(device, dtype, sizes, num_rows))


@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_programmatic_launch_changes_nothing(device: str, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs sm_90")
    plain, early = (gate_up_arguments(device, dtype, REAL["0.5b"], 4, 16) for _ in range(2))
    assert torch.equal(gate_up(plain)["mlp"], gate_up(early | {"pdl": True})["mlp"])
    plain, early = (down_arguments(device, dtype, REAL["0.5b"], 16) for _ in range(2))
    decode_mlp.decode_down(**plain)
    decode_mlp.decode_down(**early, pdl=True)
    assert torch.equal(plain["partials_out"], early["partials_out"])


def test_pack_gate_up_rows() -> None:
    assert decode_mlp.pack_gate_up_rows(3).tolist() == [0, 3, 1, 4, 2, 5]


# The models' shapes, on which the buffers of partials depend.
def test_down_splits() -> None:
    shapes = [*REAL.values(), (8192, 29568), DEMO, (64, 128)]
    assert [decode_mlp.down_splits(*shape) for shape in shapes] == [5, 2, 1, 1, 1]


BAD_GATE_UP = {
    "weight-f64": ("weight", torch.zeros(80, 72).double(), TypeError, "weight is"),
    "weight-odd": ("weight", torch.zeros(81, 72), ValueError, "weight has 81 rows"),
    "weight-narrow": ("weight", torch.zeros(80, 70), ValueError, "weight has shape"),
    "residual": ("residual_in", torch.zeros(16, 64), ValueError, "residual_in has shape"),
    "residual-out": ("residual_out", torch.zeros(16, 64), ValueError, "residual_out has shape"),
    "partials": ("partials", torch.zeros(1, 16, 64), ValueError, "partials has shape"),
    "norm": ("norm_weight", torch.zeros(72).half(), TypeError, "norm_weight is"),
    "mlp": ("mlp", torch.zeros(16, 41), ValueError, "mlp has shape"),
    "rows": ("num_rows", 17, ValueError, "num_rows is 17"),
}
BAD_DOWN = {
    "weight-f64": ("weight", torch.zeros(72, 40).double(), TypeError, "weight is"),
    "weight-transposed": ("weight", torch.zeros(40, 72).t(), ValueError, "weight has last"),
    "mlp-narrow": ("mlp", torch.zeros(16, 39), ValueError, "mlp has shape"),
    "mlp-f16": ("mlp", torch.zeros(16, 40).half(), TypeError, "mlp is"),
    "partials": ("partials_out", torch.zeros(2, 16, 72), ValueError, "partials_out has shape"),
    "partials-f16": ("partials_out", torch.zeros(1, 16, 72).half(), TypeError, "partials_out is"),
    "rows": ("num_rows", 0, ValueError, "num_rows is 0"),
}


@pytest.mark.parametrize("name", BAD_GATE_UP)
def test_bad_arguments_of_gate_up_are_named(name: str) -> None:
    argument, value, error, message = BAD_GATE_UP[name]
    arguments = gate_up_arguments("cpu", torch.float32, ODD, 1, 1) | {argument: value}
    with pytest.raises(error, match=message):
        decode_mlp.decode_gate_up(**arguments)


@pytest.mark.parametrize("name", BAD_DOWN)
def test_bad_arguments_of_down_are_named(name: str) -> None:
    argument, value, error, message = BAD_DOWN[name]
    arguments = down_arguments("cpu", torch.float32, ODD, 1) | {argument: value}
    with pytest.raises(error, match=message):
        decode_mlp.decode_down(**arguments)
