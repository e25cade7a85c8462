"""The measured read rate: a plausible number, and a clean error for every wrong input."""

import time

import pytest

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

MEGABYTE = 1 << 20


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("num_bytes", [8, 15, MEGABYTE - 8, 5 * MEGABYTE + 8])
def test_rates_are_those_of_a_memory(threads: int, num_bytes: int) -> None:
    """One word and all sizes around a task; rates beyond what any cache reads would be a fault."""
    rate = native.read_bandwidth(native.ThreadPool(threads), num_bytes)
    assert 0 < rate < 1e13


def test_all_bytes_are_read_each_pass() -> None:
    """No pass is left out by the compiler: 32 MB take longer than 1 µs."""
    pool = native.ThreadPool(1)
    start = time.perf_counter()
    rate = native.read_bandwidth(pool, 32 * MEGABYTE)
    assert 32 * MEGABYTE / rate < time.perf_counter() - start
    assert rate < 1e12, "a core of today reads less"


@pytest.mark.parametrize("num_bytes", [0, 7, -1, -(1 << 63), (8 << 30) + 1, 1 << 62])
def test_sizes_out_of_range(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"num_bytes is {num_bytes}; expected 8 to 8589934592"):
        native.read_bandwidth(native.ThreadPool(1), num_bytes)


def test_other_errors() -> None:
    with pytest.raises(TypeError, match="read_bandwidth"):
        native.read_bandwidth(1, 64)
