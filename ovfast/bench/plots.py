"""Pictures of a record: stages against their floors, the roofline, ratios to peers, contexts.

Each chart is drawn only where the record has its rows, as PNG and as SVG, the same bytes every
time. matplotlib (extra `bench`) is imported when a chart is drawn; nothing of its global state is
used.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovfast.bench.calibration import Calibration
from ovfast.bench.ratios import OURS, PeerRatio, peer_ratios
from ovfast.bench.record import Record, Row
from ovfast.bench.statistics import Ratio, summarize, verdict
from ovfast.bench.table import ratio_text
from ovfast.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CHARTS", "draw"]

WIDTH = 8.0  # inches
PIXELS_PER_INCH = 120
STAGES = {
    "media_ms": "#c9b458",
    "preprocess_ms": "#7fb069",
    "vision_ms": "#3a7ca5",
    "prefill_ms": "#d1603d",
}
STORAGES = {
    "float32": "#444c5c",
    "bfloat16": "#3a7ca5",
    "float16": "#7fb069",
    "bfloat16-matmul": "#2a9d8f",
    "int8": "#d1603d",
    "int4": "#8e5ea2",
    "fp8": "#c75146",
}
GRAY, DARK = "#9aa0a6", "#333333"
COMPARED = ("ttft_ms", "tpot_ms", "e2e_ms", "step_ms", "view_ms", "prefill_ms", "tokens_per_s")
STYLE: Any = {
    "svg.hashsalt": "ovfast",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(record: Record, directory: Path, stem: str) -> list[Path]:
    """Draws the charts that a record has rows for.

    Args:
        record: to draw.
        directory: made if it is not there.
        stem: start of the files' names; the chart's name follows.

    Returns:
        The files, each chart's PNG before its SVG.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise OptionError(
            f"charts need matplotlib ({error}). Install it: pip install 'ovfast[bench]'."
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    with mpl.rc_context(STYLE):
        for name, chart in CHARTS.items():
            figure = chart(record)
            if figure is None:
                continue
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                files.append(directory / f"{stem}-{name}.{kind}")
                figure.savefig(files[-1], dpi=PIXELS_PER_INCH, metadata=metadata)
    return files


def stage_bars(record: Record) -> "Figure | None":
    """What the time to the first token is made of, the floor of each stage below it."""
    rows = [row for row in record.rows if row.suite == "latency" and row.samples]
    answered = {row.workload for row in rows if row.side == OURS and row.metric == "ttft_ms"}
    workloads = [
        name
        for name in dict.fromkeys(row.workload for row in rows if row.metric in STAGES)
        if name in answered
    ]
    if not workloads:
        return None
    bars = {name: _bars_of([row for row in rows if row.workload == name]) for name in workloads}
    counts = [len(labels) for labels in bars.values()]
    figure = _figure(0.9 + sum(0.45 + 0.3 * count for count in counts))
    axes = figure.subplots(len(workloads), 1, squeeze=False, height_ratios=counts)[:, 0]
    for plot, (workload, parts) in zip(axes, bars.items(), strict=True):
        for place, segments in enumerate(parts.values()):
            _stack(plot, place, segments)
        plot.set_yticks(range(len(parts)), list(parts))
        plot.invert_yaxis()
        plot.set_title(workload, loc="left", fontweight="bold")
    axes[-1].set_xlabel("milliseconds to the first token, medians; light: the physical limit")
    handles = [_swatch(color) for color in STAGES.values()]
    names = [name.removesuffix("_ms") for name in STAGES]
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False)
    return figure


Segment = tuple[float, str, float]  # milliseconds, colour, opacity


def _bars_of(rows: Sequence[Row]) -> dict[str, list[Segment]]:
    """Bars of one workload by label: ours in stages and their floors, peers in one piece."""
    bars: dict[str, list[Segment]] = {}
    for row in rows:
        if row.side == OURS and row.metric in STAGES:
            label, color = f"{row.side} {row.storage}", STAGES[row.metric]
            bars.setdefault(label, []).append((summarize(row.samples).median, color, 1.0))
            bars.setdefault(f"limit, {row.storage}", []).append((row.floor or 0.0, color, 0.35))
    for row in rows:
        if row.side != OURS and row.metric == "ttft_ms" and row.comparable:
            label = f"{row.side} {row.storage}"
            bars[label] = [(summarize(row.samples).median, GRAY, 1.0)]
    return bars


def _stack(axes: "Axes", place: int, segments: Sequence[Segment]) -> None:
    left = 0.0
    for width, color, alpha in segments:
        axes.barh(place, width, left=left, color=color, alpha=alpha, height=0.7)
        left += width


def roofline(record: Record) -> "Figure | None":
    """Arithmetic rate over arithmetic intensity, under the limits of the machine."""
    rows = [row for row in record.rows if row.flops and row.num_bytes and row.samples]
    machine = record.header.machine
    if not rows or "limits" not in machine:
        return None
    storages = [name for name in STORAGES if any(row.storage == name for row in rows)]
    figure = _figure(5.0)
    axes = figure.subplots()
    intensities = [_intensity(row) for row in rows]
    span = (min(intensities) / 3, max(intensities) * 3)
    _ceilings(axes, Calibration.from_dict(machine), storages, span)
    for storage in storages:
        own = [row for row in rows if row.storage == storage]
        axes.plot(
            [_intensity(row) for row in own],
            [_gflops(row) for row in own],
            "o",
            color=STORAGES[storage],
            markersize=5,
            label=storage,
        )
    for row in rows:
        if row.suite == "latency" and row.side == OURS:
            axes.annotate(
                row.workload,
                (_intensity(row), _gflops(row)),
                xytext=(5, -3),
                textcoords="offset points",
                fontsize=7,
                color=DARK,
            )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s, median")
    axes.legend(loc="lower right", frameon=False)
    return figure


def _ceilings(
    axes: "Axes", calibration: Calibration, storages: Sequence[str], span: tuple[float, float]
) -> None:
    """The limit of each storage: reading below the ridge, multiplying above it."""
    limits: dict[tuple[float, float], list[str]] = {}
    for storage in storages:
        machine = calibration.machine(storage)
        limits.setdefault((machine.read_gb_per_s, machine.gflops), []).append(storage)
    for (read, gflops), names in limits.items():
        ridge = gflops / read
        corners = sorted({span[0], min(max(ridge, span[0]), span[1]), span[1]})
        heights = [min(gflops, read * corner) for corner in corners]
        color = STORAGES[names[0]]
        label = f"{', '.join(names)}: {read:.0f} GB/s, {gflops:.0f} GFLOP/s"
        axes.plot(corners, heights, "-", color=color, linewidth=1, alpha=0.7, label=label)


def _intensity(row: Row) -> float:
    assert row.flops
    assert row.num_bytes
    return row.flops / row.num_bytes


def _gflops(row: Row) -> float:
    assert row.flops
    return row.flops / (summarize(row.samples).median * 1e6)


def peers(record: Record) -> "Figure | None":
    """How many times better than its peers ovfast was in the same rounds."""
    ratios = [one for one in peer_ratios(record.rows) if one.row.metric in COMPARED and one.ratio]
    if not ratios:
        return None
    figure = _figure(0.9 + 0.26 * len(ratios))
    axes = figure.subplots()
    axes.axvline(1, color=DARK, linewidth=1)
    for place, one in enumerate(ratios):
        _whisker(axes, place, one)
    axes.set_yticks(range(len(ratios)), [_label(one) for one in ratios])
    axes.set(xscale="log", xlabel="times better than the peer, pair by pair; gray: not shown")
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlim(*_wide([one.ratio for one in ratios if one.ratio]))
    axes.invert_yaxis()
    return figure


def _whisker(axes: "Axes", place: int, one: PeerRatio) -> None:
    assert one.ratio is not None
    is_shown = verdict(one.ratio) != "no difference shown"
    color = STORAGES[one.row.storage] if is_shown else GRAY
    axes.plot([one.ratio.low, one.ratio.high], [place, place], "-", color=color, linewidth=2)
    axes.plot([one.ratio.median], [place], "o", color=color, markersize=5)
    axes.annotate(
        ratio_text(one.ratio),
        (one.ratio.high, place),
        xytext=(6, -3),
        textcoords="offset points",
        fontsize=7,
        color=color,
    )


def _wide(ratios: Sequence[Ratio]) -> tuple[float, float]:
    """Limits of the axis: room for the text on the right, whose length is that of the ratios."""
    low = min(1.0, *(one.low for one in ratios))
    high = max(1.0, *(one.high for one in ratios))
    return low / 1.1, high * max(2.0, (high / low) ** 1.3)


def _label(one: PeerRatio) -> str:
    subject = f"{one.row.workload}, {one.row.metric.removesuffix('_ms')}"
    given = {name: one.row.parameters.get(name) for name in ("context", "batch")}
    many = "".join(
        f", {name} {value}"
        for name, value in given.items()
        if value not in (None, 1) and str(value) not in subject
    )
    return f"{subject}{many}: {one.row.storage} vs {one.peer.side} {one.peer.storage}"


def contexts(record: Record) -> "Figure | None":
    """Time per token over the length of the context, the floor dashed."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in record.rows:
        if row.suite == "latency" and "context" in row.parameters and row.samples:
            lines.setdefault((row.side, row.storage), []).append(row)
    lines = {
        line: sorted(rows, key=_context)
        for line, rows in lines.items()
        if len({_context(row) for row in rows}) > 1
    }
    if not lines:
        return None
    figure = _figure(4.0)
    axes = figure.subplots()
    for (side, storage), rows in lines.items():
        _context_line(axes, f"{side} {storage}", STORAGES[storage], rows, is_ours=side == OURS)
    axes.set(xlabel="tokens of context", ylabel="milliseconds a token", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=7)
    return figure


def _context_line(
    axes: "Axes", label: str, color: str, rows: Sequence[Row], *, is_ours: bool
) -> None:
    places = [_context(row) for row in rows]
    found = [summarize(row.samples) for row in rows]
    color = color if is_ours else GRAY
    axes.plot(places, [one.median for one in found], "o-", color=color, label=label, markersize=4)
    low, high = [one.p10 for one in found], [one.p90 for one in found]
    axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    floors = [row.floor for row in rows if row.floor is not None]
    if is_ours and len(floors) == len(places):
        axes.plot(places, floors, "--", color=color, linewidth=1)


def _context(row: Row) -> float:
    return float(row.parameters["context"])


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _swatch(color: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color)


CHARTS: dict[str, Callable[[Record], "Figure | None"]] = {
    "stages": stage_bars,
    "roofline": roofline,
    "peers": peers,
    "context": contexts,
}
