"""Packed directories: what convert writes loads to the same bits, and every damage is named."""

import errno
import gc
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import ovfast
from ovfast import (
    BackendError,
    CheckpointError,
    Engine,
    OptionError,
    OVFastError,
    QuantizationError,
    cli,
    conversion,
)
from ovfast.packed_file import PACKED_FILE, Matrix, PackedFile, PackedWriter
from ovfast.verify import verify
from tests.support.checkpoints import CheckpointSpec, make_checkpoint
from tests.support.engines import REQUESTS, open_engine

pytest.importorskip("ovfast._C", reason="the native extension is not built")

Make = Callable[..., Path]
STORAGES = ("float32", "float16", "bfloat16", "int8", "int4")
# Widths that are no multiple of a block or a group; the halves of the MLP are padded.
ODD = CheckpointSpec(
    vision_mlp=205, hidden=90, mlp=85, heads=6, kv_heads=2, head_dim=16, tie=False, vocab_size=601
)


def options_of(storage: str) -> dict[str, str]:
    return {"quantization" if storage.startswith("int") else "dtype": storage}


def logits_of(path: Path, **options: Any) -> torch.Tensor:
    with open_engine(path, **options) as engine:
        inputs = engine.prepare(**REQUESTS["image"])
        return engine.forward(inputs, positions=range(inputs.num_tokens - 5, inputs.num_tokens))


@pytest.fixture(scope="module")
def kept(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kept") / "packed"
    return ovfast.convert(tiny_checkpoint, out, quantization="int8")


@pytest.fixture
def packed(kept: Path, tmp_path: Path) -> Path:
    """A packed directory that a test may damage."""
    return Path(shutil.copytree(kept, tmp_path / "packed"))


@pytest.mark.parametrize("layout", ["v5", "orig"])
@pytest.mark.parametrize("spec", [CheckpointSpec(dtype=torch.bfloat16), ODD], ids=["tied", "odd"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_packed_directory_gives_the_same_bits(
    random_checkpoint: Make, tmp_path: Path, spec: CheckpointSpec, layout: str, storage: str
) -> None:
    source = random_checkpoint(spec, layout)
    out = ovfast.convert(source, tmp_path / "out", **options_of(storage))
    expected = logits_of(source, **options_of(storage))
    assert torch.equal(logits_of(out), expected)
    assert torch.equal(logits_of(out, **options_of(storage)), expected), "said once more"
    with open_engine(out) as engine:
        assert engine.storage == storage
        tied = engine._model.language_model.lm_head is engine._model.language_model.embedding
        assert tied is spec.tie


def test_answers_are_the_same(tiny_checkpoint: Path, packed: Path) -> None:
    def tokens(engine: Engine) -> list[Any]:
        with engine:
            return [engine.generate(**r, max_new_tokens=8).token_ids for r in REQUESTS.values()]

    assert tokens(open_engine(packed)) == tokens(open_engine(tiny_checkpoint, quantization="int8"))


def test_auto_keeps_the_checkpoint_s_dtype(random_checkpoint: Make, tmp_path: Path) -> None:
    source = random_checkpoint(CheckpointSpec(dtype=torch.float16))
    out = ovfast.convert(source, tmp_path / "out")
    assert PackedFile(out / PACKED_FILE).storage == "float16"


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


def test_the_weights_stay_in_the_map(packed: Path) -> None:
    """No copy: the packed weights lie inside the mapping of the file."""
    with open_engine(packed) as engine:
        maps = Path("/proc/self/maps").read_text().splitlines()
        line = next(line for line in maps if str(packed) in line)
        begin, end = (int(word, 16) for word in line.split()[0].split("-"))
        assert line.split()[1].startswith("r--s")
        address = engine._model.language_model.layers[1].down_proj.weight.bytes().ctypes.data
        assert begin <= address < end
    assert str(packed) not in Path("/proc/self/maps").read_text(), "closing unmaps"


def test_the_loader_reads_no_file_that_is_not_copied(
    random_checkpoint: Make, tmp_path: Path
) -> None:
    for name, spec in (
        ("files", CheckpointSpec(vocab_and_merges=True)),
        ("jinja", CheckpointSpec(template_file="jinja")),
    ):
        source = shutil.copytree(random_checkpoint(spec), tmp_path / name)
        (source / "notes.md").write_text("not ours")
        out = ovfast.convert(source, tmp_path / f"{name}-out", quantization="int4")
        held = {file.name for file in out.iterdir()}
        assert "notes.md" not in held
        assert "model.safetensors" not in held
        with open_engine(source, quantization="int4") as one, open_engine(out) as other:
            chat = [{"role": "user", "content": "Hello <image>"}]
            picture = REQUESTS["image"]["images"]
            ids = [engine.prepare(chat, images=picture).input_ids for engine in (one, other)]
            assert np.array_equal(*ids)


def test_the_source_may_go(random_checkpoint: Make, tmp_path: Path) -> None:
    source = Path(shutil.copytree(random_checkpoint(), tmp_path / "source"))
    expected = logits_of(source, quantization="int8")
    out = ovfast.convert(source, tmp_path / "out", quantization="int8")
    shutil.rmtree(source)
    assert torch.equal(logits_of(out), expected)


def test_a_running_engine_survives_a_new_conversion(tiny_checkpoint: Path, packed: Path) -> None:
    """Its map holds the file that it opened, which only loses its name."""
    with open_engine(packed) as engine:
        inputs = engine.prepare("Hello")
        expected = engine.forward(inputs)
        ovfast.convert(tiny_checkpoint, packed, quantization="int4")
        assert torch.equal(engine.forward(inputs), expected)
    with open_engine(packed) as engine:
        assert engine.storage == "int4"


CONTRADICTIONS: list[tuple[dict[str, Any], type[OVFastError], str]] = [
    ({"quantization": "int4"}, QuantizationError, r"quantization='int4', but .* packed as int8"),
    ({"dtype": "float32"}, OptionError, r"dtype='float32', but .* packed as int8"),
    ({"backend": "reference"}, BackendError, r"native CPU back end, but back end 'reference'"),
]


@pytest.mark.parametrize(("options", "kind", "pattern"), CONTRADICTIONS)
def test_options_that_contradict(
    packed: Path, options: dict[str, Any], kind: type[OVFastError], pattern: str
) -> None:
    with pytest.raises(kind, match=pattern):
        open_engine(packed, **options)


def test_a_device_that_is_left_open_becomes_the_cpu(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with open_engine(packed, device="auto") as engine:
        assert (engine.device.type, engine.ops.backend) == ("cpu", "native")


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    """Writes the file again after `change` edited its tensors and its description."""
    from safetensors import safe_open

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
        lambda p: rewrite(p, lambda _, about: about.update(version="2")),
        "has version 2 of the packed layout; expected 1",
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


def test_failed_loads_leave_nothing_open(packed: Path) -> None:
    gc.collect()  # an error's traceback holds what it was raised over
    before, good = len(os.listdir("/proc/self/fd")), (packed / PACKED_FILE).read_bytes()
    for name in ("other version", "unknown storage", "few rows", "other kind"):
        (packed / PACKED_FILE).write_bytes(good)
        DAMAGES[name][0](packed)
        with pytest.raises(CheckpointError):
            open_engine(packed)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


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


class Broken(Exception):
    """Stands for anything that stops a conversion."""


@pytest.mark.parametrize("call", [1, 2, 9])
@pytest.mark.parametrize(
    ("error", "raised", "pattern"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError, r"No space left.*nothing was"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (Broken("stop"), Broken, "stop"),
    ],
)
def test_an_interrupted_conversion_leaves_nothing(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    error: BaseException,
    raised: type[BaseException],
    pattern: str | None,
) -> None:
    append, calls = PackedWriter._append, []

    def failing(self: PackedWriter, *args: Any) -> None:
        calls.append(1)
        append(self, *args)
        if len(calls) == call:
            raise error

    monkeypatch.setattr(PackedWriter, "_append", failing)
    with pytest.raises(raised, match=pattern):
        ovfast.convert(tiny_checkpoint, tmp_path / "new", quantization="int8")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    calls.clear()
    with pytest.raises(raised, match=pattern):
        ovfast.convert(tiny_checkpoint, tmp_path / "empty", quantization="int8")
    assert list((tmp_path / "empty").iterdir()) == []


def test_an_interrupted_conversion_keeps_the_old_directory(
    tiny_checkpoint: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in packed.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(conversion.shutil, "copyfile", full)
    with pytest.raises(OSError, match="quota exceeded"):
        ovfast.convert(tiny_checkpoint, packed, quantization="int4")
    assert {file.name: file.read_bytes() for file in packed.iterdir()} == before


def test_what_a_killed_conversion_left_is_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / f"{PACKED_FILE}.partial").write_bytes(b"half")
    out = ovfast.convert(tiny_checkpoint, tmp_path)
    assert not list(out.glob("*.partial"))
    with open_engine(out) as engine:
        assert engine.storage == "float32"


def test_what_the_new_checkpoint_lacks_is_not_left_from_the_old(
    random_checkpoint: Make, tmp_path: Path
) -> None:
    out = ovfast.convert(random_checkpoint(CheckpointSpec(template_file="jinja")), tmp_path / "a")
    assert (out / "chat_template.jinja").exists()
    ovfast.convert(random_checkpoint(CheckpointSpec()), out)
    assert not (out / "chat_template.jinja").exists()


@pytest.mark.parametrize("held", ["notes.txt", "config.json", "model.safetensors", PACKED_FILE])
def test_other_files_are_not_overwritten(tiny_checkpoint: Path, tmp_path: Path, held: str) -> None:
    (tmp_path / held).write_text("mine")
    with pytest.raises(OptionError, match=f"holds other files, such as {held}; expected a new"):
        ovfast.convert(tiny_checkpoint, tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(held, "mine")]


def test_targets_that_are_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="is a file; expected a directory"):
        ovfast.convert(tiny_checkpoint, tmp_path / "file")
    for out in ("", None, 3):
        with pytest.raises(OptionError, match="expected the path of a directory"):
            ovfast.convert(tiny_checkpoint, out)  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"nothing was converted.*file/sub"):
        ovfast.convert(tiny_checkpoint, tmp_path / "file" / "sub")


def test_sources_that_are_none(tiny_checkpoint: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="is a packed directory; expected an original"):
        ovfast.convert(packed, out)
    with pytest.raises(OptionError, match="holds other files"):
        ovfast.convert(tiny_checkpoint, tiny_checkpoint)
    with pytest.raises(CheckpointError, match="no such directory"):
        ovfast.convert("/no/such/model", out)
    with pytest.raises(QuantizationError, match="quantization='int3'"):
        ovfast.convert(tiny_checkpoint, out, quantization="int3")
    broken = make_checkpoint(tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        ovfast.convert(broken, out)
    assert not out.exists()


def test_verify_asks_for_the_original(packed: Path) -> None:
    with pytest.raises(BackendError, match=r"packed weights.*Verify the original"):
        verify(packed, device="cpu")


def test_the_command(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", str(tiny_checkpoint), out, "--quantization", "int4"])
    assert not ended.value.code
    assert f"wrote {out}" in capsys.readouterr().out
    assert PackedFile(Path(out) / PACKED_FILE).storage == "int4"
    (tmp_path / "file").write_text("mine")
    for target, word in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "x", "nothing")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["convert", str(tiny_checkpoint), str(target)])
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert word in captured.err
        assert captured.err.count("\n") == 1


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
