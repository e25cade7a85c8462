"""pytest's plugin of `benchmarks.gpu`: which part of the suite runs, and failures told at once.

    python -m pytest -p benchmarks.gpu_plugin --gpu-part smoke

"smoke" is one test of each function, in bfloat16 where there is one and at the last of its sizes,
as the real ones stand last; "rest" is all others. A worker of xdist whose device is lost ends
itself, and xdist starts another: what a kernel broke would fail every test behind it.
"""

from __future__ import annotations

import os

import pytest
import torch

TAIL_CHARACTERS = 1500


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-part", choices=("smoke", "rest", "all"), default="all")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Reports(config), "ovfast-gpu-reports")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--gpu-part")
    if part == "all":
        return
    smoke = set(smoke_ids([item.nodeid for item in items]))
    kept = [item for item in items if (item.nodeid in smoke) == (part == "smoke")]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def smoke_ids(node_ids: list[str]) -> list[str]:
    """One test of each function: the last in bfloat16, or the last."""
    chosen: dict[str, str] = {}
    for node_id in node_ids:
        name = node_id.partition("[")[0]
        known = chosen.get(name)
        if known is None or "bf16" in node_id or "bf16" not in known:
            chosen[name] = node_id
    return list(chosen.values())


class _Reports:
    """Of the controller: writes a failure when it comes. Of a worker: ends it with its device."""

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._has_failed = config, False

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._has_failed |= report.failed
        if not report.failed or hasattr(self._config, "workerinput"):
            return
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line(f"\n== {report.nodeid}\n{str(report.longrepr)[-TAIL_CHARACTERS:]}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        if not (self._has_failed and hasattr(self._config, "workerinput")):
            return
        self._has_failed = False
        if not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
