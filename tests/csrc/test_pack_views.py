"""Native pack_views: byte for byte the plain canvas, and a clean error for every wrong input."""

import random
import threading

import numpy as np
import pytest
from numpy.typing import NDArray

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

Uint8Array = NDArray[np.uint8]


def expected_views(
    picture: Uint8Array, top: int, left: int, rows: int, cols: int, fill: int, side: int
) -> Uint8Array:
    canvas = np.full((rows * side, cols * side, 3), fill, np.uint8)
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    views = canvas.reshape(rows, side, cols, side, 3).swapaxes(1, 2)
    return views.reshape(rows * cols, side, side, 3)


def random_picture(rng: np.random.Generator, height: int, width: int) -> Uint8Array:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


# 384: the real side; 84: the demo's; 1 and 7: a view smaller than any vector.
@pytest.mark.parametrize(
    ("side", "rows", "cols"),
    [(side, *grid) for side in (1, 7, 84) for grid in ((1, 1), (1, 3), (3, 1), (6, 6), (1, 41))]
    + [(384, 1, 1), (384, 1, 2), (384, 2, 2)],
)
@pytest.mark.parametrize("fill", [0, 127, 255])
def test_full_canvas_and_centred_bands(side: int, rows: int, cols: int, fill: int) -> None:
    rng = np.random.default_rng(side * rows + cols)
    height, width = rows * side, cols * side
    for picture_hw in ((height, width), (max(height // 3, 1), width), (height, max(width // 3, 1))):
        picture = random_picture(rng, *picture_hw)
        top, left = (height - picture_hw[0]) // 2, (width - picture_hw[1]) // 2
        out = np.empty((rows * cols, side, side, 3), np.uint8)
        native.pack_views(picture, top, left, rows, cols, fill, out)
        np.testing.assert_array_equal(
            out, expected_views(picture, top, left, rows, cols, fill, side)
        )


@pytest.mark.parametrize("seed", range(200))
def test_random_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    side, rows, cols = (int(value) for value in rng.integers(1, [33, 5, 5]))
    height = int(rng.integers(1, rows * side + 1))
    width = int(rng.integers(1, cols * side + 1))
    top = int(rng.integers(0, rows * side - height + 1))
    left = int(rng.integers(0, cols * side - width + 1))
    fill = int(rng.integers(0, 256))
    picture = random_picture(rng, height, width)
    # One guard view on both sides: nothing outside `out` may be written.
    guarded = np.full((rows * cols + 2, side, side, 3), 77, np.uint8)
    native.pack_views(picture, top, left, rows, cols, fill, guarded[1:-1])
    np.testing.assert_array_equal(
        guarded[1:-1], expected_views(picture, top, left, rows, cols, fill, side)
    )
    assert (guarded[0] == 77).all()
    assert (guarded[-1] == 77).all()


def test_rows_at_any_stride() -> None:
    wide = random_picture(np.random.default_rng(5), 40, 50)
    out = np.empty((4, 16, 16, 3), np.uint8)
    crop = wide[3:23, 11:41]
    # Every second row, upside down, and sizes of 1, where numpy's strides mean nothing.
    for picture in (crop, wide[::2, :20], crop[::-1], wide[:1, :30], wide[:20, :1], crop[::5, :1]):
        native.pack_views(picture, 1, 2, 2, 2, 9, out)
        np.testing.assert_array_equal(out, expected_views(picture, 1, 2, 2, 2, 9, 16))


def test_read_only_input_is_fine_and_unchanged() -> None:
    picture = random_picture(np.random.default_rng(6), 8, 8)
    before = picture.copy()
    picture.flags.writeable = False
    native.pack_views(picture, 0, 0, 1, 1, 0, np.empty((1, 8, 8, 3), np.uint8))
    np.testing.assert_array_equal(picture, before)


def test_threads_share_a_picture() -> None:
    picture = random_picture(np.random.default_rng(7), 300, 400)
    outs = [np.empty((4, 200, 200, 3), np.uint8) for _ in range(4)]
    threads = [
        threading.Thread(target=native.pack_views, args=(picture, 50, 0, 2, 2, 0, out))
        for out in outs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in outs:
        np.testing.assert_array_equal(out, expected_views(picture, 50, 0, 2, 2, 0, 200))


def good_arguments() -> dict[str, object]:
    return {
        "resized": np.zeros((10, 12, 3), np.uint8),
        "offset_top": 1,
        "offset_left": 2,
        "grid_rows": 2,
        "grid_cols": 2,
        "fill": 0,
        "out": np.zeros((4, 8, 8, 3), np.uint8),
    }


def read_only(array: Uint8Array) -> Uint8Array:
    array.flags.writeable = False
    return array


SHARED = np.zeros((4, 8, 8, 3), np.uint8)

BAD_ARGUMENTS = {
    "resized-list": ({"resized": [[1]]}, TypeError, "resized is a list; expected a numpy array"),
    "resized-none": ({"resized": None}, TypeError, "resized is a NoneType"),
    "resized-float": ({"resized": np.zeros((4, 4, 3))}, TypeError, "dtype float64; expected uint8"),
    "resized-int8": ({"resized": np.zeros((4, 4, 3), np.int8)}, TypeError, "dtype int8"),
    "resized-bool": ({"resized": np.zeros((4, 4, 3), bool)}, TypeError, "dtype bool"),
    "resized-rank": ({"resized": np.zeros((4, 4), np.uint8)}, ValueError, r"shape \(4, 4\)"),
    "resized-scalar": ({"resized": np.uint8(3)}, TypeError, "resized is a uint8"),
    "resized-0d": ({"resized": np.array(3, np.uint8)}, ValueError, r"shape \(\)"),
    "resized-rgba": ({"resized": np.zeros((4, 4, 4), np.uint8)}, ValueError, "width, 3"),
    "resized-empty": ({"resized": np.zeros((0, 4, 3), np.uint8)}, ValueError, "is empty"),
    "resized-columns": ({"resized": np.zeros((4, 8, 3), np.uint8)[:, ::2]}, ValueError, "axis 1"),
    "resized-bgr": ({"resized": np.zeros((4, 8, 3), np.uint8)[..., ::-1]}, ValueError, "axis 2"),
    "resized-tall": ({"resized": np.zeros((17, 4, 3), np.uint8)}, ValueError, "height 17"),
    "resized-wide": ({"resized": np.zeros((4, 17, 3), np.uint8)}, ValueError, "width 17"),
    "top-negative": ({"offset_top": -1}, ValueError, "offset -1"),
    "top-large": ({"offset_top": 7}, ValueError, "leaves the canvas of 16"),
    "top-huge": ({"offset_top": 2**63 - 1}, ValueError, "leaves the canvas"),
    "top-over-int64": ({"offset_top": 2**64}, TypeError, "incompatible"),
    "top-float": ({"offset_top": 1.0}, TypeError, "incompatible"),
    "left-negative": ({"offset_left": -5}, ValueError, "width 12 at offset -5"),
    "grid-zero": ({"grid_rows": 0}, ValueError, "grid of 0 × 2"),
    "grid-negative": ({"grid_rows": -2, "grid_cols": -2}, ValueError, "grid of -2 × -2"),
    "grid-too-few": ({"grid_rows": 1}, ValueError, r"out has shape \(4, 8, 8, 3\)"),
    "grid-huge": ({"grid_rows": 2**62, "grid_cols": 4}, ValueError, "at least 1"),
    "fill-negative": ({"fill": -1}, ValueError, "fill is -1"),
    "fill-256": ({"fill": 256}, ValueError, "expected 0 to 255"),
    "out-tuple": ({"out": ()}, TypeError, "out is a tuple"),
    "out-float": ({"out": np.zeros((4, 8, 8, 3), np.float32)}, TypeError, "dtype float32"),
    "out-rank": ({"out": np.zeros((8, 8, 3), np.uint8)}, ValueError, "out has shape"),
    "out-oblong": ({"out": np.zeros((4, 8, 9, 3), np.uint8)}, ValueError, "out has shape"),
    "out-empty": ({"out": np.zeros((0, 8, 8, 3), np.uint8)}, ValueError, "out is empty"),
    "out-strided": ({"out": np.zeros((8, 8, 8, 3), np.uint8)[::2]}, ValueError, "axis 0"),
    "out-broadcast": (
        {"out": np.broadcast_to(np.zeros((1, 8, 8, 3), np.uint8), (4, 8, 8, 3))},
        ValueError,
        "stride 0",
    ),
    "out-read-only": (
        {"out": read_only(np.zeros((4, 8, 8, 3), np.uint8))},
        ValueError,
        "out is read-only",
    ),
    "shared-memory": ({"resized": SHARED[1], "out": SHARED}, ValueError, "share memory"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    changes, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        native.pack_views(**(good_arguments() | changes))


def random_array(rng: random.Random) -> object:
    shape = [rng.choice((0, 1, 2, 3, 8, 16, 17)) for _ in range(rng.randrange(5))]
    if rng.random() < 0.7:
        shape = [*shape[:3], 3]
    dtype = rng.choice((np.uint8, np.uint8, np.uint8, np.int8, np.uint16, np.float32, bool, object))
    array = np.zeros(shape, dtype)
    kind = rng.randrange(4)
    if kind == 1 and array.ndim:
        return array[(*[slice(None)] * (array.ndim - 1), slice(None, None, -1))]
    if kind == 2:
        return array.T
    if kind == 3:
        return read_only(array)
    return array


def test_hundreds_of_random_calls_work_or_raise_cleanly() -> None:
    rng = random.Random(20)
    numbers = [0, 1, 2, 3, 4, 7, -1, 255, 256, 2**31, 2**62, -(2**63), 2**63, 2**70, True]
    others: list[object] = [None, "x", 1.5, b"", [], np.int64(2), np.float64(1), object()]
    messages = []
    for _ in range(2000):
        arguments = good_arguments()
        for name in rng.sample(sorted(arguments), rng.randrange(1, 4)):
            is_array = name in ("resized", "out")
            wrong = random_array(rng) if is_array else rng.choice(numbers)
            arguments[name] = rng.choice(others) if rng.random() < 0.2 else wrong
        try:
            native.pack_views(**arguments)
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    assert all(messages)
    assert len(messages) > 500, "the fuzzing mostly made valid calls"
