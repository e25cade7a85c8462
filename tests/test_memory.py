"""Requests leave no memory behind."""

import gc
import os
import weakref
from pathlib import Path

import pytest

from tests.support.engines import REQUESTS, free_slots, open_engine

# Calls before memory is watched, while it is, and what it may grow: the allocator's own noise. What
# one request holds (5 views of 21 kB, 179 rows of inputs_embeds and of logits, half a megabyte in
# all) would, kept from every call, come to some 30 MB at least.
CALLS = [(60, 300, 4_000_000), pytest.param(200, 800, 5_000_000, marks=pytest.mark.slow)]


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("first", "num_calls", "most_bytes"), CALLS)
def test_many_calls_do_not_grow(
    tiny_checkpoint: Path, first: int, num_calls: int, most_bytes: int
) -> None:
    with open_engine(tiny_checkpoint, max_batch_size=2) as engine:

        def call(turn: int) -> None:
            request = REQUESTS[["image", "video", "mixed"][turn % 3]]
            options = {"max_new_tokens": 3, "ignore_eos": True, "repetition_penalty": 1.1}
            engine.generate(**request, **options, logprobs=2)
            if turn % 10 == 0:
                next(engine.stream(**request, **options))  # dropped half-way
                engine.score(**request, continuations=["yes", "no"])
                engine.forward(engine.prepare(**request))
                handle = engine.encode(**request, keep="prefix")
                engine.choose(request["prompt"], ["yes", "no way"], media=handle)
                if turn % 20 == 0:
                    handle.release()  # else dropped

        for turn in range(first):
            call(turn)
        before = resident_bytes()
        for turn in range(num_calls):
            call(turn)
        growth = resident_bytes() - before
        assert free_slots(engine) == 2
    assert growth < most_bytes, f"{growth / 1e6:.1f} MB more after {num_calls} calls"


def test_closing_frees_the_weights(tiny_checkpoint: Path) -> None:
    """Also where a stream was left open and an output, an error or ModelInputs are still held."""
    engine = open_engine(tiny_checkpoint)
    inputs = engine.prepare(**REQUESTS["image"])
    stream = engine.stream(inputs)
    chunk = next(stream)
    model = weakref.ref(engine._model)
    cache = weakref.ref(engine._scheduler.loaded().cache)
    engine.close()
    gc.collect()
    assert model() is None
    assert cache() is None
    assert chunk.token_ids
    del stream
