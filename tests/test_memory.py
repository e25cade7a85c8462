"""Requests leave no memory behind."""

import gc
import os
import weakref
from pathlib import Path

from tests.support.engines import REQUESTS, free_slots, open_engine

NUM_CALLS = 300
# The allocator's own noise. What one request holds (5 views of 21 kB, 179 rows of inputs_embeds and
# of logits, half a megabyte in all) would, kept from every call, come to some 30 MB at least.
BOUND_BYTES = 4_000_000


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_many_calls_do_not_grow(tiny_checkpoint: Path) -> None:
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

        for turn in range(60):
            call(turn)
        before = resident_bytes()
        for turn in range(NUM_CALLS):
            call(turn)
        growth = resident_bytes() - before
        assert free_slots(engine) == 2
    assert growth < BOUND_BYTES, f"{growth / 1e6:.1f} MB more after {NUM_CALLS} calls"


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
