"""What of `make gpu` can be proven without a device: its records and its refusal."""

import subprocess
import sys

import pytest
import torch

from ovfast import OptionError
from ovfast.bench.calibration import Calibration
from ovfast.bench.limits import Limits
from ovfast.bench.record import read
from tests.bench.records import header

device_timing = pytest.importorskip("benchmarks.device_timing")
pytest.importorskip("benchmarks.gpu", reason="needs triton")

LIMITS = Limits({"copy": 1.0}, bfloat16_gflops=1000.0)  # 1 GB/s, 1 TFLOP/s
CPU_MACHINE = Calibration("cpu", "native", 2, Limits({"2": 1.0}, 100.0), {}).as_dict()
MACHINE = Calibration("cuda", "triton", 2, LIMITS, {}).as_dict()


def open_records(path, budget_s: float = 60.0, gpu: str | None = "A GPU"):
    machine = MACHINE if gpu else CPU_MACHINE
    return device_timing.Records(path, budget_s, header(gpu=gpu, machine=machine))


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
    assert {row.floor for row in rows} == {1.0}
    assert {row.parameters["device"] for row in rows} == {"cuda"}
    said = capsys.readouterr().out
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_measures_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "none was found" in done.stderr
    assert not (tmp_path / "out").exists()
