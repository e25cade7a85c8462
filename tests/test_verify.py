"""verify: passes where ovfast is right, and names the stage where it is not."""

import json
import shutil
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ovfast.verify as verify_module
from ovfast import image
from ovfast.checkpoint import CheckpointWeights
from ovfast.errors import BackendError, CheckpointError, OptionError
from ovfast.loading import load
from ovfast.models.siglip import SiglipTower
from ovfast.text_tokenizer import TextTokenizer
from ovfast.verify import VerifyReport, verify
from ovfast.verify.cases import make_cases
from ovfast.verify.oracle import Oracle
from ovfast.verify.stages import Stages, keep_head
from ovfast.verify.stored import STORED_FILE
from tests.support.checkpoints import POST_LAYERNORM, CheckpointSpec, make_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "tied.json"
STAGES_WITH_PICTURES = ["prompt", "views", "tower", "rows", "logits", "tokens"]


def check(path: Path | str, dtype: str = "float32") -> VerifyReport:
    return verify(path, device="cpu", dtype=dtype)


def keep_cases(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def few(image_size: int) -> tuple:
        return tuple(case for case in make_cases(image_size) if case.name in names)

    monkeypatch.setattr(verify_module, "make_cases", few)


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_cases(monkeypatch, "text", "square")


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)


# Against transformers


def test_everything_agrees_with_transformers(tiny_checkpoint: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.10")
    verbosity = transformers.utils.logging.get_verbosity()
    report = check(tiny_checkpoint)
    assert report.ok, report.first_failure
    assert report.reference == f"transformers {transformers.__version__}"
    assert (report.device, report.dtype, report.notes) == ("cpu", "float32", ())
    stages: dict[str, list[str]] = {}
    for row in report.rows:
        stages.setdefault(row.case, []).append(row.stage)
    assert stages.pop("text") == ["prompt", "logits", "tokens"]
    # transformers' own video processor needs torchvision: its views are not compared.
    assert stages.pop("video") == ["prompt", "tower", "rows", "logits", "tokens"]
    assert len(stages) == 7
    assert all(names == STAGES_WITH_PICTURES for names in stages.values())
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["ok"] is True
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_judged_against_float32(random_checkpoint, monkeypatch, dtype: str) -> None:
    pytest.importorskip("transformers", minversion="5.10")
    keep_cases(monkeypatch, "square", "video")
    path = random_checkpoint(CheckpointSpec(dtype=getattr(torch, dtype)))
    report = check(path, dtype)
    assert report.ok, report.first_failure
    assert report.dtype == dtype
    ratios = [row for row in report.rows if row.stage in ("tower", "rows", "logits")]
    assert len(ratios) == 6
    assert all(0 < row.error < row.bound == 1.25 for row in ratios)


# Of the weight `name` the numbers from `first` on are scaled; which stage notices first?
@pytest.mark.parametrize(
    ("name", "stage", "failing_cases"),
    [
        ("vision_tower.layers.1.fc2.weight", "tower", {"square"}),
        ("vision_tower.position_embedding", "tower", {"square"}),
        ("multi_modal_projector.linear_2.bias", "rows", {"square"}),
        ("image_newline", "rows", {"square"}),
        ("language_model.layers.0.down_proj.weight", "logits", {"text", "square"}),
        ("language_model.norm.weight", "logits", {"text", "square"}),
    ],
)
def test_a_perturbed_weight_is_found_in_its_stage(
    few_cases, monkeypatch, tiny_checkpoint: Path, name: str, stage: str, failing_cases: set[str]
) -> None:
    pytest.importorskip("transformers", minversion="5.10")
    perturb(monkeypatch, name)
    report = check(tiny_checkpoint)
    assert not report.ok
    assert report.first_failure.stage == stage
    assert {row.case for row in report.rows if not row.ok} == failing_cases
    assert report.as_dict()["first_failure"].endswith(f": {stage}")


def perturb(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Loads one weight wrong by 2 %."""
    take = CheckpointWeights.take

    def wrong(self: CheckpointWeights, wanted: str, **where: object) -> torch.Tensor:
        tensor = take(self, wanted, **where)
        return tensor * 1.02 if wanted == name else tensor

    monkeypatch.setattr(CheckpointWeights, "take", wrong)


def test_an_applied_post_layernorm_is_found(few_cases, monkeypatch, tiny_checkpoint: Path) -> None:
    pytest.importorskip("transformers", minversion="5.10")
    encode = SiglipTower.encode

    def with_norm(self: SiglipTower, *args: object) -> torch.Tensor:
        features = encode(self, *args)
        normed = torch.nn.functional.layer_norm(features, features.shape[-1:])
        return normed * POST_LAYERNORM["weight"] + POST_LAYERNORM["bias"]

    monkeypatch.setattr(SiglipTower, "encode", with_norm)
    report = check(tiny_checkpoint)
    assert (report.first_failure.case, report.first_failure.stage) == ("square", "tower")


def test_another_resize_is_found(monkeypatch, tiny_checkpoint: Path) -> None:
    pytest.importorskip("transformers", minversion="5.10")
    keep_cases(monkeypatch, "portrait")

    def bilinear(pixels: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
        size = (size_hw[1], size_hw[0])
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))

    monkeypatch.setattr(image, "resize", bilinear)
    report = check(tiny_checkpoint)
    failure = report.first_failure
    assert (failure.stage, failure.error, failure.note) == ("views", 5.0, "5 views")


def test_another_tokenization_is_found(few_cases, monkeypatch, tiny_checkpoint: Path) -> None:
    pytest.importorskip("transformers", minversion="5.10")
    encode = TextTokenizer.encode
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, text: encode(self, text.lower()))
    report = check(tiny_checkpoint)
    assert report.first_failure.stage == "prompt"
    # The reference runs over our ids, so that later stages are still compared.
    assert {row.stage for row in report.rows if not row.ok} == {"prompt"}


def test_a_request_that_transformers_refuses_is_a_failure(
    few_cases, monkeypatch, tiny_checkpoint: Path
) -> None:
    pytest.importorskip("transformers", minversion="5.10")
    run = Oracle.run

    def refuse(self: Oracle, case, *args: object) -> Stages:
        if case.name == "square":
            raise ValueError("Image features and image tokens do not match")
        return run(self, case, *args)

    monkeypatch.setattr(Oracle, "run", refuse)
    report = check(tiny_checkpoint)
    assert report.first_failure.stage == "run"
    assert "do not match" in report.first_failure.note
    assert report.as_dict()["rows"][-1]["error"] is None
    assert all(row.ok for row in report.rows if row.case == "text")


def test_what_transformers_cannot_load_says_so(monkeypatch, tiny_checkpoint: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.10")

    def fail(*args: object, **options: object) -> None:
        raise KeyError("rope_type")

    model = transformers.LlavaOnevisionForConditionalGeneration
    monkeypatch.setattr(model, "from_pretrained", fail)
    with pytest.raises(BackendError, match=r"transformers .* cannot load .*rope_type"):
        check(tiny_checkpoint)


def test_a_tensor_that_transformers_misses_says_so(monkeypatch, tiny_checkpoint: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.10")
    model = transformers.LlavaOnevisionForConditionalGeneration
    info = {"missing_keys": {"model.image_newline"}}
    monkeypatch.setattr(model, "from_pretrained", lambda *args, **options: (None, info))
    with pytest.raises(BackendError, match=r"finds no model\.image_newline"):
        check(tiny_checkpoint)


def test_cases_beyond_the_context_are_left_out(random_checkpoint) -> None:
    path = random_checkpoint(CheckpointSpec(max_position_embeddings=150))
    with load(path, device="cpu", dtype="float32") as engine:
        requests, notes = verify_module._requests(engine)
    kept = [case.name for case, _ in requests]
    assert kept == ["text", "square", "strip", "three images", "video"]
    assert len(notes) == 4
    assert "'landscape' was left out" in notes[0]


def test_our_weights_are_freed_before_the_reference_loads(tiny_checkpoint: Path) -> None:
    engine = load(tiny_checkpoint, device="cpu", dtype="float32")
    model = engine._model
    hidden = torch.randn(3, engine.config.text.hidden_size, generator=torch.manual_seed(0))
    with torch.inference_mode():
        expected = model.language_model.logits(hidden)
    parts = [weakref.ref(part) for part in (model, model.vision_tower)]
    parts.append(weakref.ref(model.language_model.layers[0].down_proj.weight))
    del model
    head = keep_head(engine)
    assert engine.closed
    assert [part() for part in parts] == [None, None, None]
    with torch.inference_mode():
        assert torch.equal(head(hidden), expected)


# Without transformers


@pytest.fixture
def with_stored(tmp_path: Path) -> Path:
    """A checkpoint with the references of the golden beside it."""
    fields = json.loads(GOLDEN.read_text())["spec"]
    path = make_checkpoint(tmp_path / "stored", CheckpointSpec(**fields))
    shutil.copy(GOLDEN, path / STORED_FILE)
    return path


def test_stored_references_stand_in(no_transformers, with_stored: Path) -> None:
    report = check(with_stored)
    assert report.ok, report.first_failure
    assert report.reference.startswith("stored references (transformers 5.")
    assert "cannot be imported" in report.notes[0]
    stages = [row.stage for row in report.rows if row.case == "three images"]
    assert stages == ["prompt", "views", "logits", "tokens"]
    assert len({row.case for row in report.rows}) == 9


@pytest.mark.parametrize(
    "name", ["vision_tower.layers.0.fc1.weight", "language_model.layers.1.o_proj.weight"]
)
def test_stored_references_find_a_perturbed_weight(
    no_transformers, monkeypatch, with_stored: Path, name: str
) -> None:
    perturb(monkeypatch, name)
    report = check(with_stored)
    assert not report.ok
    assert report.first_failure.stage == "logits"


def test_stored_references_find_other_pixels(no_transformers, monkeypatch, with_stored) -> None:
    monkeypatch.setattr(verify_module, "make_cases", lambda size: make_cases(size + 1))
    report = check(with_stored)
    failing = {row.stage for row in report.rows if not row.ok}
    assert {"views"} <= failing
    assert "resized by Pillow" in next(r.note for r in report.rows if r.stage == "views")


def test_stored_references_of_other_weights_are_refused(no_transformers, with_stored) -> None:
    make_checkpoint(with_stored, CheckpointSpec())
    with pytest.raises(CheckpointError, match=r"stored references .* Make them again"):
        check(with_stored)


@pytest.mark.parametrize("text", ["{}", '{"cases": {"text": {}}}', '{"cases": []}', "{"])
def test_damaged_stored_references_are_refused(no_transformers, with_stored, text: str) -> None:
    (with_stored / STORED_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=STORED_FILE):
        check(with_stored)


def test_stored_references_are_for_float32(no_transformers, with_stored: Path) -> None:
    with pytest.raises(OptionError, match=r"dtype='bfloat16' .* 'float32'"):
        check(with_stored, "bfloat16")


def test_without_any_reference(no_transformers, tiny_checkpoint: Path) -> None:
    with pytest.raises(BackendError, match=r"no stored references.*pip install 'transformers>=5"):
        check(tiny_checkpoint)


@pytest.mark.parametrize("version", ["4.57.1", "5.9.3"])
def test_old_transformers_is_no_reference(monkeypatch, tiny_checkpoint, version: str) -> None:
    old = SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(BackendError, match=rf"transformers {version} is too old"):
        check(tiny_checkpoint)


def test_original_layout_is_no_reference(random_checkpoint) -> None:
    with pytest.raises(BackendError, match="original layout, which transformers cannot load"):
        check(random_checkpoint(layout="orig"))
