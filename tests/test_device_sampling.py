"""The sampler for rows chooses what the sampler of one row chooses."""

import numpy as np
import pytest
import torch

from ovfast.device_sampling import (
    ERROR_TOKEN,
    RowParams,
    SamplerKind,
    philox_uniform_rows,
    sample_rows,
)
from ovfast.sampling import SamplingParams, philox_uniform, sample

VOCAB = 211
CPU = torch.device("cpu")
FORBIDDEN = torch.zeros(VOCAB, dtype=torch.bool)
FORBIDDEN[[3, 200]] = True


def test_random_numbers_are_those_of_one_row():
    rng = np.random.default_rng(0)
    seeds = [0, 1, 2**32 - 1, 2**32, 2**64 - 1, *(int(s) for s in rng.integers(0, 2**63, 50))]
    indices = [0, 1, 2**31, 2**33 + 5, *(int(i) for i in rng.integers(0, 2**40, 51))]
    rows = torch.tensor([[seed & 0xFFFFFFFF, seed >> 32] for seed in seeds])
    out = philox_uniform_rows(rows, torch.tensor(indices))
    assert out.tolist() == [philox_uniform(s, i) for s, i in zip(seeds, indices, strict=True)]


OPTIONS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1e-40},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 2.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 10**6},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.5, "min_p": 0.2},
    {"temperature": 1.0, "top_k": 30, "top_p": 0.8, "min_p": 0.01},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7, "temperature": 0.9},
    {"min_new_tokens": 5},
]


def random_rows(seed: int, num_rows: int):
    """Rows of different options over logits with equals, and what the plain sampler takes."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (num_rows, VOCAB)).astype(np.float32))
    logits = (logits * 4).round() / 4  # many equal values
    params = RowParams.empty(num_rows, VOCAB, CPU)
    index = torch.from_numpy(rng.integers(0, 10, num_rows))
    kind, expected = SamplerKind(), []
    for row in range(num_rows):
        options = SamplingParams(**OPTIONS[int(rng.integers(len(OPTIONS)))])
        stops = [int(i) for i in rng.integers(0, VOCAB, 3)]
        seen = torch.from_numpy(rng.random(VOCAB) < 0.3)
        number = int(rng.integers(0, 2**63))
        params.set_row(row, options, number, torch.tensor(stops), seen)
        kind = kind | SamplerKind.of(options)
        early = index[row] < options.min_new_tokens
        expected.append(
            sample(
                logits[row],
                options,
                forbidden=FORBIDDEN,
                seen=seen,
                seed=number,
                index=int(index[row]),
                suppress_stop=tuple(stops) if early else (),
            )
        )
    return logits, params, index, kind, expected


@pytest.mark.parametrize("num_rows", [1, 2, 16])
def test_chooses_as_the_sampler_of_one_row(num_rows):
    for seed in range(60):
        logits, params, index, kind, expected = random_rows(seed, num_rows)
        before = logits.clone()
        out = sample_rows(logits, params, index, FORBIDDEN, kind)
        assert out.tolist() == expected, seed
        assert torch.equal(logits, before)


def test_rows_do_not_depend_on_each_other():
    logits, params, index, kind, expected = random_rows(99, 16)
    for row in (0, 7, 15):
        one = slice(row, row + 1)
        out = sample_rows(logits[one], params.rows(row, row + 1), index[one], FORBIDDEN, kind)
        assert out.tolist() == [expected[row]]


def test_what_no_row_needs_changes_nothing():
    """A greedy row in a step whose neighbours need every rule."""
    logits = torch.randn(3, VOCAB, generator=torch.manual_seed(0))
    params, index = RowParams.empty(3, VOCAB, CPU), torch.zeros(3, dtype=torch.int64)
    plain = sample_rows(logits, params, index, FORBIDDEN, SamplerKind())
    every = sample_rows(logits, params, index, FORBIDDEN, SamplerKind(True, True, True))
    assert plain.tolist() == every.tolist()
    expected = logits.masked_fill(FORBIDDEN, -torch.inf).argmax(1)
    assert plain.tolist() == expected.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(bad, temperature):
    logits = torch.zeros(2, VOCAB)
    logits[1, 5] = bad
    params = RowParams.empty(2, VOCAB, CPU)
    options = SamplingParams(temperature=temperature)
    for row in range(2):
        params.set_row(row, options, 1, torch.empty(0, dtype=torch.int64), None)
    index = torch.zeros(2, dtype=torch.int64)
    out = sample_rows(logits, params, index, FORBIDDEN, SamplerKind.of(options))
    assert out[0] >= 0
    assert out[1] == ERROR_TOKEN


def test_everything_forbidden():
    params, index = RowParams.empty(1, VOCAB, CPU), torch.zeros(1, dtype=torch.int64)
    forbidden = torch.ones(VOCAB, dtype=torch.bool)
    out = sample_rows(torch.zeros(1, VOCAB), params, index, forbidden, SamplerKind(random=True))
    assert out.tolist() == [ERROR_TOKEN]
