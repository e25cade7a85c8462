"""Every field of SamplingParams does what it says, end to end: tokens, text, stops, randomness."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ovfast import Engine, GenerationOutput, ModelInputs, OptionError, SamplingParams
from tests.support.engines import REQUESTS, free_slots, logprobs_of, open_engine, script_tokens
from tests.support.prompts import IM_END

NUM_TOKENS = 24
IMAGE = REQUESTS["image"]
HOT = {"temperature": 5.0, "seed": 11, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
MULTI_BYTE = "日本 naïve 🧑‍🚀 ок"


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path) -> Iterator[Engine]:
    with open_engine(tiny_checkpoint, max_batch_size=2, max_seq_len=600) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    yield shared
    assert free_slots(shared) == 2


@pytest.fixture
def greedy(engine: Engine) -> tuple[int, ...]:
    return engine.generate(**IMAGE, max_new_tokens=NUM_TOKENS, ignore_eos=True).token_ids


def ids_of(engine: Engine, text: str) -> list[int]:
    return engine._processor.encode_text(text)


def next_token_probabilities(engine: Engine, inputs: ModelInputs) -> torch.Tensor:
    """After masking the forbidden ids."""
    logits = engine.forward(inputs, positions=[inputs.num_tokens - 1])[0]
    logits[torch.from_numpy(engine._processor.forbidden_ids)] = -math.inf
    return logits.softmax(0)


def test_max_new_tokens(engine: Engine, greedy: tuple[int, ...]) -> None:
    for count in (1, 7):
        output = engine.generate(**IMAGE, max_new_tokens=count, ignore_eos=True)
        assert (output.token_ids, output.finish_reason) == (greedy[:count], "length")


def test_none_goes_on_to_a_stop_or_to_capacity(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = engine.generate("Hi", ignore_eos=True)
    assert full.finish_reason == "length"
    assert full.usage.prompt_tokens + full.usage.completion_tokens == 600
    script_tokens(monkeypatch, [5] * 300 + [IM_END])
    output = engine.generate("Hi")
    assert (len(output.token_ids), output.finish_reason) == (301, "stop")


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_narrowing_a_hot_distribution_gives_greedy(
    engine: Engine, greedy: tuple[int, ...], narrow: dict
) -> None:
    assert engine.generate(**IMAGE, **HOT).token_ids != greedy
    assert engine.generate(**IMAGE, **HOT, **narrow).token_ids == greedy


@pytest.mark.parametrize(
    ("narrow", "count"), [({"top_k": 3}, 3), ({"top_p": 0.4}, 3), ({"min_p": 0.5}, 5)]
)
def test_narrowing_keeps_the_likely(engine: Engine, narrow: dict, count: int) -> None:
    inputs = engine.prepare("What?")
    probabilities = next_token_probabilities(engine, inputs)
    values, ids = probabilities.sort(descending=True)
    assert values[:2].sum() < 0.4 < values[:3].sum()
    assert values[4] > 0.5 * values[0] > values[5]
    drawn = {
        engine.generate(inputs, temperature=1.0, max_new_tokens=1, seed=seed, **narrow).token_ids[0]
        for seed in range(60)
    }
    assert drawn == set(ids[:count].tolist())


def test_temperature_1_is_the_model_s_own_distribution(engine: Engine) -> None:
    inputs = engine.prepare("Hi")
    probabilities = next_token_probabilities(engine, inputs)
    num_draws = 300
    drawn = Counter(
        engine.generate(inputs, temperature=1.0, seed=seed, max_new_tokens=1).token_ids[0]
        for seed in range(num_draws)
    )
    for token_id in probabilities.topk(5).indices.tolist():
        p = float(probabilities[token_id])
        spread = math.sqrt(num_draws * p * (1 - p))
        assert abs(drawn[token_id] - num_draws * p) <= 4 * spread + 1, token_id


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_as_transformers(
    engine: Engine, tiny_checkpoint: Path, greedy: tuple[int, ...], penalty: float
) -> None:
    """Over prompt and output; the prompt's placeholders count as seen there too."""
    from tests.support import hf
    from tests.support.requests import Request

    inputs = engine.prepare(**IMAGE)
    request = Request(
        inputs.input_ids, inputs.spans, inputs.plans, inputs.views, (IMAGE["images"],)
    )
    expected = hf.greedy(
        hf.load_model(tiny_checkpoint),
        hf.make_inputs(tiny_checkpoint, request),
        NUM_TOKENS,
        repetition_penalty=penalty,
        suppress_tokens=engine._processor.forbidden_ids.tolist(),
    )
    options = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    ours = engine.generate(inputs, repetition_penalty=penalty, **options).token_ids
    assert list(ours) == expected
    assert ours != greedy


def test_seed(engine: Engine) -> None:
    again = [engine.generate(**IMAGE, **HOT) for _ in range(2)]
    assert again[0].token_ids == again[1].token_ids
    assert [output.seed for output in again] == [11, 11]
    assert engine.generate(**IMAGE, **HOT | {"seed": 12}).token_ids != again[0].token_ids
    drawn = engine.generate(["Hi"] * 3, **HOT | {"seed": None})
    drawn.append(engine.generate("Hi", **HOT | {"seed": None}))
    assert len({output.seed for output in drawn}) == 4
    assert len({output.token_ids for output in drawn}) == 4
    for output in drawn:
        assert engine.generate("Hi", **HOT | {"seed": output.seed}).token_ids == output.token_ids


def check_prefixes(engine: Engine, **options: object) -> GenerationOutput:
    """Streams; text once given is never taken back, and adds up to the output's."""
    text, output = "", None
    for chunk in engine.stream("Q", **options):
        text += chunk.text
        output = chunk.output
    assert output is not None
    assert output.text == text == engine.generate("Q", **options).text
    return output


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        ("ree sha", "There are th"),
        (["zzz", "shapes"], "There are three "),
        (["three shapes in", "re th"], "There a"),
        ("T", ""),
        ("picture.", "There are three shapes in the "),
        (["never"], "There are three shapes in the picture."),
        ("three shapes\n", "There are three shapes in the picture."),
    ],
)
def test_stop_strings_span_tokens(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, stop: str | list[str], kept: str
) -> None:
    ids = [*ids_of(engine, "There are three shapes in the picture."), IM_END]
    script_tokens(monkeypatch, ids)
    output = check_prefixes(engine, stop=stop, max_new_tokens=100)
    assert (output.text, output.finish_reason) == (kept, "stop")
    generated = list(output.token_ids)
    assert generated == ids[: len(generated)]
    # The tokens hold a stop string, without their last one none; or none came before the stop id.
    whole, before = (engine._processor.decode(t) for t in (generated, generated[:-1]))
    stops = [stop] if isinstance(stop, str) else stop
    assert any(kept + s in whole for s in stops) or generated == ids
    assert not any(s in before for s in stops)


def test_held_back_text_is_given_at_the_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text ends with the beginning of a stop string, at a stop id or at the length."""
    ids = ids_of(engine, "one two thr")
    script_tokens(monkeypatch, [*ids, IM_END])
    assert check_prefixes(engine, stop="three").text == "one two thr"
    assert check_prefixes(engine, stop="three", max_new_tokens=len(ids)).text == "one two thr"


def test_characters_that_span_chunks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(engine, MULTI_BYTE)
    assert len(ids) > len(MULTI_BYTE)
    script_tokens(monkeypatch, [*ids, IM_END])
    chunks = list(engine.stream("Q"))
    assert "".join(chunk.text for chunk in chunks) == MULTI_BYTE
    assert not any("\ufffd" in chunk.text for chunk in chunks)
    assert chunks[-1].output.text == MULTI_BYTE
    assert check_prefixes(engine, stop="ve 🧑").text == "日本 naï"
    cut = check_prefixes(engine, max_new_tokens=1).text
    assert cut == "\ufffd", "a character that stays incomplete shows"


def test_stop_token_ids(engine: Engine, greedy: tuple[int, ...]) -> None:
    stop = greedy[3]
    expected = greedy[: greedy.index(stop) + 1]
    options = {"ignore_eos": True, "max_new_tokens": NUM_TOKENS}
    output = engine.generate(**IMAGE, stop_token_ids=[607, stop], **options)
    assert (output.token_ids, output.finish_reason) == (expected, "stop")
    assert output.text == engine._processor.decode(expected[:-1])
    with pytest.raises(OptionError, match=r"stop_token_ids=\(608,\).*below.*608"):
        engine.generate("Hi", stop_token_ids=[608])


def test_ignore_eos(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    word = ids_of(engine, "yes")
    script_tokens(monkeypatch, [*word, IM_END, *word, IM_END, *word])
    ended = engine.generate("Q")
    assert (ended.text, ended.finish_reason) == ("yes", "stop")
    assert list(ended.token_ids) == [*word, IM_END]
    count = 3 * len(word) + 2
    ignored = engine.generate("Q", ignore_eos=True, max_new_tokens=count)
    assert (ignored.text, ignored.finish_reason) == ("yesyesyes", "length")


def test_min_new_tokens(engine: Engine) -> None:
    """No stop id among the first tokens; what would have been one is replaced, not ignored."""
    stops = set(range(300))  # of 595: about every second token
    options = {"ignore_eos": True, "max_new_tokens": NUM_TOKENS, "stop_token_ids": sorted(stops)}
    lengths = []
    for least in range(10):
        output = engine.generate(**IMAGE, min_new_tokens=least, **options)
        assert not stops & set(output.token_ids[:least])
        assert output.token_ids[-1] in stops
        lengths.append(len(output.token_ids) - least)
    assert min(lengths) == 1, "the first that may be a stop is one somewhere"


def test_min_new_tokens_and_stop_strings(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    word = ids_of(engine, "stop ")
    script_tokens(monkeypatch, word * 3)
    options = {"min_new_tokens": len(word), "max_new_tokens": 50}
    assert check_prefixes(engine, stop="sto", **options).text == "stop "
    assert check_prefixes(engine, stop=" ", **options).text == "stop stop"
    for begins_before, kept in (("stop s", ""), ("op st", "st"), (" s", "stop")):
        output = check_prefixes(engine, stop=begins_before, **options)
        assert (output.text, output.finish_reason) == (kept, "stop")
    longer = check_prefixes(engine, stop=["op ", "stop sting"], **options)
    assert longer.text == "stop st", "held back, and complete too early to count"


@pytest.mark.parametrize("count", [0, 3])
def test_logprobs(engine: Engine, count: int) -> None:
    """Of the raw model: as forward gives them, whatever is masked or tempered."""
    output = engine.generate(**IMAGE, **HOT, logprobs=count)
    inputs = engine.prepare(**IMAGE)
    prompt = inputs.input_ids
    whole = type(inputs)(
        np.concatenate([prompt, output.token_ids]),
        inputs.spans,
        inputs.plans,
        inputs.media,
        inputs.visual,
    )
    rows = range(len(prompt) - 1, len(prompt) + NUM_TOKENS - 1)
    expected = engine.forward(whole, positions=rows).log_softmax(1)
    chosen = expected[torch.arange(NUM_TOKENS), torch.tensor(output.token_ids)]
    np.testing.assert_allclose(logprobs_of(output), chosen.numpy(), rtol=1e-4, atol=1e-4)
    assert output.logprobs is not None
    for entry, token_id, row in zip(output.logprobs, output.token_ids, expected, strict=True):
        assert entry.token_id == token_id
        assert [i for i, _ in entry.top] == row.topk(count).indices.tolist()
    assert engine.generate("Hi", max_new_tokens=2).logprobs is None


def test_forbidden_ids_are_never_generated(engine: Engine) -> None:
    """So hot that all ids are nearly alike: 13 of 608 would be hit 11 times in 500 tokens."""
    forbidden = set(engine._processor.forbidden_ids.tolist())
    assert forbidden == {*range(595, 608)}
    options = {"temperature": 1e4, "seed": 1, "ignore_eos": True, "max_new_tokens": 500}
    generated = engine.generate("Hi", **options).token_ids
    assert not forbidden & set(generated)
    assert IM_END in generated
    mask = engine._scheduler.loaded().runner._forbidden
    kept = mask.clone()
    mask.zero_()
    try:
        assert forbidden & set(engine.generate("Hi", **options).token_ids), "the test sees it"
    finally:
        mask.copy_(kept)


def test_sampling_and_keywords(engine: Engine, greedy: tuple[int, ...]) -> None:
    params = SamplingParams(**HOT)
    assert engine.generate(**IMAGE, sampling=params).token_ids != greedy
    output = engine.generate(**IMAGE, sampling=params, temperature=0, max_new_tokens=4)
    assert output.token_ids == greedy[:4]
    assert params.max_new_tokens == NUM_TOKENS
    with pytest.raises(OptionError, match=r"unknown option 'max_tokens'.*expected one of.*max_new"):
        engine.generate("Hi", max_tokens=3)
    with pytest.raises(OptionError, match=r"sampling=\{.*expected SamplingParams"):
        engine.generate("Hi", sampling={"temperature": 1})
