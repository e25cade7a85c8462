"""Whole runs of lmms-eval with ovfast, and the numbers of its own Hugging Face path.

`make test-integrations` has lmms-eval. Runs over demo scenes must give the answers and scores
of `tools/train_demo.py --evaluate`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovfast
from tests.integrations.hf_path import load_hf
from tests.integrations.lmms_requests import build, request, say, show, text, with_documents
from tests.integrations.scene_files import held_out, with_choices, write_lines, write_scenes
from tools.demo_scenes import MAKERS
from tools.evaluate_demo import ask, evaluate

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed; make test-integrations", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's are not ours to mend

COUNT = 20
EVERYTHING = ovfast.VisualOptions()
TASKS = Path(__file__).parent / "lmms_tasks"
KINDS = tuple(MAKERS)


@pytest.fixture(scope="module")
def engine() -> Iterator[ovfast.Engine]:
    with ovfast.load("demo") as engine:
        yield engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data sets of the tasks in TASKS."""
    folder = tmp_path_factory.mktemp("scenes")
    documents = {kind: write_scenes(folder, held_out(kind, COUNT), kind) for kind in KINDS}
    write_lines(folder / "choice.jsonl", with_choices(documents["single"]))
    write_lines(folder / "rounds.jsonl", documents["single"][:4] + documents["several"][:2])
    return folder


class Run:
    """What a run of lmms-eval's command line wrote."""

    def __init__(self, folder: Path, name: str, tasks: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "lmms_eval", "--model", "ovfast", "--tasks", tasks]
        command += ["--include_path", str(TASKS), "--output_path", name, "--log_samples"]
        offline = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *arguments],
            cwd=folder,
            env=os.environ | offline,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.output = done.stdout + done.stderr
        self._folder = folder / name
        (results,) = self._folder.rglob("*results.json")
        self.results = json.loads(results.read_text())["results"]

    def responses(self, task: str) -> list[Any]:
        """Of each document, in their order."""
        (path,) = self._folder.rglob(f"*samples_{task}.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]


ALL = ",".join(f"scenes_{name}" for name in (*KINDS, "rounds"))


@pytest.fixture(scope="module")
def chat_run(folder: Path) -> Run:
    return Run(folder, "chat", ALL, "--model_args", "pretrained=demo", "--batch_size", "4")


@pytest.fixture(scope="module")
def simple_run(folder: Path) -> Run:
    arguments = ("--model_args", "pretrained=demo", "--batch_size", "3", "--force_simple")
    return Run(folder, "simple", f"{ALL},scenes_choice", *arguments)


@pytest.fixture(scope="module")
def runs(chat_run: Run, simple_run: Run) -> dict[str, Run]:
    return {"chat": chat_run, "simple": simple_run}


@pytest.fixture(scope="module")
def scores(engine: ovfast.Engine) -> dict[str, float]:
    """Of `tools/train_demo.py --evaluate` on the same scenes."""
    return {row.kind: row.share for row in evaluate(engine, COUNT)}


@pytest.mark.parametrize("form", ["chat", "simple"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_scores(
    form: str,
    kind: str,
    runs: dict[str, Run],
    engine: ovfast.Engine,
    scores: dict[str, float],
):
    expected = [ask(engine, sample, EVERYTHING) for sample in held_out(kind, COUNT)]
    assert runs[form].responses(f"scenes_{kind}") == expected
    assert runs[form].results[f"scenes_{kind}"]["exact,none"] == pytest.approx(scores[kind])


def documents(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("form", ["chat", "simple"])
def test_rounds(form: str, runs: dict[str, Run], folder: Path, engine: ovfast.Engine):
    """Each round is asked alone: the task hands no earlier turn on."""
    asked = documents(folder, "rounds")
    expected = [
        [
            engine.generate(question, images=images, max_new_tokens=48).text
            for question in document["questions"]
        ]
        for document in asked
        for images in [[folder / name for name in document["images"]]]
    ]
    assert max(map(len, expected)) > 2
    assert runs[form].responses("scenes_rounds") == expected


def test_multiple_choice(simple_run: Run, folder: Path, engine: ovfast.Engine):
    """Losses of all choices over one prefill, and the score of the smallest ones."""
    asked = documents(folder, "choice")
    right = []
    for document, logged in zip(asked, simple_run.responses("scenes_choice"), strict=True):
        images = [folder / name for name in document["images"]]
        scored = engine.score(
            document["questions"][0], document["choices"], images=images, include_terminator=True
        )
        losses = [-score.mean_logprob for score in scored]
        assert [float(loss) for loss, _ in logged] == pytest.approx(losses, rel=1e-5)
        assert [greedy == "True" for _, greedy in logged] == [s.is_greedy for s in scored]
        right.append(int(np.argmin(losses)) == document["gold"])
    assert len(right) >= COUNT // 2
    assert simple_run.results["scenes_choice"]["acc,none"] == pytest.approx(np.mean(right))
    assert np.mean(right) > 0.8  # and so no ranking is upside down


def test_metrics_are_logged(chat_run: Run):
    assert "ttft" in chat_run.output
    assert "total_gen_tokens" in chat_run.output


# lmms-eval's own Hugging Face path, on a random checkpoint.

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*hw, 3), np.uint8))
    for seed, hw in enumerate([(80, 120), (200, 90)])
]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_losses_of_the_hugging_face_path(
    count: int, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where llava_hf computes at all (hf_path.py), it gives our losses."""
    theirs = load_hf(tiny_checkpoint, monkeypatch, chat=False, repaired=True)
    ours = build(simple=True, checkpoint=str(tiny_checkpoint), token_policy="anyres")
    pictures = PICTURES[:count]
    context = "\nWhat is it?" if count == 0 else "What is it?"  # its text has no pictures, one line
    losses = {}
    for name, model, words in (("ours", ours, context), ("theirs", theirs, "What is it?")):
        requests = [
            request("loglikelihood", words, target, lambda document: pictures)
            for target in ("a cat", " a dog", "no")
        ]
        losses[name] = [loss for loss, _ in with_documents(model, 1).loglikelihood(requests)]
    ours.clean()
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-5)
    assert len(set(losses["ours"])) == 3


@pytest.mark.parametrize("count", [0, 1])
def test_the_hugging_face_path_as_it_is(
    count: int, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    """When this fails, lmms-eval or transformers has mended it: hf_path.py can go."""
    theirs = load_hf(tiny_checkpoint, monkeypatch, chat=False, repaired=False)
    pictures = PICTURES[:count]
    asked = request("loglikelihood", "What?", "no", lambda document: pictures)
    with pytest.raises((ValueError, IndexError)):
        with_documents(theirs, 1).loglikelihood([asked])


@pytest.mark.parametrize("count", [1, 2])
def test_answers_of_the_hugging_face_path(
    count: int, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    theirs = load_hf(tiny_checkpoint, monkeypatch, chat=True, repaired=False)
    ours = build(checkpoint=str(tiny_checkpoint), token_policy="anyres")
    questions = ["What is it?", "Describe.", "How many?"]
    texts = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        requests = [
            request(
                "generate_until",
                "",
                say(*show(PICTURES[:count]), text(question)),
                {"max_new_tokens": 8},
            )
            for question in questions
        ]
        texts[name] = [result.text for result in with_documents(model, 1).generate_until(requests)]
    ours.clean()
    assert texts["ours"] == texts["theirs"]
    assert all(texts["ours"])
