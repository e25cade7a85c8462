"""Native resample: byte for byte Pillow's resize, and the reference where a picture is padded."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ovfast import reference_pixels
from ovfast.resize_table import resize_table, vertical_first

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

UInt8Array = NDArray[np.uint8]
POOL = native.ThreadPool(1)


def picture(height: int, width: int, seed: int = 0) -> UInt8Array:
    return np.random.default_rng([seed, height, width]).integers(
        0, 256, (height, width, 3), np.uint8
    )


def resample(
    source: UInt8Array, size_in: int, size_out: int, axis: int, pool: Any = POOL, **padding: int
) -> UInt8Array:
    shape = [*source.shape]
    shape[axis] = size_out
    # Nothing around `out` may be written.
    guarded = np.full((shape[0] + 2, shape[1] + 2, 3), 77, np.uint8)
    out = guarded[1:-1, 1:-1]
    table = resize_table(size_in, size_out)
    native.resample(pool, source, table.first, table.coefficients, axis, out, **padding)
    result = out.copy()
    out[...] = 77
    assert (guarded == 77).all()
    return result


def resize(source: UInt8Array, size_hw: tuple[int, int], pool: Any = POOL) -> UInt8Array:
    for axis in (0, 1) if vertical_first(source.shape[:2], size_hw) else (1, 0):
        if source.shape[axis] != size_hw[axis]:
            source = resample(source, source.shape[axis], size_hw[axis], axis, pool)
    return source


def check_resize(source_hw: tuple[int, int], size_hw: tuple[int, int]) -> None:
    source = picture(*source_hw)
    expected = Image.fromarray(source).resize(size_hw[::-1], Image.Resampling.BICUBIC)
    same = np.array_equal(resize(source, size_hw), np.asarray(expected))
    assert same, f"{source_hw} to {size_hw}"


def test_random_shapes_equal_pillow(isa: str) -> None:
    rng = random.Random(1)
    for _ in range(150):
        height, width, to_height, to_width = (int(2 ** rng.uniform(0, 7.5)) for _ in range(4))
        check_resize((height, width), (to_height, to_width))


# 15, 16 and 17 rows, columns and bytes: around the size of a vector and of a strip.
@pytest.mark.parametrize("size", [1, 2, 5, 6, 15, 16, 17, 31, 32, 33, 48, 49])
def test_sizes_around_a_vector(isa: str, size: int) -> None:
    check_resize((size, 40), (size, 23))
    check_resize((40, size), (23, size))
    check_resize((40, 23), (size, size))
    check_resize((size, size), (40, 23))


# One pixel, thin ones, and hundreds of taps; the model's own sizes.
@pytest.mark.parametrize(
    ("source_hw", "size_hw"),
    [
        ((1, 1), (384, 384)),
        ((333, 277), (1, 1)),
        ((1, 4096), (1, 384)),
        ((4096, 1), (384, 1)),
        ((5000, 20), (16, 24)),
        ((20, 5000), (24, 16)),
        ((384, 384), (383, 385)),
        ((480, 640), (384, 384)),
    ],
)
def test_large_and_thin(isa: str, source_hw: tuple[int, int], size_hw: tuple[int, int]) -> None:
    check_resize(source_hw, size_hw)


def test_black_and_white_overshoot_is_cut(isa: str) -> None:
    source = (picture(60, 70) > 127).astype(np.uint8) * 255
    expected = Image.fromarray(source).resize((150, 130), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize(source, (130, 150)), np.asarray(expected))


@pytest.mark.parametrize("axis", [0, 1])
def test_padding_by_address(isa: str, axis: int) -> None:
    rng = random.Random(axis)
    for _ in range(40):
        source = picture(rng.randint(1, 60), rng.randint(1, 60))
        size_in = source.shape[axis] + rng.randint(0, 50)
        size_out = rng.randint(1, 60)
        padding = {"offset": rng.randint(-3, 53), "fill": rng.randint(0, 255)}
        table = resize_table(size_in, size_out)
        shape = [*source.shape]
        shape[axis] = size_out
        expected = reference_pixels.resample(
            torch.from_numpy(source),
            torch.from_numpy(table.first),
            torch.from_numpy(table.coefficients),
            axis,
            torch.empty(shape, dtype=torch.uint8),
            **padding,
        )
        out = resample(source, size_in, size_out, axis, **padding)
        np.testing.assert_array_equal(out, expected.numpy())


# Any table: sums wrap around as those of int32 do, and taps lie anywhere.
@pytest.mark.parametrize("axis", [0, 1])
def test_any_coefficients(isa: str, axis: int) -> None:
    rng = np.random.default_rng(axis)
    for num_taps in (0, 1, 2, 7):
        source = picture(37, 29)
        first = rng.integers(-(2**31), 2**31, 41).astype(np.int32)
        first[5:] = rng.integers(-9, 45, 36)
        coefficients = rng.integers(-(2**31), 2**31, (41, num_taps)).astype(np.int32)
        coefficients[::3] >>= 9
        coefficients[6:9, :4] = (0x7FFF8000, -(2**31), 0x8000, -0x8001)[:num_taps]
        shape = (41, 29, 3) if axis == 0 else (37, 41, 3)
        out, expected = np.empty(shape, np.uint8), torch.empty(shape, dtype=torch.uint8)
        native.resample(POOL, source, first, coefficients, axis, out, 3, 200)
        arrays = (torch.from_numpy(array) for array in (source, first, coefficients))
        reference_pixels.resample(*arrays, axis, expected, offset=3, fill=200)
        np.testing.assert_array_equal(out, expected.numpy())


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_same_bytes_with_any_number_of_threads(isa: str, num_threads: int) -> None:
    source = picture(130, 170)
    pool = native.ThreadPool(num_threads)
    expected = Image.fromarray(source).resize((60, 90), Image.Resampling.BICUBIC)
    for _ in range(5):
        np.testing.assert_array_equal(resize(source, (90, 60), pool), np.asarray(expected))


def test_sources_at_any_row_stride(isa: str) -> None:
    wide = picture(80, 90)
    for source in (wide[3:60, 11:70], wide[::-1], wide[::2, :50], wide[::-3, 5:40], wide[:20, :1]):
        contiguous = np.ascontiguousarray(source)
        for axis in (0, 1):
            np.testing.assert_array_equal(
                resample(source, source.shape[axis], 33, axis),
                resample(contiguous, source.shape[axis], 33, axis),
            )


def test_read_only_arrays_are_fine(isa: str) -> None:
    source = picture(20, 30)
    expected = resample(source, 30, 20, 1)
    source.setflags(write=False)
    np.testing.assert_array_equal(resample(source, 30, 20, 1), expected)


def test_empty_outputs() -> None:
    empty = np.empty((0,), np.int32)
    table = np.empty((0, 4), np.int32)
    native.resample(POOL, picture(5, 6), empty, table, 0, np.empty((0, 6, 3), np.uint8))
    native.resample(POOL, picture(5, 6), empty, table, 1, np.empty((5, 0, 3), np.uint8))
    full = resize_table(6, 4)
    none = np.empty((0, 6, 3), np.uint8)
    native.resample(POOL, none, full.first, full.coefficients, 1, np.empty((0, 4, 3), np.uint8))


def good_arguments() -> dict[str, Any]:
    table = resize_table(12, 7)
    return {
        "pool": POOL,
        "source": np.zeros((10, 12, 3), np.uint8),
        "first": table.first,
        "coefficients": table.coefficients,
        "axis": 1,
        "out": np.zeros((10, 7, 3), np.uint8),
        "offset": 0,
        "fill": 0,
    }


def read_only(array: UInt8Array) -> UInt8Array:
    array.flags.writeable = False
    return array


SHARED = np.zeros((10, 12, 3), np.uint8)

BAD_ARGUMENTS = {
    "pool-none": ({"pool": None}, TypeError, "pool"),
    "source-list": ({"source": [[1]]}, TypeError, "source is a list; expected a numpy array"),
    "source-float": ({"source": np.zeros((4, 4, 3))}, TypeError, "source has dtype float64"),
    "source-rank": ({"source": np.zeros((4, 4), np.uint8)}, ValueError, r"source has shape \(4, 4"),
    "source-rgba": ({"source": np.zeros((4, 4, 4), np.uint8)}, ValueError, "source has shape"),
    "source-empty": (
        {"source": np.zeros((10, 0, 3), np.uint8)},
        ValueError,
        "source is empty",
    ),
    "source-columns": ({"source": np.zeros((10, 24, 3), np.uint8)[:, ::2]}, ValueError, "axis 1"),
    "source-bgr": ({"source": np.zeros((10, 12, 3), np.uint8)[..., ::-1]}, ValueError, "axis 2"),
    "first-int64": ({"first": np.zeros(7, np.int64)}, TypeError, "first has dtype int64"),
    "first-strided": ({"first": np.zeros(14, np.int32)[::2]}, ValueError, "first has stride 8"),
    "first-rank": ({"first": np.zeros((7, 1), np.int32)}, ValueError, "first has shape"),
    "coefficients-int64": (
        {"coefficients": np.zeros((7, 4), np.int64)},
        TypeError,
        "coefficients has dtype int64",
    ),
    "coefficients-rows": (
        {"coefficients": np.zeros((8, 4), np.int32)},
        ValueError,
        r"coefficients has shape \(8, 4\); expected \(7, any\)",
    ),
    "axis-2": ({"axis": 2}, ValueError, "axis is 2; expected 0 to 1"),
    "axis-negative": ({"axis": -1}, ValueError, "axis is -1"),
    "axis-float": ({"axis": 1.0}, TypeError, "incompatible"),
    "axis-other": ({"axis": 0}, ValueError, r"out has shape .* expected \(7, 12, 3\)"),
    "offset-huge": ({"offset": 2**62}, ValueError, "offset is 4611686018427387904"),
    "offset-over-int64": ({"offset": 2**64}, TypeError, "incompatible"),
    "fill-negative": ({"fill": -1}, ValueError, "fill is -1"),
    "fill-256": ({"fill": 256}, ValueError, "fill is 256; expected 0 to 255"),
    "out-float": ({"out": np.zeros((10, 7, 3), np.float32)}, TypeError, "out has dtype float32"),
    "out-size": ({"out": np.zeros((10, 8, 3), np.uint8)}, ValueError, "out has shape"),
    "out-read-only": (
        {"out": read_only(np.zeros((10, 7, 3), np.uint8))},
        ValueError,
        "out is read-only",
    ),
    "out-repeated": (
        {"out": np.broadcast_to(np.zeros((1, 7, 3), np.uint8), (10, 7, 3))},
        ValueError,
        "out is read-only",
    ),
    "shared-memory": (
        {"source": SHARED, "out": SHARED.reshape(-1)[:210].reshape(10, 7, 3)},
        ValueError,
        "source and out share memory",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    changes, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        native.resample(**(good_arguments() | changes))


def test_good_arguments_are_good() -> None:
    native.resample(**good_arguments())
