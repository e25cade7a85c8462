"""What is captured, what is evicted and what runs eagerly, with a stand-in for the device."""

import random
from collections.abc import Callable

import pytest
import torch

from ovfast.cuda_graphs import GraphCache


class FakeGraph:
    def __init__(self, device: "Device", body, nbytes: int, pool_bytes: int) -> None:
        self.nbytes, self.pool_bytes = nbytes, pool_bytes
        self._device, self._body, self._log = device, body, device.log
        self.released = False

    def replay(self, tensor):
        assert not self.released
        self._log.append("replay")
        self._body(tensor)

    def release(self):
        assert not self.released
        self.released = True
        self._log.append("release")
        self._device.release(self)


class Device:
    """Captures to FakeGraphs of as many bytes as the tensor has elements.

    Bodies work in one pool, in `scratch` bytes by size: it grows to the most that any needed, and
    is free when no graph is left.
    """

    def __init__(self, scratch: Callable[[int], int] = lambda size: 0) -> None:
        self.log: list[str] = []
        self.full = False
        self.scratch, self.pool_bytes = scratch, 0
        self.graphs: list[FakeGraph] = []

    @property
    def held_bytes(self) -> int:
        return self.pool_bytes + sum(graph.nbytes for graph in self.graphs)

    def capture(self, body, tensor):
        before = self.pool_bytes
        if self.full:
            self.pool_bytes += 1 if self.graphs else 0  # half a capture
            raise torch.OutOfMemoryError("no memory")
        self.log.append("capture")
        self.pool_bytes = max(before, self.scratch(tensor.numel()))
        self.graphs.append(FakeGraph(self, body, tensor.numel(), self.pool_bytes - before))
        return self.graphs[-1]

    def release(self, graph: FakeGraph) -> None:
        self.graphs.remove(graph)
        self.pool_bytes = self.pool_bytes if self.graphs else 0

    def body(self, tensor):
        self.log.append("body")
        tensor += 1

    def run(self, cache: GraphCache, key: int) -> list[str]:
        """Runs one key on a tensor of that many elements; what it did."""
        self.log.clear()
        tensor = torch.zeros(key)
        cache.run(key, self.body, tensor)
        assert torch.equal(tensor, torch.ones(key))
        return list(self.log)


@pytest.fixture
def device() -> Device:
    return Device()


def test_captured_when_it_comes_again(device):
    cache = GraphCache(device.capture, 100)
    assert device.run(cache, 3) == ["body"]
    assert device.run(cache, 3) == ["capture", "replay", "body"]
    assert device.run(cache, 3) == ["replay", "body"]
    assert device.run(cache, 4) == ["body"]
    assert (cache.keys, cache.nbytes) == ((3,), 3)


def test_the_least_recently_used_goes_first(device):
    cache = GraphCache(device.capture, 10)
    for key in (3, 4, 3, 4, 3):
        device.run(cache, key)
    assert cache.keys == (4, 3)
    device.run(cache, 5)
    assert device.run(cache, 5) == ["capture", "release", "replay", "body"]
    assert (cache.keys, cache.nbytes) == ((3, 5), 8)
    assert device.run(cache, 4) == ["capture", "release", "replay", "body"]  # 3 went
    assert cache.keys == (5, 4)


def test_room_is_for_one_as_large_as_the_largest(device):
    cache = GraphCache(device.capture, 10)
    assert cache.has_room()
    for key in (4, 4, 1, 1):
        device.run(cache, key)
    assert cache.has_room()
    for key in (2, 2):
        device.run(cache, key)
    assert not cache.has_room()
    assert not GraphCache(device.capture, 0).has_room()


def test_one_that_never_fits_is_tried_once(device, caplog):
    cache = GraphCache(device.capture, 5)
    device.run(cache, 2)
    device.run(cache, 2)
    device.run(cache, 6)
    with caplog.at_level("INFO", logger="ovfast"):
        assert device.run(cache, 6) == [
            *("capture", "release", "release"),  # with the pool that both had
            *("capture", "release", "body"),  # alone, and still too large
        ]
    assert "graph_memory_bytes=5" in caplog.text
    assert device.run(cache, 6) == ["body"]
    assert [cache.is_refused(key) for key in (2, 6)] == [False, True]
    assert device.run(cache, 2) == ["capture", "replay", "body"], "what fits comes again"


def test_a_ceiling_of_zero_captures_nothing(device):
    cache = GraphCache(device.capture, 0)
    assert [device.run(cache, 3) for _ in range(3)] == [["body"]] * 3


def test_without_memory_it_runs_eagerly(device, caplog):
    cache = GraphCache(device.capture, 100)
    device.run(cache, 3)
    device.full = True
    assert device.run(cache, 3) == ["body"]
    assert "it runs without a graph" in caplog.text
    device.full = False
    assert device.run(cache, 3) == ["body"], "asked once"


def test_the_least_recently_used_leave_a_pool_of_its_size():
    device = Device(lambda size: 10 * size)
    cache = GraphCache(device.capture, 100)
    for key in (4, 4, 3, 3, 2, 2):
        device.run(cache, key)
    assert (cache.keys, cache.nbytes) == ((4, 3, 2), 40 + 9)
    device.run(cache, 9)
    assert device.run(cache, 9) == ["capture", *["release"] * 3, "replay", "body"]
    assert (cache.keys, cache.nbytes, device.held_bytes) == ((9,), 99, 99)


def test_a_pool_without_room_goes_with_all_that_use_it():
    device = Device({4: 90, 5: 0, 20: 10}.__getitem__)
    cache = GraphCache(device.capture, 100)
    for key in (4, 4, 5, 5):
        device.run(cache, key)
    assert (cache.keys, cache.nbytes) == ((4, 5), 99)
    device.run(cache, 20)
    # Beside the pool of 90 there is no room for it, whoever is released: it begins a new one.
    assert device.run(cache, 20) == [
        *("capture", "release", "release", "release"),
        *("capture", "replay", "body"),
    ]
    assert (cache.keys, cache.nbytes, device.held_bytes) == ((20,), 30, 30)
    assert device.run(cache, 5) == ["capture", "replay", "body"], "what has gone comes again"


@pytest.mark.parametrize("pool", ["none", "grows", "any"])
def test_the_ceiling_holds_whatever_comes(pool):
    needs = {"none": lambda size: 0, "grows": lambda size: 2 * size, "any": lambda size: size**3}
    device, rng = Device(lambda size: needs[pool](size) % 70), random.Random(pool)
    cache = GraphCache(device.capture, 60)
    for _ in range(2000):
        device.full = rng.random() < 0.01
        device.run(cache, rng.randint(1, 40))
        assert device.held_bytes <= cache.nbytes <= 60
    assert cache.keys


def test_clear_releases_all(device):
    cache = GraphCache(device.capture, 100)
    for key in (2, 2, 3, 3):
        device.run(cache, key)
    device.log.clear()
    cache.clear()
    assert device.log == ["release", "release"]
    assert (cache.keys, cache.nbytes) == ((), 0)
    assert device.run(cache, 2) == ["capture", "replay", "body"]
