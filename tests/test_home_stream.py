"""Work of an engine in order, whatever streams its callers are on; stand-ins for the streams."""

import itertools
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ovfast.home_stream import HomeStream
from tests.support.engines import REQUESTS, free_slots, open_engine, run_threads
from tests.support.row_decoder import open_rows


class FakeStream:
    """Knows which work will be done before what it is given next."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.before: set[int] = set()
        self.waits: list[str] = []

    def wait_stream(self, other: "FakeStream") -> None:
        self.waits.append(other.name)
        self.before |= other.before


class FakeDevice:
    """Streams with names, one of them current in each thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams = {name: FakeStream(name) for name in ("home", "a", "b")}
        self._local, self._count = threading.local(), itertools.count()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.use)

    @property
    def current(self) -> FakeStream:
        return getattr(self._local, "current", self.streams["home"])

    @contextmanager
    def use(self, stream: FakeStream) -> Iterator[None]:
        outer, self._local.current = self.current, stream
        try:
            yield
        finally:
            self._local.current = outer

    def launch(self) -> tuple[int, set[int]]:
        """Gives the current stream work: its number, and all that is done before it."""
        stream, number = self.current, next(self._count)
        before = set(stream.before)
        stream.before.add(number)
        return number, before


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return FakeDevice(monkeypatch)


def test_any_order_of_callers(fake: FakeDevice) -> None:
    """A step follows all steps and the caller's work, and the caller's next work follows it."""
    home, rng = HomeStream(torch.device("cuda")), random.Random(0)
    steps: set[int] = set()
    for _ in range(300):
        with fake.use(fake.streams[rng.choice(["home", "a", "b"])]):
            own, _ = fake.launch()
            step, before = home.run(fake.launch)
            assert steps | {own} <= before
            steps.add(step)
            assert steps <= fake.launch()[1]


def test_one_stream_costs_nothing(fake: FakeDevice) -> None:
    home = HomeStream(torch.device("cuda"))
    assert [home.run(fake.launch)[0] for _ in range(3)] == [0, 1, 2]
    assert all(stream.waits == [] for stream in fake.streams.values())


def test_a_stream_that_loaded_is_home(fake: FakeDevice) -> None:
    with fake.use(fake.streams["a"]):
        home = HomeStream(torch.device("cuda"))
        home.run(fake.launch)
    assert home.run(lambda: fake.current.name) == "a"
    assert fake.current.name == "home"
    assert {name: stream.waits for name, stream in fake.streams.items()} == {
        "a": ["home"],
        "home": ["a"],
        "b": [],
    }


def test_errors_leave_the_caller_in_order(fake: FakeDevice) -> None:
    home = HomeStream(torch.device("cuda"))

    def fail() -> None:
        fake.launch()
        raise KeyboardInterrupt

    with fake.use(fake.streams["b"]):
        with pytest.raises(KeyboardInterrupt):
            home.run(fail)
        assert fake.current.name == "b"
        assert fake.launch()[1] == {0}


def test_a_cpu_has_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "current_stream")
    monkeypatch.delattr(torch.cuda, "stream")
    assert HomeStream(torch.device("cpu")).run(lambda: 5) == 5


@pytest.mark.parametrize("rows", [True, False])
def test_all_that_an_engine_does(tiny_checkpoint: Path, fake: FakeDevice, rows: bool) -> None:
    """Steps of threads on three streams, and the emptying of rows of streams that are left."""
    opened = (open_rows if rows else open_engine)(
        tiny_checkpoint, backend="reference", max_batch_size=3
    )
    with opened as engine:
        loaded = engine._scheduler.loaded()
        expected = engine.generate(**REQUESTS["image"], max_new_tokens=5).token_ids
        home = HomeStream(torch.device("cuda"))
        engine._scheduler._home = home
        if rows:
            loaded.runner._home = home
            state = loaded.runner._groups[0].state
            release = state.release

            def check_release(row: int) -> None:
                seen.append(fake.current.name)
                release(row)

            state.release = check_release
        seen: list[str] = []
        prefill = loaded.model.language_model.prefill_hidden

        def check_prefill(*args: Any, **options: Any) -> torch.Tensor:
            seen.append(fake.current.name)
            return prefill(*args, **options)

        loaded.model.language_model.prefill_hidden = check_prefill

        def ask(name: str) -> tuple[int, ...]:
            with fake.use(fake.streams[name]):
                left = engine.stream("Leave.", max_new_tokens=50, ignore_eos=True)
                next(left)
                left.close()
                tokens = engine.generate(**REQUESTS["image"], max_new_tokens=5).token_ids
                assert fake.current.name == name
                return tokens

        assert run_threads([lambda n=n: ask(n) for n in ("home", "a", "b")]) == [expected] * 3
        assert set(seen) == {"home"}
        assert fake.streams["a"].waits.count("home") == fake.streams["home"].waits.count("a") > 0
        assert free_slots(engine) == 3
