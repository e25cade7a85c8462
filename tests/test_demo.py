"""The embedded demo model: it answers its samples, and it truly looks."""

import numpy as np
import pytest

import ovfast
from ovfast.demo_run import ask, demo_questions, samples_path
from tools import demo_scenes
from tools.evaluate_demo import evaluate


@pytest.fixture(scope="module")
def engine():
    with ovfast.load("demo") as engine:
        yield engine


def test_size_limits():
    total = sum(path.stat().st_size for path in samples_path().parent.rglob("*") if path.is_file())
    assert total <= 9e6


def test_parameters_and_heads(engine):
    config = engine.config
    assert config.num_parameters <= 4.5e6
    assert (config.text.head_dim, config.vision.head_dim) == (64, 72)


@pytest.mark.parametrize("entry", demo_questions(), ids=lambda entry: entry["question"])
def test_sample_questions(engine, entry):
    assert ask(engine, entry).correct


def test_the_answer_follows_the_picture(engine):
    """The same question about mirrored pictures gets mirrored answers."""
    scene = demo_scenes.blank(np.random.default_rng(1), (84, 84))
    star = demo_scenes.Thing("star", "red")
    demo_scenes.add_shape(np.random.default_rng(1), scene, star, (21, 21), 17)
    answers = [
        engine.generate("Describe the picture.", images=np.ascontiguousarray(picture)).text
        for picture in (scene.image, scene.image[:, ::-1], scene.image[::-1])
    ]
    places = ("top left", "top right", "bottom left")
    assert answers == [f"A red star at the {place}." for place in places]


def test_questions_over_a_handle(engine):
    """The sample questions about one picture, over its prefix, and its colours as options."""
    picture = samples_path() / "shapes.png"
    questions = ["What shapes are there?", "How many shapes?", "What is in the top left?"]
    with engine.encode(images=picture, keep="prefix") as handle:
        for question in questions:
            expected = engine.generate(question, images=picture)
            got = engine.generate(question, media=handle)
            assert (got.text, got.token_ids) == (expected.text, expected.token_ids)
            assert got.usage.cached_tokens == handle.num_prefix_tokens
            options = [expected.text, "A red cube.", "No.", "A pink star at the top left."]
            found = engine.choose(question, options, media=handle)
            assert found.index == 0
            assert found.probabilities[0] > 0.9
            for option, score in zip(options, found.scores, strict=True):
                alone = engine.score(question, [option], images=picture)[0]
                assert score.logprob == pytest.approx(alone.logprob, rel=1e-5)


def test_held_out_scenes(engine):
    """A sample of the evaluation whose full table README shows; bounds allow for 30 a kind."""
    rows = {row.kind: row.share for row in evaluate(engine, 30)}
    assert rows["single"] >= 0.65
    assert rows["several"] >= 0.9
    assert rows["video"] >= 0.7
    assert rows["detail"] >= 0.8
    assert rows["detail, base view only"] <= 0.3
