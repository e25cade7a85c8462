"""What of `make gpu` can be proven without a device: its clock, records, order, suite and refusal.

The works that it times are called in `test_gpu_works`.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ovfast import OptionError
from ovfast.bench.calibration import Calibration
from ovfast.bench.limits import Limits
from ovfast.bench.record import read
from tests.bench.records import header

device_records = pytest.importorskip("benchmarks.device_records")
device_timing = pytest.importorskip("benchmarks.device_timing")
gpu = pytest.importorskip("benchmarks.gpu", reason="needs triton")
gpu_plugin = pytest.importorskip("benchmarks.gpu_plugin")
gpu_tests = pytest.importorskip("benchmarks.gpu_tests")

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits({"copy": 1.0}, bfloat16_gflops=1000.0)  # 1 GB/s, 1 TFLOP/s
CPU_MACHINE = Calibration("cpu", "native", 2, Limits({"2": 1.0}, 100.0), {}).as_dict()
MACHINE = Calibration("cuda", "triton", 2, LIMITS, {}).as_dict()


def open_records(path, budget_s: float = 60.0, gpu: str | None = "A GPU", **options):
    machine = MACHINE if gpu else CPU_MACHINE
    return device_records.Records(path, budget_s, header(gpu=gpu, machine=machine), **options)


class Recorder:
    """Stands in for what the timer calls of torch.cuda, and writes down in which order."""

    def __init__(self, monkeypatch, refuses: str = ""):
        self.calls: list[str] = []
        self._refuses = refuses
        recorder = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                recorder.calls.append("event")

            def elapsed_time(self, other):
                return 0.5

        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.calls.append("wait"))
        monkeypatch.setattr(
            torch.cuda, "_sleep", lambda cycles: self.calls.append(f"spin {cycles}")
        )
        monkeypatch.setattr(device_timing, "CudaCapture", lambda device: self.capture)

    def capture(self, body, tensor):
        assert tensor is None
        body()
        if self.calls[-1] == self._refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.calls.append("captured")
        return type("Graph", (), {"replay": lambda _, tensor: self.calls.append("replay")})()

    def timer(self):
        timer = object.__new__(device_timing.CudaTimer)
        flush = type("Flush", (), {"zero_": lambda _: self.calls.append("flush")})
        timer._flush = flush()
        return timer


def test_kernels_are_timed_behind_a_busy_device(monkeypatch):
    """Nothing waits between the flush and the end event, so no gap of the host is in the figure."""
    recorder = Recorder(monkeypatch)
    works = {name: lambda name=name: recorder.calls.append(name) for name in ("a", "b")}
    samples = recorder.timer().device(works, repeats=2, warm=1)
    assert samples == {"a": [0.5, 0.5], "b": [0.5, 0.5]}
    taken = [f"spin {device_timing.REPLAY_CYCLES}", "flush", "event", "replay", "event"]
    first = [call for name in "ab" for call in (name, "wait", name, "captured", "replay")]
    assert recorder.calls == [*first, *2 * [*taken, *taken, "wait"]]


def test_what_cannot_be_captured_is_called_behind_a_longer_spin(monkeypatch, capsys):
    recorder = Recorder(monkeypatch, refuses="a")
    recorder.timer().device({"a": lambda: recorder.calls.append("a")}, repeats=1, warm=1)
    spin = f"spin {device_timing.CALL_CYCLES}"
    assert recorder.calls[-6:] == [spin, "flush", "event", "a", "event", "wait"]
    assert "a cannot be captured" in capsys.readouterr().out


def test_works_by_the_hosts_clock(monkeypatch):
    recorder = Recorder(monkeypatch)
    works = {"slow": lambda: time.sleep(0.01), "own": lambda: 7.0}
    samples = recorder.timer().host(works, repeats=2, warm=1)
    assert samples["own"] == [7.0, 7.0]
    assert min(samples["slow"]) >= 10
    assert recorder.calls == ["wait"] * 12


def test_races_become_rows_with_floors(tmp_path, capsys):
    records = open_records(tmp_path / "deep" / "rows.jsonl")
    samples = {"ovfast": [2.0, 2.0, 4.0], "torch": [6.0, 8.0, 8.0], "64x128": [3.0, 3.0, 3.0]}
    records.race("kernels", "one", samples, flop=1e9)
    rows = read(tmp_path / "deep" / "rows.jsonl").rows
    assert [(row.side, row.parameters.get("variant")) for row in rows] == [
        ("ovfast", None),
        ("torch", None),
        ("ovfast", "64x128"),
    ]
    assert [list(row.samples) for row in rows] == list(samples.values())
    assert {(row.floor, row.flops, row.num_bytes) for row in rows} == {(1.0, 1e9, None)}
    assert {row.parameters["device"] for row in rows} == {"cuda"}
    said = capsys.readouterr().out
    assert "2 ms, limit 1 (50%), 0.5 of 1 TFLOP/s" in said
    assert "ovfast against torch: 3 times" in said
    assert "no difference shown" in said  # three pairs are too few to say more
    assert not records.is_over


def test_failures_become_rows(tmp_path, capsys):
    records = open_records(tmp_path / "rows.jsonl", budget_s=-1)
    assert records.is_over
    records.failed("latency", "tower", "left out: the time budget is over")
    (row,) = read(tmp_path / "rows.jsonl").rows
    assert row.error == "left out: the time budget is over"
    assert "left out" in capsys.readouterr().out


def test_no_device_no_figures(tmp_path):
    records = open_records(tmp_path / "rows.jsonl", gpu=None)
    with pytest.raises(OptionError, match="names no GPU"):
        records.race("kernels", "one", {"ovfast": [2.0]})
    assert read(tmp_path / "rows.jsonl").rows == ()


def test_a_run_that_starts_again_keeps_its_rows(tmp_path):
    records = open_records(tmp_path / "rows.jsonl")
    records.race("kernels", "one", {"ovfast": [2.0]})
    records = open_records(tmp_path / "rows.jsonl", is_continued=True)
    records.race("kernels", "two", {"ovfast": [2.0]})
    assert [row.workload for row in read(tmp_path / "rows.jsonl").rows] == ["one", "two"]


class TestSections:
    """The order of a run: what fails, what is late, and a device that is lost."""

    @pytest.fixture
    def run(self, tmp_path):
        run = gpu.Run(open_records(tmp_path / "rows.jsonl"), tmp_path, tmp_path)
        run.device = torch.device("cpu")
        return run

    def errors(self, run):
        rows = read(run.out / "rows.jsonl").rows
        return {row.workload: row.error for row in rows}

    def test_one_that_fails_leaves_a_row_and_the_next_goes_on(self, run):
        def fail(run):
            raise ValueError("no such tile")

        def end(run):
            raise device_records.OutOfTime

        done = []
        sections = {"bad": fail, "late": end, "good": done.append}
        gpu.run_sections(list(sections), run, pytest.fail, sections)
        assert done == [run]
        assert self.errors(run) == {
            "bad": "ValueError: no such tile",
            "late": "ended: the time budget is over",
        }

    def test_none_begins_behind_the_budget(self, run):
        run.records._deadline = 0.0
        gpu.run_sections(["one"], run, pytest.fail, {"one": pytest.fail})
        assert self.errors(run) == {"one": "left out: the time budget is over"}

    def test_a_lost_device_starts_the_rest_again(self, run, monkeypatch):
        monkeypatch.setattr(gpu, "is_lost", lambda device: True)
        rest = []
        sections = dict.fromkeys(("one", "two", "three"), lambda run: None)
        gpu.run_sections(list(sections), run, rest.append, sections)
        assert rest == [["two", "three"]]

    def test_a_section_that_is_stuck_starts_the_rest_again(self, run, monkeypatch):
        monkeypatch.setattr(gpu, "SECTION_S", 1.0)
        rest = []

        def wait(run):
            while not rest:
                time.sleep(0.01)

        gpu.run_sections(["stuck", "two"], run, rest.append, {"stuck": wait, "two": lambda run: 0})
        assert rest == [["two"]]
        assert self.errors(run) == {"stuck": "stuck: not done in 1.0 s"}


class TestSuite:
    """How `pytest -m gpu` is run and read."""

    LINES = (
        "[gw0] [  1%] PASSED tests/kernels/test_a.py::test_one[cuda-bf16-two words] ",
        "[gw12] [100%] FAILED tests/kernels/test_a.py::test_two[cuda-bf16]",
        "[gw1] [ 99%] SKIPPED tests/kernels/test_b.py::test_three",
        "tests/kernels/test_b.py::test_four[1] PASSED                      [ 50%]",
        "tests/kernels/test_b.py::test_five SKIPPED (needs a CUDA device)  [ 60%]",
        "tests/kernels/test_b.py::test_six PASSED [ 70%]",
        "tests/kernels/test_b.py::test_six ERROR  [ 70%]",
        "FAILED tests/kernels/test_a.py::test_two[cuda-bf16] - AssertionError: PASSED",
        "E   AssertionError in tests/kernels/test_a.py::test_one",
    )

    def test_lines_of_one_process_and_of_many(self):
        assert gpu_tests.parse(self.LINES) == {
            "tests/kernels/test_a.py::test_one[cuda-bf16-two words]": "passed",
            "tests/kernels/test_a.py::test_two[cuda-bf16]": "failed",
            "tests/kernels/test_b.py::test_three": "skipped",
            "tests/kernels/test_b.py::test_four[1]": "passed",
            "tests/kernels/test_b.py::test_five": "skipped",
            "tests/kernels/test_b.py::test_six": "failed",
        }

    def test_a_row_a_file(self, tmp_path, capsys):
        records = open_records(tmp_path / "rows.jsonl")
        gpu_tests.write_rows(records, "smoke", gpu_tests.parse(self.LINES))
        rows = read(tmp_path / "rows.jsonl").rows
        assert [(row.workload, row.samples) for row in rows] == [
            ("pytest tests/kernels/test_a.py", (50.0,)),
            ("pytest tests/kernels/test_b.py", (50.0,)),
        ]
        assert rows[1].parameters["skipped"] == 2
        assert "FAILED tests/kernels/test_a.py::test_two[cuda-bf16]" in capsys.readouterr().out

    def test_parts_are_the_whole(self):
        ids = ["a::x[cuda-f32-1]", "a::x[cuda-bf16-1]", "a::x[cuda-bf16-2]", "a::y", "b::x[f16]"]
        assert gpu_plugin.smoke_ids(ids) == ["a::x[cuda-bf16-2]", "a::y", "b::x[f16]"]

    def test_files_with_tests_for_a_device(self):
        files = gpu_tests.test_files()
        assert "tests/kernels/test_layer_norm.py" in files
        assert "tests/models/test_decode_triton.py" in files
        assert "tests/test_cli.py" not in files

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_the_suite_starts(self, tmp_path, monkeypatch):
        """Every option is understood, and the parts divide the tests; without a device all skip."""
        monkeypatch.setattr(gpu_tests, "test_files", lambda: ["tests/kernels/test_layer_norm.py"])
        records, found = open_records(tmp_path / "rows.jsonl"), {}
        for part in ("smoke", "rest"):
            gpu_tests.run_suite(records, tmp_path, part, 120)
            log = (tmp_path / f"pytest-{part}.log").read_text()
            found[part] = gpu_tests.parse(log.splitlines())
        assert set(found["smoke"].values()) == set(found["rest"].values()) == {"skipped"}
        assert not found["smoke"].keys() & found["rest"].keys()
        names = {node_id.partition("[")[0] for node_id in found["rest"]}
        assert {node_id.partition("[")[0] for node_id in found["smoke"]} >= names
        assert read(tmp_path / "rows.jsonl").rows == ()

    def test_a_run_that_takes_too_long_keeps_what_it_said(self, tmp_path, monkeypatch):
        script = f"print({self.LINES[3]!r}); import time; time.sleep(60)"
        monkeypatch.setattr(gpu_tests, "suite_command", lambda part: [sys.executable, "-c", script])
        records = open_records(tmp_path / "rows.jsonl")
        gpu_tests.run_suite(records, tmp_path, "rest", 2)
        passed, late = read(tmp_path / "rows.jsonl").rows
        assert passed.samples == (100.0,)
        assert late.error == "ended after 2 s, with 1 tests done"

    def test_a_run_that_cannot_start_says_why(self, tmp_path, monkeypatch):
        script = "import sys; print('no such option'); sys.exit(4)"
        monkeypatch.setattr(gpu_tests, "suite_command", lambda part: [sys.executable, "-c", script])
        gpu_tests.run_suite(open_records(tmp_path / "rows.jsonl"), tmp_path, "rest", 60)
        (row,) = read(tmp_path / "rows.jsonl").rows
        assert row.error == "pytest ended with code 4\nno such option"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_profile_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA"):
        gpu.gpu_profile.profile(tmp_path)


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("av", "rich", "typer") or name == "ovfast._C":
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocked())
from benchmarks.gpu import main
main()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_measures_nothing(tmp_path):
    """It says so behind its imports, for which a checkout with nothing built is enough."""
    command = [sys.executable, "-c", BLOCKED, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "none was found" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("has_environment", [True, False])
def test_make_gpu_needs_no_network(tmp_path, has_environment):
    python = tmp_path / "bin" / "python"
    if has_environment:
        python.parent.mkdir()
        python.touch()
    command = ["make", "--dry-run", "gpu", f"VENV={tmp_path}", "PYTHON=python3"]
    # Not as a part of the make that may run these tests.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=outside)
    assert done.returncode == 0, done.stderr
    used = python if has_environment else "python3"
    assert done.stdout.strip() == f"{used} -m benchmarks.gpu"
