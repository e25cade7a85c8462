"""The suites over scripted sides: which rows they write, and what those say of failures."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ovfast.bench.bounds import Bounds
from ovfast.bench.calibration import Calibration
from ovfast.bench.latency import run_latency
from ovfast.bench.limits import Limits
from ovfast.bench.machine import make_header
from ovfast.bench.memory import run_memory
from ovfast.bench.record import Row, read
from ovfast.bench.session import Session
from ovfast.bench.sides import Rounds, SideSpec
from ovfast.bench.stages import run_stages
from ovfast.bench.startup import run_startup
from ovfast.bench.targets import Target
from ovfast.bench.throughput import run_throughput
from ovfast.bench.workloads import WORKLOADS
from tests.support.bench_sides import scripted_side

CALIBRATION = Calibration("cpu", "native", 2, Limits({"2": 10.0}, 100.0, 200.0), {})
ANSWER = """
def answer(self, requests, max_new_tokens):
    return [
        {{
            "ttft_ms": 10.0 * {slow},
            "e2e_ms": {slow} * (10.0 + 2.0 * (max_new_tokens - 1)),
            "prompt_tokens": {tokens},
            "token_ids": list(range({first}, {first} + max_new_tokens)),
            "stages": {{"vision_ms": 4.0 * {slow}}},
        }}
        for _ in requests
    ]

def decode(self, context, steps, rows=1):
    return {slow} * context / 100

def tower(self, num_views):
    raise RuntimeError("no eyes")
"""
ROUNDS = Rounds(repeats=3, warmup=1)


@dataclasses.dataclass
class Run:
    """A session that writes a file, and what its suites need."""

    session: Session
    target: Target
    bounds: Bounds
    out: Path
    side: Callable[..., SideSpec]

    def rows(self) -> dict[tuple[str, str, str], Row]:
        """As they are read back, by workload, side and metric."""
        rows = read(self.out).rows
        assert rows == tuple(self.session.rows)
        return {(row.workload, row.side, row.metric): row for row in rows}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    target = Target("demo", "cpu", 2)
    tokens = len(target.layout(WORKLOADS["text"])[0])

    def side(name: str, **changes: Any) -> SideSpec:
        values = {"slow": 1.0, "tokens": tokens, "first": 0} | changes
        return scripted_side(tmp_path, name, ANSWER.format(**values))

    out = tmp_path / "out.jsonl"
    header = make_header("ovfast bench test", CALIBRATION, {"verdict": "quiet"})
    session = Session(header, out, Console(file=io.StringIO()))
    return Run(session, target, Bounds(target, CALIBRATION), out, side)


def measure(run: Run, specs: list[SideSpec], **changes: Any) -> dict[tuple[str, str, str], Row]:
    options = {"new_tokens": 6, "rounds": ROUNDS} | changes
    with run.session.open(specs) as sides:
        workloads = [WORKLOADS["text"]]
        run_latency(run.session, run.target, run.bounds, sides, workloads, **options)
    return run.rows()


def test_latency_rows(run: Run) -> None:
    rows = measure(run, [run.side("ovfast"), run.side("transformers", slow=3.0, first=3)])
    assert rows["text", "ovfast", "ttft_ms"].samples == (10.0,) * 3
    assert rows["text", "transformers", "ttft_ms"].samples == (30.0,) * 3
    assert rows["text", "ovfast", "tpot_ms"].samples == (2.0,) * 3
    assert rows["text", "ovfast", "e2e_ms"].samples == (20.0,) * 3
    assert rows["text", "ovfast", "vision_ms"].samples == (4.0,) * 3
    assert rows["text", "ovfast", "tokens_as_transformers"].samples == (0.0,) * 3
    row = rows["text", "ovfast", "e2e_ms"]
    assert row.floor == pytest.approx(
        rows["text", "ovfast", "ttft_ms"].floor + 5 * rows["text", "ovfast", "tpot_ms"].floor
    )
    assert row.parameters["device"] == "cpu"
    assert all(row.comparable for row in rows.values())


def test_tokens_agree_up_to_the_first_that_differs(run: Run) -> None:
    rows = measure(run, [run.side("ovfast"), run.side("transformers")])
    assert rows["text", "ovfast", "tokens_as_transformers"].samples == (100.0,) * 3


def test_other_prompt_tokens_are_not_comparable(run: Run) -> None:
    rows = measure(run, [run.side("ovfast"), run.side("vllm", tokens=77)])
    assert rows["text", "ovfast", "ttft_ms"].comparable
    theirs = rows["text", "vllm", "ttft_ms"]
    assert not theirs.comparable
    assert theirs.prompt_tokens == 77


def test_a_single_token_has_no_time_per_token(run: Run) -> None:
    rows = measure(run, [run.side("ovfast")], new_tokens=1)
    assert ("text", "ovfast", "ttft_ms") in rows
    assert ("text", "ovfast", "tpot_ms") not in rows


def test_peers_that_fail_do_not_stop_the_run(run: Run, tmp_path: Path) -> None:
    missing = SideSpec("sglang", "bfloat16", missing="there is no sglang here")
    broken = scripted_side(
        tmp_path, "vllm", "def answer(self, **_):\n    raise MemoryError('full')"
    )
    rows = measure(run, [run.side("ovfast"), missing, broken])
    assert rows["text", "ovfast", "ttft_ms"].samples == (10.0,) * 3
    assert rows["text", "sglang", "ttft_ms"].error == "there is no sglang here"
    assert rows["text", "vllm", "ttft_ms"].error == "MemoryError: full"
    assert rows["text", "vllm", "peak_bytes"].error == "MemoryError: full"
    said = run.session._console.file.getvalue()
    assert "sglang bfloat16: failed to load: there is no sglang here" in said
    assert "vllm float32: failed: MemoryError: full" in said


def test_stages_leave_out_what_a_side_has_not(run: Run) -> None:
    with run.session.open([run.side("ovfast"), run.side("llama.cpp")]) as sides:
        run_stages(
            run.session,
            run.target,
            run.bounds,
            sides,
            stages=["tower", "prefill", "decode"],
            contexts=[300, 100],
            rounds=ROUNDS,
        )
    rows = run.rows()
    assert rows["decode at 300", "ovfast", "step_ms"].samples == (3.0,) * 3
    assert rows["decode at 100", "llama.cpp", "step_ms"].samples == (1.0,) * 3
    assert rows["tower, a view", "ovfast", "view_ms"].error == "RuntimeError: no eyes"
    assert not any(workload.startswith("prefill") for workload, _, _ in rows)


def test_throughput_counts_all_requests_of_a_batch(run: Run) -> None:
    with run.session.open([run.side("ovfast"), run.side("vllm", tokens=3)]) as sides:
        run_throughput(
            run.session,
            run.target,
            run.bounds,
            sides,
            [WORKLOADS["text"]],
            batches=[4],
            new_tokens=6,
            rounds=ROUNDS,
        )
    rows = run.rows()
    assert rows["text", "ovfast", "tokens_per_s"].samples == (1e3 * 4 * 6 / 20.0,) * 3
    floor_ms = rows["text", "ovfast", "batch_ms"].floor
    assert rows["text", "ovfast", "tokens_per_s"].floor == pytest.approx(1e3 * 24 / floor_ms)
    assert not rows["text", "vllm", "tokens_per_s"].comparable


def test_starts_are_new_processes_and_failures_rows(run: Run) -> None:
    loads = {"load_ms": 5.0, "import_ms": 3.0, "import_torch_ms": 2.0}
    side = run.side("ovfast")
    side = dataclasses.replace(side, options=dict(side.options) | loads)
    dead = SideSpec("vllm", "bfloat16", missing="there is no vllm here")
    sides = [(run.target, side), (run.target, dead)]
    run_startup(run.session, sides, Rounds(repeats=2, warmup=0))
    rows = [row for row in read(run.out).rows if row.metric == "load_to_first_token_ms"]
    found = [(row.side, row.parameters["file_cache"], row.samples, row.error) for row in rows]
    assert found == [
        ("ovfast", "warm", (15.0, 15.0), None),
        ("vllm", "warm", (), "there is no vllm here"),
        ("ovfast", "cold", (15.0, 15.0), None),
        ("vllm", "cold", (), "there is no vllm here"),
    ]


def test_memory_is_counted_above_weights_and_torch(run: Run) -> None:
    side = run.side("ovfast")
    base = {"weight_bytes": 1 << 20, "torch_bytes": 1 << 20}
    side = dataclasses.replace(side, options=dict(side.options) | base)
    run_memory(
        run.session,
        run.target,
        [side],
        [WORKLOADS["text"]],
        new_tokens=1,
        rounds=Rounds(repeats=2, warmup=0),
    )
    rows = run.rows()
    if not rows:
        pytest.skip("no /proc here")
    peaks = rows["text", "ovfast", "peak_bytes"].samples
    above = rows["text", "ovfast", "above_weights_and_torch_bytes"].samples
    assert above == tuple(peak - (2 << 20) for peak in peaks)


def test_weights_that_fit_in_a_cache_have_no_bandwidth_floor(run: Run) -> None:
    spec = SideSpec("ovfast", "bfloat16")
    small = run.bounds.decode(spec, 64).floor
    large_target = Target("demo", "cpu", 2)
    text = dataclasses.replace(large_target.config.text, hidden_size=8192)
    large_target.config = dataclasses.replace(large_target.config, text=text)
    large = Bounds(large_target, CALIBRATION).decode(spec, 64).floor
    assert small < 0.1
    assert large > 10
