"""Checkpoints: every layout gives the same tensors, and every damage a typed error."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import ovfast.checkpoint
from ovfast.checkpoint import CheckpointWeights, resolve_checkpoint, terminal_progress
from ovfast.config import ModelConfig
from ovfast.errors import CheckpointError, OptionError
from tests.support.checkpoints import (
    LAYOUTS,
    CheckpointSpec,
    make_checkpoint,
    make_tensor,
    tensor_name,
)

CPU = torch.device("cpu")
UNTIED = CheckpointSpec(tie=False, heads=7, kv_heads=1, head_dim=16)
Tensors = dict[str, torch.Tensor]
Make = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path, random_checkpoint: Make) -> Path:
    """An untied checkpoint that a test may damage."""
    return Path(shutil.copytree(random_checkpoint(UNTIED), tmp_path / "model"))


def open_weights(path: Path, **options: Any) -> CheckpointWeights:
    return CheckpointWeights(path, ModelConfig.from_checkpoint(path), **options)


def take_all(path: Path, dtype: torch.dtype | None = None) -> Tensors:
    weights = open_weights(path)
    tensors = {name: weights.take(name, dtype=dtype, device=CPU) for name in weights.names}
    weights.finish()
    return tensors


def damage(path: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite model.safetensors after `change` edited its tensors."""
    tensors = {k: v.clone() for k, v in load_file(path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def fused(spec: CheckpointSpec, *logical: str) -> torch.Tensor:
    return torch.cat([make_tensor(name, spec) for name in logical])


@pytest.mark.parametrize("spec", [CheckpointSpec(), UNTIED], ids=["tied", "untied"])
def test_own_names_hold_the_right_numbers(spec: CheckpointSpec, random_checkpoint: Make) -> None:
    tensors = take_all(random_checkpoint(spec))
    text, tower = "language_model.layers.1", "vision_tower.layers.1"
    disk = "llm.layers.1.self_attn"
    expected = {
        "vision_tower.patch_embedding.weight": make_tensor(
            "tower.embeddings.patch_embedding.weight", spec
        ).reshape(144, 588),
        "vision_tower.position_embedding": make_tensor(
            "tower.embeddings.position_embedding.weight", spec
        ),
        f"{tower}.qkv_proj.weight": fused(
            spec, *(f"tower.encoder.layers.1.self_attn.{p}_proj.weight" for p in "qkv")
        ),
        f"{tower}.fc2.bias": make_tensor("tower.encoder.layers.1.mlp.fc2.bias", spec),
        f"{tower}.layer_norm2.bias": make_tensor("tower.encoder.layers.1.layer_norm2.bias", spec),
        "multi_modal_projector.linear_2.weight": make_tensor("projector.linear_2.weight", spec),
        "image_newline": make_tensor("image_newline", spec),
        f"{text}.qkv_proj.weight": fused(spec, *(f"{disk}.{p}_proj.weight" for p in "qkv")),
        f"{text}.qkv_proj.bias": fused(spec, *(f"{disk}.{p}_proj.bias" for p in "qkv")),
        f"{text}.o_proj.weight": make_tensor(f"{disk}.o_proj.weight", spec),
        f"{text}.gate_up_proj.weight": fused(
            spec, "llm.layers.1.mlp.gate_proj.weight", "llm.layers.1.mlp.up_proj.weight"
        ),
        "language_model.embed_tokens.weight": make_tensor("llm.embed_tokens.weight", spec),
    }
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name
    assert ("lm_head.weight" in tensors) is not spec.tie
    assert not any("post_layernorm" in name for name in tensors)


@pytest.mark.parametrize("spec", [CheckpointSpec(), UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_shard_bytes", [None, 300_000])
def test_every_layout_gives_identical_tensors(
    tmp_path: Path,
    random_checkpoint: Make,
    spec: CheckpointSpec,
    layout: str,
    max_shard_bytes: int | None,
) -> None:
    path = make_checkpoint(tmp_path / "a", spec, layout=layout, max_shard_bytes=max_shard_bytes)
    assert len(list(path.glob("*.safetensors"))) == 1 or max_shard_bytes
    tensors, expected = take_all(path), take_all(random_checkpoint(spec))
    assert list(tensors) == list(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    path = make_checkpoint(tmp_path, CheckpointSpec(dtype=torch.bfloat16))
    weights = open_weights(path)
    assert weights.storage_dtype is torch.bfloat16
    count = sum(torch.Size(weights.shape(name)).numel() for name in weights.names)
    assert count == ModelConfig.from_checkpoint(path).num_parameters
    assert weights.total_bytes() == 2 * count
    assert weights.total_bytes(dtype) == dtype.itemsize * count
    kept, cast = take_all(path), take_all(path, dtype)
    for name, tensor in kept.items():
        assert tensor.dtype is torch.bfloat16
        assert tensor.shape == cast[name].shape == weights.shape(name)
        assert cast[name].is_contiguous()
        assert torch.equal(cast[name], tensor.to(dtype))


def test_each_tensor_is_read_once_and_reported(random_checkpoint: Make) -> None:
    reports: list[tuple[int, int]] = []
    weights = open_weights(random_checkpoint(), progress=lambda *done: reports.append(done))
    first, *others = weights.names
    weights.take(first, dtype=None, device=CPU)
    with pytest.raises(AssertionError, match="taken before"):
        weights.take(first, dtype=None, device=CPU)
    with pytest.raises(AssertionError, match="unknown"):
        weights.take("vision_tower.post_layernorm.weight", dtype=None, device=CPU)
    with pytest.raises(AssertionError, match=r"never taken.*and \d+ more"):
        weights.finish()
    for name in others:
        weights.take(name, dtype=None, device=CPU)
    weights.finish()
    assert reports == sorted(reports)
    assert len(reports) == len(weights.names)
    assert reports[-1] == (weights.total_bytes(), weights.total_bytes())


def test_tensors_survive_the_removal_of_their_file(checkpoint: Path) -> None:
    weights = open_weights(checkpoint)
    tensor = weights.take("image_newline", dtype=None, device=CPU)
    (checkpoint / "model.safetensors").write_bytes(b"")  # a mapped tensor would now crash
    assert torch.equal(tensor, make_tensor("image_newline", UNTIED))
    with pytest.raises(CheckpointError, match="the file changed while loading"):
        weights.take("lm_head.weight", dtype=None, device=CPU)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the file changed while loading"):
        weights.take("multi_modal_projector.linear_1.weight", dtype=None, device=CPU)


def test_known_unused_tensors_pass(checkpoint: Path, random_checkpoint: Make) -> None:
    def add(tensors: Tensors) -> None:
        for key in [k for k in tensors if k.startswith("vision_tower.encoder.layers.1.")]:
            tensors[key.replace("layers.1.", "layers.2.")] = torch.zeros(1)
        tensors["vision_tower.vision_model.head.probe"] = torch.zeros(3)
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["model.rotary_emb.inv_freq"] = torch.zeros(8, dtype=torch.float64)

    damage(checkpoint, add)
    tensors, expected = take_all(checkpoint), take_all(random_checkpoint(UNTIED))
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_fewer_kept_layers_leave_stored_ones_unread(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, CheckpointSpec(vision_layers=3, vision_feature_layer=-3))
    names = take_all(path)
    assert "vision_tower.layers.0.fc1.weight" in names
    assert "vision_tower.layers.1.fc1.weight" not in names


def test_a_tower_of_other_depth_is_unexpected(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, CheckpointSpec(vision_layers=4))
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"16 unexpected: .*layers\.3"):
        open_weights(path)


def test_duplicate_of_a_tied_head(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, CheckpointSpec(), layout="orig")
    embedding = make_tensor("llm.embed_tokens.weight", CheckpointSpec())
    damage(path, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    assert "lm_head.weight" not in take_all(path)
    damage(path, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, but lm_head"):
        open_weights(path)


def test_missing_head_is_tied(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(checkpoint, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    assert "lm_head.weight" not in open_weights(checkpoint).names
    assert "tied" in caplog.text


@pytest.mark.parametrize("rows", [597, 600, 700])
def test_the_embedding_decides_the_vocabulary(tmp_path: Path, rows: int) -> None:
    path = make_checkpoint(tmp_path, CheckpointSpec(vocab_size=rows, tie=False))
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["vocab_size"] = 608
    (path / "config.json").write_text(json.dumps(config))
    weights = open_weights(path)
    assert weights.vocab_size == rows
    assert (
        weights.shape("lm_head.weight")
        == weights.shape("language_model.embed_tokens.weight")
        == (rows, 128)
    )


def test_vocabulary_without_rows_for_special_ids(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, CheckpointSpec(vocab_size=596))
    with pytest.raises(CheckpointError, match=r"596 rows; expected at least 597"):
        open_weights(path)


def test_original_vocabulary_needs_no_placeholder_rows(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, CheckpointSpec(vocab_size=595), layout="orig")
    assert open_weights(path).vocab_size == 595


def test_missing_unexpected_and_misshapen_are_named(checkpoint: Path) -> None:
    gone = "language_model.model.layers.1.self_attn.k_proj.bias"

    def change(tensors: Tensors) -> None:
        del tensors[gone]
        tensors["language_model.model.layers.1.self_attn.q_norm.weight"] = torch.ones(16)
        tensors["multi_modal_projector.linear_3.weight"] = torch.ones(2)
        tensors["image_newline"] = torch.ones(127)

    damage(checkpoint, change)
    with pytest.raises(CheckpointError) as caught:
        open_weights(checkpoint)
    message = str(caught.value)
    assert "1 missing: llm.layers.1.self_attn.k_proj.bias" in message
    assert "2 unexpected: language_model.model.layers.1.self_attn.q_norm.weight" in message
    assert "multi_modal_projector.linear_3.weight" in message
    assert "image_newline (127,) instead of (128,)" in message


def test_names_match_whole_never_by_part(checkpoint: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["x.image_newline"] = tensors.pop("image_newline")

    damage(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"missing: image_newline; 1 unexpected: x\.image_n"):
        open_weights(checkpoint)


@pytest.mark.parametrize("name", ["llm.embed_tokens.weight", "tower.encoder.layers.0.mlp.fc1.bias"])
def test_empty_or_flat_tensor(checkpoint: Path, name: str) -> None:
    damage(checkpoint, lambda tensors: tensors.update({tensor_name(name, "v5"): torch.ones(0)}))
    with pytest.raises(CheckpointError, match="of another shape"):
        open_weights(checkpoint)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.float64, torch.float8_e4m3fn, torch.bool]
)
def test_other_dtypes_are_refused(checkpoint: Path, dtype: torch.dtype) -> None:
    damage(
        checkpoint,
        lambda tensors: tensors.update(image_newline=torch.zeros(128).to(dtype)),
    )
    with pytest.raises(CheckpointError, match="image_newline"):
        open_weights(checkpoint)


def test_a_tensor_under_two_names(checkpoint: Path) -> None:
    damage(
        checkpoint,
        lambda tensors: tensors.update({"model.image_newline": torch.zeros(128)}),
    )
    with pytest.raises(CheckpointError, match=r"twice: .*image_newline"):
        open_weights(checkpoint)


def test_resolve_directories(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_checkpoint(checkpoint) == checkpoint
    assert resolve_checkpoint(str(checkpoint)) == checkpoint
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert resolve_checkpoint("~/model") == checkpoint
    with pytest.raises(CheckpointError, match=r"is a file.*config\.json"):
        resolve_checkpoint(checkpoint / "config.json")


@pytest.mark.parametrize("model", ["", "  ", None, 3, b"x", ["x"], "a\0b"])
def test_resolve_refuses_what_is_no_name(model: Any) -> None:
    with pytest.raises(OptionError, match="model="):
        resolve_checkpoint(model)


@pytest.mark.parametrize(
    "model", ["/no/such/dir", "./nothing", "nothing", "a/b/c", "~/nothing", Path("owner/name")]
)
def test_resolve_never_downloads_a_path(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("hub"))
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve_checkpoint(model)


def test_resolve_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ovfast.checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    with pytest.raises(CheckpointError, match="no demo model"):
        resolve_checkpoint("demo")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert resolve_checkpoint("demo") == tmp_path / "demo"


def test_resolve_downloads_only_safe_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve_checkpoint("owner/name", revision="v1", token="t", cache_dir=tmp_path / "c")
    assert found == tmp_path
    assert (asked["repo"], asked["revision"], asked["token"]) == ("owner/name", "v1", "t")
    assert asked["cache_dir"] == str(tmp_path / "c")
    assert not any("bin" in p or p.endswith(("py", "pt")) for p in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("GatedRepoError", "accept its terms"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("RepositoryNotFoundError", "private repository"),
        ("LocalEntryNotFoundError", "HF_HUB_OFFLINE"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE"),
    ],
)
def test_hub_errors_are_ours(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(huggingface_hub.errors, name)

    def download(*_: Any, **__: Any) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=hint):
        resolve_checkpoint("owner/name", revision="v9")


def test_progress_only_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert terminal_progress() is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = terminal_progress()
    assert progress is not None
    progress(5, 10)
    progress(10, 10)
    assert capsys.readouterr().out == ""


def test_host_memory_is_the_weights_and_one_tensor(tmp_path: Path) -> None:
    """While tensors are held, nothing of the file is: no mapping outlives its read."""
    path = make_checkpoint(tmp_path, CheckpointSpec(layers=4, mlp=1024), max_shard_bytes=10**6)
    weights = open_weights(path)
    held = [weights.take(name, dtype=None, device=CPU) for name in weights.names]
    mapped = Path("/proc/self/maps").read_text()
    assert str(path) not in mapped
    assert len(held) == len(weights.names)
