"""Loading what cannot be loaded: a typed error that names the file, and nothing left behind."""

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ovfast
from ovfast import CheckpointError, ConfigError, Engine, OptionError, OVFastError
from tests.support.engines import open_engine


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path) -> Iterator[Engine]:
    with open_engine(tiny_checkpoint) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    """Failed loads open no files and start no threads for good, nor disturb a loaded engine."""
    expected = shared.generate("Hi", max_new_tokens=4).token_ids
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield shared
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    assert shared.generate("Hi", max_new_tokens=4).token_ids == expected


BAD_LOADS: dict[str, tuple[type[OVFastError], Any, dict[str, Any], str]] = {
    "empty name": (OptionError, "", {}, r"model=''; expected a checkpoint directory"),
    "None": (OptionError, None, {}, r"model=None; expected"),
    "number": (OptionError, 3, {}, r"model=3; expected"),
    "no directory": (CheckpointError, "/no/such/model", {}, r"no such directory.*Check the path"),
    "dtype": (OptionError, None, {"dtype": "int8"}, r"dtype='int8'; expected 'auto', 'float32'"),
    "device": (OptionError, None, {"device": "gpu"}, r"device='gpu'; expected 'auto', 'cpu'"),
    "backend": (OptionError, None, {"backend": "fast"}, r"backend='fast'; expected one of"),
    "max_seq_len 0": (OptionError, None, {"max_seq_len": 0}, r"max_seq_len=0; expected an int"),
    "max_seq_len": (OptionError, None, {"max_seq_len": 10**9}, r"at most 32768 positions"),
    "max_batch_size": (OptionError, None, {"max_batch_size": True}, r"max_batch_size=True; expec"),
    "threads": (OptionError, None, {"threads": 0}, r"threads=0; expected an integer"),
    "visual": (OptionError, None, {"visual": "paper"}, r"visual='paper'; expected VisualOptions"),
    "limits": (OptionError, None, {"media_limits": 5}, r"media_limits=5; expected MediaLimits"),
    "graphs": (OptionError, None, {"cuda_graphs": 1}, r"cuda_graphs=1; expected True or False"),
    "quantization": (
        ovfast.QuantizationError,
        None,
        {"quantization": "int3"},
        r"quantization='int3'; expected 'int8', 'int4', 'fp8', or None",
    ),
    "attention": (ovfast.OptionError, None, {"attention": "fa9"}, r"attention='fa9'.*'sdpa'"),
}


@pytest.mark.parametrize("name", BAD_LOADS)
def test_arguments(engine: Engine, tiny_checkpoint: Path, name: str) -> None:
    kind, model, options, pattern = BAD_LOADS[name]
    given = tiny_checkpoint if options else model
    with pytest.raises(kind, match=pattern):
        ovfast.load(given, **{"device": "cpu"} | options)


@pytest.fixture
def broken(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def edit_config(path: Path, **changes: Any) -> None:
    """`text_config__key=value` reaches into a section; None removes."""
    config = json.loads((path / "config.json").read_text())
    for name, value in changes.items():
        *sections, key = name.split("__")
        target = config
        for section in sections:
            target = target[section]
        target[key] = value
        if value is None:
            del target[key]
    (path / "config.json").write_text(json.dumps(config))


def rewrite_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def make_pickle(path: Path) -> None:
    (path / "model.safetensors").unlink()
    with (path / "pytest_was_here.bin").open("wb") as file:
        pickle.dump({"a": 1}, file)
    (path / "pytest_was_here.bin").rename(path / "pytorch_model.bin")


def cut(path: Path, keep: int) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])


NORM = "language_model.model.norm.weight"
BAD_CHECKPOINTS: dict[str, tuple[type[OVFastError], Callable[[Path], Any], str]] = {
    "no config": (CheckpointError, lambda p: (p / "config.json").unlink(), r"config\.json"),
    "no JSON": (CheckpointError, lambda p: (p / "config.json").write_text("{"), r"config\.json"),
    "bad header": (
        CheckpointError,
        lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 4000),
        r"model\.safetensors",
    ),
    "cut header": (CheckpointError, lambda p: cut(p, 100), r"model\.safetensors"),
    "cut file": (CheckpointError, lambda p: cut(p, 200_000), r"model\.safetensors"),
    "empty file": (CheckpointError, lambda p: cut(p, 0), r"model\.safetensors"),
    "no weights": (
        CheckpointError,
        lambda p: (p / "model.safetensors").unlink(),
        r"safetensors",
    ),
    "pickle": (CheckpointError, make_pickle, r"pytorch_model\.bin"),
    "missing tensor": (
        CheckpointError,
        lambda p: rewrite_weights(p, lambda t: t.pop(NORM)),
        r"1 missing: .*norm\.weight",
    ),
    "unexpected tensor": (
        CheckpointError,
        lambda p: rewrite_weights(p, lambda t: t.update({"extra.weight": torch.zeros(2)})),
        r"1 unexpected: .*extra\.weight",
    ),
    "misshapen tensor": (
        CheckpointError,
        lambda p: rewrite_weights(p, lambda t: t.update({NORM: torch.zeros(3)})),
        r"1 of another shape: .*norm\.weight.*\(3,\) instead of \(128,\)",
    ),
    "no heads": (
        ConfigError,
        lambda p: edit_config(p, text_config__num_attention_heads=None),
        r"num_attention_heads",
    ),
    "sliding window": (
        ConfigError,
        lambda p: edit_config(p, text_config__use_sliding_window=True),
        r"use_sliding_window",
    ),
    "rope scaling": (
        ConfigError,
        lambda p: edit_config(p, text_config__rope_scaling={"type": "yarn", "factor": 4.0}),
        r"rope_scaling",
    ),
    "activation": (
        ConfigError,
        lambda p: edit_config(p, projector_hidden_act="relu"),
        r"projector_hidden_act",
    ),
    "other model": (ConfigError, lambda p: edit_config(p, model_type="llava"), r"model_type|archi"),
    "no tokenizer": (
        CheckpointError,
        lambda p: (p / "tokenizer.json").unlink(),
        r"tokenizer\.json",
    ),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_checkpoints(engine: Engine, broken: Path, name: str) -> None:
    kind, damage, pattern = BAD_CHECKPOINTS[name]
    damage(broken)
    with pytest.raises(kind, match=pattern) as caught:
        open_engine(broken)
    assert type(caught.value) is kind
    assert str(broken) in str(caught.value)
    assert "expected" in str(caught.value).lower()
