"""From nothing to the first token: import, load, first answer, in a new process every time.

"warm" finds the checkpoint's files in the system's file cache; before "cold" they are dropped from
it (the libraries' are not). The first answer is to a short text, so that loading is what counts.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ovfast.bench.record import Row
from ovfast.bench.session import Session
from ovfast.bench.sides import Rounds, Side, SideError, SideSpec
from ovfast.bench.targets import Target
from ovfast.bench.workloads import WORKLOADS, Media

__all__ = ["run_startup"]

CACHES = ("warm", "cold")


def run_startup(
    session: Session, target: Target, specs: Sequence[SideSpec], rounds: Rounds
) -> None:
    """Measures starts of each side, in turn.

    Args:
        session: takes the rows.
        target: the checkpoint.
        specs: each started once a round.
        rounds: how often; the first warm start warms up.
    """
    for cache in CACHES:
        samples: dict[SideSpec, list[dict[str, float]]] = {spec: [] for spec in specs}
        errors: dict[SideSpec, str] = {}
        for index in range(-rounds.warmup if cache == "warm" else 0, rounds.repeats):
            for spec in specs:
                if spec in errors:
                    continue
                try:
                    times = _start(target, spec, is_cold=cache == "cold")
                except SideError as error:
                    errors[spec] = str(error)
                    session.tell(f"startup, {spec.label}: failed: {error}")
                    continue
                brief = f"{times['load_to_first_token_ms']:.0f} ms from load to first token"
                session.show(f"startup ({cache}), {spec.label}: {brief}")
                if index >= 0:
                    samples[spec].append(times)
        for spec in specs:
            for row in _rows(target, spec, cache, samples[spec], errors.get(spec)):
                session.add(row)


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


def _rows(
    target: Target,
    spec: SideSpec,
    cache: str,
    samples: Sequence[dict[str, float]],
    error: str | None,
) -> list[Row]:
    given = spec.head("startup", "text", target.parameters(file_cache=cache)) | {"unit": "ms"}
    if error is not None:
        return [Row(**given, metric="load_to_first_token_ms", samples=(), error=error)]
    return [
        Row(**given, metric=metric, samples=tuple(sample[metric] for sample in samples))
        for metric in samples[0]
    ]


def _drop_from_cache(directory: Path) -> None:
    """Asks the system to forget the contents of a checkpoint's files."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
