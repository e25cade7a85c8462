"""Ctrl-C before any line of the engine's loop."""

import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from ovfast import BackendError

FILES = ("scheduler.py", "call.py", "runner.py", "request.py")
# A store that follows no call and no jump: CPython looks for no signal before it, a tracer could.
SIGNAL_FREE = (
    "call.ended = True",
    "self._stepping = False",
    "state.is_over = ",
    "state.logits, state.last_token, ",
    "self._results.append(result)",
    "return results",
)


class InterruptAtLine:
    """Raises KeyboardInterrupt before the n-th line that runs in some of the engine's files."""

    def __init__(self, line: int, files: tuple[str, ...] = FILES) -> None:
        self.left, self.files = line, files

    def __enter__(self) -> None:
        sys.settrace(self.trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.name not in self.files or path.parent.name != "ovfast":
            return None
        source = linecache.getline(str(path), frame.f_lineno).strip()
        if event == "line" and not source.startswith(SIGNAL_FREE):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt(f"{path.name}:{frame.f_lineno}")
        return self.trace


def is_interrupt(error: BackendError) -> bool:
    """Whether a request says that Ctrl-C cut one of its steps in two; any other error is raised."""
    if "an interrupt (Ctrl-C) cut a step" not in str(error):
        raise error
    return True
