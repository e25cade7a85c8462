"""One run of a suite: its sides, its rows, its file, and what the terminal shows meanwhile.

A row is written to the file the moment it is known. Progress goes to stderr: a line that is
replaced on a terminal, a line for each step elsewhere.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from ovfast.bench.record import Header, Row, append_row, write_header
from ovfast.bench.sides import Outcome, Rounds, Side, SideError, SideSpec, take_turns

__all__ = ["Loaded", "Session"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A side and what it said when it had loaded; nothing where it could not."""

    side: Side
    answer: Mapping[str, Any]


class Session:
    """Collects the rows of one run.

    Args:
        header: of the record.
        out: the file; None writes none.
        console: for progress.
    """

    def __init__(self, header: Header, out: Path | None, console: Console) -> None:
        self.header, self.rows = header, list[Row]()
        self._out, self._console = out, console
        self._status: Status | None = None
        if out is not None:
            write_header(out, header)

    def add(self, row: Row) -> None:
        """Keeps a row and writes it."""
        self.rows.append(row)
        if self._out is not None:
            append_row(self._out, row)

    def tell(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def show(self, text: str) -> None:
        """What is going on now."""
        if self._status is not None:
            self._status.update(text)
        else:
            self.tell(text)

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """While it lasts a terminal shows one moving line."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status("") as self._status:
            yield
        self._status = None

    @contextlib.contextmanager
    def open(self, specs: Sequence[SideSpec]) -> Iterator[list[Loaded]]:
        """Starts the sides, one after the other, and ends them all.

        One that fails stays in the list: every job of it then gives a row with its error.
        """
        with contextlib.ExitStack() as stack:
            sides = []
            for spec in specs:
                side = stack.enter_context(Side(spec))
                sides.append(Loaded(side, self._load(side)))
            yield sides

    def _load(self, side: Side) -> dict[str, Any]:
        self.show(f"{side.spec.label}: loading")
        try:
            answer = side.load()
        except SideError as error:
            self.tell(f"{side.spec.label}: failed to load: {error}")
            return {}
        self.tell(f"{side.spec.label}: loaded in {1e-3 * answer['load_ms']:.2f} s")
        return answer

    def take_turns(
        self,
        title: str,
        sides: Sequence[Loaded],
        job: str,
        arguments: Callable[[int], Mapping[str, Any]],
        rounds: Rounds,
        brief: Callable[[Any], str],
    ) -> dict[Side, Outcome]:
        """As `sides.take_turns`, shown as it goes.

        Args:
            title: of the job, for people.
            sides: in the order of a round.
            job: of `protocol`.
            arguments: of a round's job.
            rounds: how often.
            brief: an answer in a few words.
        """

        def told(side: Side, index: int, answer: Any) -> None:
            if isinstance(answer, SideError):
                self.tell(f"{title}, {side.spec.label}: failed: {answer}")
                return
            self.show(f"{title} (round {index + 1}), {side.spec.label}: {brief(answer)}")

        outcomes = take_turns(
            [loaded.side for loaded in sides],
            job,
            arguments,
            rounds=rounds,
            told=told,
        )
        for side, outcome in outcomes.items():
            if outcome.unsupported:
                self.tell(f"{title}, {side.spec.label}: does no such thing")
        return outcomes
