"""What is captured, what is evicted and what runs eagerly, with a stand-in for the device."""

import pytest
import torch

from ovfast.cuda_graphs import GraphCache


class FakeGraph:
    def __init__(self, body, nbytes: int, log: list[str]) -> None:
        self.nbytes, self._body, self._log = nbytes, body, log
        self.released = False

    def replay(self, tensor):
        assert not self.released
        self._log.append("replay")
        self._body(tensor)

    def release(self):
        assert not self.released
        self.released = True
        self._log.append("release")


class Device:
    """Captures to FakeGraphs of as many bytes as the tensor has elements."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.full = False

    def capture(self, body, tensor):
        if self.full:
            raise torch.OutOfMemoryError("no memory")
        self.log.append("capture")
        return FakeGraph(body, tensor.numel(), self.log)

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


def test_one_that_never_fits_is_tried_once(device, caplog):
    cache = GraphCache(device.capture, 5)
    device.run(cache, 2)
    device.run(cache, 2)
    device.run(cache, 6)
    with caplog.at_level("INFO", logger="ovfast"):
        assert device.run(cache, 6) == ["capture", "release", "body"]
    assert "graph_memory_bytes=5" in caplog.text
    assert device.run(cache, 6) == ["body"]
    assert cache.keys == (2,), "what fits stays"


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


def test_clear_releases_all(device):
    cache = GraphCache(device.capture, 100)
    for key in (2, 2, 3, 3):
        device.run(cache, key)
    device.log.clear()
    cache.clear()
    assert device.log == ["release", "release"]
    assert (cache.keys, cache.nbytes) == ((), 0)
    assert device.run(cache, 2) == ["capture", "replay", "body"]
