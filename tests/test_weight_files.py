"""Weight files: every damage, and every incomplete set of files, gives a typed error."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovfast.checkpoint import CheckpointWeights
from ovfast.config import ModelConfig
from ovfast.errors import CheckpointError
from ovfast.weight_files import read_headers, read_tensor
from tests.support.checkpoints import (
    CheckpointSpec,
    make_checkpoint,
)

UNTIED = CheckpointSpec(tie=False, heads=7, kv_heads=1, head_dim=16)
Make = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path, random_checkpoint: Make) -> Path:
    """An untied checkpoint that a test may damage."""
    return Path(shutil.copytree(random_checkpoint(UNTIED), tmp_path / "model"))


def open_weights(path: Path) -> CheckpointWeights:
    return CheckpointWeights(path, ModelConfig.from_checkpoint(path))


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _rewrite_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _beyond(data: bytes) -> bytes:
    def change(header: dict[str, Any]) -> None:
        header["image_newline"]["data_offsets"][1] += 1 << 40

    return _rewrite_header(data, change)


def _longer_shape(data: bytes) -> bytes:
    def change(header: dict[str, Any]) -> None:
        header["image_newline"]["shape"] = [1 << 20]

    return _rewrite_header(data, change)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda data: b"",
        lambda data: b"\x08",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: b"PK\x03\x04" + data,
        lambda data: data[:40],
        _cut,
        lambda data: data + b"more",
        _beyond,
        _longer_shape,
    ],
)
def test_corrupt_safetensors(checkpoint: Path, break_it: Callable[[bytes], bytes]) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(break_it(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable"):
        open_weights(checkpoint)


@pytest.mark.parametrize("num_spaces", [1, 2, 5])
def test_data_at_odd_places(checkpoint: Path, num_spaces: int) -> None:
    """A header of any length moves every tensor off its dtype's alignment."""
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    expected = {name: tensor.clone() for name, tensor in load_file(file).items()}
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].rstrip() + b" " * num_spaces
    while len(text) % 2 == 0:
        text += b" "
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    for stored in read_headers(checkpoint).values():
        assert torch.equal(read_tensor(stored), expected[stored.name])
        assert torch.equal(read_tensor(stored, 1), expected[stored.name][1:2])


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, UNTIED, max_shard_bytes=500_000)


def _edit_index(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        open_weights(sharded)


def test_cut_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    shard.write_bytes(_cut(shard.read_bytes()))
    with pytest.raises(CheckpointError, match=f"{shard.name} is not a readable"):
        open_weights(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    name = next(iter(load_file(first)))
    save_file(tensors | {name: load_file(first)[name]}, second)
    with pytest.raises(CheckpointError, match=f"twice: {name} in {first.name}"):
        open_weights(sharded)


def test_index_names_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["ghost"] = sorted(set(index["weight_map"].values()))[0]

    _edit_index(sharded, change)
    with pytest.raises(CheckpointError, match="lacks tensors that the index places there: ghost"):
        open_weights(sharded)


@pytest.mark.parametrize(
    "weight_map", [None, [], {"a": 1}, {"a": "../model.safetensors"}, {"a": "model.bin"}]
)
def test_unusable_index(sharded: Path, weight_map: object) -> None:
    _edit_index(sharded, lambda index: index.update(weight_map=weight_map))
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        open_weights(sharded)


def test_shards_without_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"without model\.safetensors\.index\.json"):
        open_weights(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_unread(checkpoint: Path, name: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"only as pickles .{name}.*Convert"):
        open_weights(checkpoint)


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_weights(checkpoint)
