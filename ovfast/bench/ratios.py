"""What rows of one record say together: shares of limits, errors of predictions, peer ratios.

A ratio above 1 means that ours is better, whatever the unit. Rows of two sides belong together
where suite, workload, metric and parameters agree; storages may differ, and are named.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ovfast.bench.record import LOWER_IS_BETTER, Row
from ovfast.bench.statistics import Ratio, Summary, paired_ratio, summarize

__all__ = [
    "OURS",
    "PeerRatio",
    "peer_ratios",
    "prediction_error",
    "prediction_errors",
    "share_of_limit",
]

OURS = "ovfast"


@dataclass(frozen=True, slots=True)
class PeerRatio:
    """One of our rows beside a peer's.

    Attributes:
        row: ours.
        peer: theirs.
        ratio: how many times better ours is, over pairs; None where there is none.
        why: there is none.
    """

    row: Row
    peer: Row
    ratio: Ratio | None
    why: str = ""


def share_of_limit(row: Row) -> float | None:
    """How near the median is to the floor, 1 at the floor; None without one."""
    if not row.floor or not row.samples:
        return None
    median = summarize(row.samples).median
    if not median:
        return None
    return row.floor / median if LOWER_IS_BETTER[row.unit] else median / row.floor


def prediction_error(row: Row) -> float | None:
    """How far the prediction lies above the median, as a share of it; None without one."""
    if row.predicted is None or not row.samples:
        return None
    median = summarize(row.samples).median
    return row.predicted / median - 1 if median else None


def prediction_errors(rows: Iterable[Row]) -> Summary | None:
    """Sizes of all prediction errors; None without a prediction."""
    errors = [abs(error) for row in rows if (error := prediction_error(row)) is not None]
    return summarize(errors) if errors else None


def peer_ratios(rows: Sequence[Row]) -> list[PeerRatio]:
    """Each of our rows beside each peer's row of the same thing, in the order of the rows."""
    return [
        _beside(row, peer)
        for row in rows
        if row.side == OURS
        for peer in rows
        if peer.side != OURS and _subject(peer) == _subject(row)
    ]


def _subject(row: Row) -> tuple[object, ...]:
    """What a row is about, whoever did it."""
    suite, workload, _, _, metric, parameters = row.key
    return suite, workload, metric, parameters


def _beside(row: Row, peer: Row) -> PeerRatio:
    for one in (row, peer):
        if one.error is not None:
            return PeerRatio(row, peer, None, f"{one.side} failed: {one.error}")
    if not (row.comparable and peer.comparable):
        counts = f"{peer.prompt_tokens} prompt tokens against {row.prompt_tokens}"
        return PeerRatio(row, peer, None, f"not comparable: {counts}")
    if len(row.samples) != len(peer.samples):
        return PeerRatio(row, peer, None, "not measured in turn")
    if min(*row.samples, *peer.samples) <= 0:
        return PeerRatio(row, peer, None, "too small to compare")
    ours, theirs = row.samples, peer.samples
    if not LOWER_IS_BETTER[row.unit]:
        ours, theirs = theirs, ours
    return PeerRatio(row, peer, paired_ratio(ours, theirs))
