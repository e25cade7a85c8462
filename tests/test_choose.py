"""Choosing among options: each one's score, over one prefill and one pass for the rest."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovfast import (
    BackendError,
    CapacityError,
    ChoiceOutput,
    Engine,
    OptionError,
    PromptError,
    ScoreOutput,
    choices,
)
from ovfast.models.qwen2 import Qwen2
from ovfast.models.siglip import SiglipTower
from tests.support.calls import note_calls
from tests.support.engines import REQUESTS, free_slots, open_engine
from tests.support.interrupts import FILES, InterruptAtLine
from tests.support.prompts import IM_END
from tests.support.row_decoder import open_rows

# Of several tokens; some begin with others, some share a beginning, one is a single token.
OPTIONS = ["yes", "yes please", "yes pleased to", "no", "no way at all", "日本", "Z"]
OPENERS: dict[str, Callable[[Path], Engine]] = {
    "native": open_engine,
    "reference": lambda path: open_engine(path, backend="reference"),
    "rows": open_rows,
}


@pytest.fixture(scope="module")
def engines(tiny_checkpoint: Path) -> Iterator[dict[str, Engine]]:
    opened = {name: opener(tiny_checkpoint) for name, opener in OPENERS.items()}
    yield opened
    for engine in opened.values():
        engine.close()


@pytest.fixture
def engine(engines: dict[str, Engine]) -> Iterator[Engine]:
    yield engines["native"]
    assert free_slots(engines["native"]) == 1


def assert_is_scores(engine: Engine, found: ChoiceOutput, options: list[str], **ask: Any) -> None:
    """Each option as `score` has it alone, to 1e-5 of it."""
    assert len(found.scores) == len(options)
    for option, score in zip(options, found.scores, strict=True):
        alone = engine.score(continuations=[option], **ask)[0]
        assert (score.token_ids, score.is_greedy) == (alone.token_ids, alone.is_greedy)
        np.testing.assert_allclose(score.token_logprobs, alone.token_logprobs, rtol=1e-5)
        assert score.logprob == pytest.approx(alone.logprob, rel=1e-5)
        assert score.mean_logprob == pytest.approx(alone.mean_logprob, rel=1e-5)


@pytest.mark.parametrize("include_terminator", [False, True])
@pytest.mark.parametrize("name", ["text", "image"])
@pytest.mark.parametrize("backend", OPENERS)
def test_options_are_scored_as_alone(
    engines: dict[str, Engine], backend: str, name: str, include_terminator: bool
) -> None:
    ask = {**REQUESTS[name], "include_terminator": include_terminator}
    engine = engines[backend]
    found = engine.choose(options=OPTIONS, **ask)
    assert_is_scores(engine, found, OPTIONS, **ask)
    assert free_slots(engine) == 1


def test_probabilities(engine: Engine) -> None:
    for normalize, key in (("sum", "logprob"), ("mean", "mean_logprob")):
        found = engine.choose(**REQUESTS["image"], options=OPTIONS, normalize=normalize)
        weights = np.exp([getattr(score, key) for score in found.scores])
        np.testing.assert_allclose(found.probabilities, weights / weights.sum(), rtol=1e-12)
        assert math.fsum(found.probabilities) == pytest.approx(1)
        assert found.index == int(weights.argmax())
        assert found.choice == OPTIONS[found.index]
    sums = engine.choose(**REQUESTS["image"], options=OPTIONS)
    means = engine.choose(**REQUESTS["image"], options=OPTIONS, normalize="mean")
    assert sums.scores == means.scores
    assert sums.choice != means.choice, "long options lose by their sum alone"


def test_numbers_by_hand() -> None:
    """A beginning of another option counts once; means do not favour the short."""

    def score(*likelihoods: float, ids: tuple[int, ...]) -> ScoreOutput:
        logprobs = tuple(map(math.log, likelihoods))
        total = sum(logprobs)
        return ScoreOutput(total, total / len(ids), ids, logprobs, is_greedy=False)

    scores = [
        score(0.5, ids=(1,)),
        score(0.5, 0.8, ids=(1, 3)),
        score(0.1, 0.9, 0.9, ids=(2, 1, 3)),
        score(0.5, 0.8, 0.9, ids=(1, 3, 4)),
    ]
    texts = ["a", "ac", "bac", "acd"]
    found = choices.choose_best(texts, scores, "sum")
    assert found.label_mass == pytest.approx(0.5 + 0.081)
    assert (found.choice, found.index) == ("a", 0)
    assert found.probabilities == pytest.approx([x / 1.341 for x in (0.5, 0.4, 0.081, 0.36)])
    found = choices.choose_best(texts, scores, "mean")
    assert (found.choice, found.index) == ("acd", 3)
    weights = [0.5, 0.4**0.5, 0.081 ** (1 / 3), 0.36 ** (1 / 3)]
    assert found.probabilities == pytest.approx([w / sum(weights) for w in weights])
    assert found.label_mass == pytest.approx(0.581)
    tiny = [score(1e-300, 1e-300, ids=(n, 9)) for n in range(2)]
    assert choices.choose_best(["a", "b"], tiny, "sum").probabilities == (0.5, 0.5)
    broken = [score(0.5, ids=(1,)), ScoreOutput(math.nan, math.nan, (2,), (math.nan,), False)]
    with pytest.raises(BackendError, match=r"nan.*expected finite numbers"):
        choices.choose_best(["a", "b"], broken, "sum")


def test_label_mass(engine: Engine) -> None:
    """The probability that one of the options comes next, each beginning counted once."""
    inputs = engine.prepare("Which?")
    following = engine.forward(inputs, positions=[inputs.num_tokens - 1])[0].softmax(0)
    letters = engine.choose(inputs, ["A", "B", "C"])
    ids = [score.token_ids for score in letters.scores]
    assert [len(own) for own in ids] == [1, 1, 1]
    assert letters.label_mass == pytest.approx(float(sum(following[own[0]] for own in ids)))
    longer = engine.choose(inputs, ["A", "B", "C", "A then", "B then", "C then"])
    assert longer.label_mass == pytest.approx(letters.label_mass)
    tokens = [score.token_ids for score in longer.scores]
    assert tokens[3][:1] == tokens[0], "not the beginning of it: the test tests nothing"
    ended = engine.choose(inputs, ["A", "A then"], include_terminator=True)
    assert ended.label_mass == pytest.approx(sum(math.exp(s.logprob) for s in ended.scores))


def test_all_first_tokens_together_are_everything(engine: Engine) -> None:
    """Every id that text has, as an option: the mass is what special and unknown ids leave."""
    inputs = engine.prepare("Which?")
    tokenizer = engine._processor
    texts = {}
    for token_id in range(engine._vocab_size):
        text = tokenizer.decode([token_id])
        if text and tokenizer.encode_text(text) == [token_id]:
            texts[text] = token_id
    found = engine.choose(inputs, list(texts))
    following = engine.forward(inputs, positions=[inputs.num_tokens - 1])[0].softmax(0)
    single = [s for s in found.scores if len(s.token_ids) == 1]
    assert len(single) > 250
    assert found.label_mass == pytest.approx(
        float(following[[s.token_ids[0] for s in single]].sum())
    )
    assert found.label_mass < 1


def rows_run(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Views, rows of prefills and rows of branches, as they come."""

    def lengths(model: Qwen2, branches: Any, *_: Any) -> list[int]:
        return [len(branch) for branch in branches]

    return {
        "views": note_calls(monkeypatch, SiglipTower, "encode", lambda self, v, *_: v.num_views),
        "prefill": note_calls(monkeypatch, Qwen2, "prefill_hidden", lambda self, e, *_: len(e)),
        "branches": note_calls(monkeypatch, Qwen2, "branch_hidden", lengths),
    }


def test_what_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prefill of prompt and common beginning; one pass for the rest, no row of it twice."""
    inputs = engine.prepare(**REQUESTS["image"])
    encode = engine._processor.encode_text
    seen = rows_run(monkeypatch)
    letters = ["A", "B", "C", "D"]
    engine.choose(inputs, letters)
    assert seen == {"views": [5], "prefill": [inputs.num_tokens], "branches": []}
    seen["views"].clear()
    seen["prefill"].clear()
    answers = [f"The answer is {letter}" for letter in letters]
    common = len(encode(answers[0])) - 1
    assert [encode(a)[:common] for a in answers] == [encode(answers[0])[:common]] * 4
    engine.choose(inputs, answers)
    assert seen == {"views": [5], "prefill": [inputs.num_tokens + common], "branches": []}
    found = engine.choose(inputs, OPTIONS)
    tails = {score.token_ids[:-1] for score in found.scores} - {()}
    longest = [t for t in tails if not any(o != t and o[: len(t)] == t for o in tails)]
    assert len(longest) < len(tails)
    (sizes,) = seen["branches"]
    assert sorted(sizes) == sorted(map(len, longest))


def test_many_options_go_in_groups(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.choose(**REQUESTS["image"], options=OPTIONS)
    seen = rows_run(monkeypatch)
    monkeypatch.setattr(choices, "BRANCH_ROWS", 3)
    found = engine.choose(**REQUESTS["image"], options=OPTIONS)
    assert len(seen["branches"]) > 1
    assert [s.token_ids for s in found.scores] == [s.token_ids for s in expected.scores]
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=1e-5)


def test_order_does_not_matter(engine: Engine) -> None:
    forward = engine.choose(**REQUESTS["image"], options=iter(OPTIONS))
    backward = engine.choose(**REQUESTS["image"], options=OPTIONS[::-1])
    assert forward.choice == backward.choice
    np.testing.assert_allclose(forward.probabilities, backward.probabilities[::-1], rtol=1e-5)
    assert forward.label_mass == pytest.approx(backward.label_mass, rel=1e-5)


def test_options_that_merge_with_the_prompt(engine: Engine) -> None:
    """A raw prompt that ends inside a word: all options may go on with it, or none."""
    inputs = engine.prepare("The image show", raw=True)
    options = ["s a red circle", "s a blue square"]
    found = engine.choose(inputs, options)
    full = [engine._processor.encode_text("The image show" + option) for option in options]
    assert [list(s.token_ids) for s in found.scores] == [ids[inputs.num_tokens :] for ids in full]
    assert full[0][: inputs.num_tokens] != inputs.input_ids.tolist()
    assert_is_scores(engine, found, options, prompt=inputs)
    with pytest.raises(PromptError, match=r"'s a red circle' and ' a'.*different prompts.*Leave"):
        engine.choose(inputs, ["s a red circle", " a"])


def test_as_dict(engine: Engine) -> None:
    found = engine.choose("Q", ["yes", "no"])
    told = json.loads(json.dumps(found.as_dict()))
    assert (told["choice"], told["index"]) == (found.choice, found.index)
    assert told["scores"][1]["logprob"] == found.scores[1].logprob


def test_bad_arguments(engine: Engine) -> None:
    for bad in ("yes", None, 3, [1, 2], ["a", None]):
        with pytest.raises(OptionError, match=r"options=.*expected a list of str"):
            engine.choose("Q", bad)
    for bad in ([], ["a"], ["a", "b", "a"]):
        with pytest.raises(OptionError, match=r"options=.*at least two, all different"):
            engine.choose("Q", bad)
    with pytest.raises(OptionError, match=r"same tokens.*Leave one out"):
        engine.choose("Q", ["decomposed e\u0301", "decomposed \u00e9"])
    with pytest.raises(OptionError, match=r"normalize='max'; expected 'sum' or 'mean'"):
        engine.choose("Q", ["a", "b"], normalize="max")
    with pytest.raises(PromptError, match="adds no token"):
        engine.choose("Q", ["", "a"])
    assert engine.choose("Q", ["", "a"], include_terminator=True).scores[0].token_ids[0] == IM_END
    with pytest.raises(PromptError, match=r"choose\(\) got a batch"):
        engine.choose(["Q", "R"], ["a", "b"])
    with pytest.raises(CapacityError, match=r"the engine holds 1024.*Shorten"):
        engine.choose("Q", ["a", "word " * 1024])


def test_a_slot_of_ones_own_stream(engine: Engine) -> None:
    stream = engine.stream("Hi", ignore_eos=True)
    next(stream)
    with pytest.raises(CapacityError, match=r"this thread has left open.*Finish or close"):
        engine.choose("Q", ["a", "b"])
    stream.close()


@pytest.mark.slow
def test_ctrl_c_at_many_lines(engine: Engine) -> None:
    inputs = engine.prepare(**REQUESTS["text"])
    expected = engine.choose(inputs, OPTIONS[:4])
    line = 0
    while True:
        line += 3  # every line takes ten seconds
        try:
            with InterruptAtLine(line, (*FILES, "choices.py", "scoring.py")):
                engine.choose(inputs, OPTIONS[:4])
            break
        except KeyboardInterrupt as interrupt:
            where = str(interrupt)
        assert engine.choose(inputs, OPTIONS[:4]) == expected, where
        assert free_slots(engine) == 1, where
    assert line > 100
