"""Triton decode_out against a float64 truth and plain torch, by the accuracy rule."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.decode_oracle import ROWS, randn
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params

decode_out = pytest.importorskip("ovfast.kernels.decode_out", reason="needs triton")
decode_tiles = pytest.importorskip("ovfast.kernels.decode_tiles", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]
SENTINEL = 7.0

# Both sides of a split's end, and four splits; None is a row without a request.
POSITIONS: dict[int, list[int | None]] = {
    1: [255],
    2: [None, 1, None, 256],
    5: [1000, None, 0, 257, None, 254, 511],
    16: [0, 1, 254, 255, 256, 257, 1000, 999, 511, 512, 513, 767, 768, 2, 3, 1023],
}


def make_arguments(
    device: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    positions: list[int | None],
    max_splits: int = 5,
) -> dict[str, Any]:
    """Whatever lies behind a row's splits, and every row without a request, is NaN."""
    hidden_size, num_heads, head_dim = sizes
    acc = randn(ROWS, num_heads, max_splits, head_dim, seed=1)
    m = randn(ROWS, num_heads, max_splits, seed=2, scale=6.0)
    sums = 1 + randn(ROWS, num_heads, max_splits, seed=3).abs()
    rows = positions + [None] * (ROWS - len(positions))
    for row, position in enumerate(rows):
        count = 0 if position is None else position // 256 + 1
        for tensor in (acc, m, sums):
            tensor[row, :, count:] = float("nan")
    in_features = num_heads * head_dim
    weight = randn(hidden_size, in_features, seed=4, scale=in_features**-0.5)
    num_splits = decode_out.out_splits(hidden_size, in_features)
    slots = [-1 if position is None else 3 * row for row, position in enumerate(rows)]
    at = [position or 0 for position in rows]
    return {
        "acc": acc.to(device),
        "m": m.to(device),
        "l": sums.to(device),
        "slots": torch.tensor(slots, dtype=torch.int32, device=device),
        "positions": torch.tensor(at, dtype=torch.int32, device=device),
        "weight": weight.to(device, dtype),
        "partials_out": torch.full((num_splits, ROWS, hidden_size), SENTINEL, device=device),
        "num_rows": len(positions),
    }


def combined(arguments: dict[str, Any], row: int, dtype: torch.dtype) -> Tensor:
    count = int(arguments["positions"][row]) // 256 + 1
    acc, m, sums = (arguments[name][row, :, :count].to(dtype) for name in ("acc", "m", "l"))
    scale = (m - m.max(1, keepdim=True).values).exp2()
    return ((acc * scale[..., None]).sum(1) / (sums * scale).sum(1, keepdim=True)).flatten()


def expected(arguments: dict[str, Any], row: int, upcast: bool) -> Tensor:
    """The sum of the partials, which stays float32."""
    weight = arguments["weight"]
    if upcast:
        return weight.double() @ combined(arguments, row, torch.float64)
    # One rounding, of the heads: torch's product of half floats would round its sum too.
    heads = combined(arguments, row, torch.float32).to(weight.dtype)
    return weight.float() @ heads.float()


def check_case(arguments: dict[str, Any]) -> None:
    decode_out.decode_out(**arguments)
    partials, slots = arguments["partials_out"], arguments["slots"].tolist()
    assert bool((partials[:, arguments["num_rows"] :] == SENTINEL).all())
    used = [row for row, slot in enumerate(slots) if slot >= 0]
    truth = torch.stack([expected(arguments, row, upcast=True) for row in used])
    same_dtype = torch.stack([expected(arguments, row, upcast=False) for row in used])
    assert_two_times_rule(partials.sum(0)[used], same_dtype, truth)
    for row in range(arguments["num_rows"]):
        assert slots[row] >= 0 or bool((partials[:, row] == 0).all())


@pytest.mark.parametrize("batch", POSITIONS)
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_batches(device: str, dtype: torch.dtype, batch: int) -> None:
    check_case(make_arguments(device, dtype, (192, 3, 64), POSITIONS[batch]))


# 112 columns, less than a tile; 384, one and a half; 72 rows, 8 in the last program.
@pytest.mark.parametrize("sizes", [(64, 7, 16), (72, 3, 128)], ids=["odd", "two-tiles"])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_sizes(device: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    check_case(make_arguments(device, dtype, sizes, POSITIONS[5]))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_several_tiles_a_program(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 5 tiles in 2 splits of 3, as a model of 7B has them.
    monkeypatch.setattr(decode_tiles, "_MAX_PROGRAMS", 2)
    arguments = make_arguments(device, dtype, (32, 18, 64), POSITIONS[2])
    assert arguments["partials_out"].shape[0] == 2
    check_case(arguments)


# Thousands of positions: 41 splits, beside a row with one.
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_long_contexts(device: str, dtype: torch.dtype) -> None:
    positions: list[int | None] = [41 * 256 - 1, None, 3, 40 * 256]
    check_case(make_arguments(device, dtype, (16, 2, 64), positions, max_splits=41))


# 2¹⁰⁰⁰ overflows float32: the maximum must be subtracted before, in either order of the splits.
@pytest.mark.parametrize("largest", [0, 1, 3])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_large_maxima(device: str, dtype: torch.dtype, largest: int) -> None:
    arguments = make_arguments(device, dtype, (64, 2, 64), [1000, 256])
    arguments["m"][0] -= 900.0
    arguments["m"][0, :, largest] = 1000.0
    check_case(arguments)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_row_does_not_see_the_others(device: str, dtype: torch.dtype) -> None:
    sizes = (64, 5, 64)
    whole = make_arguments(device, dtype, sizes, POSITIONS[16])
    decode_out.decode_out(**whole)
    for row in (0, 4, 6):
        alone = make_arguments(device, dtype, sizes, POSITIONS[16])
        for name in ("acc", "m", "l", "slots", "positions"):
            alone[name][0] = whole[name][row]
        decode_out.decode_out(**alone | {"num_rows": 1})
        assert torch.equal(alone["partials_out"][:, 0], whole["partials_out"][:, row])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_more_room_for_splits_changes_nothing(device: str, dtype: torch.dtype) -> None:
    small = make_arguments(device, dtype, (64, 2, 64), [257, 3], max_splits=2)
    large = make_arguments(device, dtype, (64, 2, 64), [257, 3], max_splits=7)
    for name in ("acc", "m", "l"):
        large[name][:, :, :2] = small[name]
    decode_out.decode_out(**small)
    decode_out.decode_out(**large)
    assert torch.equal(small["partials_out"], large["partials_out"])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_weight_at_any_stride(device: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype, (72, 3, 128), POSITIONS[2])
    weight = arguments["weight"]
    wide = weight.new_full((weight.shape[0] + 32, weight.shape[1] + 40), float("nan"))
    wide[: weight.shape[0], 8 : 8 + weight.shape[1]] = weight
    check_case(arguments | {"weight": wide[: weight.shape[0], 8 : 8 + weight.shape[1]]})


@pytest.mark.parametrize("batch", POSITIONS)
@pytest.mark.parametrize("sizes", [(896, 14, 64), (3584, 28, 128)], ids=["0.5b", "7b"])
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_real_sizes(
    device: str, dtype: torch.dtype, sizes: tuple[int, int, int], batch: int
) -> None:
    check_case(make_arguments(device, dtype, sizes, POSITIONS[batch]))


@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_programmatic_launch_changes_nothing(device: str, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs sm_90")
    plain, early = (make_arguments(device, dtype, (896, 14, 64), POSITIONS[16]) for _ in range(2))
    decode_out.decode_out(**plain)
    decode_out.decode_out(**early, pdl=True)
    assert torch.equal(plain["partials_out"], early["partials_out"])


# The models' shapes, on which the buffers of partials depend.
def test_out_splits() -> None:
    shapes = [(896, 896), (3584, 3584), (8192, 8192), (192, 192), (64, 112)]
    assert [decode_out.out_splits(*shape) for shape in shapes] == [4, 2, 1, 1, 1]


BAD_ARGUMENTS = {
    "acc-3d": ("acc", torch.zeros(16, 3, 64), ValueError, "acc has shape"),
    "acc-f16": ("acc", torch.zeros(16, 3, 5, 64).half(), TypeError, "acc is"),
    "head-dim": ("acc", torch.zeros(16, 3, 5, 48), ValueError, "head_dim is 48"),
    "acc-strided": ("acc", torch.zeros(16, 5, 3, 64).transpose(1, 2), ValueError, "acc has str"),
    "m-short": ("m", torch.zeros(16, 3, 4), ValueError, "m has shape"),
    "l-f64": ("l", torch.zeros(16, 3, 5).double(), TypeError, "l is"),
    "slots": ("slots", torch.zeros(15, dtype=torch.int32), ValueError, "slots has shape"),
    "positions": ("positions", torch.zeros(16, dtype=torch.int64), TypeError, "positions is"),
    "weight-f64": ("weight", torch.zeros(192, 192).double(), TypeError, "weight is"),
    "weight-narrow": ("weight", torch.zeros(192, 184), ValueError, "weight has shape"),
    "weight-transposed": ("weight", torch.zeros(192, 192).t()[:, :], ValueError, "weight has las"),
    "partials": ("partials_out", torch.zeros(2, 16, 192), ValueError, "partials_out has"),
    "rows": ("num_rows", 0, ValueError, "num_rows is 0"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    argument, value, error, message = BAD_ARGUMENTS[name]
    arguments = make_arguments("cpu", torch.float32, (192, 3, 64), [0]) | {argument: value}
    with pytest.raises(error, match=message):
        decode_out.decode_out(**arguments)
