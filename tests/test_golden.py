"""Our outputs against those that transformers gave once; made by `python tools/make_golden.py`."""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from ovfast import Engine, load
from ovfast.verify import verify
from ovfast.verify.cases import Case, make_cases, prepare_case
from ovfast.verify.stored import STORED_FILE, Stored, digest, read_stored
from tests.support.checkpoints import CheckpointSpec

pytestmark = pytest.mark.golden

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = sorted((ROOT / "tests" / "golden").glob("*.json"))
IMAGE_SIZE = CheckpointSpec().image_size
CASES = {case.name: case for case in make_cases(IMAGE_SIZE)}
LOGITS_BOUND = 2e-4  # of the largest magnitude
REMAKE = "make the goldens again: python tools/make_golden.py"


class Golden(NamedTuple):
    stored: Stored
    engine: Engine
    same_checkpoint: bool


@pytest.fixture(scope="module", params=GOLDENS, ids=lambda file: file.stem)
def golden(request, random_checkpoint) -> Iterator[Golden]:
    stored = read_stored(request.param)
    fields = json.loads(request.param.read_text())["spec"]
    path = random_checkpoint(CheckpointSpec(**fields))
    with load(path, device="cpu", dtype="float32") as engine:
        yield Golden(stored, engine, digest(path) == stored.checkpoint)


def test_goldens_cover_every_case_and_both_heads() -> None:
    tied = {json.loads(file.read_text())["spec"].get("tie", True) for file in GOLDENS}
    assert tied == {True, False}
    for file in GOLDENS:
        stored = read_stored(file)
        assert stored.cases.keys() == CASES.keys()
        assert stored.made_with.keys() == {"command", "transformers", "torch", "pillow"}
    assert sum(file.stat().st_size for file in GOLDENS) < 200_000


def test_checkpoint_is_that_of_the_golden(golden: Golden) -> None:
    """Random checkpoints come from torch's generator and tokenizers' trainer; neither is promised
    to stay as it is.
    """
    assert golden.same_checkpoint, f"other weights or another tokenizer came out; {REMAKE}"


@pytest.mark.parametrize("name", CASES)
def test_case(golden: Golden, name: str) -> None:
    if not golden.same_checkpoint:
        pytest.skip(f"the golden is of another checkpoint; {REMAKE}")
    check(golden.engine, CASES[name], golden)


def check(engine: Engine, case: Case, golden: Golden) -> None:
    expected = golden.stored.cases[case.name]
    inputs = prepare_case(engine, case)
    assert inputs.input_ids.tolist() == expected.prompt_ids
    counts = [inputs.plans[span.plan_index].num_views for span in inputs.spans]
    hashes = [short_hash(views) for views in np.split(inputs.views, np.cumsum(counts)[:-1])]
    assert [digits for digits, count in zip(hashes, counts, strict=False)] == expected.views
    logits = engine.forward(inputs, positions=expected.positions)
    first = torch.tensor(expected.first_logits)
    largest = torch.tensor(expected.largest_logits)
    bound = LOGITS_BOUND * float(largest.max())
    assert float((logits[:, : first.shape[1]] - first).abs().max()) <= bound
    assert float((logits.abs().amax(1) - largest).abs().max()) <= bound
    output = engine.generate(inputs, max_new_tokens=len(expected.token_ids), ignore_eos=True)
    assert list(output.token_ids) == expected.token_ids


def short_hash(views: np.ndarray) -> str:
    return hashlib.sha256(views.tobytes()).hexdigest()[:16]


def test_demo_model_is_as_transformers_computed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = ROOT / "ovfast" / "demo"
    if not (demo / "config.json").exists():
        pytest.skip("this checkout holds no demo model")
    assert (demo / STORED_FILE).exists(), "run: python tools/make_golden.py --demo ovfast/demo"
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = verify("demo", device="cpu")
    assert report.ok, report.first_failure
