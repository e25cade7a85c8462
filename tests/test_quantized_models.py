"""What quantised weights cost in answers: on the demo model, and where channels are far out."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ovfast
from tests.support.checkpoints import CheckpointSpec
from tests.support.engines import REQUESTS, open_engine
from tools.evaluate_demo import evaluate

pytest.importorskip("ovfast._C", reason="the native extension is not built")

LOSSES = {"int8": 1.0, "int4": 3.0}  # points of exact answers
COSINES = {"int8": 0.99, "int4": 0.95}
FAR = 100.0  # an outlier channel is so many times the others


@pytest.mark.slow
def test_losses_of_the_demo_model() -> None:
    shares = {}
    for quantization in (None, *LOSSES):
        with ovfast.load("demo", device="cpu", quantization=quantization) as engine:
            rows = [row for row in evaluate(engine, 150) if row.kind != "detail, base view only"]
        shares[quantization] = 100 * float(np.mean([row.share for row in rows]))
    for quantization, most in LOSSES.items():
        assert shares[None] - shares[quantization] <= most, shares


def plant_outliers(source: Path, target: Path) -> None:
    """Scales channels of activations (by the norms' weights) and rows and columns of weights."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    rng = np.random.default_rng(0)
    planted = 0
    for name, tensor in tensors.items():
        width = tensor.shape[-1]
        channels = torch.from_numpy(rng.choice(width, max(1, width // 60), replace=False))
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[channels] *= FAR
        elif name.endswith(("gate_proj.weight", "down_proj.weight", "fc1.weight")):
            tensor[:, channels] *= FAR
        else:
            continue
        planted += 1
    assert planted >= 8
    save_file(tensors, file)


@pytest.mark.parametrize("quantization", COSINES)
def test_outlier_channels_do_not_ruin_the_logits(
    random_checkpoint, tmp_path: Path, quantization: str
) -> None:
    plant_outliers(random_checkpoint(CheckpointSpec()), tmp_path / "planted")
    logits = []
    for option in (None, quantization):
        with open_engine(tmp_path / "planted", quantization=option) as engine:
            logits.append(engine.forward(engine.prepare(**REQUESTS["image"])))
    exact, quantised = logits
    assert bool(torch.isfinite(quantised).all())
    cosine = torch.nn.functional.cosine_similarity(exact, quantised, dim=1)
    assert float(cosine.mean()) >= COSINES[quantization]
