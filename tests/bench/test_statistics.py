"""Statistics on known data, and what they may and may not call a difference."""

import itertools
import random

import pytest

from ovfast.bench.statistics import (
    CONFIDENCE,
    Ratio,
    paired_ratio,
    summarize,
    unpaired_ratio,
    verdict,
)
from ovfast.errors import OptionError


def test_summary_of_known_samples():
    got = summarize([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (got.count, got.minimum, got.median) == (5, 1.0, 3.0)
    assert (got.p10, got.p90) == (pytest.approx(1.4), pytest.approx(4.6))
    assert got.p99 is None
    assert summarize([7.0]).p90 == 7.0
    with pytest.raises(OptionError, match="no samples"):
        summarize([])


def test_p99_needs_200_samples():
    values = [float(value) for value in range(201)]
    assert summarize(values[:199]).p99 is None
    assert summarize(values).p99 == pytest.approx(198)


def test_paired_ratio_is_theirs_over_ours():
    got = paired_ratio([1.0, 2.0, 4.0], [2.0, 6.0, 4.0])
    assert (got.median, got.low, got.high, got.count) == (2.0, 1.0, 3.0, 3)
    assert got.confidence == 0.75
    assert not got.is_sure


@pytest.mark.parametrize(
    ("count", "rank", "confidence"),
    # Published ranks of the sign test's interval at 95 %.
    [
        (5, 0, 0.9375),
        (6, 0, 0.9688),
        (8, 0, 0.9922),
        (9, 1, 0.9609),
        (20, 5, 0.9586),
        (30, 9, 0.9572),
    ],
)
def test_interval_of_the_median_is_the_sign_test_s(count, rank, confidence):
    got = paired_ratio([1.0] * count, [float(i + 1) for i in range(count)])
    assert (got.low, got.high) == (rank + 1, count - rank)
    assert got.confidence == pytest.approx(confidence, abs=1e-4)
    assert got.is_sure == (count >= 6)


def test_interval_holds_the_median_as_often_as_it_says():
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        theirs = [rng.lognormvariate(0.0, 0.5) for _ in range(12)]
        got = paired_ratio([1.0] * 12, theirs)
        held += got.low <= 1 <= got.high
    assert held / 2000 == pytest.approx(got.confidence, abs=0.012)


@pytest.mark.parametrize(
    ("counts", "critical"),
    # Critical values of Mann and Whitney's U, two-sided 5 %: the interval starts right above.
    [((4, 4), 0), ((5, 5), 2), ((6, 6), 5), ((6, 9), 10), ((10, 10), 23), ((20, 20), 127)],
)
def test_unpaired_interval_is_mann_and_whitney_s(counts, critical):
    ours = [1000.0**i for i in range(counts[0])]
    theirs = [1.7 ** (i + 1) for i in range(counts[1])]
    ordered = sorted(b / a for a, b in itertools.product(ours, theirs))
    got = unpaired_ratio(ours, theirs)
    assert got.low == ordered[critical]
    assert got.high == ordered[-1 - critical]
    assert got.is_sure


def test_unpaired_interval_holds_the_ratio_as_often_as_it_says():
    rng = random.Random(1)
    held = {8: 0, 30: 0}  # exact, and by the normal distribution
    for count in held:
        for _ in range(800):
            ours, theirs = ([rng.lognormvariate(0, 0.3) for _ in range(count)] for _ in range(2))
            got = unpaired_ratio(ours, [2 * value for value in theirs])
            held[count] += got.low <= 2 <= got.high
    for times in held.values():
        assert 0.93 < times / 800 < 0.98
    assert not unpaired_ratio([1.0, 1.1, 1.2], [2.0, 2.1, 2.2]).is_sure


def test_verdicts():
    assert verdict(Ratio(1.2, 1.1, 1.3, 6, 0.97)) == "faster"
    assert verdict(Ratio(0.8, 0.7, 0.9, 6, 0.97)) == "slower"
    assert verdict(Ratio(1.2, 1.0, 1.3, 6, 0.97)) == "no difference shown"
    assert verdict(Ratio(1.2, 0.9, 1.3, 6, 0.97)) == "no difference shown"
    assert verdict(Ratio(1.2, 1.1, 1.3, 5, 0.94)) == "no difference shown", "too few pairs"
    assert CONFIDENCE == 0.95


@pytest.mark.parametrize("function", [paired_ratio, unpaired_ratio])
def test_bad_samples(function):
    with pytest.raises(OptionError, match="samples"):
        function([], [])
    with pytest.raises(OptionError, match="0 or less"):
        function([1.0, 0.0], [1.0, 2.0])
    with pytest.raises(OptionError, match="as many"):
        paired_ratio([1.0], [1.0, 2.0])
