"""BENCHMARKS.md: every committed record as tables and pictures, with the command that made it.

Only files that git has unchanged become part of it, so that each figure of the page can be traced
to a commit.
"""

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from ovfast.bench.plots import draw
from ovfast.bench.ratios import peer_ratios
from ovfast.bench.record import Record, Row, read
from ovfast.bench.table import (
    PEER_HEADINGS,
    ROW_HEADINGS,
    about,
    by_suite,
    peer_cells,
    prediction_text,
    row_cells,
)
from ovfast.errors import OptionError

__all__ = ["COMMAND", "page", "require_committed", "write_report"]

COMMAND = "make bench-report"
HEAD = f"""# Benchmarks

Written by `{COMMAND}` from the records in `benchmarks/results/`; do not edit. Every row is a median
of the samples in its record. "floor" is what the machine's own best rates allow (bytes over read
rate, or FLOPs over product rate, whichever takes longer), "of limit" how near the median is to it,
"predicted" what `Estimate` says of it from short measurements of the machine, with its error. A
ratio to a peer is taken pair by pair within the rounds of one run; where its interval covers 1, or
there are too few pairs, no speed-up is claimed. TTFT runs from the call with encoded pictures in
memory to the first token; TPOT is (E2E − TTFT) / (tokens − 1).
"""
IMAGE_TITLES = {
    "stages": "Stages up to the first token beside their limits",
    "roofline": "Rates under the machine's limits",
    "peers": "Ratios to peers with their intervals",
    "context": "Time per token by context",
}


def write_report(files: Sequence[Path], out: Path, pictures: Path) -> list[Path]:
    """Draws the records and writes the page.

    Args:
        files: records; each must be committed as it is.
        out: the page, Markdown.
        pictures: directory of its pictures, below that of the page.

    Returns:
        All files written, the page last.

    Raises:
        OptionError: no records, one that is damaged or not committed, or no matplotlib.
    """
    if not files:
        raise OptionError(
            "no records; expected at least one committed .jsonl file. Record one with"
            " `ovfast bench latency --out FILE.jsonl`."
        )
    for file in files:
        require_committed(file)
    records = {file: read(file) for file in sorted(files)}
    drawn = {file: draw(record, pictures, file.stem) for file, record in records.items()}
    out.write_text(page(records, drawn, out.parent), encoding="utf-8")
    return [*(path for paths in drawn.values() for path in paths), out]


def require_committed(file: Path) -> None:
    """Checks that git has a file as it is.

    Raises:
        OptionError: it has not.
    """
    commands = (("ls-files", "--error-unmatch"), ("diff", "--quiet", "HEAD", "--"))
    for words in commands:
        found = subprocess.run(
            ["git", "-C", file.parent, *words, file.name], check=False, capture_output=True
        )
        if found.returncode:
            raise OptionError(
                f"{file} is not committed as it is; expected a record of the history, so that its"
                " figures can be traced. Commit it first."
            )


def page(records: dict[Path, Record], drawn: dict[Path, list[Path]], root: Path) -> str:
    """The page's text.

    Args:
        records: by file.
        drawn: their pictures; of each chart the PNG, then the SVG.
        root: what links are relative to.
    """
    parts = [HEAD]
    for file, record in records.items():
        parts.append(_section(file, record, drawn.get(file, []), root))
    return "\n".join(parts)


def _section(file: Path, record: Record, drawn: Sequence[Path], root: Path) -> str:
    header = record.header
    gpu = "" if header.gpu else " No figure here is of a GPU."
    lines = [
        f"## {file.stem}",
        "",
        f"`{header.command}`, {header.date[:10]}. {about(header)}.{gpu}",
        "",
        *_pictures(file.stem, drawn, root),
    ]
    for suite, rows in by_suite(record.rows):
        lines += [f"**{suite}**", "", *_table(ROW_HEADINGS, [row_cells(row) for row in rows]), ""]
    lines += _peers(record.rows)
    if predictions := prediction_text(record.rows):
        lines += [predictions, ""]
    return "\n".join(lines)


def _pictures(stem: str, drawn: Sequence[Path], root: Path) -> Iterable[str]:
    for png, svg in zip(drawn[::2], drawn[1::2], strict=True):
        title = IMAGE_TITLES[png.stem.removeprefix(f"{stem}-")]
        there = png.relative_to(root).as_posix()
        yield f"![{title}]({there})"
        yield f"<br>{title} ([SVG]({svg.relative_to(root).as_posix()}))"
        yield ""


def _peers(rows: Sequence[Row]) -> list[str]:
    ratios = peer_ratios(rows)
    if not ratios:
        return []
    cells = [peer_cells(one) for one in ratios]
    return ["**against peers, in the same rounds**", "", *_table(PEER_HEADINGS, cells), ""]


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
