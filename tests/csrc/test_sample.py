"""Native sampling: the tokens of `ovfast.sampling.sample`, rule by rule and all together."""

import numpy as np
import pytest
import torch

from ovfast.errors import BackendError
from ovfast.sampling import SamplingParams, philox_uniform, sample

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

RULES = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.8},
    {"temperature": 1.0},
    {"temperature": 0.3, "repetition_penalty": 1.3},
    {"temperature": 1.5, "top_k": 1},
    {"temperature": 1.5, "top_k": 7},
    {"temperature": 2.0, "top_p": 0.5},
    {"temperature": 5.0, "top_p": 0.95},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 0.7},
    {"temperature": 1e-38},
    {"temperature": 1e30},
]


def native_sample(logits, params, forbidden, seen, seed, index, suppressed=()):
    return native.sample(
        logits.numpy(),
        forbidden.numpy().view(np.uint8),
        None if seen is None else seen.numpy().view(np.uint8),
        np.array(suppressed, np.int32),
        params.repetition_penalty,
        params.temperature,
        params.top_k or len(logits),
        params.top_p,
        params.min_p,
        philox_uniform(seed, index),
    )


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 17, 3000])
def test_the_same_tokens(isa, rules, vocab):
    generator = torch.Generator().manual_seed(vocab)
    params = SamplingParams(**rules)
    for index in range(40):
        logits = torch.randn(vocab, generator=generator) * 3
        if index % 4 == 0:
            logits = logits.round()  # equals
        forbidden = torch.rand(vocab, generator=generator) < 0.2
        forbidden[index % vocab] = False
        seen = torch.rand(vocab, generator=generator) < 0.3
        suppressed = [i for i in (3, 5) if vocab > 10 and i != index % vocab]
        expected = sample(
            logits,
            params,
            forbidden=forbidden,
            seen=seen,
            seed=9,
            index=index,
            suppress_stop=suppressed,
        )
        assert native_sample(logits, params, forbidden, seen, 9, index, suppressed) == expected


def test_frequencies_are_those_of_softmax(isa):
    """A draw that always took one token would pass where expectations come from the same code."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, float("-inf")])
    params, allowed = SamplingParams(temperature=1.0), torch.zeros(5, dtype=torch.bool)
    counts = torch.zeros(5)
    for index in range(4000):
        counts[native_sample(logits, params, allowed, None, 1, index)] += 1
    assert torch.allclose(counts / 4000, logits.softmax(0), atol=0.03)
    assert counts[4] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_the_sampler_refuses_is_minus_one(isa, bad):
    logits, params = torch.zeros(50), SamplingParams(temperature=1.0)
    logits[20] = bad
    allowed = torch.zeros(50, dtype=torch.bool)
    assert native_sample(logits, params, allowed, None, 0, 0) == -1
    with pytest.raises(BackendError):
        sample(logits, params, forbidden=allowed, seed=0, index=0)
    assert native_sample(torch.zeros(50), params, ~allowed, None, 0, 0) == -1


def test_errors():
    logits, flags = np.zeros(9, np.float32), np.zeros(9, np.uint8)
    ids, good = np.zeros(0, np.int32), (1.0, 1.0, 9, 1.0, 0.0, 0.5)
    for args, message in (
        ((logits[:0], flags[:0], None, ids, *good), "size of logits is 0"),
        ((logits, flags[1:], None, ids, *good), "forbidden has shape"),
        ((logits, flags, flags[1:], ids, *good), "seen has shape"),
        ((logits, flags, None, np.full(1, 9, np.int32), *good), r"suppressed\[0\] is 9"),
        ((logits, flags, None, ids, 0.0, *good[1:]), "penalty is 0"),
        ((logits, flags, None, ids, 1.0, float("nan"), *good[2:]), "temperature is nan"),
        ((logits, flags, None, ids, 1.0, 1.0, 0, *good[3:]), "top_k is 0"),
        ((logits, flags, None, ids, 1.0, 1.0, 9, 1.5, 0.0, 0.5), "top_p is 1.5"),
        ((logits, flags, None, ids, 1.0, 1.0, 9, 1.0, -0.1, 0.5), "min_p is -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            native.sample(*args)
