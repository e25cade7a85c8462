"""Rows of random requests, for tests of what chooses their tokens."""

import copy
import math

import pytest
import torch
from torch import Tensor

from ovfast.decode_kernels import DecodeKernels
from ovfast.decode_rows import ROWS, RowState
from ovfast.sampling import SamplingParams
from tests.support.devices import requires_cuda
from tests.support.interpreter import INTERPRETING

_CPU = pytest.param("cpu", marks=pytest.mark.interpreter)
_CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, requires_cuda])
DEVICES = [_CPU] if INTERPRETING else [_CPU, _CUDA]

# Every rule of sampling, alone and together.
OPTIONS = (
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1e-40),
    SamplingParams(temperature=1e39),
    SamplingParams(temperature=1.5, min_p=0.2),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=2.0, top_k=7),
    SamplingParams(temperature=1.0, top_p=0.5),
    SamplingParams(temperature=1.0, top_k=30, top_p=0.8, min_p=0.01),
    SamplingParams(repetition_penalty=1.4),
    SamplingParams(repetition_penalty=0.7, temperature=0.9),
    SamplingParams(min_new_tokens=5),
    SamplingParams(min_new_tokens=2, temperature=1.2, min_p=0.05),
    SamplingParams(repetition_penalty=1.7, temperature=0.8, top_k=20),
)

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


def best_of_blocks(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(values, ids) of each 64 ids: the lowest of equals, NaN told as inf."""
    values, ids = [], []
    scores = torch.where(scores.isnan(), math.inf, scores)
    for block, part in enumerate(scores.split(64, 1)):
        values.append(part.max(1).values)
        ids.append(64 * block + (part == values[-1][:, None]).int().argmax(1))
    return torch.stack(values, 1), torch.stack(ids, 1).int()
