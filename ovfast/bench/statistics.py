"""What samples say: quantiles, and ratios with an interval that assumes no distribution.

The two sides of a pair were measured one after the other, so that what disturbs the machine meets
both: `paired_ratio`. Samples of different runs are no pairs: `unpaired_ratio`. A difference is
called one only where the interval leaves 1 out.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ovfast.errors import OptionError

__all__ = [
    "CONFIDENCE",
    "Ratio",
    "Summary",
    "Verdict",
    "paired_ratio",
    "summarize",
    "unpaired_ratio",
    "verdict",
]

CONFIDENCE = 0.95
MIN_FOR_P99 = 200
MAX_FOR_EXACT = 400  # products of two counts; above them the normal distribution is as good

Verdict = Literal["faster", "slower", "no difference shown"]


@dataclass(frozen=True, slots=True)
class Summary:
    """Quantiles of samples, linear between neighbours.

    Attributes:
        p99: None below 200 samples, where it would be little else than the maximum.
    """

    count: int
    minimum: float
    median: float
    p10: float
    p90: float
    p99: float | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times better one side is, over pairs.

    Attributes:
        median: of the ratios.
        low, high: the interval of the median.
        count: of pairs.
        confidence: probability that such an interval holds the true median; below CONFIDENCE
            there are too few pairs, and it is the whole range.
    """

    median: float
    low: float
    high: float
    count: int
    confidence: float

    @property
    def is_sure(self) -> bool:
        """Whether there are enough pairs for an interval of CONFIDENCE."""
        return self.confidence >= CONFIDENCE


def summarize(samples: Sequence[float]) -> Summary:
    """Quantiles of at least one sample."""
    if not samples:
        raise OptionError("no samples; expected at least one. Rows with an error have none.")
    ordered = sorted(samples)
    return Summary(
        count=len(ordered),
        minimum=ordered[0],
        median=statistics.median(ordered),
        p10=_quantile(ordered, 0.1),
        p90=_quantile(ordered, 0.9),
        p99=_quantile(ordered, 0.99) if len(ordered) >= MIN_FOR_P99 else None,
    )


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio theirs / ours pair by pair: above 1 ours takes less.

    The interval lies between two of the ordered ratios. Of n independent ratios, the number below
    the true median is binomial with ½, so the k-th lowest and k-th highest enclose it with
    probability 1 − 2·P(fewer than k below), whatever the distribution. k is the largest that keeps
    CONFIDENCE, from six pairs on.

    Args:
        ours: samples in the order of the rounds.
        theirs: as many.

    Raises:
        OptionError: other numbers of samples, none at all, or a sample that is not positive.
    """
    if len(ours) != len(theirs) or not ours:
        raise OptionError(
            f"{len(ours)} and {len(theirs)} samples; expected as many of one side as of the other."
            " Measure both in turn."
        )
    if min(*ours, *theirs) <= 0:
        raise OptionError("a sample of 0 or less; expected positive ones. Measure more work.")
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    rank, confidence = _median_rank(len(ratios))
    return _ratio(ratios, rank, confidence, len(ratios))


def unpaired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio theirs / ours of the samples of two runs: above 1 ours takes less.

    The estimate of Hodges and Lehmann on the logarithms, with the interval that belongs to the
    test of Mann and Whitney; it supposes that one side's distribution is the other's, scaled.

    Args:
        ours: at least one sample; from four on either side on the interval can be sure.
        theirs: at least one sample.

    Raises:
        OptionError: no samples, or one that is not positive.
    """
    if not ours or not theirs:
        raise OptionError("no samples on one side; expected at least one. Measure both.")
    if min(*ours, *theirs) <= 0:
        raise OptionError("a sample of 0 or less; expected positive ones. Measure more work.")
    ratios = sorted(b / a for a in ours for b in theirs)
    rank, confidence = _rank_sum_rank(len(ours), len(theirs))
    return _ratio(ratios, rank, confidence, min(len(ours), len(theirs)))


def verdict(ratio: Ratio) -> Verdict:
    """What may be said of a ratio: nothing where its interval covers 1 or pairs are too few."""
    if ratio.is_sure and ratio.low > 1:
        return "faster"
    if ratio.is_sure and ratio.high < 1:
        return "slower"
    return "no difference shown"


def _ratio(ordered: Sequence[float], rank: int, confidence: float, count: int) -> Ratio:
    middle = statistics.median(ordered)
    return Ratio(middle, ordered[rank], ordered[-1 - rank], count, confidence)


def _median_rank(count: int) -> tuple[int, float]:
    """The index from either end that encloses the median, and with what probability."""
    return _widest_rank([math.comb(count, below) / 2**count for below in range((count + 1) // 2)])


def _rank_sum_rank(count: int, other: int) -> tuple[int, float]:
    """The index from either end of the ordered ratios, and the probability of the interval."""
    if count * other > MAX_FOR_EXACT:
        spread = math.sqrt(count * other * (count + other + 1) / 12)
        quantile = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
        return math.floor(count * other / 2 - quantile * spread), CONFIDENCE
    ways = _rank_sums(count, other)
    total = math.comb(count + other, count)
    return _widest_rank([way / total for way in ways[: (count * other + 1) // 2]])


def _rank_sums(count: int, other: int) -> list[int]:
    """In how many orders u of the count·other pairs lie the one way, for each u."""
    # The coefficients of the Gaussian binomial: ∏ (1 − q^(other+i)) / (1 − q^i).
    ways = [1] + [0] * (count * other)
    for i in range(1, count + 1):
        for u in range(count * other, other + i - 1, -1):
            ways[u] -= ways[u - other - i]
        for u in range(i, count * other + 1):
            ways[u] += ways[u - i]
    return ways


def _widest_rank(chances: Sequence[float]) -> tuple[int, float]:
    """The last rank whose two tails together keep CONFIDENCE; rank 0 where none does."""
    tail, best = 0.0, (0, max(0.0, 1 - 2 * chances[0]))
    for rank, chance in enumerate(chances):
        tail += chance
        if 1 - 2 * tail < CONFIDENCE:
            break
        best = rank, 1 - 2 * tail
    return best


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    index = min(int(place), len(ordered) - 2)
    if index < 0:
        return ordered[0]
    low, high = ordered[index], ordered[index + 1]
    return low + (high - low) * (place - index)
