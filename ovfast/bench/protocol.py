"""How the suite talks to a side: one JSON object a line over stdin and stdout, a job each.

Needs the standard library alone, because peers run in environments without ovfast: `python -P
protocol.py PEER.py` serves the class `Peer` of a file. A job is `{"job": NAME, ...arguments}` and
becomes a call of the method of that name; a side that has no such method, or returns None, does no
such jobs. Bytes travel as base64 and are decoded before the method is called, so that its clock
starts with encoded pictures in memory. What a side prints goes to stderr. Every answer tells the
job's peak of resident memory.
"""

import base64
import contextlib
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["encode_bytes", "memory_bytes", "serve"]

_BYTES = "base64"


def encode_bytes(value: Any) -> Any:
    """A job with every bytes in it made JSON."""
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {name: encode_bytes(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode_bytes(item) for item in value]
    return value


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes: VmHWM is the peak of resident memory, VmRSS its
    present; 0 where there is no such file.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def serve(make: Callable[[], Any]) -> None:
    """Answers jobs until stdin ends; an error of a job is an answer too.

    Args:
        make: the side; the import of its libraries belongs into its method `load`.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    side = make()
    for line in sys.stdin:
        job = _decode_bytes(json.loads(line))
        _forget_peak()
        try:
            answer = _run(side, job.pop("job"), job)
        except Exception as error:  # noqa: BLE001 - told to the suite, which goes on
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        answer["peak_bytes"] = memory_bytes("VmHWM")
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _forget_peak() -> None:
    """From here on VmHWM is the peak of this job; where that may not be done, of all so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _run(side: Any, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    method = getattr(side, name, None)
    return {"unsupported": True} if method is None else {"value": method(**arguments)}


def _decode_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_BYTES}:
            return base64.b64decode(value[_BYTES])
        return {name: _decode_bytes(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_decode_bytes(item) for item in value]
    return value


if __name__ == "__main__":
    sys.path.insert(0, str(Path(sys.argv[1]).resolve().parent))
    sys.modules["protocol"] = sys.modules["__main__"]  # for peers, which import from it
    serve(runpy.run_path(sys.argv[1])["Peer"])
