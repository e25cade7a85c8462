"""One run of `ovfast bench` from the command line: watch, calibrate, measure, print.

Owns what the commands share; what they measure is theirs.
"""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ovfast.bench.bounds import Bounds
from ovfast.bench.calibration import calibrate
from ovfast.bench.machine import make_header, quiet_check
from ovfast.bench.ratios import OURS
from ovfast.bench.record import Record
from ovfast.bench.session import Loaded, Session
from ovfast.bench.sides import SideSpec
from ovfast.bench.table import print_record
from ovfast.bench.targets import Target, available_peers, peer_versions
from ovfast.home_stream import use_device

__all__ = [
    "chosen_peers",
    "chosen_sides",
    "command_line",
    "measuring",
    "measuring_loaded",
    "table_console",
]

FILE_WIDTH = 180


@contextmanager
def measuring(
    ctx: typer.Context,
    target: Target,
    sides: Sequence[SideSpec],
    out: Path | None,
    *,
    predicts: bool = False,
    notes: Sequence[str] = (),
) -> Iterator[tuple[Session, Bounds]]:
    """A run: watches and calibrates the machine before, prints the table after.

    Args:
        ctx: of the command.
        target: gives device and threads.
        sides: that will be measured.
        out: a file for the record.
        predicts: whether ovfast's times are to be predicted; each storage takes some seconds.
        notes: printed below the table.

    Yields:
        What takes the rows, and their bounds.
    """
    console = Console(stderr=True, highlight=False)
    quiet = quiet_check()
    if quiet["verdict"] == "noisy":
        console.print(
            f"[bold yellow]This machine is busy: others take {quiet['busy_share']:.0%} of its"
            " processors. Figures will be noisy, and the record says so."
        )
    with use_device(target.device):
        with console.status("calibrating"):
            ours = dict.fromkeys(spec.storage for spec in sides if spec.side == OURS)
            storages = tuple(ours) if predicts else ()
            calibration = calibrate(str(target.device), threads=target.threads, storages=storages)
        header = make_header(command_line(ctx), calibration, quiet, peer_versions(sides))
        session = Session(header, out, console)
        with session.progress():
            yield session, Bounds(target, calibration)
    record = Record(session.header, tuple(session.rows))
    print_record(record, table_console(), notes)
    if out is not None:
        console.print(f"wrote {out}", markup=False)


@contextmanager
def measuring_loaded(
    ctx: typer.Context,
    target: Target,
    sides: Sequence[SideSpec],
    out: Path | None,
    notes: Sequence[str] = (),
) -> Iterator[tuple[Session, Bounds, list[Loaded]]]:
    """A run with predictions, as `measuring`, all of whose sides stay loaded."""
    with (
        measuring(ctx, target, sides, out, predicts=True, notes=notes) as (session, bounds),
        session.open(sides) as loaded,
    ):
        yield session, bounds, loaded


def table_console() -> Console:
    """For tables; where nobody says how wide, they are as wide as they need to be."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=FILE_WIDTH)


def chosen_peers(target: Target, given: Sequence[str] | None) -> list[SideSpec]:
    """The peers asked for; if none was named, transformers where it can run.

    Raises:
        OptionError: a name that is no peer's.
    """
    if given:
        return [target.peer_side(name) for name in given if name != "none"]
    if available_peers(["transformers"]) and not target.is_packed:
        return [target.peer_side("transformers")]
    Console(stderr=True, style="dim", highlight=False).print(
        "without a peer: transformers cannot run here; `--peer transformers` says why"
    )
    return []


def chosen_sides(
    target: Target, storages: Sequence[str] | None, peers: Sequence[str] | None, **options: Any
) -> list[SideSpec]:
    """Ours with their weights in some storages, then peers; `options` of our job `load`."""
    ours = [target.ovfast_side(name, **options) for name in storages or ["auto"]]
    return [*ours, *chosen_peers(target, peers)]


def command_line(ctx: typer.Context) -> str:
    """The command that makes a record again: what was given, without directories of this machine
    and without the file.
    """
    words = ["ovfast", "bench", ctx.command.name or ""]
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name or "")
        if parameter.name == "out" or value in (None, parameter.default):
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            text = str(item)
            words += [parameter.opts[0], Path(text).name if text.startswith("/") else text]
    return shlex.join(words)
