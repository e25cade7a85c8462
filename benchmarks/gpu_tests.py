"""The correctness suite on the device: `pytest -m gpu` over many processes, a row a test file.

Its output streams into a log beside the rows, so that a run which is cut short keeps what it found.
Kernels compile for 0.5 to 2 s a specialisation, which is most of the time: the processes share it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.device_records import Records
from ovfast.cpu_threads import available_threads

ROOT = Path(__file__).resolve().parents[1]
MAX_FAILURES = 30
MOST_WORKERS = 16
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
OUTCOMES = {
    "PASSED": PASSED,
    "XFAIL": PASSED,
    "FAILED": FAILED,
    "ERROR": FAILED,
    "XPASS": FAILED,
    "SKIPPED": SKIPPED,
}
# Of xdist: "[gw3] [ 12%] PASSED tests/a.py::test_b[c] "; of one process the id comes first.
_WORD = "|".join(OUTCOMES)
XDIST_LINE = re.compile(
    rf"\[gw\d+\] (?:\[ *\d+%\] )?(?P<word>{_WORD}) (?P<file>\S+\.py)::(?P<name>.+)"
)
PLAIN_LINE = re.compile(rf"(?P<file>\S+\.py)::(?P<name>.+?) (?P<word>{_WORD})(?: .*)?")


def run_suite(records: Records, out: Path, part: str, limit_s: float) -> None:
    """Runs a part of the suite and writes its rows.

    Args:
        records: takes them.
        out: directory of the log, pytest-PART.log.
        part: "smoke", "rest" or "all", as `gpu_plugin` divides it.
        limit_s: after which it is ended.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"pytest-{part}.log"
    code = run_command(suite_command(part), log, limit_s)
    lines = log.read_text(errors="replace").splitlines()
    outcomes = parse(lines)
    write_rows(records, part, outcomes)
    if code is None:
        say = f"ended after {limit_s:.0f} s, with {len(outcomes)} tests done"
    elif code not in (0, 1):  # 1: tests failed, which the rows say
        say = "\n".join([f"pytest ended with code {code}", *lines[-12:]])
    else:
        return
    records.write(
        "ovfast",
        "passed",
        "%",
        suite="accuracy",
        workload="pytest -m gpu",
        error=say,
        parameters={"part": part},
    )


def suite_command(part: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "--no-header"]
    command += ["-c", "benchmarks/gpu_pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider"]
    command += ["-W", "default", "-p", "benchmarks.gpu_plugin", "--gpu-part", part]
    command.append(f"--maxfail={MAX_FAILURES}")
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(MOST_WORKERS, available_threads()))]
    return [*command, *test_files()]


def test_files() -> list[str]:
    """Files that have tests for a device; collecting the others would take longer than these."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    texts = ((file, file.read_text()) for file in files)
    return [
        str(file.relative_to(ROOT))
        for file, text in texts
        if "kernel_params()" in text or "pytest.mark.gpu" in text
    ]


def run_command(command: list[str], log: Path, limit_s: float) -> int | None:
    """Runs a command with its output in a file; None if it had to be ended, with its children."""
    # One thread of torch a process, as the processes share the cores.
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def parse(lines: Iterable[str]) -> dict[str, str]:
    """Test → "passed", "failed" or "skipped"; of several, as of a teardown, a failure counts."""
    outcomes: dict[str, str] = {}
    for line in lines:
        match = XDIST_LINE.fullmatch(line.rstrip()) or PLAIN_LINE.fullmatch(line.rstrip())
        if match is None:
            continue
        node_id = f"{match['file']}::{match['name']}"
        if outcomes.get(node_id) != FAILED:
            outcomes[node_id] = OUTCOMES[match["word"]]
    return outcomes


def write_rows(records: Records, part: str, outcomes: dict[str, str]) -> None:
    """A row a file: the share that passed of those that were not skipped. Prints what failed."""
    counts: dict[str, Counter[str]] = {}
    for node_id, outcome in outcomes.items():
        counts.setdefault(node_id.partition("::")[0], Counter())[outcome] += 1
    for file, count in sorted(counts.items()):
        done = count[PASSED] + count[FAILED]
        if done == 0:
            continue
        records.write(
            "ovfast",
            "passed",
            "%",
            suite="accuracy",
            workload=f"pytest {file}",
            samples=(100.0 * count[PASSED] / done,),
            parameters={"part": part} | {name: count[name] for name in (PASSED, FAILED, SKIPPED)},
        )
    for node_id in sorted(node_id for node_id, outcome in outcomes.items() if outcome == FAILED):
        print(f"FAILED {node_id}", flush=True)
