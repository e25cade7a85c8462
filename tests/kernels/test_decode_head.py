"""Triton decode_head by the accuracy rule; the best ids of its blocks and embed_rows exactly."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

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

decode_head = pytest.importorskip("ovfast.kernels.decode_head", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]
SENTINEL = 7

# hidden_size, vocab_size. 41: less than a block; 168 columns: more than a tile, 100 ids: a block
# and a half.
DEMO, TINY, LOOP = (192, 640), (64, 41), (168, 100)


def make_arguments(
    device: str, dtype: torch.dtype, sizes: tuple[int, int], num_partials: int, num_rows: int
) -> dict[str, Any]:
    """Every third id is forbidden."""
    hidden_size, vocab_size = sizes
    residual, partials = residual_and_partials(device, hidden_size, num_partials)
    num_blocks = decode_head.head_blocks(vocab_size)
    forbidden = torch.zeros(vocab_size, dtype=torch.int8)
    forbidden[1::3] = 1
    return {
        "residual_in": residual,
        "partials": partials,
        "norm_weight": (1 + randn(hidden_size, seed=3, scale=0.2)).to(device, dtype),
        "eps": EPS,
        "weight": randn(vocab_size, hidden_size, seed=4).to(device, dtype),
        "logits": torch.full((ROWS, vocab_size), float(SENTINEL), device=device),
        "forbidden": forbidden.to(device),
        "block_max": torch.full((ROWS, num_blocks), float(SENTINEL), device=device),
        "block_argmax": torch.full((ROWS, num_blocks), SENTINEL, device=device).int(),
        "num_rows": num_rows,
    }


def best_of_blocks(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, ids) of the used rows from the kernel's own logits: what it chose is exact.

    NaN counts as inf; of equals the lowest id, also where all are -inf.
    """
    logits = arguments["logits"][: arguments["num_rows"]].cpu()
    logits = torch.where(logits.isnan(), math.inf, logits)
    logits = logits.masked_fill(arguments["forbidden"].cpu() != 0, -math.inf)
    values, ids = [], []
    for block, part in enumerate(logits.split(64, 1)):
        values.append(part.max(1).values)
        ids.append(64 * block + (part == values[-1][:, None]).int().argmax(1))
    return torch.stack(values, 1), torch.stack(ids, 1).int()


def check_blocks(arguments: dict[str, Any]) -> None:
    values, ids = best_of_blocks(arguments)
    rows = arguments["num_rows"]
    assert torch.equal(arguments["block_max"][:rows].cpu(), values)
    assert torch.equal(arguments["block_argmax"][:rows].cpu(), ids)


def check_case(arguments: dict[str, Any]) -> None:
    decode_head.decode_head(**arguments)
    a, rows = arguments, arguments["num_rows"]
    inputs = a["residual_in"], a["partials"]
    truth = F.linear(rms_norm_truth(*inputs, a["norm_weight"]), a["weight"].double())
    # Logits stay float32: torch's product of half floats would round them.
    same_dtype = F.linear(rms_norm(summed(*inputs), a["norm_weight"]).float(), a["weight"].float())
    assert_two_times_rule(a["logits"][:rows], same_dtype[:rows], truth[:rows])
    for name in ("logits", "block_max", "block_argmax"):
        assert bool((a[name][rows:] == SENTINEL).all())
    check_blocks(a)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_batches(device: str, dtype: torch.dtype, num_rows: int) -> None:
    check_case(make_arguments(device, dtype, DEMO, 1, num_rows))


@pytest.mark.parametrize("num_partials", [0, 5])
@pytest.mark.parametrize("sizes", [TINY, LOOP], ids=["tiny", "loop"])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_sizes(device: str, dtype: torch.dtype, sizes: tuple[int, int], num_partials: int) -> None:
    check_case(make_arguments(device, dtype, sizes, num_partials, 5))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_the_lowest_of_equal_ids_is_chosen(device: str, dtype: torch.dtype) -> None:
    # Equal in any order of summation, inside a block and across blocks.
    arguments = make_arguments(device, dtype, DEMO, 0, 2)
    arguments["weight"].zero_()[:, 7] = 1.0
    arguments["forbidden"].zero_()
    arguments["forbidden"][[0, 1, 64]] = 1
    decode_head.decode_head(**arguments)
    assert arguments["block_argmax"][0].tolist() == [2, 65, *range(128, 640, 64)]


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_forbidden_blocks(device: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype, LOOP, 0, 2)
    arguments["forbidden"][:64] = 1
    arguments["forbidden"][64:] = 0
    decode_head.decode_head(**arguments)
    assert arguments["block_max"][:2, 0].tolist() == [-math.inf] * 2
    assert arguments["block_argmax"][:2, 0].tolist() == [0, 0]
    check_blocks(arguments)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_nan_is_told_as_inf(device: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype, LOOP, 0, 2)
    arguments["forbidden"].zero_()
    arguments["weight"][70] = float("nan")
    decode_head.decode_head(**arguments)
    assert bool(arguments["logits"][0, 70].isnan())
    assert arguments["block_max"][0, 1] == math.inf
    assert arguments["block_argmax"][0, 1] == 70
    check_blocks(arguments)
    # Of a forbidden id it is not told.
    arguments["forbidden"][70] = 1
    decode_head.decode_head(**arguments)
    check_blocks(arguments)
    assert bool(arguments["block_max"][:2].isfinite().all())
    arguments["residual_in"][1] = float("nan")
    decode_head.decode_head(**arguments)
    check_blocks(arguments)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_row_does_not_see_the_others(device: str, dtype: torch.dtype) -> None:
    whole = make_arguments(device, dtype, LOOP, 2, 16)
    decode_head.decode_head(**whole)
    for row in (6, 15):
        alone = make_arguments(device, dtype, LOOP, 2, 1)
        for name in ("residual_in", "partials"):
            alone[name][..., 0, :] = whole[name][..., row, :]
            alone[name][..., 1:, :] = float("nan")
        decode_head.decode_head(**alone)
        for name in ("logits", "block_max", "block_argmax"):
            assert torch.equal(alone[name][0], whole[name][row])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_weight_at_any_stride(device: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype, LOOP, 1, 5)
    weight = arguments["weight"]
    wide = weight.new_full((weight.shape[0] + 64, weight.shape[1] + 40), float("nan"))
    wide[: weight.shape[0], 8 : 8 + weight.shape[1]] = weight
    check_case(arguments | {"weight": wide[: weight.shape[0], 8 : 8 + weight.shape[1]]})


@pytest.mark.parametrize("hidden_size", [64, 192, 1088])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_embed_rows(device: str, dtype: torch.dtype, hidden_size: int) -> None:
    table = randn(10, hidden_size + 8).to(device, dtype)[:, :hidden_size]
    tokens = [3, -1, 0, 9, 9] + [-1] * 11
    residual = torch.full((ROWS, hidden_size), math.nan, device=device)
    rows = torch.tensor(tokens, dtype=torch.int32, device=device)
    decode_head.embed_rows(rows, table, residual)
    expected = table[rows.long()].float() * (rows >= 0)[:, None]
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("num_rows", [1, 5, 16])
@pytest.mark.parametrize("sizes", [(896, 152000), (3584, 152128)], ids=["0.5b", "7b"])
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_real_sizes(device: str, dtype: torch.dtype, sizes: tuple[int, int], num_rows: int) -> None:
    check_case(make_arguments(device, dtype, sizes, 5, num_rows))


@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_programmatic_launch_changes_nothing(device: str, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs sm_90")
    plain, early = (make_arguments(device, dtype, (896, 6400), 5, 16) for _ in range(2))
    decode_head.decode_head(**plain)
    decode_head.decode_head(**early, pdl=True)
    for name in ("logits", "block_max", "block_argmax"):
        assert torch.equal(plain[name], early[name])


def test_head_blocks() -> None:
    assert [decode_head.head_blocks(size) for size in (1, 64, 65, 640, 152000)] == [
        1, 1, 2, 10, 2375,
    ]  # fmt: skip


BAD_HEAD = {
    "weight-f64": ("weight", torch.zeros(41, 64).double(), TypeError, "weight is"),
    "residual": ("residual_in", torch.zeros(16, 72), ValueError, "residual_in has shape"),
    "norm": ("norm_weight", torch.zeros(65), ValueError, "norm_weight has shape"),
    "logits-f16": ("logits", torch.zeros(16, 41).half(), TypeError, "logits is"),
    "logits-strided": ("logits", torch.zeros(16, 82)[:, ::2], ValueError, "logits has strides"),
    "forbidden-bool": ("forbidden", torch.zeros(41).bool(), TypeError, "forbidden is"),
    "forbidden-short": ("forbidden", torch.zeros(40).char(), ValueError, "forbidden has shape"),
    "block-max": ("block_max", torch.zeros(16, 2), ValueError, "block_max has shape"),
    "block-argmax": ("block_argmax", torch.zeros(16, 1).long(), TypeError, "block_argmax is"),
    "rows": ("num_rows", 17, ValueError, "num_rows is 17"),
}


@pytest.mark.parametrize("name", BAD_HEAD)
def test_bad_arguments_of_decode_head_are_named(name: str) -> None:
    argument, value, error, message = BAD_HEAD[name]
    arguments = make_arguments("cpu", torch.float32, TINY, 1, 1) | {argument: value}
    with pytest.raises(error, match=message):
        decode_head.decode_head(**arguments)


BAD_EMBED = {
    "tokens-i64": (0, torch.zeros(16).long(), TypeError, "tokens is"),
    "tokens-short": (0, torch.zeros(5).int(), ValueError, "tokens has shape"),
    "table-f64": (1, torch.zeros(9, 64).double(), TypeError, "weight is"),
    "table-1d": (1, torch.zeros(64), ValueError, "weight has shape"),
    "residual-f16": (2, torch.zeros(16, 64).half(), TypeError, "residual_out is"),
    "residual-narrow": (2, torch.zeros(16, 56), ValueError, "residual_out has shape"),
}


@pytest.mark.parametrize("name", BAD_EMBED)
def test_bad_arguments_of_embed_rows_are_named(name: str) -> None:
    position, value, error, message = BAD_EMBED[name]
    arguments = [torch.zeros(16).int(), torch.zeros(9, 64), torch.zeros(16, 64)]
    arguments[position] = value
    with pytest.raises(error, match=message):
        decode_head.embed_rows(*arguments)
