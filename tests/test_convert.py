"""Packed directories: what convert writes loads to the same bits, and every damage is named."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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
from ovfast.packed_file import PACKED_FILE, PackedFile, PackedWriter
from ovfast.storage import NATIVE_STORAGES
from ovfast.verify import verify
from tests.support.checkpoints import CheckpointSpec, make_checkpoint
from tests.support.engines import REQUESTS, open_engine

pytest.importorskip("ovfast._C", reason="the native extension is not built")

Make = Callable[..., Path]
# Widths that are no multiple of a block or a group; the halves of the MLP are padded.
ODD = CheckpointSpec(
    vision_mlp=205, hidden=90, mlp=85, heads=6, kv_heads=2, head_dim=16, tie=False, vocab_size=601
)


def options_of(storage: str) -> dict[str, str]:
    return {"quantization" if storage.startswith("int") else "dtype": storage}


def logits_of(engine: Engine) -> torch.Tensor:
    inputs = engine.prepare(**REQUESTS["image"])
    return engine.forward(inputs, positions=range(inputs.num_tokens - 5, inputs.num_tokens))


@pytest.mark.parametrize(
    ("spec", "layout"),
    [(CheckpointSpec(dtype=torch.bfloat16), "v5"), (ODD, "orig")],
    ids=["tied", "odd"],
)
@pytest.mark.parametrize("storage", NATIVE_STORAGES)
def test_a_packed_directory_gives_the_same_bits(
    random_checkpoint: Make, tmp_path: Path, spec: CheckpointSpec, layout: str, storage: str
) -> None:
    source = random_checkpoint(spec, layout)
    out = ovfast.convert(source, tmp_path / "out", **options_of(storage))
    with open_engine(source, **options_of(storage)) as engine:
        expected = logits_of(engine)
    with open_engine(
        out, **options_of(storage)
    ) as engine:  # the same once more is no contradiction
        assert engine.storage == storage
        model = engine._model.language_model
        assert (model.lm_head is model.embedding) is spec.tie
        assert torch.equal(logits_of(engine), expected)


def test_answers_are_the_same(tiny_checkpoint: Path, packed: Path) -> None:
    def tokens(engine: Engine) -> list[Any]:
        with engine:
            return [engine.generate(**r, max_new_tokens=8).token_ids for r in REQUESTS.values()]

    assert tokens(open_engine(packed)) == tokens(open_engine(tiny_checkpoint, quantization="int8"))


def test_auto_keeps_the_checkpoint_s_dtype(random_checkpoint: Make, tmp_path: Path) -> None:
    source = random_checkpoint(CheckpointSpec(dtype=torch.float16))
    out = ovfast.convert(source, tmp_path / "out")
    assert PackedFile(out / PACKED_FILE).storage == "float16"


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
            parts = [{"type": "text", "text": "Hello"}, {"type": "image"}]
            chat = [{"role": "user", "content": parts}]
            picture = REQUESTS["image"]["images"]
            ids = [engine.prepare(chat, images=picture).input_ids for engine in (one, other)]
            assert np.array_equal(*ids)


def test_the_source_may_go(random_checkpoint: Make, tmp_path: Path) -> None:
    source = Path(shutil.copytree(random_checkpoint(), tmp_path / "source"))
    with open_engine(source, quantization="int8") as engine:
        expected = logits_of(engine)
    out = ovfast.convert(source, tmp_path / "out", quantization="int8")
    shutil.rmtree(source)
    with open_engine(out) as engine:
        assert torch.equal(logits_of(engine), expected)


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
    with pytest.raises(QuantizationError, match=r"'fp8'; a packed directory is for the CPU"):
        ovfast.convert(tiny_checkpoint, out, quantization="fp8")
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
