"""What arrays a native function takes: outputs without overlap, indices that others may change."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

ROOT = Path(__file__).resolve().parents[2]


def normalise(out: np.ndarray) -> None:
    rows, cols = out.shape
    x = np.arange(rows * cols, dtype=np.float32).reshape(rows, cols) + 1
    native.rms_norm(native.ThreadPool(1), x, np.ones(cols, np.float32), 1e-6, out)


@pytest.mark.parametrize("stride", [0, 4, 28, -4, -28])
def test_rows_that_overlap(stride: int) -> None:
    """8 floats a row: 32 bytes."""
    memory = np.zeros(100, np.float32)
    message = rf"out repeats its elements on axis 0: its stride is {stride}, less than \d+ bytes"
    with pytest.raises(ValueError, match=message):
        normalise(as_strided(memory[50:], (3, 8), (stride, 4)))
    assert not memory.any()


@pytest.mark.parametrize("stride", [32, 36, -32, -40])
def test_rows_that_do_not_overlap(stride: int) -> None:
    memory, expected = np.zeros(100, np.float32), np.zeros((3, 8), np.float32)
    out = as_strided(memory[50:], (3, 8), (stride, 4))
    normalise(out)
    normalise(expected)
    assert np.array_equal(out, expected)
    assert np.count_nonzero(memory) == 24


@pytest.mark.parametrize("stride", [0, 4, -4, 2**40])
def test_the_stride_of_a_single_row_says_nothing(stride: int) -> None:
    normalise(as_strided(np.zeros(8, np.float32), (1, 8), (stride, 4)))


def rotate(cache: np.ndarray) -> None:
    """Writes to slots 0 and 1 of a cache (2 slots, 3 heads, 4 positions, 2)."""
    cos = np.ones((4, 1), np.float32)
    other = as_strided(np.zeros(200, np.float32)[100:], cache.shape, cache.strides)
    indices = np.array([0, 1], np.int32)
    qkv = np.ones((2, 9 * 2), np.float32)
    native.rope_and_store_rows(
        native.ThreadPool(1), qkv, cos, cos, cache, other, indices, indices, 3
    )


# Bytes of a slot and of a head; a head has 4 · 2 · 4 = 32.
@pytest.mark.parametrize("strides", [(96, 32), (32, 64), (-96, 32), (36, -72), (200, 40)])
def test_axes_in_any_order(strides: tuple[int, int]) -> None:
    rotate(as_strided(np.zeros(200, np.float32)[100:], (2, 3, 4, 2), (*strides, 8, 4)))


@pytest.mark.parametrize(
    ("strides", "axis", "bytes_inside"),
    [
        ((92, 32), 0, 96),
        ((32, 60), 1, 64),
        ((32, 32), 0, 96),
        ((-28, 64), 0, 32),
        ((64, 32), 0, 96),
        ((0, 32), 0, 4),
    ],
)
def test_axes_that_overlap(strides: tuple[int, int], axis: int, bytes_inside: int) -> None:
    cache = as_strided(np.zeros(200, np.float32)[100:], (2, 3, 4, 2), (*strides, 8, 4))
    message = rf"k_cache repeats its elements on axis {axis}: .* less than {bytes_inside} bytes"
    with pytest.raises(ValueError, match=message):
        rotate(cache)


# Each call reads indices that another thread switches between inside and far outside.
RACE = """
import contextlib, sys, threading, time
import numpy as np
from tests.support.native_arguments import native

FAR = 2**30
sys.setswitchinterval(1e-5)
pool = native.ThreadPool(1)
ones = lambda *shape: np.ones(shape, np.float32)
weights = native.pack(pool, "float32", [ones(2, 64)])
ids, index = np.zeros(20000, np.int32), np.zeros((20000, 4), np.int32)
few, many = np.zeros(40, np.int32), np.zeros(4000, np.int64)
cache, keys = ones(40, 1, 900, 64), ones(1, 4000, 16)
rows, wide = ones(20000, 64), ones(20000, 64)
prompt = ones(4000, 1, 16), keys, keys + 1, many, ones(4000, 16)
calls = {
    "embed": (ids, lambda: native.embed(pool, weights, ids, rows)),
    "place": (index, lambda: native.place(
        pool, wide, index, ones(20000, 4), ones(64), None, None, rows)),
    "place_text": (ids, lambda: native.place(
        pool, wide, np.full_like(index, -2), ones(20000, 4), ones(64), ids, weights, rows)),
    "decode": (few, lambda: native.decode_attention(
        pool, ones(40, 1, 64), cache, cache + 1, np.arange(40, dtype=np.int32), few, ones(40, 64))),
    "causal": (many, lambda: native.causal_attention(pool, *prompt)),
    "sample": (ids, lambda: native.sample(
        ones(151647), np.zeros(151647, np.uint8), None, ids, 1, 1, 50, 0.9, 0, 0.5)),
}
array, call = calls[sys.argv[1]]
ends = time.monotonic() + float(sys.argv[2])
def write():
    while time.monotonic() < ends or done < 3:
        array[:] = FAR
        array[:] = 800 if sys.argv[1] == "decode" else 0  # long enough to be met
done = 0
thread = threading.Thread(target=write)
thread.start()
while time.monotonic() < ends or done < 3:
    with contextlib.suppress(ValueError):
        call()
        done += 1
thread.join()
"""


@pytest.mark.parametrize("name", ["embed", "place", "place_text", "decode", "causal", "sample"])
def test_indices_that_another_thread_changes(name: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", RACE, name, "0.3"], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_sources_of_pack_that_another_thread_drops() -> None:
    """The list is emptied while its arrays are read."""
    program = """
import sys, threading
import numpy as np
from tests.support.native_arguments import native
sys.setswitchinterval(1e-5)
for _ in range(5):
    sources = [np.ones((3000, 2000), np.float32)]
    def drop():
        while sources: sources.pop()
    thread = threading.Thread(target=drop)
    waits = threading.Timer(0.001, thread.start)
    waits.start()
    try:
        packed = native.pack(native.ThreadPool(1), "float32", sources)
        assert (packed.bytes().view(np.float32) == 1).mean() > 0.9
    except ValueError:  # the list was empty before it was read
        pass
    waits.join(); thread.join()
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("shape", [(2**28 + 1, 1), (2**58, 1), (1, 2**24 + 1), (0, 2**60)])
def test_sources_of_pack_beyond_any_layer(shape: tuple[int, int]) -> None:
    """Rows at stride 0 need no memory of their own: their packed bytes would overflow."""
    source = as_strided(np.zeros(2**24 + 1, np.float32), shape, (0, 4))
    with pytest.raises(ValueError, match=r"the number of (rows|columns) of sources\[0\] is"):
        native.pack(native.ThreadPool(1), "float32", [source])


@pytest.mark.parametrize("kind", ["ThreadPool", "PackedWeights", "Decoder", None])
def test_objects_that_were_not_constructed(kind: str | None) -> None:
    program = f"""
import numpy as np
import pytest
from tests.support.native_arguments import native
nothing = {kind and f"native.{kind}.__new__(native.{kind})"}
one = np.ones((1, 1), np.float32)
for call in (
    lambda: native.rms_norm(nothing, one, one[0], 1e-6, one.copy()),
    lambda: native.embed(native.ThreadPool(1), nothing, np.zeros(1, np.int32), one.copy()),
    lambda: native.PackedWeights.bytes(nothing),
    lambda: native.PackedWeights.nbytes.fget(nothing),
    lambda: native.ThreadPool.num_threads.fget(nothing),
    lambda: native.Decoder.step(nothing, *[None] * 8),
    lambda: native.Decoder(native.ThreadPool(1), nothing, one, nothing, 0, 1, 1, 2, one, one),
    lambda: native.Decoder(nothing, *[native.pack(native.ThreadPool(1), "float32", [one])] * 3,
                           0, 1, 1, 2, one, one),
):
    with pytest.raises(TypeError):
        call()
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_coefficients_without_end() -> None:
    """2⁵⁰ taps that are one number: the table of them would fill any memory."""
    coefficients = np.broadcast_to(np.int32(1), (2, 2**50))
    picture, first = np.zeros((5, 5, 3), np.uint8), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="the number of columns of coefficients is"):
        native.resample(
            native.ThreadPool(1), picture, first, coefficients, 0, np.zeros((2, 5, 3), np.uint8)
        )
