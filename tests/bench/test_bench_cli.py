"""`ovfast bench` as a shell user meets it: on the demo model, from words to record and table."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ovfast import cli
from ovfast.bench import running, worker
from ovfast.bench.calibration import Calibration
from ovfast.bench.limits import Limits
from ovfast.bench.ratios import peer_ratios
from ovfast.bench.record import Record, append_row, read, write_header
from ovfast.bench.workloads import WORKLOADS
from ovfast.ops import has_native
from tests.bench.records import header, row

has_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def bench(*words: str) -> int:
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["bench", *words])
    return int(exit_info.value.code or 0)


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is known: measuring this one takes seconds and is tested elsewhere."""

    def known(device: str, *, threads: int, storages: tuple[str, ...]) -> Calibration:
        return Calibration("cpu", "native", threads, Limits({"1": 10.0}, 100.0, 200.0), {})

    monkeypatch.setattr(running, "calibrate", known)
    monkeypatch.setattr(running, "quiet_check", lambda: {"verdict": "noisy", "busy_share": 0.5})


def record_of(path: Path, *words: str) -> Record:
    one = () if "--threads" in words else ("--threads", "1")  # of two, others may have one
    assert bench(*words, *one, "--out", str(path / "out.jsonl")) == 0
    return read(path / "out.jsonl")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("latency", "-w", "8x8"), "workload '8x8'"),
        (("latency", "-p", "vlm"), "peer 'vlm'"),
        (("latency", "-s", "int2"), "storage 'int2'"),
        (("stages", "--stage", "towers"), "stage 'towers'"),
        (("latency", "-m", "/nonexistent"), "/nonexistent"),
        (("compare", "/nonexistent.jsonl"), "nonexistent.jsonl"),
        (("latency", "--repeats", "0"), "--repeats"),
        (("latencies",), "latencies"),
    ],
)
def test_mistakes_are_named_before_anything_runs(words, said, capsys, monkeypatch) -> None:
    monkeypatch.setattr(running, "calibrate", lambda *a, **k: pytest.fail("it runs"))
    assert bench(*words) == 2
    assert said in capsys.readouterr().err


def test_help_names_every_suite(capsys) -> None:
    assert bench("--help") == 0
    said = capsys.readouterr().out
    for name in ("latency", "kernels", "throughput", "startup", "memory", "accuracy", "compare"):
        assert f" {name} " in said


def test_a_record_becomes_pictures(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "run.jsonl"
    write_header(file, header())
    assert bench("plot", str(file)) == 2
    assert "no rows that a chart shows" in capsys.readouterr().err
    append_row(file, row(metric="vision_ms"))
    append_row(file, row(side="transformers"))
    append_row(file, row())
    assert bench("plot", str(file), "--out", str(tmp_path / "plots")) == 0
    said = capsys.readouterr().out.split()
    assert said == [str(path) for path in map(Path, said) if path.stat().st_size > 1000]
    assert {Path(path).suffix for path in said} == {".png", ".svg"}


@pytest.mark.slow
def test_latency_of_the_demo_without_peers(calibrated, tmp_path, capsys) -> None:
    words = ("latency", "-w", "text", "-w", "384", "-p", "none", "-n", "4", "--repeats", "3")
    record = record_of(tmp_path, *words, "--threads", "1")
    command = "ovfast bench latency --workload text --workload 384 --peer none --new-tokens 4"
    assert record.header.command == f"{command} --threads 1 --repeats 3"
    found = {(row.workload, row.metric) for row in record.rows}
    assert found >= {(w, m) for w in ("text", "384") for m in ("ttft_ms", "tpot_ms", "peak_bytes")}
    assert ("384", "vision_ms") in found
    assert ("text", "vision_ms") not in found
    assert all(row.error is None and row.side == "ovfast" for row in record.rows)
    captured = capsys.readouterr()
    assert "This machine is busy: others take 50%" in captured.err
    assert "TTFT: from the call" in captured.out
    assert {len(row.samples) for row in record.rows} == {3}


@pytest.mark.long
@pytest.mark.slow
@has_transformers
def test_every_workload_has_the_prompt_that_transformers_has(calibrated, tmp_path, capsys) -> None:
    words = [word for name in WORKLOADS if name != "32-frames" for word in ("-w", name)]
    words += ["-s", "float32", "-p", "transformers", "-p", "transformers-static", "-p", "sglang"]
    words += ["-n", "3"]
    record = record_of(tmp_path, "latency", *words, "--repeats", "1", "--warmup", "0")
    first = [row for row in record.rows if row.metric == "ttft_ms"]
    theirs = [row for row in first if row.side.startswith("transformers")]
    assert len(theirs) == 2 * (len(WORKLOADS) - 1)
    assert all(row.error is None and row.comparable for row in theirs)
    agreed = [row for row in record.rows if row.metric == "tokens_as_transformers"]
    # A clip's frames are resized by another library there.
    assert {row.workload for row in agreed if row.samples != (100.0,)} <= {"8-frames"}
    assert {one.why for one in peer_ratios(record.rows) if one.ratio is None} <= {
        "sglang failed: " + str(row.error) for row in record.rows if row.side == "sglang"
    }


@pytest.mark.long
@pytest.mark.slow
def test_stages_throughput_startup_and_memory(calibrated, tmp_path) -> None:
    few = ("-p", "none", "--repeats", "2")
    stages = record_of(tmp_path, "stages", "--prompt-tokens", "100", "--context", "50", *few)
    assert {row.workload for row in stages.rows if row.metric != "preprocess_ms"} == {
        "tower, a view",
        "prefill of 100",
        "decode at 50",
    }
    batches = ("--batch", "1", "--batch", "3", "-w", "384", "-n", "3")
    throughput = record_of(tmp_path, "throughput", *batches, *few)
    rates = [row for row in throughput.rows if row.metric == "tokens_per_s"]
    assert [row.parameters["batch"] for row in rates] == [1, 3]
    startup = record_of(tmp_path, "startup", "-p", "none", "--repeats", "1", "--warmup", "0")
    assert {row.parameters["file_cache"] for row in startup.rows} == {"warm", "cold"}
    memory = record_of(tmp_path, "memory", "-w", "384", *few)
    for record in (stages, throughput, startup, memory):
        assert all(row.error is None for row in record.rows)
        assert all(min(row.samples) > 0 for row in record.rows)


@pytest.mark.long
@pytest.mark.slow
def test_accuracy_and_kernels_on_every_back_end(calibrated, tmp_path) -> None:
    accuracy = record_of(tmp_path, "accuracy", "--pictures", "4")
    answers = {
        (row.parameters["backend"], row.storage): row.samples
        for row in accuracy.rows
        if row.workload == "samples"
    }
    assert answers["reference", "float32"] == (100.0,)
    kernels = record_of(tmp_path, "kernels", "--seconds", "0.01", "-s", "int8")
    assert all(row.error is None for row in kernels.rows)
    backends = {"reference", "native"} if has_native() else {"reference"}
    assert {row.parameters["backend"] for row in kernels.rows} == backends
    assert {backend for backend, _ in answers} == backends
    assert all(row.floor for row in kernels.rows)


@pytest.mark.slow
def test_a_command_runs_again_and_is_compared(calibrated, tmp_path, capsys, monkeypatch) -> None:
    words = ("latency", "-w", "text", "-p", "none", "-n", "2", "--repeats", "2")
    record_of(tmp_path, *words)
    old, new = tmp_path / "out.jsonl", tmp_path / "new.jsonl"

    real = subprocess.run

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if words[:4] != [sys.executable, "-m", "ovfast", "bench"]:
            return real(words, **options)
        return subprocess.CompletedProcess(words, bench(*words[4:]))

    monkeypatch.setattr(subprocess, "run", run)  # in this process, on a known machine
    assert bench("compare", str(old), "--out", str(new)) in (0, 1)
    assert "old against new" in capsys.readouterr().out
    assert read(new).header.command == read(old).header.command
    assert bench("compare", str(old), str(old)) == 0
    assert bench("compare", str(old), str(new), "-m", "demo") == 2


def test_a_side_that_does_not_start_is_a_row(
    monkeypatch, calibrated, tiny_checkpoint, tmp_path, capsys
) -> None:
    monkeypatch.setattr(worker, "COMMAND", ("/bin/false",))
    words = ("latency", "-m", str(tiny_checkpoint), "-w", "text", "-p", "none")
    record = record_of(tmp_path, *words)
    assert [row.samples for row in record.rows] == [()] * len(record.rows)
    assert record.rows[0].error
    assert "failed" in capsys.readouterr().out
    # No directory of this machine.
    model = tiny_checkpoint.name
    expected = f"ovfast bench latency --model {model} --workload text --peer none --threads 1"
    assert record.header.command == expected
