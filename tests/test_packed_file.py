"""The file of a packed directory: what lies where, and a typed error for every damage."""

import gc
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ovfast import CheckpointError
from ovfast.packed_file import PACKED_FILE, Matrix, PackedFile, PackedWriter
from tests.support.engines import open_engine

pytest.importorskip("ovfast._C", reason="the native extension is not built")


def test_the_file_is_what_safetensors_reads(packed: Path) -> None:
    """By the public reader: names, aligned matrices, no holes."""
    tensors, file = load_file(packed / PACKED_FILE), PackedFile(packed / PACKED_FILE)
    assert tensors.keys() == file.matrices.keys() | file.tensors.keys()
    for name, matrix in file.matrices.items():
        assert np.array_equal(tensors[name], matrix.data)
        assert matrix.data.ctypes.data % 64 == 0
        assert not matrix.data.flags.writeable
    for name, values in file.tensors.items():
        assert np.array_equal(tensors[name], values)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    """Writes the file again after `change` edited its tensors and its description."""
    file = path / PACKED_FILE
    tensors = {name: array.copy() for name, array in load_file(file).items()}
    with safe_open(file, "np") as opened:
        about = opened.metadata()
    change(tensors, about)
    names = sorted(tensors, key=lambda name: tensors[name].dtype != np.uint8)
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        dtype = {"uint8": "U8", "float32": "F32", "float64": "F64"}[tensors[name].dtype.name]
        header[name] = {
            "dtype": dtype,
            "shape": tensors[name].shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    data = b"".join(tensors[name].tobytes() for name in names)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_matrix(about: dict[str, str], name: str, shape: object) -> None:
    matrices = json.loads(about["matrices"])
    matrices[name] = shape
    about["matrices"] = json.dumps(matrices)


def cut(path: Path, keep: int) -> None:
    file = path / PACKED_FILE
    file.write_bytes(file.read_bytes()[:keep])


HEAD = "language_model.embed_tokens.weight"
NORM = "language_model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: cut(p, 0), "not a readable safetensors file"),
    "cut length": (lambda p: cut(p, 5), "not a readable safetensors file"),
    "cut header": (lambda p: cut(p, 500), "not a readable safetensors file"),
    "cut data": (lambda p: cut(p, 200_000), "not a readable safetensors file"),
    "cut by a byte": (
        lambda p: cut(p, (p / PACKED_FILE).stat().st_size - 1),
        "not a readable safetensors file",
    ),
    "not safetensors": (
        lambda p: (p / PACKED_FILE).write_bytes(b"PK\x03\x04" * 100),
        "not a readable safetensors file",
    ),
    "a directory": (
        lambda p: ((p / PACKED_FILE).unlink(), (p / PACKED_FILE).mkdir()),
        "not a readable safetensors file",
    ),
    "foreign": (
        lambda p: save_file({"a": np.ones(3, np.float32)}, p / PACKED_FILE),
        "not one of ovfast's packed ones",
    ),
    "other version": (
        lambda p: rewrite(p, lambda _, about: about.update(version="1")),
        "has version 1 of the packed layout; expected 2",
    ),
    "no storage": (
        lambda p: rewrite(p, lambda _, about: about.pop("storage")),
        "damaged header .KeyError: 'storage'",
    ),
    "unknown storage": (
        lambda p: rewrite(p, lambda _, about: about.update(storage="int2")),
        "its storage is 'int2'",
    ),
    "matrices are no JSON": (
        lambda p: rewrite(p, lambda _, about: about.update(matrices="[")),
        "damaged header",
    ),
    "matrices are a list": (
        lambda p: rewrite(p, lambda _, about: about.update(matrices="[1]")),
        "damaged header",
    ),
    "matrix without shape": (
        lambda p: rewrite(p, lambda _, about: edit_matrix(about, HEAD, ["int8"])),
        "damaged header",
    ),
    "matrix without data": (
        lambda p: rewrite(p, lambda tensors, _: tensors.pop(HEAD)),
        "damaged header",
    ),
    "no embedding": (
        lambda p: rewrite(p, lambda t, about: (t.pop(HEAD), drop_matrix(about, HEAD))),
        "1 missing: language_model.embed_tokens.weight",
    ),
    "other shape": (
        lambda p: rewrite(p, lambda _, about: edit_matrix(about, HEAD, ["int8", 608, 64])),
        r"1 of another shape: language_model.embed_tokens.weight \(608, 64\) instead of",
    ),
    "few rows": (
        lambda p: rewrite(p, lambda _, about: edit_matrix(about, HEAD, ["int8", 5, 128])),
        "has 5 rows; expected at least 597",
    ),
    "rows of text": (
        lambda p: rewrite(p, lambda _, about: edit_matrix(about, HEAD, ["int8", "608", 128])),
        "damaged header",
    ),
    "other kind": (
        lambda p: rewrite(p, lambda _, about: edit_matrix(about, HEAD, ["int4", 608, 128])),
        "not as described .buffer has",
    ),
    "unknown kind": (
        lambda p: rewrite(p, lambda _, about: edit_matrix(about, HEAD, ["q8", 608, 128])),
        "not as described .kind is 'q8'",
    ),
    "short matrix": (
        lambda p: rewrite(p, lambda t, _: t.update({HEAD: t[HEAD][:-64]})),
        "not as described .buffer has",
    ),
    "missing tensor": (
        lambda p: rewrite(p, lambda tensors, _: tensors.pop(NORM)),
        "1 missing: language_model.norm.weight",
    ),
    "unexpected tensor": (
        lambda p: rewrite(p, lambda t, _: t.update(extra=np.ones(3, np.float32))),
        "1 unexpected: extra",
    ),
    "misshapen tensor": (
        lambda p: rewrite(p, lambda t, _: t.update({NORM: np.ones(3, np.float32)})),
        r"1 of another shape: language_model.norm.weight \(3,\) instead of \(128,\)",
    ),
    "tensor of another dtype": (
        lambda p: rewrite(p, lambda t, _: t.update({NORM: np.ones(128, np.float64)})),
        "damaged header",
    ),
    "config of other sizes": (
        lambda p: edit_config(p, "num_hidden_layers", 3),
        "missing: language_model.layers.2",
    ),
}


def drop_matrix(about: dict[str, str], name: str) -> None:
    matrices = json.loads(about["matrices"])
    del matrices[name]
    about["matrices"] = json.dumps(matrices)


def edit_config(path: Path, key: str, value: object) -> None:
    config = json.loads((path / "config.json").read_text())
    config["text_config"][key] = value
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(packed: Path, name: str) -> None:
    damage, pattern = DAMAGES[name]
    damage(packed)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        open_engine(packed)
    message = str(caught.value)
    assert str(packed / PACKED_FILE) in message
    assert "expected" in message.lower()
    assert "convert" in message.lower() or "belong together" in message


def open_files() -> list[Path]:
    """What this process has open or mapped."""
    links = Path("/proc/self/fd").iterdir()
    files = [link.readlink() for link in links if link.is_symlink()]
    lines = Path("/proc/self/maps").read_text().splitlines()
    return files + [Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")]


def test_failed_loads_leave_nothing_open(packed: Path) -> None:
    gc.collect()  # an error's traceback holds what it was raised over
    good = (packed / PACKED_FILE).read_bytes()
    for name in ("other version", "unknown storage", "few rows", "other kind"):
        (packed / PACKED_FILE).write_bytes(good)
        DAMAGES[name][0](packed)
        with pytest.raises(CheckpointError):
            open_engine(packed)
    gc.collect()
    assert not any(packed in path.parents for path in open_files())


def test_headers_of_random_bytes(packed: Path) -> None:
    """Whatever a byte of the header becomes: an engine, or our error."""
    file, rng = packed / PACKED_FILE, np.random.default_rng(0)
    good = file.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    text = len(good[8 : 8 + length].rstrip())
    for place in rng.integers(0, 8 + text, 150):
        bad = bytearray(good)
        bad[place] = rng.integers(0, 256)
        file.write_bytes(bad)
        try:
            PackedFile(file)
            open_engine(packed).close()
        except CheckpointError:
            pass


def test_a_writer_of_many_names(tmp_path: Path) -> None:
    """The place kept for the header fits any name, and tensors of no length."""
    names = [f"{'ü' * index}{index}" for index in range(100)]
    with PackedWriter(tmp_path / PACKED_FILE, "int8", names) as writer:
        for name in names[:50]:
            writer.matrix(name, Matrix("int8", 2**40, 2**40, np.full(64, 7, np.uint8)))
        for name in names[50:]:
            writer.tensor(name, np.zeros((0, 3), np.float32))
        writer.finish()
    file = PackedFile(tmp_path / PACKED_FILE)
    assert [*file.matrices, *file.tensors] == names
    assert all(matrix.data.tolist() == [7] * 64 for matrix in file.matrices.values())
