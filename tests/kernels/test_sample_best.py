"""Triton sample_best against the scores of plain torch, exactly."""

import math
from typing import Any

import pytest
import torch

from ovfast import device_sampling
from ovfast.decode_rows import ROWS, RowState
from tests.support.row_states import DEVICES, OPTIONS, best_of_blocks, make_rows

sample_best = pytest.importorskip("ovfast.kernels.sample_best", reason="needs triton")

SENTINEL = 7


def make_arguments(rows: RowState, *, masks: bool) -> dict[str, Any]:
    vocab_size, device, params = rows.logits.shape[1], rows.logits.device, rows.params
    shape = (ROWS, -(-vocab_size // 64))
    return {
        "logits": rows.logits,
        "forbidden": rows.forbidden.to(torch.int8),
        "block_max": torch.full(shape, float(SENTINEL), device=device),
        "block_argmax": torch.full(shape, SENTINEL, dtype=torch.int32, device=device),
        "masks": (params.penalty, params.seen, params.is_stop, rows.counts, params.min_new_tokens)
        if masks
        else None,
    }


def check_case(rows: RowState, first_row: int, num_rows: int) -> None:
    for masks in (False, True):
        arguments = make_arguments(rows, masks=masks)
        sample_best.sample_best(**arguments, first_row=first_row, num_rows=num_rows)
        scores = device_sampling._allowed_scores(
            rows.logits, rows.params, rows.counts, rows.forbidden, masks=masks
        )
        used = slice(first_row, first_row + num_rows)
        for name, expected in zip(
            ("block_max", "block_argmax"), best_of_blocks(scores), strict=True
        ):
            got = arguments[name]
            assert torch.equal(got[used], expected[used])
            assert bool((got[: used.start] == SENTINEL).all())
            assert bool((got[used.stop :] == SENTINEL).all())


@pytest.mark.parametrize(("first_row", "num_rows"), [(0, 1), (0, 16), (3, 5), (15, 1)])
@pytest.mark.parametrize("vocab_size", [41, 640, 1100, 2500])
@pytest.mark.parametrize("device", DEVICES)
def test_as_plain_torch(device: str, vocab_size: int, first_row: int, num_rows: int) -> None:
    check_case(make_rows(device, vocab_size, vocab_size, OPTIONS), first_row, num_rows)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_that_are_not_finite(device: str) -> None:
    rows = make_rows(device, 200, 1, OPTIONS)
    rows.logits[0, 70], rows.logits[1, 71], rows.logits[2] = math.nan, math.inf, -math.inf
    rows.logits[10, 5], rows.logits[11, 6] = math.nan, -math.inf  # with a penalty
    rows.forbidden[71] = True
    check_case(rows, 0, 16)
    rows.forbidden.fill_(True)
    check_case(rows, 0, 16)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of numpy, in the interpreter
@pytest.mark.parametrize("device", DEVICES)
def test_a_penalty_at_the_ends_of_float32(device: str) -> None:
    rows = make_rows(device, 200, 2, OPTIONS)
    for row, penalty in enumerate((3.4e38, 1e-38, 1e30, 1.0)):
        rows.params.penalty[row] = penalty
        rows.logits[row, :4] = torch.tensor([1e30, -1e30, 0.0, -0.0], device=device)
        rows.params.seen[row, :4] = True
    check_case(rows, 0, 16)


BAD = {
    "logits-f16": ("logits", torch.zeros(16, 150).half(), TypeError, "logits is"),
    "logits-1d": ("logits", torch.zeros(150), ValueError, "logits has shape"),
    "forbidden-bool": ("forbidden", torch.zeros(150).bool(), TypeError, "forbidden is"),
    "max-short": ("block_max", torch.zeros(16, 2), ValueError, "block_max has shape"),
    "argmax-i64": ("block_argmax", torch.zeros(16, 3).long(), TypeError, "block_argmax is"),
    "rows": ("num_rows", 17, ValueError, "num_rows is 17"),
    "first-row": ("first_row", -1, ValueError, "first_row is -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    argument, value, error, message = BAD[name]
    arguments = make_arguments(make_rows("cpu", 150, 0), masks=True) | {argument: value}
    with pytest.raises(error, match=message):
        sample_best.sample_best(**arguments)


BAD_MASKS = {
    "penalty": (0, torch.zeros(16).double(), TypeError, "penalty is"),
    "seen": (1, torch.zeros(16, 150).char(), TypeError, "seen is"),
    "is-stop": (2, torch.zeros(16, 151).bool(), ValueError, "is_stop has shape"),
    "counts": (3, torch.zeros(16).int(), TypeError, "counts is"),
    "min-new-tokens": (4, torch.zeros(15).long(), ValueError, "min_new_tokens has shape"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks_are_named(name: str) -> None:
    position, value, error, message = BAD_MASKS[name]
    arguments = make_arguments(make_rows("cpu", 150, 0), masks=True)
    masks = list(arguments["masks"])
    masks[position] = value
    with pytest.raises(error, match=message):
        sample_best.sample_best(**arguments | {"masks": tuple(masks)})
