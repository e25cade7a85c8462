"""From nothing to the first token: import, load, first answer, in a new process every time.

"warm" finds the checkpoint's files in the system's file cache; before "cold" they are dropped from
it (the libraries' are not). The first answer is to a short text, so that loading is what counts.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ovfast.bench.record import Row
from ovfast.bench.session import Session
from ovfast.bench.sides import Rounds, Side, SideError, SideSpec
from ovfast.bench.targets import Target
from ovfast.bench.workloads import WORKLOADS, Media

__all__ = ["run_startup"]

CACHES = ("warm", "cold")


@dataclass(slots=True)
class _Start:
    """A side of a model, and the times of its starts so far."""

    target: Target
    spec: SideSpec
    samples: list[dict[str, float]] = field(default_factory=list)
    error: str | None = None


def run_startup(session: Session, sides: Sequence[tuple[Target, SideSpec]], rounds: Rounds) -> None:
    """Measures starts, all sides in turn.

    Args:
        session: takes the rows.
        sides: each started once a round, with its checkpoint.
        rounds: how often.
    """
    for cache in CACHES:
        starts = [_Start(target, spec) for target, spec in sides]
        for index in range(-rounds.warmup if cache == "warm" else 0, rounds.repeats):
            for start in starts:
                if start.error is None:
                    _measure(session, start, cache, is_counted=index >= 0)
        for start in starts:
            for row in _rows(start, cache):
                session.add(row)


def _measure(session: Session, start: _Start, cache: str, *, is_counted: bool) -> None:
    label = f"startup ({cache}), {start.target.name}, {start.spec.label}"
    try:
        times = _start(start.target, start.spec, is_cold=cache == "cold")
    except SideError as error:
        start.error = str(error)
        session.tell(f"{label}: failed: {error}")
        return
    session.show(f"{label}: {times['load_to_first_token_ms']:.0f} ms from load to first token")
    if is_counted:
        start.samples.append(times)


def _start(target: Target, spec: SideSpec, *, is_cold: bool) -> dict[str, float]:
    """The times of one start."""
    if is_cold:
        _drop_from_cache(target.path)
    job = {"requests": [target.request(WORKLOADS["text"], Media())], "max_new_tokens": 1}
    with Side(spec) as side:
        loaded = side.load()
        first, second = (side.ask("answer", **job)[0]["ttft_ms"] for _ in range(2))
    return {
        "import_torch_ms": loaded["import_torch_ms"],
        "import_ms": loaded["import_ms"],
        "load_ms": loaded["load_ms"],
        "first_token_ms": first,
        "second_request_ms": second,
        "load_to_first_token_ms": loaded["load_ms"] + first,
        "import_to_first_token_ms": loaded["import_ms"] + loaded["load_ms"] + first,
    }


def _rows(start: _Start, cache: str) -> list[Row]:
    parameters = start.target.parameters(file_cache=cache)
    given = start.spec.head("startup", "text", parameters) | {"unit": "ms"}
    if start.error is not None:
        return [Row(**given, metric="load_to_first_token_ms", samples=(), error=start.error)]
    return [
        Row(**given, metric=metric, samples=tuple(times[metric] for times in start.samples))
        for metric in start.samples[0]
    ]


def _drop_from_cache(directory: Path) -> None:
    """Asks the system to forget the contents of a checkpoint's files."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
