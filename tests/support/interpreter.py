"""Runs tests marked `interpreter` under Triton's CPU interpreter, from a plain `pytest`.

TRITON_INTERPRET must be set before Triton is imported, so those tests need a process of their own.
One child pytest runs all selected ones of a file; the children run one after another beside the
other tests, and each test reports what its child found. A process of its own starts them: the open
files of this one, which tests count, stay as they are. In a process that interprets already they
run in place.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_REPORT_VARIABLE = "OVFAST_TEST_CHILD_REPORT"


def register(config: pytest.Config) -> None:
    """Adds the marker and the plugin of this process; for `pytest_configure` of a conftest."""
    config.addinivalue_line("markers", "interpreter: runs under Triton's CPU interpreter")
    report = os.environ.get(_REPORT_VARIABLE)
    if not INTERPRETING:
        config.pluginmanager.register(_ParentPlugin(), "ovfast-interpreter-parent")
    elif report is not None:
        config.pluginmanager.register(_ChildPlugin(Path(report)), "ovfast-interpreter-child")


class _ParentPlugin:
    """Replaces the call of each `interpreter` test by what the child of its file found."""

    def __init__(self) -> None:
        self._children = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._results: dict[Path, Future[dict[str, tuple[str, str]]]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Puts them last: until then their children have the time of all other tests."""
        items.sort(key=lambda item: item.get_closest_marker("interpreter") is not None)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            return
        node_ids: dict[Path, list[str]] = {}
        for item in session.items:
            if item.get_closest_marker("interpreter") is not None:
                node_ids.setdefault(item.path, []).append(item.nodeid)
        for path, of_file in node_ids.items():
            root = session.config.rootpath
            self._results[path] = self._children.submit(_run_child, of_file, root)

    def pytest_sessionfinish(self) -> None:
        self._children.shutdown(cancel_futures=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        if pyfuncitem.get_closest_marker("interpreter") is None:
            return None
        outcome, text = self._results[pyfuncitem.path].result()[pyfuncitem.nodeid]
        if outcome == "skipped":
            pytest.skip(text)
        if outcome == "failed":
            pytest.fail(f"under the interpreter:\n{text}", pytrace=False)
        return True


class _ChildPlugin:
    """Appends every outcome to the file that the parent reads."""

    def __init__(self, report: Path) -> None:
        self._report = report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        text = str(report.longrepr) if report.longrepr else ""
        entry = {"node_id": report.nodeid, "outcome": report.outcome, "text": text}
        with self._report.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")


def _run_child(node_ids: list[str], root: Path) -> dict[str, tuple[str, str]]:
    """Returns (outcome, text) by node id."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.jsonl"
        child = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "--tb=short",
                "-p",
                "no:cacheprovider",
                *node_ids,
            ],
            cwd=root,
            env=os.environ | {"TRITON_INTERPRET": "1", _REPORT_VARIABLE: str(report)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        lines = report.read_text().splitlines() if report.exists() else []
    lost = f"the child process ended with {child.returncode} and did not run this\n{child.stdout}"
    results = dict.fromkeys(node_ids, ("failed", lost))
    for entry in map(json.loads, lines):
        known = results.get(entry["node_id"])
        # A test has a second entry when its teardown fails: the first failure is the one to show.
        if known is not None and (known[1] is lost or known[0] == "passed"):
            results[entry["node_id"]] = (entry["outcome"], entry["text"])
    return results
