"""Sides of a comparison: processes of their own that wait while the others work.

Owns starting, asking and ending them, and the turn order (A B A B): every round asks each side
once, so that the machine's noise meets all. A side that fails is left out of its job, a side that
dies out of all later ones; the run goes on.
"""

import itertools
import json
import math
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from ovfast.bench.protocol import encode_bytes

__all__ = ["Outcome", "Parameters", "Rounds", "Side", "SideError", "SideSpec", "take_turns"]

TAIL_CHARACTERS = 400
SLOW_S, COUNTED_S = 1.0, 5.0
REPEATS, SLOW_REPEATS = 30, 6  # from six pairs on there is an interval of the median
Parameters = Mapping[str, int | float | str]


class SideError(Exception):
    """What a side said when it failed; the suite writes it down."""


@dataclass(frozen=True, slots=True, eq=False)
class SideSpec:
    """How a side is started.

    Attributes:
        side: "ovfast" or the name of a peer.
        storage: of its weights.
        command: of a process that speaks `protocol`.
        options: of its job `load`.
        environment: added to ours.
        missing: why it cannot be started, where that is known.
    """

    side: str
    storage: str
    command: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None

    @property
    def label(self) -> str:
        return f"{self.side} {self.storage}"

    def head(self, suite: str, workload: str, parameters: Parameters) -> dict[str, Any]:
        """What all rows of this side have in common, for `record.Row`."""
        return {
            "suite": suite,
            "workload": workload,
            "side": self.side,
            "storage": self.storage,
            "parameters": dict(parameters) | {"device": self.device},
        }

    @property
    def device(self) -> str:
        """Its kind: "cpu" or "cuda"."""
        return str(self.options.get("device", "cpu")).partition(":")[0]


class Side:
    """A running process; a context manager that ends it.

    Args:
        spec: how to start it.
        timeout_s: of a job; a side that takes longer is ended.
    """

    def __init__(self, spec: SideSpec, timeout_s: float = 900.0) -> None:
        self.spec, self._timeout_s = spec, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._why = spec.missing
        self.peak_bytes = 0  # of the last job

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def load(self) -> dict[str, Any]:
        """Starts the process and has it load its model.

        Raises:
            SideError: it could not.
        """
        if self._why is None:
            try:
                self._process = subprocess.Popen(
                    self.spec.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    env=os.environ | self.spec.environment,
                )
            except OSError as error:
                self._why = f"cannot be started: {error}"
        try:
            loaded = self.ask("load", **self.spec.options)
        except SideError as error:
            self._end(str(error))
            raise
        assert isinstance(loaded, dict)
        return loaded

    def ask(self, job: str, **arguments: Any) -> Any:
        """One job's answer; None where the side does not do such jobs.

        Raises:
            SideError: the job failed, or the side is dead.
        """
        process = self._process
        if self._why is not None or process is None:
            raise SideError(self._why or "not started")
        assert process.stdin is not None
        line = json.dumps(encode_bytes({"job": job} | arguments)) + "\n"
        try:
            process.stdin.write(line.encode())
            process.stdin.flush()
            answer = json.loads(self._read_line(process))
        except (OSError, ValueError) as error:
            self._end(f"{error}{self._tail()}")
            raise SideError(self._why) from None
        self.peak_bytes = answer["peak_bytes"]
        if "error" in answer:
            raise SideError(answer["error"])
        return answer.get("value")

    def close(self) -> None:
        """Ends the process; repeatable."""
        self._end("ended")
        self._log.close()

    def _read_line(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        deadline, line = time.monotonic() + self._timeout_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise OSError(f"no answer in {self._timeout_s:g} s")
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    raise OSError(f"the process ended with code {process.wait()}")
                line += part
        return line

    def _tail(self) -> str:
        """The end of what it printed, for an error."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - TAIL_CHARACTERS))
        text = " ".join(self._log.read().decode(errors="replace").split())
        return f" (last words: {text})" if text else ""

    def _end(self, why: str) -> None:
        process, self._process = self._process, None
        self._why = self._why or why
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:  # a pipe that the process left
                continue
        process.kill()
        process.wait()


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often is measured.

    Attributes:
        repeats: counted rounds.
        slow_repeats: instead, where sides take longer than SLOW_S on average.
        warmup: rounds before them. One in which sides take longer than COUNTED_S counts: what a
            first call pays for is lost in it.
        deadline: on the monotonic clock; after it a job gets one counted round.
    """

    repeats: int = REPEATS
    slow_repeats: int = SLOW_REPEATS
    warmup: int = 1
    deadline: float = math.inf


@dataclass(slots=True)
class Outcome:
    """What one side answered to a job, round by round; an error instead where it failed."""

    answers: list[Any] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)  # of resident memory, in bytes
    error: str | None = None
    unsupported: bool = False


def take_turns(
    sides: Sequence[Side],
    job: str,
    arguments: Callable[[int], Mapping[str, Any]],
    *,
    rounds: Rounds,
    told: Callable[[Side, int, Any], None] = lambda side, index, answer: None,
) -> dict[Side, Outcome]:
    """Asks each side in turn, round by round.

    Args:
        sides: in the order of a round.
        job: of `protocol`.
        arguments: of the job in a round, from 0 on; the same for all sides.
        rounds: how many.
        told: called with each answer, or the error, and its round.

    Returns:
        Each side's answers; those with the same index are of the same round.
    """
    outcomes = {side: Outcome() for side in sides}
    counted, repeats, warmup = 0, rounds.repeats, rounds.warmup
    for index in itertools.count():
        is_late = counted > 0 and time.monotonic() > rounds.deadline
        running = {s: o for s, o in outcomes.items() if o.error is None and not o.unsupported}
        if counted >= repeats or is_late or not running:
            return outcomes
        start = time.monotonic()
        answers = _round(running, job, arguments(index), partial(_told, told, index))
        mean_s = (time.monotonic() - start) / len(running)
        if warmup > 0 and mean_s <= COUNTED_S:
            warmup -= 1
            continue
        warmup, counted = 0, counted + 1
        for side, answer in answers.items():
            outcomes[side].answers.append(answer)
            outcomes[side].peaks.append(side.peak_bytes)
        if mean_s > SLOW_S:
            repeats = min(repeats, rounds.slow_repeats)
    raise AssertionError


def _round(
    running: Mapping[Side, Outcome],
    job: str,
    arguments: Mapping[str, Any],
    told: Callable[[Side, Any], None],
) -> dict[Side, Any]:
    """One answer of each side that gives one; what fails is noted in its outcome."""
    answers = {}
    for side, outcome in running.items():
        try:
            answer = side.ask(job, **arguments)
        except SideError as error:
            outcome.error = str(error)
            outcome.answers.clear()
            outcome.peaks.clear()
            told(side, error)
            continue
        outcome.unsupported = answer is None
        if answer is not None:
            answers[side] = answer
            told(side, answer)
    return answers


def _told(told: Callable[[Side, int, Any], None], index: int, side: Side, answer: Any) -> None:
    told(side, index, answer)
