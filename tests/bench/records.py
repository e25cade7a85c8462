"""Headers and rows for tests; every figure here is made up."""

from typing import Any

from ovfast.bench.record import HARDWARE, Header, Row

MACHINE = {"device": "cpu", "threads": 2, "read_gb_per_s": {"1": 10.0, "2": 20.0}}


def header(gpu: str | None = None, **changes: Any) -> Header:
    hardware = dict.fromkeys(HARDWARE) | {"cpu": "A CPU", "num_cpus": 2, "gpu": gpu}
    values: dict[str, Any] = {
        "command": "ovfast bench latency",
        "date": "2026-11-24T12:00:00Z",
        "commit": "0123456",
        "dirty": False,
        "hardware": hardware,
        "versions": {"torch": "2.13.0", "transformers": None},
        "threads": 2,
        "machine": MACHINE,
        "quiet": {"verdict": "quiet"},
    }
    return Header(**(values | changes))


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "suite": "latency",
        "workload": "384",
        "side": "ovfast",
        "storage": "bfloat16",
        "metric": "ttft_ms",
        "unit": "ms",
        "samples": (100.0, 101.0, 99.0, 102.0, 98.0, 100.5),
        "parameters": {"device": "cpu", "model": "0.5b", "threads": 2},
        "floor": 40.0,
        "predicted": 90.0,
        "prompt_tokens": 1500,
    }
    return Row(**(values | changes))
