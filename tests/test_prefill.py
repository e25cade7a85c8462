"""Prompts in chunks: the same answers as in one, other requests' tokens between, nothing lost."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ovfast import BackendError, CapacityError, Engine
from ovfast.models.qwen2 import Qwen2
from ovfast.models.siglip import SiglipTower
from ovfast.ops import multiplies_bfloat16
from ovfast.storage import BFLOAT16_MATMUL
from tests.support.calls import note_calls
from tests.support.engines import REQUESTS, free_slots, open_engine

CHUNK = 64
FEW = 8  # rows that are not left alone
WHOLE = 1 << 20
LONG = {"prompt": "How many shapes are there? " * 60}
GREEDY = {"max_new_tokens": 4, "ignore_eos": True, "logprobs": 2}
# Another number of rows is another order of sums in a matrix product of torch; ours have one.
CLOSE = {"rtol": 0, "atol": 2e-4}
BACKENDS: dict[str, dict[str, Any]] = {
    "native": {},
    "int8": {"quantization": "int8"},
    "reference": {"backend": "reference"},
}
if multiplies_bfloat16():
    BACKENDS[BFLOAT16_MATMUL] = {"matmul_precision": "bfloat16"}


@pytest.fixture(scope="module")
def engines(tiny_checkpoint: Path) -> Iterator[dict[str, Engine]]:
    opened = {
        name: open_engine(tiny_checkpoint, max_batch_size=2, **options)
        for name, options in BACKENDS.items()
    }
    yield opened
    for engine in opened.values():
        assert free_slots(engine) == 2
        engine.close()


@pytest.fixture
def engine(engines: dict[str, Engine]) -> Iterator[Engine]:
    set_chunk(engines["native"], CHUNK)
    return engines["native"]


def set_chunk(engine: Engine, size: int) -> None:
    language_model = engine._model.language_model
    language_model._ops = replace(language_model._ops, prefill_chunk=size)


def lengths_of_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return note_calls(monkeypatch, Qwen2, "prefill_hidden", lambda _, rows, *rest: len(rows))


@pytest.mark.parametrize(
    ("start", "num_tokens", "cuts"),
    [
        (0, 1, []),
        (0, CHUNK, []),
        (0, CHUNK + FEW - 1, []),
        (0, CHUNK + FEW, [64]),
        (0, 3 * CHUNK - 1, [64, 128]),
        (0, 3 * CHUNK + 1, [64, 128]),
        (40, 24, []),
        (40, 24 + FEW, [64]),
        (40, 200, [64, 128, 192]),
        (57, 100, [128]),  # 7 rows before the cut at 64
        (64, 130, [128]),
        (127, 200, [192, 256]),
    ],
)
def test_cuts_are_at_fixed_positions(
    engine: Engine, start: int, num_tokens: int, cuts: list[int]
) -> None:
    chunks = engine._model.language_model.chunks(start, num_tokens)
    edges = [start, *cuts, start + num_tokens]
    assert [(start + c.start, start + c.stop) for c in chunks] == list(pairwise(edges))


def fill(engine: Engine, start: int, num_tokens: int, wanted: Any, chunk: int) -> tuple[Any, ...]:
    """The rows wanted, and the keys and values, of a slot that is filled in two calls."""
    scheduler, text = engine._scheduler, engine.config.text
    generator = torch.Generator().manual_seed(num_tokens)
    rows = torch.randn(start + num_tokens, text.hidden_size, generator=generator)
    cache = engine._model.new_cache(num_slots=1, max_positions=start + num_tokens)
    if start:
        set_chunk(engine, WHOLE)
        scheduler.prefill(rows[:start], cache, 0, 0, lambda *_: None, ())
    set_chunk(engine, chunk)
    hidden = scheduler.prefill(rows[start:], cache, 0, start, lambda _, found: found, wanted)
    assert cache.lengths == [start + num_tokens]
    return hidden, cache.k_cache, cache.v_cache


@pytest.mark.parametrize("wanted", ["last", "all", "none", "some"])
@pytest.mark.parametrize(
    ("start", "num_tokens"),
    [(0, n) for n in (CHUNK, CHUNK + 1, CHUNK + FEW - 1, CHUNK + FEW, CHUNK + FEW + 1)]
    + [(0, n) for n in (2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 200)]
    + [(40, CHUNK), (CHUNK - 1, CHUNK + 1), (CHUNK, CHUNK + FEW), (CHUNK + 1, 140)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_make_what_one_prefill_makes(
    engines: dict[str, Engine], backend: str, start: int, num_tokens: int, wanted: str
) -> None:
    """Bit for bit on the native back end, whose sums begin at fixed positions."""
    rows: dict[str, Any] = {
        "last": None,
        "all": range(num_tokens),
        "none": (),
        "some": sorted({0, 23, 24, CHUNK - 2, num_tokens - 2}),
    }
    whole, chunked = (
        fill(engines[backend], start, num_tokens, rows[wanted], chunk) for chunk in (WHOLE, CHUNK)
    )
    for ours, expected in zip(chunked, whole, strict=True):
        assert ours.shape == expected.shape
        if backend == "reference":
            torch.testing.assert_close(ours, expected, **CLOSE)
        else:
            assert torch.equal(ours, expected)


def every_call(engine: Engine) -> list[Any]:
    """What all calls that prefill return for a long prompt, and over a handle."""
    inputs = engine.prepare(**LONG)
    texts = ["yes", "no way", "yes, " * 40]
    out = [engine.generate(inputs, **GREEDY), list(engine.stream(inputs, **GREEDY))[-1].output]
    out = [(o.token_ids, o.logprobs) for o in out]
    positions = [0, 63, 64, 65, inputs.num_tokens - 1, 3, 64]
    out += [engine.forward(inputs).tolist(), engine.forward(inputs, positions=positions).tolist()]
    out += [engine.score(inputs, texts), engine.choose(inputs, texts)]
    for name in ("wide", "mixed"):
        for keep in ("features", "prefix"):
            with engine.encode(**REQUESTS[name], keep=keep) as handle:
                ask = {"prompt": REQUESTS[name]["prompt"] + " " + LONG["prompt"], "media": handle}
                out.append(engine.generate(**ask, **GREEDY).logprobs)
                out += [
                    engine.score(**ask, continuations=texts),
                    engine.choose(**ask, options=texts),
                ]
    return out


def test_every_call_answers_as_in_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = lengths_of_chunks(monkeypatch)
    chunked = every_call(engine)
    assert len(chunks) > 60
    assert max(chunks) < CHUNK + 2 * FEW
    set_chunk(engine, WHOLE)
    assert every_call(engine) == chunked


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")])
@pytest.mark.parametrize("keep", ["features", "prefix"])
def test_giving_up_between_chunks(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException, keep: str
) -> None:
    """The slot is free at once, and what a handle had put into it is still right."""
    expected = engine.generate(**LONG, **GREEDY).token_ids
    with engine.encode(**REQUESTS["wide"], keep=keep) as handle:
        ask = {"prompt": REQUESTS["wide"]["prompt"] + " " + LONG["prompt"], "media": handle}
        over_handle = engine.generate(**ask, **GREEDY).token_ids
        step, left = type(engine._scheduler).step, []

        def interrupted(scheduler: Any, work: Callable[..., Any]) -> Any:
            out = step(scheduler, work)
            if len(chunks) == 2:
                left.append(free_slots(engine))
                raise error
            return out

        calls: list[Callable[[], Any]] = [
            lambda: engine.generate(**LONG, **GREEDY),
            lambda: next(engine.stream(**LONG, **GREEDY)),
            lambda: engine.generate(**ask, **GREEDY),
            lambda: engine.score(**ask, continuations=["yes"]),
        ]
        for call in calls:
            with monkeypatch.context() as patch:
                chunks = lengths_of_chunks(patch)
                patch.setattr(type(engine._scheduler), "step", interrupted)
                with pytest.raises(type(error)):
                    call()
            assert len(chunks) == 2
            assert free_slots(engine) == 2
        assert left == [1] * 4
        assert engine.generate(**ask, **GREEDY).token_ids == over_handle
    assert engine.generate(**LONG, **GREEDY).token_ids == expected


def test_closing_between_chunks(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(tiny_checkpoint)
    set_chunk(engine, CHUNK)
    inputs = engine.prepare(**LONG)
    closing = note_calls(monkeypatch, Qwen2, "prefill_hidden", lambda *_: engine.close())
    with pytest.raises(BackendError, match="closed"):
        engine.generate(inputs, **GREEDY)
    assert len(closing) == 1


def test_a_neighbour_gets_tokens_between_chunks(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one thread prefills a long prompt, a stream of another goes on."""
    expected = engine.generate(**LONG, **GREEDY).token_ids
    step, stop = type(engine._scheduler).step, threading.Event()
    tokens: list[int] = []
    begun = threading.Event()

    def neighbour() -> None:
        for chunk in engine.stream("Hi", ignore_eos=True):
            tokens.extend(chunk.token_ids)
            begun.set()
            time.sleep(0.001)  # or a slot's positions are used up
            if stop.is_set():
                break

    def polite(scheduler: Any, work: Callable[..., Any]) -> Any:
        out = step(scheduler, work)
        if threading.current_thread() is not thread:
            time.sleep(0.02)  # who gets the lock is the system's choice
        return out

    thread = threading.Thread(target=neighbour, daemon=True)
    with monkeypatch.context() as patch:
        patch.setattr(type(engine._scheduler), "step", polite)
        counts = note_calls(patch, Qwen2, "prefill_hidden", lambda *_: len(tokens))
        thread.start()
        begun.wait(30)
        counts.clear()
        assert engine.generate(**LONG, **GREEDY).token_ids == expected
    stop.set()
    thread.join(30)
    assert len(counts) >= 4
    assert all(before < after for before, after in pairwise(counts))


def test_each_gap_between_chunks_gives_the_others_a_token(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever the lock goes to: here nobody else asks for it."""
    stream = engine.stream("Hi", ignore_eos=True, max_new_tokens=40)
    next(stream)
    (held,) = [request for request in engine._scheduler._requests if request is not None]
    counts = note_calls(monkeypatch, Qwen2, "prefill_hidden", lambda *_: len(held.pending))
    engine.generate(**LONG, max_new_tokens=1)
    assert len(counts) >= 4
    assert counts == list(range(counts[0], counts[0] + len(counts)))
    stream.close()


def test_what_does_not_fit_is_refused_before_any_work(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = lengths_of_chunks(monkeypatch)
    views = note_calls(monkeypatch, SiglipTower, "encode", lambda *_: None)
    cache = engine._model.new_cache(num_slots=1, max_positions=2 * CHUNK)
    rows = torch.zeros(2 * CHUNK + 1, engine.config.text.hidden_size)
    with pytest.raises(CapacityError, match="129 more tokens"):
        engine._scheduler.prefill(rows, cache, 0, 0, lambda *_: None)
    text = "word " * 1100
    for call in (
        lambda: engine.generate(text, images=REQUESTS["wide"]["images"]),
        lambda: next(engine.stream(text)),
        lambda: engine.score(text, ["yes"]),
        lambda: engine.choose(text, ["yes", "no"]),
        lambda: engine.forward(engine.prepare(text)),
    ):
        with pytest.raises(CapacityError, match="1024"):
            call()
    assert chunks == views == []


def test_the_prefill_is_timed_from_its_first_chunk(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = note_calls(monkeypatch, Qwen2, "prefill_hidden", lambda *_: time.sleep(0.02))
    times = engine.generate(**LONG, **GREEDY).timings
    assert times.prefill_ms >= 20 * len(chunks) >= 80
    assert times.prefill_ms <= times.ttft_ms
    assert times.vision_ms == 0
