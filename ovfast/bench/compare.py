"""Two records of the same thing: what became faster or slower, beyond the noise.

Runs at other times meet other noise, so a difference must outlive two doubts. Where both records
hold the same peer beside ours, ours is compared in units of the peer: what slows the machine slows
both. Where ours by itself moved the other way, it was the peer that moved, and the interval is
widened as far. Elsewhere it is widened by as much as the machine's own limits moved between the
calibrations of the two records.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ovfast.bench.ratios import OURS
from ovfast.bench.record import LOWER_IS_BETTER, Header, Key, Record, Row, read
from ovfast.bench.statistics import Ratio, Verdict, unpaired_ratio, verdict
from ovfast.errors import OptionError

__all__ = ["Comparison", "Difference", "compare", "rerun"]

SAME_HARDWARE = ("cpu", "isa", "num_cpus", "memory_bytes", "gpu", "driver")
TIMES = ("ms", "tokens/s")  # units that a machine's noise moves
Drift = tuple[float, float]
MODEL_OPTIONS = ("--model", "-m")


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of ours in two records.

    Attributes:
        old, new: the rows.
        ratio: how many times better the new one is.
        verdict: "faster" where the new one is, beyond the noise.
        unit: what was compared: the rows' own unit, or the side that was the unit.
    """

    old: Row
    new: Row
    ratio: Ratio
    verdict: Verdict
    unit: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """All figures of ours that two records share, and what else must be said of them."""

    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def slower(self) -> tuple[Difference, ...]:
        """What became slower."""
        return tuple(one for one in self.differences if one.verdict == "slower")


def compare(old: Record, new: Record) -> Comparison:
    """What changed between two records.

    Raises:
        OptionError: they share no figure of ours, or one holds a figure twice.
    """
    before, after = old.by_key(), new.by_key()
    drift = _drift(old.header, new.header)
    differences, notes = [], _notes(old.header, new.header, drift)
    for key, row in before.items():
        if row.side != OURS or key not in after:
            continue
        other = after[key]
        broken = [one for one in (row, other) if one.error is not None]
        if broken:
            notes.append(f"{_name(row)}: failed: {broken[0].error}")
        elif min(*row.samples, *other.samples) <= 0:
            notes.append(f"{_name(row)}: too small to compare")
        else:
            control = _control(key, before, after, old.header, new.header)
            differences.append(_difference(row, other, control, drift))
    for name, one, rest in (("old", before, after), ("new", after, before)):
        alone = sum(row.side == OURS and key not in rest for key, row in one.items())
        if alone:
            notes.append(f"{alone} figures are in the {name} record only")
    if not differences:
        raise OptionError(
            f"the records share no figure that can be compared ({'; '.join(notes) or 'no rows'});"
            " expected two of the same suite, model and threads. Run the same command for both."
        )
    return Comparison(tuple(differences), tuple(notes))


def rerun(old: Record, out: Path, models: Sequence[str] = ()) -> Record:
    """Runs the command of a record again, with the ovfast that is imported here.

    Args:
        old: the record.
        out: the file for the new one.
        models: in place of those in the command, in order: a record names no directories.

    Raises:
        OptionError: the command is none of ours, has another number of models, or fails.
    """
    words = rerun_command(old.header.command, models)
    code = subprocess.run([*words, "--out", str(out)], check=False).returncode
    if code:
        raise OptionError(
            f"{old.header.command!r} ended with exit code {code}; expected 0. What it printed says"
            " why; --model names a checkpoint that is elsewhere here."
        )
    return read(out)


def rerun_command(command: str, models: Sequence[str]) -> list[str]:
    """The words that run a record's command with this interpreter."""
    words = shlex.split(command)
    if words[:2] != [OURS, "bench"]:
        raise OptionError(
            f"the record was made by {command!r}; expected `ovfast bench …`. Run it by hand, and"
            " compare the two files."
        )
    places = [i + 1 for i, word in enumerate(words[:-1]) if word in MODEL_OPTIONS]
    if models and len(models) != len(places):
        raise OptionError(
            f"{len(models)} models for {command!r}; expected {len(places)}, one for each of the"
            " command's. Name them in its order."
        )
    for place, model in zip(places, models, strict=False):
        words[place] = model
    return [sys.executable, "-m", *words]


def _difference(old: Row, new: Row, control: tuple[Row, Row] | None, drift: Drift) -> Difference:
    ratio = unpaired_ratio(_costs(new), _costs(old))
    if control is not None:
        costs = [_relative(row, peer) for row, peer in zip((old, new), control, strict=True)]
        beside = unpaired_ratio(costs[1], costs[0])
        if (beside.median - 1) * (ratio.median - 1) < 0:  # then it was the peer that moved
            low, high = min(beside.low, ratio.median), max(beside.high, ratio.median)
            beside = replace(beside, low=low, high=high)
        return Difference(old, new, beside, verdict(beside), control[0].side)
    if old.unit not in TIMES:
        return Difference(old, new, ratio, verdict(ratio), old.unit)
    wide = replace(ratio, low=ratio.low / drift[1], high=ratio.high / drift[0])
    return Difference(old, new, wide, verdict(wide), old.unit)


def _costs(row: Row) -> list[float]:
    """Samples of which less is better."""
    return [x if LOWER_IS_BETTER[row.unit] else 1 / x for x in row.samples]


def _relative(row: Row, peer: Row) -> list[float]:
    """Costs in units of a peer's, round by round."""
    return [ours / theirs for ours, theirs in zip(_costs(row), _costs(peer), strict=True)]


def _control(
    key: Key, before: dict[Key, Row], after: dict[Key, Row], old: Header, new: Header
) -> tuple[Row, Row] | None:
    """The rows of a peer that was measured in turn with ours in both records, unchanged."""
    suite, workload, _, _, metric, parameters = key
    if before[key].unit not in TIMES:
        return None
    for candidate, row in before.items():
        side = row.side
        is_beside = (candidate[0], candidate[1], candidate[4], candidate[5]) == (
            suite,
            workload,
            metric,
            parameters,
        )
        if side == OURS or not is_beside or candidate not in after:
            continue
        pairs = ((row, before[key]), (after[candidate], after[key]))
        version = side.partition("-")[0]
        is_same = old.versions.get(version) == new.versions.get(version) is not None
        if is_same and all(_is_control(peer, ours) for peer, ours in pairs):
            return row, after[candidate]
    return None


def _is_control(peer: Row, ours: Row) -> bool:
    has_pairs = peer.error is None and len(peer.samples) == len(ours.samples)
    return has_pairs and min(peer.samples) > 0


def _drift(old: Header, new: Header) -> Drift:
    """How many times faster the machine's limits were at the second calibration: least and most."""
    moved = [1.0]
    limits = [header.machine.get("limits", {}) for header in (old, new)]
    reads = [max((one.get("read_gb_per_s") or {"": 0.0}).values()) for one in limits]
    products = [[one.get(name) for one in limits] for name in ("float32_gflops", "bfloat16_gflops")]
    for before, after in (reads, *products):
        if before and after:
            moved.append(after / before)
    return min(moved), max(moved)


def _notes(old: Header, new: Header, drift: Drift) -> list[str]:
    notes = []
    for name in SAME_HARDWARE:
        before, after = old.hardware[name], new.hardware[name]
        if before != after:
            notes.append(f"other hardware: {name} was {before}, is {after}")
    if old.threads != new.threads:
        notes.append(f"threads were {old.threads}, are {new.threads}")
    for name in sorted(old.versions.keys() | new.versions.keys()):
        before, after = old.versions.get(name), new.versions.get(name)
        if before != after and name != OURS:
            notes.append(f"{name} was {before}, is {after}")
    if drift != (1.0, 1.0):
        moved = " to ".join(f"{factor:.2f}" for factor in drift)
        notes.append(f"the machine itself was {moved} times as fast by its calibration")
    for name, header in (("old", old), ("new", new)):
        if header.quiet.get("verdict") != "quiet":
            notes.append(f"the machine was {header.quiet.get('verdict')} at the {name} record")
        if header.dirty:
            notes.append(f"the {name} record was made from a changed checkout of {header.commit}")
    return notes


def _name(row: Row) -> str:
    return f"{row.workload} {row.metric} {row.storage}"
