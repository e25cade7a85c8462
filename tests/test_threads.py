"""Many threads on one engine, and Ctrl-C anywhere: the same tokens as alone, and no slot lost."""

import _thread
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ovfast import BackendError, CapacityError, Engine, SamplingParams
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.models.qwen2 import Qwen2
from ovfast.models.siglip import SiglipTower
from tests.support.engines import REQUESTS, free_slots, open_engine, run_threads
from tests.support.interrupts import InterruptAtLine, is_interrupt

NUM_SLOTS = 2
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
HOT = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=2.0, seed=4)
ENDLESS = SamplingParams(ignore_eos=True)
CONTINUATIONS = ["yes", "no way"]


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with open_engine(tiny_checkpoint, max_batch_size=NUM_SLOTS, max_seq_len=4096) as engine:
        yield engine
        assert free_slots(engine) == NUM_SLOTS


def tokens_of(engine: Engine, name: str, params: SamplingParams = GREEDY) -> tuple[int, ...]:
    return engine.generate(**REQUESTS[name], sampling=params).token_ids


def test_mixed_calls_from_many_threads(engine: Engine) -> None:
    names = list(REQUESTS)
    inputs = {name: engine.prepare(**REQUESTS[name]) for name in names}

    def generate(name: str) -> Any:
        return tokens_of(engine, name)

    def sample(name: str) -> Any:
        return tokens_of(engine, name, HOT)

    def stream(name: str) -> Any:
        return tuple(t for c in engine.stream(inputs[name], sampling=GREEDY) for t in c.token_ids)

    def leave(name: str) -> Any:
        chunks = engine.stream(**REQUESTS[name], sampling=GREEDY)
        return tuple(next(chunks).token_ids[0] for _ in range(4))

    def score(name: str) -> Any:
        return engine.score(inputs[name], CONTINUATIONS)

    def forward(name: str) -> Any:
        return engine.forward(inputs[name], positions=[0]).tolist()

    def batch(name: str) -> Any:
        return [o.token_ids for o in engine.generate([inputs[name]] * 3, sampling=GREEDY)]

    calls = [generate, sample, stream, leave, score, forward, batch]
    alone = {(call, name): call(name) for call in calls for name in names}

    def work(seed: int) -> list[Any]:
        order = random.Random(seed).sample(list(alone), 16)
        return [key for key in order if key[0](key[1]) != alone[key]]

    assert run_threads([lambda seed=seed: work(seed) for seed in range(8)]) == [[]] * 8


def test_steps_serve_all_threads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads' tokens come from shared steps: fewer steps than tokens."""
    runner = engine._scheduler.loaded().runner
    launch, active = runner.launch, []

    def counting(n_steps: int) -> None:
        active.append(len(runner._active))
        launch(n_steps)

    monkeypatch.setattr(runner, "launch", counting)
    params = SamplingParams(max_new_tokens=3000, ignore_eos=True)
    run_threads([lambda: engine.generate("Hi", sampling=params)] * 2)
    assert active.count(2) > 50


@pytest.fixture
def eager(tiny_checkpoint: Path) -> Iterator[Engine]:
    """An engine whose requests decode one by one, by methods that tests can break."""
    options = {"max_batch_size": NUM_SLOTS, "max_seq_len": 4096, "backend": "reference"}
    with open_engine(tiny_checkpoint, **options) as engine:
        yield engine
        assert free_slots(engine) == NUM_SLOTS


def test_an_error_in_one_request_is_not_its_neighbours(
    eager: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = eager
    expected = tokens_of(engine, "image")
    decode = LlavaOnevision.decode

    def failing(self: LlavaOnevision, token_id: int, cache: Any, slot: int) -> Any:
        if slot == bad_slot and cache.lengths[slot] > bad_length:
            raise RuntimeError("a broken step")
        return decode(self, token_id, cache, slot)

    monkeypatch.setattr(LlavaOnevision, "decode", failing)
    broken = engine.stream("Hi", sampling=ENDLESS)
    bad_slot, bad_length = 0, 10_000
    next(broken)
    assert engine._scheduler._calls[0] is not None
    bad_length = engine._scheduler.loaded().cache.lengths[0] + 5
    assert tokens_of(engine, "image") == expected, "the neighbour drove the failing step"
    with pytest.raises(RuntimeError, match="a broken step"):
        list(broken)
    bad_length = 10_000
    assert tokens_of(engine, "image") == expected


def test_an_error_in_prefill_or_in_a_batch(eager: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = eager
    expected = tokens_of(engine, "three_images")
    for owner, name in ((SiglipTower, "encode"), (Qwen2, "prefill_hidden"), (Qwen2, "decode")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raise_at(getattr(owner, name), 3, ValueError("broken")))
            with pytest.raises(ValueError, match="broken"):
                engine.generate([engine.prepare(**REQUESTS["three_images"])] * 3, sampling=GREEDY)
        assert free_slots(engine) == NUM_SLOTS
        assert tokens_of(engine, "three_images") == expected


def test_running_out_of_memory_is_a_capacity_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens_of(engine, "image")
    with monkeypatch.context() as patch:
        error = torch.OutOfMemoryError("CUDA out of memory")
        patch.setattr(SiglipTower, "encode", raise_at(SiglipTower.encode, 1, error))
        with pytest.raises(CapacityError, match=r"no memory left.*out of memory.*Use fewer"):
            tokens_of(engine, "image")
    assert tokens_of(engine, "image") == expected


def raise_at(function: Callable[..., Any], call: int, error: BaseException) -> Callable[..., Any]:
    calls = []

    def wrapped(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return function(*args, **options)

    return wrapped


@pytest.mark.parametrize(
    "operation", ["_attend", "_run_layer", "decode", "prefill_hidden", "embed"]
)
@pytest.mark.parametrize("call", [1, 2, 4, 7])
def test_ctrl_c_in_an_operation(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, operation: str, call: int
) -> None:
    """In the prefill and in decode steps, also in those made for another request."""
    expected = tokens_of(engine, "image"), tokens_of(engine, "text")
    other = engine.stream(**REQUESTS["text"], sampling=GREEDY)
    tokens = list(next(other).token_ids)
    with monkeypatch.context() as patch:
        target = getattr(Qwen2, operation)
        patch.setattr(Qwen2, operation, raise_at(target, call, KeyboardInterrupt()))
        try:
            tokens_of(engine, "image")
        except KeyboardInterrupt:
            assert free_slots(engine) == NUM_SLOTS - 1
    tokens += [t for chunk in other for t in chunk.token_ids]
    assert tuple(tokens) == expected[1]
    assert tokens_of(engine, "image") == expected[0]


def test_ctrl_c_at_every_line_of_the_loop(engine: Engine) -> None:
    """Wherever it strikes: slots are free, other requests go on or say so, the next is right."""
    few = SamplingParams(max_new_tokens=2, ignore_eos=True, stop="never", repetition_penalty=1.1)
    some = SamplingParams(max_new_tokens=5, ignore_eos=True)
    expected, other_expected = tokens_of(engine, "text", few), tokens_of(engine, "text", some)
    line = broken = 0
    while True:
        line += 1
        other = engine.stream(**REQUESTS["text"], sampling=some)
        tokens = list(next(other).token_ids)
        try:
            with InterruptAtLine(line):
                tokens_of(engine, "text", few)
            break
        except KeyboardInterrupt as interrupt:
            where = str(interrupt)
        try:
            tokens += [t for chunk in other for t in chunk.token_ids]
        except BackendError as error:
            broken += is_interrupt(error)
        else:
            assert tuple(tokens) == other_expected, where
        assert tokens_of(engine, "text", few) == expected, where
        assert free_slots(engine) == NUM_SLOTS, where
    other.close()
    assert line > 200
    assert broken < line / 4


@pytest.fixture
def raising_sigint() -> Iterator[None]:
    """Ctrl-C raises, also where a shell started the tests in the background and has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("raising_sigint")
def test_ctrl_c_at_random_moments(engine: Engine) -> None:
    """The real signal, while another thread's requests are served by the same steps."""
    expected, stop, wrong = tokens_of(engine, "image"), threading.Event(), []

    def neighbour() -> None:
        while not stop.is_set():
            try:
                found = tokens_of(engine, "image")
            except BackendError as error:
                found = expected if is_interrupt(error) else ()
            if found != expected:
                wrong.append(found)

    thread = threading.Thread(target=neighbour, daemon=True)
    thread.start()
    delays = random.Random(0)
    for _ in range(25):
        timer = threading.Timer(delays.uniform(0.001, 0.06), _thread.interrupt_main)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal may come at any point
            timer.start()
            engine.generate("Hi", sampling=ENDLESS)
            time.sleep(5)
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    assert wrong == []


def test_close_during_streams(tiny_checkpoint: Path) -> None:
    """Open streams and waiting threads end with an error; none hangs, and close returns."""
    engine = open_engine(tiny_checkpoint, max_batch_size=NUM_SLOTS, max_seq_len=32768)
    begun = threading.Semaphore(0)

    def work() -> None:
        stream = engine.stream("Hi", sampling=ENDLESS)
        begun.release()
        for _ in stream:
            begun.release()

    def close() -> None:
        for _ in range(40):
            begun.acquire()
        engine.close()

    results = run_threads([work] * 4 + [close])
    assert results.pop() is None
    assert all(isinstance(r, BackendError) and "closed" in str(r) for r in results), results
    assert engine.closed


def in_forked_child(work: Callable[[], object]) -> str:
    """What `work` returns in a forked child, or the error it raises there."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest may run here
        signal.alarm(20)
        try:
            os.write(write_end, str(work()).encode())
        except BackendError as error:
            os.write(write_end, str(error).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        found = answer.read()
    assert os.waitpid(child, 0)[1] == 0, "the child hangs"
    return found


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # from Python 3.12 on
def test_a_forked_child_is_told_to_load_its_own(engine: Engine) -> None:
    inputs, locked, unlock = engine.prepare("Hi"), threading.Event(), threading.Event()
    stream, left = (engine.stream(inputs, sampling=ENDLESS) for _ in range(2))
    next(stream), next(left)

    def hold_lock() -> None:
        def wait(loaded: object) -> None:
            locked.set()
            unlock.wait()

        engine._scheduler.step(wait)

    works: dict[str, Callable[[], object]] = {
        "generate": lambda: engine.generate(inputs, max_new_tokens=1),
        "forward": lambda: engine.forward(inputs),
        "next": lambda: list(stream),
        "step": lambda: engine._scheduler.step(len),
    }
    ends = (stream.close, left.close, engine.close)
    thread = threading.Thread(target=hold_lock)
    thread.start()
    locked.wait()
    try:
        errors = {name: in_forked_child(work) for name, work in works.items()}
        closed = in_forked_child(lambda: [end() for end in ends])
    finally:
        unlock.set()
        thread.join()
    assert [name for name, error in errors.items() if "Load it after the fork" not in error] == []
    assert closed == "[None, None, None]"
    stream.close()
    left.close()
    assert tokens_of(engine, "text")
