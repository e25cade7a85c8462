"""Native patch_embed against a float64 oracle: windows of pictures that share one buffer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from ovfast import reference_pixels
from ovfast.pixels import view_pixels
from tests.support.accuracy import assert_two_times_rule
from tests.support.pixel_cases import (
    ALL_VIEWS,
    BEYOND,
    IDENTITY,
    INSIDE,
    OUTSIDE,
    PADDED,
    SIZES,
    lay_out,
)

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

POOL = native.ThreadPool(1)


@dataclass
class Case:
    """Arguments of a call, and what makes the truth."""

    pixels: np.ndarray
    windows: np.ndarray
    weights: Any
    stored_weight: torch.Tensor
    offset: torch.Tensor
    views: list[torch.Tensor]
    image: int

    def run(self, windows: np.ndarray | None = None, pool: Any = POOL) -> torch.Tensor:
        windows = self.windows if windows is None else windows
        out = np.full((len(windows) * len(self.offset), self.weights.rows), np.nan, np.float32)
        native.patch_embed(
            pool, self.pixels, windows, self.weights, self.offset.numpy(), self.image, out
        )
        return torch.from_numpy(out)

    def check(self) -> None:
        pixels = view_pixels(torch.stack(self.views).numpy(), torch.device("cpu"))
        arguments = (pixels.buffer, pixels.windows, self.stored_weight, self.offset, self.image)
        truth = reference_pixels.patch_embed(*arguments, torch.float32, upcast=True)
        same_dtype = reference_pixels.patch_embed(*arguments, torch.float32)
        assert_two_times_rule(self.run(), same_dtype, truth)


def make_case(
    views: list[tuple[int, int, int, int]],
    *,
    hidden: int = 41,
    sizes: list[tuple[int, int]] = SIZES,
    patch: int = 14,
    image: int = 56,
    around: int = 255,
    kind: str = "float32",
) -> Case:
    """Pictures with gaps between them and behind each row, all of value `around`."""
    generator = torch.Generator().manual_seed(hidden)
    laid_out = lay_out(generator, views, sizes, image, around)
    dtype = getattr(torch, kind)
    weight = (torch.randn(hidden, 3 * patch * patch, generator=generator) / patch).to(dtype)
    source = weight.view(torch.uint16) if dtype == torch.bfloat16 else weight
    bias = torch.randn(hidden, generator=generator)
    positions = torch.randn((image // patch) ** 2, hidden, generator=generator)
    return Case(
        pixels=laid_out.pixels.numpy(),
        windows=laid_out.windows.numpy(),
        weights=native.pack(POOL, kind, [source.numpy()]),
        stored_weight=weight.float(),
        offset=reference_pixels.patch_offset(weight, bias, positions),
        views=laid_out.views,
        image=image,
    )


@pytest.mark.parametrize(
    "views",
    [IDENTITY, INSIDE, PADDED, BEYOND, OUTSIDE, ALL_VIEWS],
    ids=["identity", "inside", "padded", "beyond", "outside", "all"],
)
def test_windows(isa: str, views: list[tuple[int, int, int, int]]) -> None:
    make_case(views).check()


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_storages(isa: str, kind: str) -> None:
    make_case(ALL_VIEWS, kind=kind).check()


# 1: one lane; 64: whole blocks; 144: the demo's.
@pytest.mark.parametrize("hidden", [1, 64, 144])
def test_hidden_sizes(isa: str, hidden: int) -> None:
    make_case([*INSIDE[:1], *PADDED[:1]], hidden=hidden).check()


# The real view: 729 patches, of which several groups are unfolded, and six rows and columns that
# fill no patch.
def test_real_view(isa: str) -> None:
    sizes = [(384, 384), (300, 500)]
    views = [(0, 0, 0, 0), (1, -42, 116, 127)]
    make_case(views, hidden=8, sizes=sizes, image=384).check()


@pytest.mark.slow
def test_real_size(isa: str) -> None:
    sizes = [(384, 384), (1152, 768)]
    views = [(0, 0, 0, 0), *((1, 384 * (i // 2), 384 * (i % 2) - 7, 0) for i in range(6))]
    make_case(views, hidden=1152, sizes=sizes, image=384).check()


# 7 × 7 pixels fill 2 × 2 patches of 3.
@pytest.mark.parametrize(("patch", "image"), [(1, 3), (3, 7), (16, 32)])
def test_patch_sizes(isa: str, patch: int, image: int) -> None:
    make_case([(0, 0, 0, 0), (2, -1, 2, 127)], hidden=5, patch=patch, image=image).check()


def test_bytes_around_the_pictures_do_not_count(isa: str) -> None:
    white, black = (make_case([*PADDED, *BEYOND], around=around).run() for around in (255, 0))
    assert torch.equal(white, black)


def test_a_view_alone_has_the_same_bits(isa: str) -> None:
    case = make_case(ALL_VIEWS)
    together = case.run().view(len(ALL_VIEWS), 16, -1)
    for index in range(len(ALL_VIEWS)):
        assert torch.equal(together[index], case.run(case.windows[index : index + 1]))
    backwards = np.ascontiguousarray(case.windows[::-1])
    assert torch.equal(together.flip(0).flatten(0, 1), case.run(backwards))


@pytest.mark.parametrize("num_threads", [2, 3])
def test_same_bits_with_any_number_of_threads(isa: str, num_threads: int) -> None:
    case = make_case(ALL_VIEWS * 8)  # more patches than are unfolded at a time
    pool, expected = native.ThreadPool(num_threads), case.run()
    for _ in range(3):
        assert torch.equal(case.run(pool=pool), expected)


def test_rows_at_any_stride(isa: str) -> None:
    case = make_case(INSIDE)
    wide_offset = np.full((16, 50), np.nan, np.float32)
    wide_offset[:, 3:44] = case.offset
    wide_out = np.full((48, 50), 9.0, np.float32)
    arguments = (case.pixels, case.windows, case.weights, wide_offset[:, 3:44])
    native.patch_embed(POOL, *arguments, 56, wide_out[:, 4:45])
    assert torch.equal(torch.from_numpy(wide_out[:, 4:45]), case.run())
    assert (wide_out[:, :4] == 9).all()
    assert (wide_out[:, 45:] == 9).all()


def test_nothing_to_embed(isa: str) -> None:
    case = make_case([])
    assert case.windows.shape == (0, 7)
    assert case.run().shape == (0, 41)
    none = native.pack(POOL, "float32", [np.zeros((0, 12), np.float32)])
    arguments = (case.pixels, make_case(INSIDE).windows, none)
    native.patch_embed(
        POOL, *arguments, np.zeros((1, 0), np.float32), 2, np.zeros((3, 0), np.float32)
    )
    small = native.pack(POOL, "float32", [np.zeros((4, 12), np.float32)])
    no_patch = (np.zeros((0, 4), np.float32), 1, np.zeros((0, 4), np.float32))
    native.patch_embed(POOL, case.pixels, make_case(INSIDE).windows, small, *no_patch)


def test_pictures_without_pixels_are_all_padding(isa: str) -> None:
    case = make_case(IDENTITY)
    empty = np.array([(len(case.pixels), 0, 2**40, 0, 0, 0, 77), (0, 5, 0, 9, 3, 3, 77)], np.int64)
    gray = make_case([(2, 999, 999, 77)]).run()
    assert torch.equal(case.run(empty), gray.repeat(2, 1))


# The last byte that a window may read is the last of the buffer.
def test_windows_up_to_the_end_of_the_buffer(isa: str) -> None:
    case = make_case(IDENTITY)
    num_bytes = len(case.pixels)
    for stride in (0, 3, 168, 200):
        start = num_bytes - (55 * stride + 168)
        window = np.array([(start, stride, 56, 56, 0, 0, 0)], np.int64)
        assert bool(torch.isfinite(case.run(window)).all())
        for column in (0, 2, 3) if stride else (0, 3):
            beyond = window.copy()
            beyond[0, column] += 1
            with pytest.raises(ValueError, match=r"windows\[0\]: a picture .* leaves pixels of"):
                case.run(beyond)


def ints(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, np.int64)


def good_arguments() -> dict[str, Any]:
    return {
        "pool": POOL,
        "pixels": np.zeros(300, np.uint8),
        "windows": ints((0, 18, 6, 6, 0, 0, 0), (100, 30, 6, 10, -1, 2, 127)),
        "weights": native.pack(POOL, "float32", [np.zeros((8, 12), np.float32)]),
        "offset": np.zeros((9, 8), np.float32),
        "image_size": 6,
        "out": np.zeros((18, 8), np.float32),
    }


def one_window(**changes: int) -> np.ndarray:
    columns = ("offset", "stride", "height", "width", "top", "left", "fill")
    values = dict(zip(columns, (0, 18, 6, 6, 0, 0, 0), strict=True)) | changes
    return ints((0, 18, 6, 6, 0, 0, 0), tuple(values[name] for name in columns))


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


SHARED = np.zeros((18, 8), np.float32)
MOST, LEAST = 2**63 - 1, -(2**63)

BAD_ARGUMENTS = {
    "pixels-list": ({"pixels": [0] * 300}, TypeError, "pixels is a list"),
    "pixels-int8": ({"pixels": np.zeros(300, np.int8)}, TypeError, "pixels has dtype int8"),
    "pixels-3d": ({"pixels": np.zeros((10, 10, 3), np.uint8)}, ValueError, "pixels has shape"),
    "pixels-strided": ({"pixels": np.zeros(600, np.uint8)[::2]}, ValueError, "pixels has stride"),
    "windows-int32": ({"windows": np.zeros((2, 7), np.int32)}, TypeError, "windows has dtype"),
    "windows-6": ({"windows": np.zeros((2, 6), np.int64)}, ValueError, r"expected \(any, 7\)"),
    "windows-strided": (
        {"windows": np.zeros((2, 9), np.int64)[:, :7]},
        ValueError,
        "windows has stride 72",
    ),
    "weights-array": ({"weights": np.zeros((8, 12), np.float32)}, TypeError, "incompatible"),
    "weights-none": ({"weights": None}, TypeError, "incompatible"),
    "weights-columns": (
        {"weights": native.pack(POOL, "float32", [np.zeros((8, 13), np.float32)])},
        ValueError,
        "weights has 13 columns; expected 3 · patch_size²",
    ),
    "offset-f64": ({"offset": np.zeros((9, 8))}, TypeError, "offset has dtype float64"),
    "offset-tokens": (
        {"offset": np.zeros((4, 8), np.float32)},
        ValueError,
        r"offset has shape \(4, 8\); expected \(9, 8\)",
    ),
    "offset-hidden": ({"offset": np.zeros((9, 9), np.float32)}, ValueError, "offset has shape"),
    "image-0": ({"image_size": 0}, ValueError, "image_size is 0"),
    "image-huge": ({"image_size": 2**40}, ValueError, "image_size is"),
    "image-8": ({"image_size": 8}, ValueError, r"offset has shape .* expected \(16, 8\)"),
    "out-f64": ({"out": np.zeros((18, 8))}, TypeError, "out has dtype float64"),
    "out-rows": ({"out": np.zeros((17, 8), np.float32)}, ValueError, "out has shape"),
    "out-transposed": ({"out": np.zeros((8, 18), np.float32).T}, ValueError, "out has stride"),
    "out-read-only": (
        {"out": read_only(np.zeros((18, 8), np.float32))},
        ValueError,
        "out is read-only",
    ),
    "shared-memory": ({"offset": SHARED[:9], "out": SHARED}, ValueError, "share memory"),
    "shared-pixels": (
        {"pixels": SHARED.reshape(-1).view(np.uint8)[:300], "out": SHARED},
        ValueError,
        "pixels and out share memory",
    ),
    "window-negative-offset": (
        {"windows": one_window(offset=-1)},
        ValueError,
        r"windows\[1\]: offset is -1; expected 0 to 300",
    ),
    "window-offset": ({"windows": one_window(offset=301)}, ValueError, r"offset is 301"),
    "window-offset-huge": ({"windows": one_window(offset=MOST)}, ValueError, "offset is"),
    "window-beyond": (
        {"windows": one_window(offset=200)},
        ValueError,
        r"windows\[1\]: a picture of height 6 and width 6 at byte 200, rows 18 bytes apart, leaves",
    ),
    "window-negative-stride": ({"windows": one_window(stride=-18)}, ValueError, "stride is -18"),
    "window-stride-huge": ({"windows": one_window(stride=MOST)}, ValueError, "stride is"),
    "window-stride-large": ({"windows": one_window(stride=2**40)}, ValueError, "leaves pixels"),
    "window-height": ({"windows": one_window(height=-1)}, ValueError, "height is -1"),
    "window-height-huge": ({"windows": one_window(height=MOST)}, ValueError, "height is"),
    "window-height-large": ({"windows": one_window(height=2**40)}, ValueError, "leaves pixels"),
    "window-width-huge": ({"windows": one_window(width=MOST)}, ValueError, "width is"),
    "window-width-large": ({"windows": one_window(width=2**40)}, ValueError, "leaves pixels"),
    "window-width": ({"windows": one_window(width=LEAST)}, ValueError, "width is"),
    "window-top": ({"windows": one_window(top=LEAST)}, ValueError, "top is"),
    "window-left": ({"windows": one_window(left=MOST)}, ValueError, "left is"),
    "window-fill": ({"windows": one_window(fill=256)}, ValueError, "fill is 256"),
    "window-fill-negative": ({"windows": one_window(fill=-1)}, ValueError, "fill is -1"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    changes, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        native.patch_embed(**(good_arguments() | changes))


def test_good_arguments_are_good() -> None:
    native.patch_embed(**good_arguments())
