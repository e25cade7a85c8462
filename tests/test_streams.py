"""Streams: chunks that add up, slots that come free, and threads that wait or are told not to."""

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ovfast
from ovfast import CapacityError, Engine, MediaError, OptionError, SamplingParams
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.models.qwen2 import Qwen2
from ovfast.scheduler import WAIT_S
from tests.support.engines import REQUESTS, free_slots, open_engine, run_threads
from tests.support.prompts import picture

NUM_TOKENS = 16
GREEDY = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
ENDLESS = SamplingParams(ignore_eos=True)


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    """One slot; free again at the end of each test."""
    with open_engine(tiny_checkpoint) as engine:
        yield engine
        assert free_slots(engine) == 1


@pytest.fixture
def two_slots(tiny_checkpoint: Path) -> Iterator[Engine]:
    """Of the back end whose steps call `decode`, so that tests can act in the middle of one."""
    with open_engine(tiny_checkpoint, max_batch_size=2, backend="reference") as engine:
        yield engine
        assert free_slots(engine) == 2


@pytest.mark.parametrize("name", REQUESTS)
def test_chunks_add_up_to_the_output(engine: Engine, name: str) -> None:
    params = SamplingParams(max_new_tokens=NUM_TOKENS, logprobs=1, temperature=1.0, seed=5)
    expected = engine.generate(**REQUESTS[name], sampling=params)
    chunks = list(engine.stream(**REQUESTS[name], sampling=params))
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert sum((chunk.token_ids for chunk in chunks), ()) == expected.token_ids
    assert all(len(chunk.token_ids) == 1 for chunk in chunks)
    assert sum((chunk.logprobs or () for chunk in chunks), ()) == expected.logprobs
    assert [chunk.output for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    last = chunks[-1].output
    assert last is not None
    assert (last.text, last.token_ids, last.seed) == (expected.text, expected.token_ids, 5)
    assert (last.usage, last.finish_reason) == (expected.usage, expected.finish_reason)


def test_the_slot_is_free_with_the_last_chunk(engine: Engine) -> None:
    """A caller that leaves its loop at the last chunk need not close the stream."""
    stream = engine.stream("Hi", sampling=GREEDY)
    for chunk in stream:
        assert (free_slots(engine) == 1) == (chunk.output is not None)
        if chunk.output is not None:
            break
    engine.generate("Hi", sampling=GREEDY)
    assert list(stream) == []


def test_closing_frees_the_slot(engine: Engine) -> None:
    expected = engine.generate("Hi", sampling=GREEDY).token_ids
    for steps in (1, 5):
        stream = engine.stream("Hi", sampling=ENDLESS)
        for _ in range(steps):
            next(stream)
        assert free_slots(engine) == 0
        stream.close()
        assert free_slots(engine) == 1
        assert list(stream) == []
        assert engine.generate("Hi", sampling=GREEDY).token_ids == expected


def test_dropping_frees_the_slot(engine: Engine) -> None:
    stream = engine.stream("Hi", sampling=ENDLESS)
    next(stream)
    del stream
    gc.collect()
    assert free_slots(engine) == 1
    cycle: list[Any] = [engine.stream("Hi", sampling=ENDLESS)]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert free_slots(engine) == 1


def test_a_stream_not_begun_holds_nothing(engine: Engine) -> None:
    waiting = [engine.stream("Hi", sampling=GREEDY) for _ in range(3)]
    assert free_slots(engine) == 1
    texts = {"".join(chunk.text for chunk in stream) for stream in waiting}
    assert texts == {engine.generate("Hi", sampling=GREEDY).text}


def test_dropping_in_the_middle_of_a_step(
    two_slots: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a garbage collection may do it: the step goes on, then the slot is free."""
    expected = two_slots.generate("Hi", sampling=GREEDY).token_ids
    cycle: list[Any] = [two_slots.stream("What?", sampling=ENDLESS)]
    next(cycle[0])
    decode, seen = LlavaOnevision.decode, []

    def dropping(*args: Any) -> Any:
        if cycle and len(seen) == 5:
            cycle.pop().close()
            seen.append(free_slots(two_slots))
        seen.append(None)
        return decode(*args)

    monkeypatch.setattr(LlavaOnevision, "decode", dropping)
    assert two_slots.generate("Hi", sampling=GREEDY).token_ids == expected
    assert seen[5] == 0, "freed inside the step that uses it"


def test_calling_from_inside_a_step_is_refused(
    two_slots: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = two_slots
    expected = engine.generate("Hi", sampling=GREEDY).token_ids
    decode, errors = LlavaOnevision.decode, []

    def calling(*args: Any) -> Any:
        if not errors:
            with pytest.raises(ovfast.BackendError, match="from inside one of its own steps") as e:
                engine.generate("Hi")
            errors.append(e)
        return decode(*args)

    monkeypatch.setattr(LlavaOnevision, "decode", calling)
    assert engine.generate("Hi", sampling=GREEDY).token_ids == expected
    assert errors


def test_waiting_for_ones_own_stream_raises(engine: Engine) -> None:
    stream = engine.stream("Hi", sampling=GREEDY)
    first = next(stream)
    for call in (
        lambda: engine.generate("What?", max_new_tokens=1),
        lambda: engine.generate(["a", "b"], max_new_tokens=1),
        lambda: next(engine.stream("What?", max_new_tokens=1)),
        lambda: engine.score("What?", ["x"]),
        lambda: engine.forward(engine.prepare("What?")),
    ):
        with pytest.raises(CapacityError, match=r"this thread has left open.*Finish or close"):
            call()
    text = first.text + "".join(chunk.text for chunk in stream)
    assert text == engine.generate("Hi", sampling=GREEDY).text


def test_another_thread_waits_for_the_slot(engine: Engine) -> None:
    expected = engine.generate("What?", sampling=GREEDY).token_ids
    stream = engine.stream("Hi", sampling=ENDLESS)
    next(stream)
    calls = [lambda: engine.generate("What?", sampling=GREEDY).token_ids] * 3
    calls.append(
        lambda: tuple(t for c in engine.stream("What?", sampling=GREEDY) for t in c.token_ids)
    )
    begun, done = threading.Event(), []

    def wait() -> None:
        begun.set()
        done.extend(run_threads(calls))

    thread = threading.Thread(target=wait)
    thread.start()
    begun.wait()
    for _ in range(100):
        next(stream)
    assert not done
    stream.close()
    thread.join()
    assert done == [expected] * 4


@pytest.mark.parametrize("last", [1, 3])
def test_a_wait_for_the_slot_is_given_up(engine: Engine, last: int) -> None:
    """Asked before the wait, and again when the call wants to be."""
    stream, asked = engine.stream("Hi", sampling=ENDLESS), list[float]()
    next(stream)

    def give_up() -> float:
        asked.append(time.monotonic())
        if len(asked) == last:
            raise TimeoutError
        return 0.02

    request = engine._request(engine.prepare("What?"), GREEDY, time.perf_counter())
    (error,) = run_threads([lambda: next(engine._scheduler.stream(request, give_up))])
    assert isinstance(error, TimeoutError)
    assert asked[-1] - asked[0] < WAIT_S / 2
    stream.close()


def test_a_request_is_given_up_before_its_prefill(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [1.0]  # then the list is empty
    monkeypatch.setattr(Qwen2, "prefill_hidden", None)
    request = engine._request(engine.prepare(**REQUESTS["image"]), GREEDY, time.perf_counter())
    with pytest.raises(IndexError):
        next(engine._scheduler.stream(request, answers.pop))


def test_a_busy_neighbour_is_waited_for(two_slots: Engine) -> None:
    """This thread's open stream holds one slot, but the other comes free."""
    busy = two_slots.stream("What?", sampling=ENDLESS)
    begun, finish = threading.Event(), threading.Event()

    def neighbour() -> None:
        next(busy)
        begun.set()
        finish.wait()
        busy.close()

    thread = threading.Thread(target=neighbour)
    thread.start()
    begun.wait()
    own = two_slots.stream("Hi", sampling=ENDLESS)
    next(own)
    threading.Timer(0.1, finish.set).start()
    assert two_slots.generate("Hi", sampling=GREEDY).finish_reason == "length"
    own.close()
    thread.join()


def test_threads_that_wait_for_each_other_do_not_hang(two_slots: Engine) -> None:
    barrier = threading.Barrier(2)

    def work() -> int:
        stream = two_slots.stream("Hi", sampling=ENDLESS)
        next(stream)
        barrier.wait()
        try:
            return len(two_slots.generate("What?", sampling=GREEDY).token_ids)
        finally:
            stream.close()

    results = run_threads([work, work])
    assert sum(isinstance(result, CapacityError) for result in results) == 1
    assert NUM_TOKENS in results


def test_a_stream_may_change_threads(engine: Engine) -> None:
    """Begun here and continued elsewhere, it is not this thread's to finish."""
    stream = engine.stream("Hi", sampling=GREEDY)
    tokens = list(next(stream).token_ids)
    tokens += run_threads([lambda: next(stream).token_ids])[0]
    rest: list[int] = []
    begun = threading.Event()

    def consume() -> None:
        begun.wait()
        for chunk in stream:
            rest.extend(chunk.token_ids)

    thread = threading.Thread(target=consume)
    thread.start()
    threading.Timer(0.05, begun.set).start()
    expected = engine.generate("Hi", sampling=GREEDY).token_ids
    thread.join()
    assert tuple(tokens + rest) == expected


def test_open_streams_advance_together(two_slots: Engine) -> None:
    """One stream's steps also make the other's tokens; none is lost or mixed up."""
    names = ["image", "video"]
    expected = [two_slots.generate(**REQUESTS[n], sampling=GREEDY).token_ids for n in names]
    streams = [two_slots.stream(**REQUESTS[n], sampling=GREEDY) for n in names]
    found: list[list[int]] = [[], []]
    for turn in (0, 0, 0, 1, 0, 1, 1):
        found[turn] += next(streams[turn]).token_ids
    for tokens, stream in zip(found, streams, strict=True):
        for chunk in stream:
            tokens += chunk.token_ids
    assert [tuple(tokens) for tokens in found] == expected


def test_when_errors_come(engine: Engine) -> None:
    """What is wrong with the request is said at the call, not at the first chunk."""
    with pytest.raises(OptionError):
        engine.stream("Hi", temperature=-1)
    with pytest.raises(MediaError):
        engine.stream("Hi", images="missing.png")
    with pytest.raises(CapacityError):
        engine.stream("Hi", max_new_tokens=10_000)
    with pytest.raises(ovfast.PromptError):
        engine.stream("<image> and <image>", images=picture())
