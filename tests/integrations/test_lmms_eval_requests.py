"""The lmms-eval classes with requests as lmms-eval makes them; `make test-integrations`."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ovfast
from ovfast.errors import MediaError, OptionError, PromptError
from tests.integrations.lmms_requests import (
    GREEDY,
    build,
    pictures_of,
    request,
    say,
    show,
    text,
    with_documents,
)
from tests.integrations.scene_files import held_out
from tools.evaluate_demo import ask

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed; make test-integrations", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's are not ours to mend

EVERYTHING = ovfast.VisualOptions()


@pytest.fixture(scope="module")
def engine() -> Iterator[ovfast.Engine]:
    with ovfast.load("demo") as engine:
        yield engine


@pytest.fixture(scope="module")
def chat() -> Iterator[Any]:
    model = build()
    yield model
    model.clean()


@pytest.fixture(scope="module")
def simple() -> Iterator[Any]:
    model = build(simple=True)
    yield model
    model.clean()


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


def test_view_options_reach_the_engine(engine: ovfast.Engine):
    model = with_documents(build(max_views=1), 3)
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


def test_tokens_by_policy(tiny_checkpoint: Path):
    """Two pictures of one view each: with the newline, without it, and with all views."""
    pictures = [Image.new("RGB", (84, 84)), Image.new("RGB", (84, 84))]
    tokens = {}
    for policy in ("paper", "lmms_eval", "anyres"):
        model = with_documents(build(checkpoint=str(tiny_checkpoint), token_policy=policy), 1)
        (result,) = model.generate_until(
            [request("generate_until", "", say(*show(pictures), text("Hi")), GREEDY)]
        )
        tokens[policy] = result.token_counts.input_tokens
        model.clean()
    assert tokens["paper"] == tokens["lmms_eval"] + 2
    assert tokens["anyres"] > tokens["paper"] + 2 * 36


def test_an_answer_ends_with_the_context():
    model = with_documents(build(max_seq_len=40), 1)
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


def test_refused_arguments(chat: Any, simple: Any):
    with pytest.raises(OptionError, match="conv_template"):
        build(conv_template="qwen_1_5")
    with pytest.raises(OptionError, match="Pass --batch_size N"):
        build(batch_size="auto")
    with pytest.raises(OptionError, match="Leave the flag out"):
        _ = chat.chat_template
    with pytest.raises(OptionError, match="Add --force_simple"):
        chat.loglikelihood([])
    without_document = request("loglikelihood", "", "One.")
    without_document.arguments = ("", "One.")
    with pytest.raises(OptionError, match="acc_mutual_info"):
        simple.loglikelihood([without_document])


def test_system_prompt(engine: ovfast.Engine, tmp_path: Path):
    (tmp_path / "system.txt").write_text("Be brief.\n")
    model = with_documents(build(system_prompt=tmp_path / "system.txt"), 1)
    (result,) = model.generate_until([request("generate_until", "", say(text("Hi")), GREEDY)])
    model.clean()
    expected = engine.generate("Hi", system="Be brief.", max_new_tokens=48)
    assert result.text == expected.text
    assert result.token_counts.input_tokens == expected.usage.prompt_tokens
