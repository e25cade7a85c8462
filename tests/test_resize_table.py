"""Resize tables, applied by numpy in two passes, byte for byte against Pillow."""

import math
import random

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ovfast import resize_table as module
from ovfast.resize_table import resize_table, vertical_first

UInt8Array = NDArray[np.uint8]


def resample(source: UInt8Array, size_out: int, axis: int) -> UInt8Array:
    """One pass as Pillow's ImagingResample 8bpc does it, in int32."""
    table = resize_table(source.shape[axis], size_out)
    lines = np.moveaxis(source, axis, 0)
    total = np.full((size_out, *lines.shape[1:]), 1 << 21, np.int32)
    for tap, coefficients in enumerate(table.coefficients.T):
        at = np.minimum(table.first + tap, len(lines) - 1)  # unused taps have weight 0
        total += coefficients[:, None, None] * lines[at].astype(np.int32)
    return np.moveaxis(np.clip(total >> 22, 0, 255).astype(np.uint8), 0, axis)


def resize(source: UInt8Array, size_hw: tuple[int, int]) -> UInt8Array:
    axes = (0, 1) if vertical_first(source.shape[:2], size_hw) else (1, 0)
    for axis in axes:
        if source.shape[axis] != size_hw[axis]:
            source = resample(source, size_hw[axis], axis)
    return source


def picture(height: int, width: int, seed: int) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def check(source_hw: tuple[int, int], size_hw: tuple[int, int]) -> None:
    source = picture(*source_hw, seed=sum(source_hw))
    expected = Image.fromarray(source).resize(size_hw[::-1], Image.Resampling.BICUBIC)
    same = np.array_equal(resize(source, size_hw), np.asarray(expected))
    assert same, f"{source_hw} to {size_hw}"


def test_random_shapes() -> None:
    rng = random.Random(1)
    for _ in range(500):
        sizes = [int(2 ** rng.uniform(0, 8)) for _ in range(4)]
        check((sizes[0], sizes[1]), (sizes[2], sizes[3]))


# Both sides shrink by a lot or by little more than half of the other: where the order turns.
def test_pass_order() -> None:
    rng = random.Random(2)
    seen = set()
    for _ in range(150):
        height, width = rng.randint(2, 90), rng.randint(2, 90)
        rows = rng.randint(0, height - 1)
        source_hw, size_hw = (height + rows, width + rows // 2), (height, width)
        for extra in (0, 1):  # removed rows equal to twice the removed columns, then above
            source_hw = (source_hw[0] + extra, source_hw[1])
            seen.add(vertical_first(source_hw, size_hw))
            check(source_hw, size_hw)
    assert seen == ({False, True} if module.PILLOW_MAJOR >= 13 else {False})


# A side of several thousand pixels, thin pictures, from and to one pixel, 384 as in the model.
@pytest.mark.parametrize(
    ("source_hw", "size_hw"),
    [
        ((480, 640), (384, 384)),
        ((3000, 40), (384, 384)),
        ((40, 6000), (384, 384)),
        ((5000, 3), (768, 2)),
        ((1, 4096), (1, 384)),
        ((4096, 1), (384, 1)),
        ((7001, 2), (13, 3)),
        ((1, 1), (384, 384)),
        ((1, 1), (2304, 7)),
        ((333, 777), (1, 1)),
        ((384, 384), (384, 384)),
        ((383, 385), (384, 384)),
        ((700, 2000), (691, 40)),
    ],
)
def test_large_and_thin(source_hw: tuple[int, int], size_hw: tuple[int, int]) -> None:
    check(source_hw, size_hw)


# Every axis that the model resizes to, from many lengths: cheap, because the picture is thin.
def test_long_axes() -> None:
    rng = random.Random(3)
    for _ in range(300):
        size_in, size_out = int(2 ** rng.uniform(0, 13)), 384 * rng.randint(1, 6)
        for source_hw, size_hw in (
            ((size_in, 1), (size_out, 1)),
            ((1, size_in), (1, size_out)),
        ):
            check(source_hw, size_hw)


@pytest.mark.parametrize(
    ("size_in", "size_out"), [(1, 1), (1, 9), (9, 1), (5, 5), (6000, 384), (41, 384), (2**20, 56)]
)
def test_table_is_sound(size_in: int, size_out: int) -> None:
    table = resize_table(size_in, size_out)
    num_taps = table.coefficients.shape[1]
    assert table.first.dtype == table.coefficients.dtype == np.int32
    assert table.first.shape == (size_out,)
    assert table.coefficients.shape == (size_out, num_taps)
    assert num_taps <= 2 * math.ceil(2 * max(size_in / size_out, 1)) + 1
    assert table.first.min() >= 0
    used = np.arange(num_taps) * (table.coefficients != 0)
    assert (table.first[:, None] + used).max() < size_in
    # A constant color stays constant: the coefficients sum to 1 but for their rounding.
    gray = np.full((size_out, num_taps), 127, np.int64)
    assert ((((1 << 21) + (gray * table.coefficients).sum(1)) >> 22) == 127).all()
    # Sums of 255 · |coefficient| stay within int32, whatever the picture.
    assert (255 * np.abs(table.coefficients.astype(np.int64)).sum(1) + (1 << 21)).max() < 2**31
    assert table.coefficients.strides[0] == 4


def test_same_size_keeps_every_pixel() -> None:
    source = picture(7, 5, seed=4)
    assert np.array_equal(resample(resample(source, 7, 0), 5, 1), source)


def test_tables_are_kept() -> None:
    assert resize_table(77, 33) is resize_table(77, 33)


def test_older_pillow_is_horizontal_first(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((900, 100), (384, 384))
    monkeypatch.setattr(module, "PILLOW_MAJOR", 13)
    assert vertical_first(*shapes)
    monkeypatch.setattr(module, "PILLOW_MAJOR", 12)
    assert not vertical_first(*shapes)


@pytest.mark.parametrize(("size_in", "size_out"), [(0, 4), (4, 0), (-1, 4)])
def test_sizes_below_one(size_in: int, size_out: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        resize_table(size_in, size_out)
