"""Records and comparisons on a terminal: time, floor, share of the limit, prediction, ratio.

A ratio whose interval covers 1, or that has too few pairs, is never printed as a speed-up.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ovfast.bench.compare import Comparison, Difference
from ovfast.bench.ratios import (
    PeerRatio,
    peer_ratios,
    prediction_error,
    prediction_errors,
    share_of_limit,
)
from ovfast.bench.record import SUITES, Header, Record, Row
from ovfast.bench.statistics import Ratio, summarize, verdict

__all__ = [
    "PEER_HEADINGS",
    "ROW_HEADINGS",
    "about",
    "amount",
    "by_suite",
    "comparison_cells",
    "peer_cells",
    "prediction_text",
    "print_comparison",
    "print_record",
    "ratio_text",
    "row_cells",
]

ROW_HEADINGS = ("workload", "metric", "side", "median", "p10–p90", "floor", "of limit", "predicted")
PEER_HEADINGS = ("workload", "metric", "side", "peer", "ours against theirs", "")
CHANGE_HEADINGS = ("workload", "metric", "side", "old", "new", "change", "in units of")
FIGURES = ("median", "floor", "of limit", "old", "new")  # columns set to the right
HIDDEN = ("device", "threads", "model", "new_tokens")  # parameters that the head of a run names
GOAL = 0.25  # of the median prediction error on a CPU
ERROR_LENGTH = 60


def print_record(record: Record, console: Console, notes: Sequence[str] = ()) -> None:
    """Prints everything that a run measured.

    Args:
        record: header and rows.
        console: where to.
        notes: definitions of what was measured, below the table.
    """
    console.print(about(record.header), highlight=False, markup=False)
    for suite, rows in by_suite(record.rows):
        console.print(_table(suite, ROW_HEADINGS, [row_cells(row) for row in rows]))
    ratios = peer_ratios(record.rows)
    if ratios:
        cells = [peer_cells(ratio) for ratio in ratios]
        console.print(_table("against peers, in the same rounds", PEER_HEADINGS, cells))
    for line in (prediction_text(record.rows), *notes):
        if line:
            console.print(line, style="dim", highlight=False, markup=False)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints what changed between two records, and what must be known to believe it."""
    cells = [comparison_cells(one) for one in comparison.differences]
    console.print(_table("old against new", CHANGE_HEADINGS, cells))
    for note in comparison.notes:
        console.print(note, style="dim", highlight=False, markup=False)


def by_suite(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of each suite that has some."""
    suites = ((suite, [row for row in rows if row.suite == suite]) for suite in SUITES)
    return [(suite, own) for suite, own in suites if own]


def about(header: Header) -> str:
    """Where and how a record was made, in one line."""
    hardware = header.hardware
    device = hardware["gpu"] or f"{hardware['cpu']}, {hardware['isa']}"
    commit = f"{header.commit or 'no commit'}{', changed' if header.dirty else ''}"
    busy = header.quiet.get("busy_share")
    taken = "" if busy is None else f" (others took {busy:.0%})"
    quiet = f"{header.quiet.get('verdict', 'unknown')}{taken}"
    versions = [
        f"{name} {header.versions[name]}"
        for name in ("torch", "transformers", "triton")
        if header.versions.get(name)
    ]
    return "; ".join(
        [device, f"{header.threads} threads", *versions, f"commit {commit}", f"machine {quiet}"]
    )


def row_cells(row: Row) -> tuple[str, ...]:
    """One figure under ROW_HEADINGS."""
    head = (_subject(row), row.metric, f"{row.side} {row.storage}")
    if row.error is not None:
        return (*head, "failed", _short(row.error), "", "", "")
    summary = summarize(row.samples)
    share, error = share_of_limit(row), prediction_error(row)
    spread = f"{amount(summary.p10, row.unit)}–{amount(summary.p90, row.unit)}"
    if summary.p99 is not None:
        spread += f", p99 {amount(summary.p99, row.unit)}"
    predicted = "" if row.predicted is None else amount(row.predicted, row.unit)
    return (
        *head,
        amount(summary.median, row.unit),
        spread if summary.count > 1 else "",
        "" if row.floor is None else amount(row.floor, row.unit),
        "" if share is None else f"{share:.0%}",
        predicted if error is None else f"{predicted} ({error:+.0%})",
    )


def peer_cells(one: PeerRatio) -> tuple[str, ...]:
    """One ratio under PEER_HEADINGS."""
    sides = (f"{side.side} {side.storage}" for side in (one.row, one.peer))
    head = (_subject(one.row), one.row.metric, *sides)
    if one.ratio is None:
        return (*head, "", _short(one.why))
    return (*head, ratio_text(one.ratio, _words(one.row)), f"{one.ratio.count} pairs")


def comparison_cells(one: Difference) -> tuple[str, ...]:
    """One change under CHANGE_HEADINGS."""
    old, new = (summarize(row.samples).median for row in (one.old, one.new))
    return (
        _subject(one.old),
        one.old.metric,
        f"{one.old.side} {one.old.storage}",
        amount(old, one.old.unit),
        amount(new, one.new.unit),
        ratio_text(one.ratio, _words(one.old)),
        one.unit,
    )


def ratio_text(ratio: Ratio, words: tuple[str, str] = ("faster", "slower")) -> str:
    """A ratio as far as its interval allows it to be said.

    Args:
        ratio: how many times better ours is.
        words: for better and worse.
    """
    spread = f"({ratio.low:.2f}–{ratio.high:.2f})"
    if not ratio.is_sure:
        spread = f"({ratio.low:.2f}–{ratio.high:.2f}, too few to be sure)"
    found = verdict(ratio)
    if found == "faster":
        return f"{ratio.median:.2f}× {words[0]} {spread}"
    if found == "slower":
        return f"{1 / ratio.median:.2f}× {words[1]} {spread}"
    return f"no difference shown {spread}"


def prediction_text(rows: Sequence[Row]) -> str:
    """The errors of all predictions in one line; nothing without predictions."""
    errors = prediction_errors(rows)
    if errors is None:
        return ""
    return (
        f"Predictions of Estimate: median error {errors.median:.0%} over {errors.count} figures"
        f" (90 % within {errors.p90:.0%}; goal {GOAL:.0%})."
    )


def amount(value: float, unit: str) -> str:
    """Three significant digits and a unit for people."""
    if unit == "ms":
        return _scaled(value, (("µs", 1e-3), ("ms", 1.0), ("s", 1e3)))
    if unit == "bytes":
        return _scaled(value, (("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9)))
    return f"{value:.1f} %" if unit == "%" else f"{_digits(value)} {unit}"


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    name, scale = units[0]
    for larger, size in units[1:]:
        if value >= size:
            name, scale = larger, size
    return f"{_digits(value / scale)} {name}"


def _digits(value: float) -> str:
    if value >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _subject(row: Row) -> str:
    """The workload and the parameters that tell its rows apart."""
    rest = {k: v for k, v in row.parameters.items() if k not in HIDDEN}
    if rest.get("batch") == 1:
        del rest["batch"]
    model = row.parameters.get("model")
    shown = [str(model)] if model else []
    shown += [f"{key} {value}" for key, value in rest.items() if str(value) not in row.workload]
    return f"{row.workload} ({', '.join(shown)})" if shown else row.workload


def _words(row: Row) -> tuple[str, str]:
    if row.unit == "bytes":
        return "smaller", "larger"
    return ("better", "worse") if row.unit == "%" else ("faster", "slower")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= ERROR_LENGTH else f"{line[:ERROR_LENGTH]}…"


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in FIGURES else "left")
    for row in rows:
        table.add_row(*map(Text, row))  # errors may hold what rich takes for markup
    return table
