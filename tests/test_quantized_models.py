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
COSINES = {"int8": 0.9, "int4": 0.8}  # of logits with those of exact weights
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
    """Makes a channel of activations and one of weights far larger, and the other factor smaller:
    the model computes what it did.
    """
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors, rng = load_file(file), np.random.default_rng(0)
    readers = {
        "input_layernorm.weight": [f"self_attn.{name}_proj.weight" for name in "qkv"],
        "post_attention_layernorm.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    }
    planted = 0
    for name in list(tensors):
        for norm, names in readers.items():
            if not name.endswith(norm):
                continue
            large, small = rng.choice(len(tensors[name]), 2, replace=False)
            tensors[name][large] *= FAR
            tensors[name][small] /= FAR
            for reader in names:
                weight = tensors[name.removesuffix(norm) + reader]
                weight[:, large] /= FAR
                weight[:, small] *= FAR
            planted += 1
    assert planted == 6
    save_file(tensors, file)


# A random model is the hardest case: its cosines without outliers are 0.999 and 0.93.
@pytest.mark.parametrize("quantization", COSINES)
def test_outlier_channels_do_not_ruin_the_logits(
    random_checkpoint, tmp_path: Path, quantization: str
) -> None:
    spec = CheckpointSpec(hidden=512, heads=8, kv_heads=2, head_dim=64, mlp=1024, layers=3)
    plant_outliers(random_checkpoint(spec), tmp_path / "planted")
    logits = []
    for option in (None, quantization):
        with open_engine(tmp_path / "planted", quantization=option) as engine:
            logits.append(engine.forward(engine.prepare(**REQUESTS["image"])))
    cosine = torch.nn.functional.cosine_similarity(*logits, dim=1)
    assert float(cosine.mean()) >= COSINES[quantization]
