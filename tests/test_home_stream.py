"""Work of an engine in order and on its device, whatever streams and devices its callers are on;
stand-ins for both.
"""

import itertools
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ovfast import BackendError, loading
from ovfast.home_stream import HomeStream
from tests.support.engines import REQUESTS, free_slots, open_engine, run_threads
from tests.support.row_decoder import open_rows

SECOND = torch.device("cuda", 1)


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
    """Streams with names, one of them current in each thread, and which device is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams = {name: FakeStream(name) for name in ("home", "a", "b")}
        self._local, self._count = threading.local(), itertools.count()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.use)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.index)
        monkeypatch.setattr(torch.cuda, "device", self.use_device)

    @property
    def current(self) -> FakeStream:
        return getattr(self._local, "current", self.streams["home"])

    @property
    def index(self) -> int:
        return getattr(self._local, "index", 0)

    @contextmanager
    def use_device(self, device: torch.device) -> Iterator[None]:
        outer = self.index
        self._local.index = outer if device.index is None else device.index
        try:
            yield
        finally:
            self._local.index = outer

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


@pytest.mark.parametrize("stream", ["home", "a"])
def test_work_is_on_its_device(fake: FakeDevice, stream: str) -> None:
    """In the thread that loaded, where another device is current, and in a new one."""
    home = HomeStream(SECOND)

    def fail() -> None:
        raise KeyboardInterrupt

    def work() -> tuple[int, ...]:
        with fake.use(fake.streams[stream]):
            inside = home.run(torch.cuda.current_device)
            with pytest.raises(KeyboardInterrupt):
                home.run(fail)
        return inside, torch.cuda.current_device()

    with fake.use_device(torch.device("cuda", 2)):
        assert work() == (1, 2)
        assert run_threads([work]) == [(1, 0)]


def test_a_model_is_built_on_its_device(fake: FakeDevice) -> None:
    seen: list[int] = []

    def build() -> Any:
        seen.append(torch.cuda.current_device())
        raise ValueError("built enough")

    with pytest.raises(ValueError, match="built enough"):
        loading._build(build, 0, 0, SECOND)
    assert (seen, torch.cuda.current_device()) == ([1], 0)


@pytest.mark.parametrize(
    ("name", "index"), [("auto", 1), ("cuda", 1), ("cuda:0", 0), (torch.device("cuda", 1), 1)]
)
def test_a_device_has_an_index(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, name: Any, index: int
) -> None:
    """That of the device which is current now: in another thread it may be another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with fake.use_device(SECOND):
        assert loading.resolve_device(name) == torch.device("cuda", index)
    with pytest.raises(BackendError, match="'cuda:2', but 2 CUDA devices were found"):
        loading.resolve_device("cuda:2")


def test_a_cpu_has_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("current_stream", "stream", "current_device", "device"):
        monkeypatch.delattr(torch.cuda, name)
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
        home = HomeStream(SECOND)
        engine._scheduler._home = home
        if rows:
            loaded.runner._home = home
            state = loaded.runner._groups[0].state
            release = state.release

            def check_release(row: int) -> None:
                seen.append(fake.current.name)
                assert fake.index == 1
                release(row)

            state.release = check_release
        seen: list[str] = []
        prefill = loaded.model.language_model.prefill_hidden

        def check_prefill(*args: Any, **options: Any) -> torch.Tensor:
            seen.append(fake.current.name)
            assert fake.index == 1
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
