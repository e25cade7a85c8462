"""The lmms-eval models, through the real lmms-eval; `make test-integrations-eval` has it.

Whole runs of its command line over demo scenes must give the answers and scores of
`tools/train_demo.py --evaluate`; losses are compared with lmms-eval's own Hugging Face path.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovfast
from ovfast.errors import MediaError, OptionError, PromptError
from tests.integrations.hf_path import load_hf
from tests.integrations.scene_files import held_out, with_choices, write_lines, write_scenes
from tools.demo_scenes import MAKERS
from tools.evaluate_demo import ask, evaluate

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed; make test-integrations-eval", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's are not ours to mend

COUNT = 20
EVERYTHING = ovfast.VisualOptions()
TASKS = Path(__file__).parent / "lmms_tasks"
KINDS = tuple(MAKERS)
GREEDY = {"max_new_tokens": 48, "until": []}


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


# From here on the classes themselves, with requests as lmms-eval makes them.

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make() -> Make:
    """make(simple, checkpoint, batch_size, **arguments) -> a model as lmms-eval builds it."""
    from lmms_eval.models import get_model

    def build(*, simple: bool = False, checkpoint: str = "demo", batch_size: int = 3, **kw: Any):
        model = get_model("ovfast", force_simple=simple)
        arguments = ",".join(f"{name}={value}" for name, value in kw.items())
        return model.create_from_arg_string(
            f"pretrained={checkpoint}" + (f",{arguments}" if arguments else ""),
            {"batch_size": batch_size, "max_batch_size": None, "device": None},
        )

    return build


@pytest.fixture(scope="module")
def chat(make: Make) -> Iterator[Any]:
    model = make()
    yield model
    model.clean()


@pytest.fixture(scope="module")
def simple(make: Make) -> Iterator[Any]:
    model = make(simple=True)
    yield model
    model.clean()


def request(kind: str, *arguments: Any, document: int = 0, **metadata: Any) -> Any:
    from lmms_eval.api.instance import Instance

    place = {"task": "scenes", "doc_id": document, "repeats": 1}
    return Instance(kind, (*arguments, document, "scenes", "test"), 0, place | metadata)


def say(*content: dict[str, Any]) -> Callable[[Any], list[dict[str, Any]]]:
    return lambda document: [{"role": "user", "content": list(content)}]


def show(pictures: list[Any]) -> list[dict[str, Any]]:
    return [{"type": "image", "url": picture} for picture in pictures]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def pictures_of(sample: Any) -> list[Image.Image]:
    return [Image.fromarray(scene.image) for scene in sample.scenes]


def with_documents(model: Any, count: int) -> Any:
    model.task_dict = {"scenes": {"test": list(range(count))}}
    return model


def test_mixed_arguments_keep_the_order(chat: Any, engine: ovfast.Engine):
    """Each request has its own generation arguments; results come back where they belong."""
    samples = held_out("single", 8)
    kwargs = [GREEDY | {"max_new_tokens": 2 + number % 3} for number in range(8)]
    kwargs[5] = GREEDY | {"until": [" "]}
    with_documents(chat, 8)
    requests = [
        request(
            "generate_until",
            "context",
            say(*show(pictures_of(sample)), text(sample.questions[0][0])),
            gen_kwargs,
            document=number,
        )
        for number, (sample, gen_kwargs) in enumerate(zip(samples, kwargs, strict=True))
    ]
    hooked: list[Any] = []
    chat.set_cache_hook(type("Hook", (), {"add_partial": lambda self, *a: hooked.append(a)})())
    results = chat.generate_until(requests)
    expected = [
        engine.generate(
            sample.questions[0][0],
            images=[scene.image for scene in sample.scenes],
            max_new_tokens=gen_kwargs["max_new_tokens"],
            stop=gen_kwargs["until"],
        )
        for sample, gen_kwargs in zip(samples, kwargs, strict=True)
    ]
    assert [result.text for result in results] == [output.text for output in expected]
    counts = [(r.token_counts.input_tokens, r.token_counts.output_tokens) for r in results]
    usages = [output.usage for output in expected]
    assert counts == [(usage.prompt_tokens, usage.completion_tokens) for usage in usages]
    assert hooked == [
        ("generate_until", ("context", gen_kwargs), output.text)
        for gen_kwargs, output in zip(kwargs, expected, strict=True)
    ]


def test_throughput_history(chat: Any):
    from lmms_eval.models.model_utils.gen_metrics import (
        get_logged_metrics_history,
        reset_logged_metrics,
    )

    reset_logged_metrics()
    with_documents(chat, 1)
    (result,) = chat.generate_until([request("generate_until", "", say(text("Hi")), GREEDY)])
    (metrics,) = get_logged_metrics_history()
    assert metrics["total_gen_tokens"] == result.token_counts.output_tokens > 1
    assert 0 < metrics["ttft"] < metrics["total_elapsed_time"]
    assert 0 < metrics["tpot"] < 1
    assert metrics["rank"] == 0


def test_sampling_follows_the_seed_of_lmms_eval(chat: Any):
    import torch

    with_documents(chat, 1)
    sampled = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 12}
    requests = 4 * [request("generate_until", "", say(text("Describe the picture.")), sampled)]

    def draw(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return [result.text for result in chat.generate_until(requests)]

    first = draw(1)
    assert len(set(first)) == 4  # repeats are not copies
    assert draw(1) == first
    assert draw(2) != first


def test_view_options_reach_the_engine(make: Make, engine: ovfast.Engine):
    model = with_documents(make(max_views=1), 3)
    samples = held_out("detail", 3)
    results = model.generate_until(
        [
            request(
                "generate_until",
                "",
                say(*show(pictures_of(sample)), text(sample.questions[0][0])),
                GREEDY,
                document=number,
            )
            for number, sample in enumerate(samples)
        ]
    )
    model.clean()
    base_only = ovfast.VisualOptions(max_views=1)
    assert [r.text for r in results] == [ask(engine, sample, base_only) for sample in samples]
    tokens = [result.token_counts.input_tokens for result in results]
    everything = engine.prepare(samples[0].questions[0][0], images=samples[0].scenes[0].image)
    assert tokens[0] < everything.num_tokens


def test_tokens_by_policy(make: Make, tiny_checkpoint: Path):
    """Two pictures of one view each: with the newline, without it, and with all views."""
    pictures = [Image.new("RGB", (84, 84)), Image.new("RGB", (84, 84))]
    tokens = {}
    for policy in ("paper", "lmms_eval", "anyres"):
        model = with_documents(make(checkpoint=str(tiny_checkpoint), token_policy=policy), 1)
        (result,) = model.generate_until(
            [request("generate_until", "", say(*show(pictures), text("Hi")), GREEDY)]
        )
        tokens[policy] = result.token_counts.input_tokens
        model.clean()
    assert tokens["paper"] == tokens["lmms_eval"] + 2
    assert tokens["anyres"] > tokens["paper"] + 2 * 36


def test_an_answer_ends_with_the_context(make: Make):
    model = with_documents(make(max_seq_len=40), 1)
    endless = {"max_new_tokens": 49152, "do_sample": True, "temperature": 50.0, "seed": 1}
    (result,) = model.generate_until([request("generate_until", "", say(text("Hi")), endless)])
    counts = result.token_counts
    assert 10 < counts.input_tokens + counts.output_tokens <= 40
    model.clean()


def test_frames_as_pictures(simple: Any, engine: ovfast.Engine):
    sample = held_out("video", 1)[0]
    frames = pictures_of(sample)
    with_documents(simple, 1)
    metadata = {"task_type": "video", "sample_frames": len(frames)}
    question = sample.questions[0][0]
    (result,) = simple.generate_until(
        [request("generate_until", question, GREEDY, lambda document: frames, **metadata)]
    )
    assert result.text == ask(engine, sample, EVERYTHING)


def test_likelihoods_need_no_order(simple: Any, engine: ovfast.Engine):
    """Two documents' choices, mixed: each pair belongs to its request, and unpacks as a pair."""
    samples = held_out("single", 2)
    with_documents(simple, 2)
    asked = [(0, "A star."), (1, "A star."), (0, "One."), (1, "Shapes: two."), (0, "")]
    requests = [
        request(
            "loglikelihood",
            "What?",
            # A target may be a function of the document.
            words if words != "One." else lambda document: "One.",
            lambda document: pictures_of(samples[document]),
            document=document,
        )
        for document, words in asked
    ]
    results = simple.loglikelihood(requests)
    for (document, words), (loss, greedy) in zip(asked, results, strict=True):
        images = [scene.image for scene in samples[document].scenes]
        (score,) = engine.score("What?", [words], images=images, include_terminator=True)
        assert loss == pytest.approx(-score.mean_logprob, rel=1e-5)
        assert greedy == score.is_greedy


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([{"type": "audio", "url": "a.wav"}], PromptError, "'audio'"),
        ([{"type": "video", "url": "a.mp4", "start_time": 1.0}], PromptError, "video_start"),
        ([{"type": "image", "url": "missing.png"}], MediaError, "missing.png"),
    ],
)
def test_unknown_content_is_refused(chat: Any, content: Any, error: type, message: str):
    with_documents(chat, 3)
    good = request("generate_until", "", say(text("Hi")), GREEDY)
    bad = request("generate_until", "", say(*content, text("Hi")), GREEDY, document=2)
    with pytest.raises(error, match=message) as caught:
        chat.generate_until([good, bad])
    assert caught.value.__notes__ == ["document 2 of task scenes"]


def test_what_is_wrong_is_said_before_anything_runs(chat: Any):
    with_documents(chat, 2)
    asked: list[int] = []
    good = request("generate_until", "", asked.append, GREEDY)
    bad = request("generate_until", "", say(text("Hi")), GREEDY | {"num_beams": 4}, document=1)
    with pytest.raises(OptionError, match="num_beams=4"):
        chat.generate_until([good, bad])
    assert asked == []


def test_what_has_no_effect_is_said(chat: Any, caplog: pytest.LogCaptureFixture):
    with_documents(chat, 1)
    kwargs = GREEDY | {"image_aspect_ratio": "original", "max_new_tokens": 1}
    chat.generate_until(2 * [request("generate_until", "", say(text("Hi")), kwargs)])
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    (message,) = [message for message in warned if "image_aspect_ratio='original'" in message]
    assert "token_policy" in message


def test_refused_arguments(make: Make, chat: Any, simple: Any):
    with pytest.raises(OptionError, match="conv_template"):
        make(conv_template="qwen_1_5")
    with pytest.raises(OptionError, match="Pass --batch_size N"):
        make(batch_size="auto")
    with pytest.raises(OptionError, match="Leave the flag out"):
        _ = chat.chat_template
    with pytest.raises(OptionError, match="Add --force_simple"):
        chat.loglikelihood([])
    without_document = request("loglikelihood", "", "One.")
    without_document.arguments = ("", "One.")
    with pytest.raises(OptionError, match="acc_mutual_info"):
        simple.loglikelihood([without_document])


def test_system_prompt(make: Make, engine: ovfast.Engine, tmp_path: Path):
    (tmp_path / "system.txt").write_text("Be brief.\n")
    model = with_documents(make(system_prompt=tmp_path / "system.txt"), 1)
    (result,) = model.generate_until([request("generate_until", "", say(text("Hi")), GREEDY)])
    model.clean()
    expected = engine.generate("Hi", system="Be brief.", max_new_tokens=48)
    assert result.text == expected.text
    assert result.token_counts.input_tokens == expected.usage.prompt_tokens


# lmms-eval's own Hugging Face path, on a random checkpoint.

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*hw, 3), np.uint8))
    for seed, hw in enumerate([(80, 120), (200, 90)])
]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_losses_of_the_hugging_face_path(
    count: int, make: Make, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where llava_hf computes at all (hf_path.py), it gives our losses."""
    theirs = load_hf(tiny_checkpoint, monkeypatch, chat=False, repaired=True)
    ours = make(simple=True, checkpoint=str(tiny_checkpoint), token_policy="anyres")
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
    count: int, make: Make, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    theirs = load_hf(tiny_checkpoint, monkeypatch, chat=True, repaired=False)
    ours = make(checkpoint=str(tiny_checkpoint), token_policy="anyres")
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
