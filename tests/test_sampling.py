"""Sampling: options, Philox, the rules against transformers', statistics, stop strings."""

import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from ovfast.errors import BackendError, OptionError, OVFastError
from ovfast.sampling import (
    SamplingParams,
    StopStrings,
    _candidates,
    _masked,
    philox4x32,
    philox_uniform,
    sample,
    token_logprob,
)


def nothing(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bool)


def only(size: int, *ids: int) -> torch.Tensor:
    mask = nothing(size)
    mask[list(ids)] = True
    return mask


# Options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("max_new_tokens", "10"),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", True),
        ("temperature", "1"),
        ("temperature", None),
        ("top_k", 0),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_k", False),
        ("top_p", 0),
        ("top_p", 2),
        ("top_p", -0.5),
        ("top_p", math.nan),
        ("top_p", None),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("seed", "7"),
        ("seed", 1.0),
        ("seed", True),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 3),
        ("stop", None),
        ("stop", b"a"),
        ("stop", {"a"}),
        ("stop_token_ids", 5),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["5"]),
        ("ignore_eos", 1),
        ("ignore_eos", None),
        ("min_new_tokens", -1),
        ("min_new_tokens", None),
        ("logprobs", -1),
        ("logprobs", True),
        ("logprobs", 2.5),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(OptionError) as caught:
        SamplingParams(**{name: value})
    text = str(caught.value)
    assert text.startswith(f"{name}=")  # what was given
    assert "; expected " in text  # what is allowed
    assert ". " in text  # what to do
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, OVFastError)
    with pytest.raises(OptionError):
        replace(SamplingParams(), **{name: value})


def test_min_new_tokens_fits_into_max_new_tokens():
    SamplingParams(min_new_tokens=4, max_new_tokens=4)
    with pytest.raises(OptionError, match="min_new_tokens=5"):
        SamplingParams(min_new_tokens=5, max_new_tokens=4)


def test_values_are_normalised():
    params = SamplingParams(
        max_new_tokens=np.int64(5),
        temperature=1,
        top_p=np.float32(0.5),
        stop="end",
        stop_token_ids=[np.int32(3), 4],
        seed=2**64 - 1,
    )
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert type(params.max_new_tokens) is int
    assert type(params.temperature) is float
    assert type(params.top_p) is float
    assert SamplingParams(stop=["a", "b", "a"]).stop == ("a", "b")
    assert hash(params) == hash(replace(params))
    assert SamplingParams().is_greedy
    assert not params.is_greedy


# Philox


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, wanted):
    assert " ".join(f"{word:08x}" for word in philox4x32(counter, key)) == wanted


def test_uniform_is_the_top_of_the_first_word():
    assert philox_uniform(0, 0) == (0x6627E8D5 >> 8) / 2**24
    seed, index = 0x299F31D0_A4093822, 0x85A308D3_243F6A88
    words = philox4x32([0x243F6A88, 0x85A308D3, 0, 0], [0xA4093822, 0x299F31D0])
    assert philox_uniform(seed, index) == (words[0] >> 8) / 2**24
    values = [philox_uniform(2**64 - 1, index) for index in range(1000)]
    assert all(0.0 <= value < 1.0 and value == np.float32(value) for value in values)
    assert len(set(values)) > 990


def test_uniform_is_uniform():
    # Chi-square over 64 cells, 63 degrees of freedom: 99.9 % of draws lie under 103.4.
    for seed in (0, 1, 123456789):
        values = np.array([philox_uniform(seed, index) for index in range(6400)])
        counts = np.bincount((values * 64).astype(int), minlength=64)
        assert ((counts - 100) ** 2 / 100).sum() < 103.4


# The rules


def transformers_scores(logits, params, seen_ids):
    """Scores after transformers' own processors, in its order; −inf where dropped."""
    process = pytest.importorskip("transformers.generation.logits_process")
    steps = []
    if params.repetition_penalty != 1.0:
        steps.append(process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if not params.is_greedy:
        steps.append(process.TemperatureLogitsWarper(params.temperature))
    if params.top_k is not None:
        steps.append(process.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(process.TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        steps.append(process.MinPLogitsWarper(params.min_p))
    scores = logits[None].clone()
    for step in steps:
        scores = step(torch.tensor([seen_ids]), scores)
    return scores[0]


GRID = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-6},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.1},
    {"top_k": 3, "top_p": 0.99, "repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "top_p": 0.5},
]


@pytest.mark.parametrize("options", GRID)
@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("size", [1, 41, 4096])
def test_kept_tokens_and_probabilities_equal_transformers(options, temperature, size):
    params = SamplingParams(temperature=temperature, **options)
    generator = torch.Generator().manual_seed(size)
    for _ in range(3):
        logits = torch.randn(size, generator=generator) * 3
        seen_ids = torch.randint(size, (min(size, 20),), generator=generator).tolist()
        library = params if size >= (params.top_k or 1) else replace(params, top_k=size)
        wanted = transformers_scores(logits, library, seen_ids)
        scores = _masked(logits, params, nothing(size), only(size, *seen_ids), ())
        ids, weights = _candidates((scores - scores.max()) / temperature, params)
        assert ids.tolist() == (wanted > -math.inf).nonzero()[:, 0].tolist()
        torch.testing.assert_close(weights / weights.sum(), wanted.softmax(0)[ids])


def test_greedy_with_penalty_equals_transformers():
    params = SamplingParams(repetition_penalty=1.5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        logits = torch.randn(64, generator=generator)
        seen_ids = logits.topk(8).indices.tolist()
        wanted = int(transformers_scores(logits, params, seen_ids).argmax())
        seen = only(64, *seen_ids)
        assert sample(logits, params, forbidden=nothing(64), seen=seen) == wanted


def test_greedy_takes_the_lowest_id_of_equals():
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0])
    params = SamplingParams()
    assert sample(logits, params, forbidden=nothing(5)) == 1
    assert sample(logits, params, forbidden=only(5, 1)) == 3
    assert sample(logits, params, forbidden=only(5, 1), suppress_stop=[3]) == 4
    large = torch.zeros(152_000)
    large[[90_000, 151_000]] = 1.0
    assert sample(large, params, forbidden=nothing(152_000)) == 90_000


def test_equals_of_the_kth_stay():
    scores = torch.tensor([0.0, -1.0, -1.0, -1.0, -2.0])
    ids, _ = _candidates(scores, SamplingParams(temperature=1.0, top_k=2))
    assert ids.tolist() == [0, 1, 2, 3]


def test_equals_in_top_p_are_kept_from_the_end_always():
    for _ in range(3):
        ids, weights = _candidates(torch.zeros(1000), SamplingParams(temperature=1.0, top_p=0.0105))
        assert ids.tolist() == list(range(989, 1000))
        assert weights.tolist() == [1.0] * 11


def test_top_p_always_keeps_one():
    for size in (1, 4, 1000):
        ids, _ = _candidates(torch.zeros(size), SamplingParams(temperature=1.0, top_p=1e-9))
        assert ids.tolist() == [size - 1]


def test_forbidden_and_suppressed_are_never_chosen():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=5.0)
    best = int(logits.argmax())
    forbidden = only(50, best, 7, 8)
    drawn = {
        sample(logits, params, forbidden=forbidden, seed=9, index=i, suppress_stop=[1, 2])
        for i in range(2000)
    }
    assert not drawn & {best, 7, 8, 1, 2}
    assert len(drawn) > 35


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-300])
def test_one_allowed_token_is_chosen(temperature):
    logits = torch.randn(9)
    forbidden = ~only(9, 4)
    params = SamplingParams(temperature=temperature, top_k=3, top_p=0.1, min_p=0.5)
    assert sample(logits, params, forbidden=forbidden, seed=1) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_to_choose_and_broken_logits_raise(temperature):
    params = SamplingParams(temperature=temperature)
    with pytest.raises(BackendError, match="every token is forbidden"):
        sample(torch.zeros(4), params, forbidden=~nothing(4))
    with pytest.raises(BackendError, match="every token is forbidden"):
        sample(torch.zeros(1), params, forbidden=nothing(1), suppress_stop=[0])
    for bad in (math.nan, math.inf):
        logits = torch.tensor([0.0, bad, 1.0])
        with pytest.raises(BackendError, match=str(bad)):
            sample(logits, params, forbidden=nothing(3))


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6])
def test_a_very_small_temperature_is_greedy(temperature):
    params = SamplingParams(temperature=temperature)
    for seed in range(20):
        logits = torch.randn(100, generator=torch.Generator().manual_seed(seed)) * 1e4
        token = sample(logits, params, forbidden=nothing(100), seed=seed)
        assert token == int(logits.argmax())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    logits = (torch.randn(300, generator=torch.Generator().manual_seed(5)) * 4).to(dtype)
    params = SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.1)
    seen = only(300, *range(0, 300, 3))
    options = {"forbidden": nothing(300), "seen": seen, "seed": 11}
    for index in range(50):
        wanted = sample(logits.float(), params, index=index, **options)
        assert sample(logits, params, index=index, **options) == wanted
    assert token_logprob(logits, 3, 2) == token_logprob(logits.float(), 3, 2)


def test_logits_are_not_changed():
    logits = torch.randn(30)
    before = logits.clone()
    params = SamplingParams(temperature=0.8, repetition_penalty=1.2, top_k=4, top_p=0.9, min_p=0.1)
    sample(logits, params, forbidden=only(30, 3), seen=only(30, 4), suppress_stop=[5])
    sample(logits, SamplingParams(), forbidden=~only(30, 3), suppress_stop=[5])
    assert torch.equal(logits, before)


# Statistics


@pytest.mark.parametrize("seed", [0, 1, 42, 2**63])
def test_draws_follow_the_probabilities(seed):
    # Chi-square with 7 degrees of freedom: 99.9 % of draws lie under 24.3.
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.5, -0.5, 1.0])
    params = SamplingParams(temperature=0.8)
    count = 4000
    drawn = [sample(logits, params, forbidden=nothing(8), seed=seed, index=i) for i in range(count)]
    expected = (logits.double() / 0.8).softmax(0).numpy() * count
    observed = np.bincount(drawn, minlength=8)
    assert ((observed - expected) ** 2 / expected).sum() < 24.3


def test_draws_are_the_inverse_of_the_cumulative_probabilities():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(8))
    cumulative = logits.double().softmax(0).cumsum(0).numpy()
    params = SamplingParams(temperature=1.0)
    for index in range(300):
        wanted = int(np.searchsorted(cumulative, philox_uniform(77, index), side="right"))
        assert sample(logits, params, forbidden=nothing(500), seed=77, index=index) == wanted


def test_a_draw_depends_on_seed_and_index_alone():
    logits = torch.zeros(1000)
    params = SamplingParams(temperature=1.0)

    def draw(seed, index):
        return sample(logits, params, forbidden=nothing(1000), seed=seed, index=index)

    first = [draw(5, index) for index in range(20)]
    assert [draw(5, index) for index in reversed(range(20))] == first[::-1]
    assert [draw(6, index) for index in range(20)] != first


def test_a_token_of_weight_zero_is_never_drawn(monkeypatch):
    logits = torch.tensor([-1e30, 0.0, -1e30, 0.0, -1e30])
    params = SamplingParams(temperature=1.0)
    for uniform, wanted in [(0.0, 1), (0.4999999, 1), (0.5, 3), (1 - 2.0**-24, 3)]:
        monkeypatch.setattr("ovfast.sampling.philox_uniform", lambda *_, u=uniform: u)
        assert sample(logits, params, forbidden=nothing(5)) == wanted


def test_a_large_vocabulary_is_quick():
    # Generous: sorting all 152 000 in Python would take far longer, and greedy needs one pass.
    logits = torch.randn(152_000, generator=torch.Generator().manual_seed(2)) * 4
    forbidden = nothing(152_000)
    for params, bound_s in [
        (SamplingParams(), 0.02),
        (SamplingParams(temperature=1.0, top_k=50, top_p=0.9), 0.1),
        (SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01), 0.1),
    ]:
        times = []
        for index in range(7):
            start = time.perf_counter()
            sample(logits, params, forbidden=forbidden, index=index)
            times.append(time.perf_counter() - start)
        assert min(times) < bound_s


# Log-probabilities


def test_logprobs_are_the_log_softmax():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(4)) * 5
    wanted = logits.double().log_softmax(0)
    found = token_logprob(logits, 17, 5)
    assert found.token_id == 17
    assert found.logprob == pytest.approx(float(wanted[17]), abs=1e-5)
    assert [token for token, _ in found.top] == wanted.topk(5).indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(wanted.topk(5).values.tolist())
    assert token_logprob(logits, 17).top == ()
    assert len(token_logprob(logits[:3], 0, 10).top) == 3


def test_equal_logprobs_are_listed_by_id():
    logits = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert [token for token, _ in token_logprob(logits, 0, 4).top] == [1, 3, 0, 2]


# Stop strings


def test_stop_strings_by_example():
    stops = StopStrings(["</s>"])
    assert stops.push("a<") == ("a", False)
    assert stops.push("b</") == ("<b", False)
    assert stops.push("s") == ("", False)
    assert stops.push("> tail") == ("", True)
    assert stops.push("more") == ("", True)
    assert stops.flush() == ""
    held = StopStrings(["abc"])
    assert held.push("xab") == ("x", False)
    assert held.flush() == "ab"
    assert held.flush() == ""
    assert StopStrings([]).push("text") == ("text", False)


def test_a_stop_string_over_many_pieces_and_multi_byte_characters():
    stops = StopStrings(["猫は寝る"])
    emitted = [stops.push(character) for character in "犬と猫と猫は寝るよ"]
    assert "".join(text for text, _ in emitted) == "犬と猫と"
    assert [stopped for _, stopped in emitted] == [False] * 7 + [True, True]


@pytest.mark.parametrize(
    ("stops", "text", "wanted"),
    [
        (["aab"], "aaab", "a"),  # a prefix of itself
        (["abab", "bb"], "ababab", ""),
        (["bc", "abcd"], "xabcd", "xa"),  # complete first
        (["bcd", "abcd"], "xabcd", "x"),  # complete together: the longest
        (["cd", "bcd", "d"], "abcd", "a"),
        (["\n\n"], "a\n\nb", "a"),
    ],
)
def test_overlapping_stop_strings(stops, text, wanted):
    for size in range(1, len(text) + 1):
        matcher = StopStrings(stops)
        emitted, stopped = "", False
        for start in range(0, len(text), size):
            piece, stopped = matcher.push(text[start : start + size])
            emitted += piece
        assert (emitted, stopped) == (wanted, True)


def test_stop_strings_that_begin_before_they_count():
    stops = StopStrings(["ab", "abcd"])
    assert stops.push("xab", counts=False) == ("x", False)
    assert stops.push("", counts=False) == ("", False)
    assert stops.push("c") == ("", False)
    assert stops.push("e") == ("abce", False)
    assert stops.push("ab") == ("", True)
    assert StopStrings(["ab"]).push("xab", counts=False) == ("xab", False), "nothing to wait for"


def naive_end(text: str, stops: list[str], least: int) -> str | None:
    """The text before the first stop string that is complete behind the first characters."""
    for end in range(least + 1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return None


def test_stop_strings_equal_a_naive_search_whatever_the_pieces():
    draw = random.Random(12)
    found = 0
    for _ in range(3000):
        letters = draw.choice(["ab", "abc", "aé日🙂"])
        stops = [
            "".join(draw.choices(letters, k=draw.randint(1, 5))) for _ in range(draw.randint(0, 3))
        ]
        text = "".join(draw.choices(letters, k=draw.randint(0, 14)))
        matcher = StopStrings(stops)
        emitted, stopped, start, least, early = "", False, 0, 0, draw.randint(0, 6)
        while start < len(text):
            end = start + draw.randint(1, 4)
            if start < early:
                least = end
            piece, stopped = matcher.push(text[start:end], counts=start >= early)
            emitted += piece
            start = end
            if not stopped:
                # Held back is only what may still become a stop string.
                waiting = text[len(emitted) : start]
                assert not waiting or any(
                    stop.startswith(waiting) and stop != waiting for stop in stops
                )
        wanted = naive_end(text, stops, least)
        assert stopped == (wanted is not None)
        assert emitted + matcher.flush() == (text if wanted is None else wanted)
        found += stopped
    assert 500 < found < 2900
