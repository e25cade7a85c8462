"""What of `make gpu` can be proven without a device: its arithmetic, its records, its refusal."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from ovfast.config import ModelConfig
from tests.support.checkpoints import PRESETS, make_checkpoint

device_timing = pytest.importorskip("benchmarks.device_timing")
gpu = pytest.importorskip("benchmarks.gpu", reason="needs triton")


def test_tower_flop_is_the_design_figure(tmp_path):
    """0.642 TFLOP a view of the full tower, attention and products."""
    spec = PRESETS["0.5b"]
    tiny = make_checkpoint(tmp_path)
    config = ModelConfig.from_checkpoint(tiny)
    vision = dataclasses.replace(
        config.vision,
        hidden_size=spec.vision_hidden,
        intermediate_size=spec.vision_mlp,
        num_layers=spec.vision_layers,
        num_heads=spec.vision_heads,
        image_size=384,
    )
    full = dataclasses.replace(config, vision=vision)
    assert gpu.tower_flop(full, 1) == pytest.approx(0.642e12, rel=2e-3)
    assert gpu.tower_flop(full, 7) == pytest.approx(7 * gpu.tower_flop(full, 1))


def test_records_hold_ratios_and_floors(tmp_path, capsys):
    records = device_timing.Records(tmp_path / "deep" / "rows.jsonl", budget_s=60)
    ceilings = object.__new__(device_timing.Ceilings)
    ceilings.flop_per_s, ceilings.bytes_per_s = 1e12, 1e9
    samples = {"ovfast": [2.0, 2.0, 4.0], "torch": [6.0, 8.0, 8.0]}
    records.race("kernels", "one", samples, ceilings, flop=1e9)
    row = json.loads((tmp_path / "deep" / "rows.jsonl").read_text())
    assert row["times"]["ovfast"]["median_ms"] == 2.0
    assert row["times_faster_than_torch"] == [3.0, 2.0, 4.0]
    assert row["floor_ms"] == 1.0
    assert row["share_of_limit"] == 0.5
    assert row["tflop_per_s"] == 0.5
    assert row["samples"] == samples
    assert "one" in capsys.readouterr().out
    assert not records.is_over
    assert device_timing.Records(tmp_path / "r.jsonl", budget_s=-1).is_over


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_measures_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "none was found" in done.stderr
    assert not (tmp_path / "out").exists()
