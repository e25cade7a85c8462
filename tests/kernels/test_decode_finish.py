"""Triton decode_finish against the choice in plain torch: every tensor of the rows, exactly."""

import math
from typing import Any

import pytest
import torch

from ovfast import decode_rows
from ovfast.decode_rows import ROWS, RowState
from ovfast.device_sampling import ERROR_TOKEN, SamplerKind
from tests.support.devices import requires_cuda
from tests.support.row_states import DEVICES, assert_same_rows, best_of_blocks, copy_rows, make_rows

decode_finish = pytest.importorskip("ovfast.kernels.decode_finish", reason="needs triton")


def leave_blocks(rows: RowState) -> tuple[torch.Tensor, torch.Tensor]:
    """What decode_head leaves."""
    return best_of_blocks(rows.logits.masked_fill(rows.forbidden, -math.inf))


def finish(rows: RowState, num_rows: int, **options: Any) -> None:
    decode_finish.decode_finish(
        *leave_blocks(rows),
        rows.params.is_stop,
        rows.max_new_tokens,
        rows.slots,
        rows.positions,
        rows.counts,
        rows.tokens,
        rows.output.tokens,
        num_rows=num_rows,
        **options,
    )


def check_case(rows: RowState, num_rows: int) -> None:
    """Three steps: rows that are over stay so. Rows beyond num_rows keep every value."""
    plain, ours = copy_rows(rows), copy_rows(rows)
    for _ in range(3):
        plain.choose(0, num_rows, SamplerKind(), None)
        finish(ours, num_rows)
        assert_same_rows(ours, plain)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16])
@pytest.mark.parametrize("vocab_size", [41, 640, 1100])
@pytest.mark.parametrize("device", DEVICES)
def test_as_plain_torch(device: str, vocab_size: int, num_rows: int) -> None:
    """Free rows, stops, lengths and equal logits among them."""
    for seed in range(3):
        check_case(make_rows(device, vocab_size, seed), num_rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("device", DEVICES)
def test_logits_that_are_not_finite(device: str, bad: float) -> None:
    rows = make_rows(device, 100, 5)
    rows.slots[:4] = 1
    rows.logits[0, 70] = bad
    rows.logits[1] = bad
    rows.forbidden[[3, 71]] = True
    rows.logits[2, 71] = bad  # a forbidden id may be anything
    check_case(rows, 4)
    ended = copy_rows(rows)
    finish(ended, 4)
    errors = [bad != -math.inf, True, False, False]
    assert (ended.output.tokens[:4, 0] == ERROR_TOKEN).tolist() == errors
    assert (ended.output.tokens[:4, 1] == decode_rows.ERROR).tolist() == errors


@pytest.mark.parametrize("device", DEVICES)
def test_everything_forbidden(device: str) -> None:
    rows = make_rows(device, 100, 6)
    rows.forbidden.fill_(True)
    check_case(rows, 16)
    finish(rows, 16)
    assert bool((rows.slots == -1).all())
    assert bool((rows.tokens == 0).all())


@pytest.mark.parametrize("device", DEVICES)
def test_the_lowest_of_equal_ids(device: str) -> None:
    rows = make_rows(device, 200, 7)
    rows.logits.fill_(1.5)
    rows.forbidden.fill_(False)
    rows.forbidden[:66] = True
    check_case(rows, 16)
    finish(rows, 16)
    assert rows.tokens.tolist() == [66] * ROWS


# 2375: the blocks of 0.5B. The best value is in the last block, and twice before it.
@pytest.mark.parametrize("num_blocks", [1, 41, 2375])
@pytest.mark.parametrize("device", DEVICES)
def test_blocks(device: str, num_blocks: int) -> None:
    rows = make_rows(device, 64 * num_blocks, 0)
    values = torch.randn(ROWS, num_blocks, generator=torch.manual_seed(1))
    for row in range(ROWS):
        values[row, [-1, num_blocks // 2, (row * num_blocks) // ROWS]] = 9.0
    ids = (torch.arange(num_blocks, dtype=torch.int32) * 64 + 5).repeat(ROWS, 1)
    arguments = make_arguments(rows) | {
        "block_max": values.to(device),
        "block_argmax": ids.to(device),
    }
    decode_finish.decode_finish(**arguments)
    first = [int((row == 9.0).nonzero()[0]) for row in values]
    assert rows.tokens.tolist() == [64 * block + 5 for block in first]


@pytest.mark.parametrize("device", DEVICES)
def test_drawn_tokens_of_some_rows(device: str) -> None:
    """Rows of temperature 0 keep the most likely id; what is not looked at is not written."""
    rows = make_rows(device, 150, 8)
    rows.forbidden.fill_(False)
    rows.params.temperature[3:9] = 0.5
    drawn = torch.arange(40, 40 + ROWS, dtype=torch.int32, device=device)
    seen = rows.params.seen.clone()
    greedy, before = copy_rows(rows), copy_rows(rows)
    finish(greedy, 16)
    options = {"drawn": drawn, "temperature": rows.params.temperature, "seen": rows.params.seen}
    finish(rows, 6, first_row=2, **options)
    expected = [*before.tokens[:2], greedy.tokens[2], *drawn[3:8], *before.tokens[8:]]
    assert rows.tokens.tolist() == [int(token) for token in expected]
    seen[range(2, 8), rows.tokens[2:8].long()] = True
    assert torch.equal(rows.params.seen, seen)
    for name in ("slots", "positions", "counts"):
        for part in (slice(0, 2), slice(8, 16)):
            assert torch.equal(getattr(rows, name)[part], getattr(before, name)[part])


def test_the_codes_are_those_of_the_rows() -> None:
    for name in ("RUNNING", "STOP", "LENGTH", "ERROR", "NO_SLOT"):
        assert getattr(decode_finish, name).value == getattr(decode_rows, name)
    assert decode_finish.ERROR_TOKEN.value == ERROR_TOKEN


@requires_cuda
@pytest.mark.gpu
def test_programmatic_launch_changes_nothing() -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs sm_90")
    rows = make_rows("cuda", 152000, 3)
    early = copy_rows(rows)
    finish(rows, 16)
    finish(early, 16, pdl=True)
    assert_same_rows(early, rows)


def make_arguments(rows: RowState) -> dict[str, Any]:
    block_max, block_argmax = leave_blocks(rows)
    return {
        "block_max": block_max,
        "block_argmax": block_argmax,
        "is_stop": rows.params.is_stop,
        "max_new_tokens": rows.max_new_tokens,
        "slots": rows.slots,
        "positions": rows.positions,
        "counts": rows.counts,
        "tokens": rows.tokens,
        "output": rows.output.tokens,
    }


BAD = {
    "max-1d": ("block_max", torch.zeros(16), ValueError, "block_max has shape"),
    "max-many": ("block_max", torch.zeros(16, 32769), ValueError, "block_max has shape"),
    "max-f16": ("block_max", torch.zeros(16, 3).half(), TypeError, "block_max is"),
    "argmax-short": ("block_argmax", torch.zeros(16, 2).int(), ValueError, "block_argmax has"),
    "stop-i8": ("is_stop", torch.zeros(16, 150).char(), TypeError, "is_stop is"),
    "stop-1d": ("is_stop", torch.zeros(150).bool(), ValueError, "is_stop has shape"),
    "slots-i64": ("slots", torch.zeros(16).long(), TypeError, "slots is"),
    "counts-i32": ("counts", torch.zeros(16).int(), TypeError, "counts is"),
    "output-narrow": ("output", torch.zeros(16, 1).int(), ValueError, "output has shape"),
    "rows": ("num_rows", 17, ValueError, "num_rows is 17"),
    "first-row": ("first_row", 1, ValueError, "first_row is 1"),
    "drawn-i64": ("drawn", torch.zeros(16).long(), TypeError, "drawn is"),
    "drawn-alone": ("drawn", torch.zeros(16).int(), ValueError, "temperature is None"),
    "seen-i8": ("seen", torch.zeros(16, 150).char(), TypeError, "seen is"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    argument, value, error, message = BAD[name]
    with pytest.raises(error, match=message):
        decode_finish.decode_finish(**make_arguments(make_rows("cpu", 150, 0)) | {argument: value})
