"""Rows of random requests, for tests of what chooses their tokens."""

import copy

import pytest
import torch

from ovfast.decode_kernels import DecodeKernels
from ovfast.decode_rows import ROWS, RowState
from ovfast.sampling import SamplingParams
from tests.support.devices import requires_cuda
from tests.support.interpreter import INTERPRETING

_CPU = pytest.param("cpu", marks=pytest.mark.interpreter)
_CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, requires_cuda])
DEVICES = [_CPU] if INTERPRETING else [_CPU, _CUDA]

STATE = ("slots", "positions", "tokens", "counts", "max_new_tokens", "logits")


def make_rows(
    device: str,
    vocab_size: int,
    seed: int,
    options: tuple[SamplingParams, ...] = (SamplingParams(),),
    kernels: DecodeKernels | None = None,
) -> RowState:
    """16 rows, every fifth free, in the middle of answers that may end soon.

    Args:
        device: of the tensors.
        vocab_size: of the logits, of which many are equal.
        seed: of everything.
        options: of the rows, in turn.
        kernels: of the rows.
    """
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random)

    forbidden = torch.rand(vocab_size, generator=random) < 0.1
    rows = RowState(vocab_size, forbidden.to(device), 4, kernels)
    logits = (torch.randn(ROWS, vocab_size, generator=random) * 12).round() / 4
    for row in range(ROWS):
        # Of the most likely ids some end the answer, or stops would be rare.
        stops = logits[row].topk(3).indices[integers(0, 3, 1)]
        rows.admit(
            row,
            -1 if row % 5 == 4 else row,
            int(integers(1, 500, 1)),
            logits[row].to(device),
            options[row % len(options)],
            seed=int(integers(0, 2**62, 1)),
            stop_ids=stops.to(device),
            max_new_tokens=int(integers(1, 5, 1)),
            seen=(torch.rand(vocab_size, generator=random) < 0.3).to(device),
        )
    rows.counts.copy_(integers(0, 3, ROWS))
    rows.tokens.copy_(integers(0, vocab_size, ROWS))
    return rows


def copy_rows(rows: RowState, kernels: DecodeKernels | None = None) -> RowState:
    """The same rows on tensors of their own.

    Args:
        rows: to copy.
        kernels: of the copy.
    """
    twin = RowState(rows.logits.shape[1], rows.forbidden, rows.output.top_ids.shape[1], kernels)
    for name in STATE:
        getattr(twin, name).copy_(getattr(rows, name))
    for name in rows.params.__slots__:
        getattr(twin.params, name).copy_(getattr(rows.params, name))
    twin.output = copy.deepcopy(rows.output)
    return twin


def assert_same_rows(ours: RowState, expected: RowState) -> None:
    """Every tensor that a choice writes, and those that it must not write."""
    for name in STATE:
        got, wanted = getattr(ours, name), getattr(expected, name)
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num()), name
    assert torch.equal(ours.output.tokens, expected.output.tokens)
    assert torch.equal(ours.params.seen, expected.params.seen)
