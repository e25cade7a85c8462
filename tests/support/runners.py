"""What every runner must give: the answers of plain torch, whatever decodes beside it."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from ovfast import Engine, GenerationOutput

OPTIONS = [
    {"max_new_tokens": 7},
    {"max_new_tokens": 1},
    {"max_new_tokens": 9, "temperature": 1.3, "seed": 5},
    {"max_new_tokens": 9, "temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 3},
    {"max_new_tokens": 8, "repetition_penalty": 1.7},
    {"max_new_tokens": 8, "logprobs": 3},
    {"max_new_tokens": 6, "logprobs": 0, "temperature": 2.0, "seed": 1},
    {"max_new_tokens": 12, "temperature": 3.0, "seed": 8, "min_new_tokens": 10},
]


def assert_same_answer(
    got: GenerationOutput, expected: GenerationOutput, logprob_error: float
) -> None:
    assert got.token_ids == expected.token_ids
    assert got.finish_reason == expected.finish_reason
    assert got.text == expected.text
    if expected.logprobs is not None:
        for ours, theirs in zip(got.logprobs, expected.logprobs, strict=True):
            assert ours.token_id == theirs.token_id
            assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
            assert ours.logprob == pytest.approx(theirs.logprob, abs=logprob_error)


def assert_batch_of_many(plain: Engine, engine: Engine) -> None:
    """20 slots are two groups of rows; requests of all lengths, more than slots."""
    prompts = [f"Number {index}?" for index in range(26)]
    options = {"temperature": 1.5, "seed": 11, "max_new_tokens": 9}
    expected = [plain.generate(prompt, **options).token_ids for prompt in prompts]
    assert [output.token_ids for output in engine.generate(prompts, **options)] == expected


def drain(streams: Iterable[Any], after_each: Callable[[], None] = lambda: None) -> list[list[int]]:
    """Tokens of streams, a chunk of each in turn."""
    alive = dict(enumerate(streams))
    tokens: list[list[int]] = [[] for _ in alive]
    while alive:
        for index, stream in list(alive.items()):
            chunk = next(stream, None)
            if chunk is None:
                del alive[index]
            else:
                tokens[index] += chunk.token_ids
            after_each()
    return tokens


def assert_options_side_by_side(plain: Engine, engine: Engine) -> None:
    expected = [plain.generate("Go on.", ignore_eos=True, **o).token_ids for o in OPTIONS[:-1]]
    streams = [engine.stream("Go on.", ignore_eos=True, **options) for options in OPTIONS[:-1]]
    assert [tuple(tokens) for tokens in drain(streams)] == expected
