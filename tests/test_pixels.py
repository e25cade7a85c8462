"""Pictures resized on the device by address equal the views that the host builds, byte for byte.

The path of a device that reads pictures, on a CPU with the reference's resampling: layout of the
buffer, windows, order of passes, padding. The kernels have their own tests.
"""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

import ovfast.pixels as pixels_module
from ovfast.anyres import VisualGeometry, VisualOptions, plan_image, plan_video
from ovfast.image import build_media_views
from ovfast.ops import make_ops
from ovfast.pixels import PixelLoader, view_pixels
from ovfast.reference_pixels import cut_view

CPU = torch.device("cpu")
SIDE = 28
GRID = tuple((SIDE * h, SIDE * w) for h in range(1, 7) for w in range(1, 7))
GEOMETRY = VisualGeometry(SIDE, 14, GRID, 9)
OPS = replace(make_ops(CPU, "reference"), reads_pictures=True, views_a_step=64)
HAS_NATIVE = importlib.util.find_spec("ovfast._C") is not None
# Square, larger, smaller, both extreme ratios, sides equal to the tower's, one pixel.
SIZES = [(28, 28), (91, 150), (150, 91), (9, 5), (1, 300), (300, 1), (28, 90), (90, 28), (1, 1)]


def picture(size_hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *size_hw]).integers(0, 256, (*size_hw, 3), np.uint8)


def clips(num_frames):
    """Of several sizes, behind a picture whose length is no multiple of 16 bytes."""
    options = VisualOptions(token_policy="anyres")
    media, plans = [picture((9, 5))], [plan_image((9, 5), GEOMETRY, options, num_images=2)]
    for size_hw in SIZES:
        media.append(np.stack([picture(size_hw, frame) for frame in range(num_frames)]))
        plans.append(plan_video(num_frames, size_hw, GEOMETRY, options))
    return media, plans


def views_of(pixels, side=SIDE) -> np.ndarray:
    windows = pixels.windows.tolist()
    return np.stack([cut_view(pixels.buffer, window, side).numpy() for window in windows])


def check(media, plans, ops=OPS) -> None:
    loaded = PixelLoader(ops, CPU).load(media, plans)
    assert loaded.num_views == sum(plan.num_views for plan in plans)
    np.testing.assert_array_equal(views_of(loaded), build_media_views(media, plans))


@pytest.mark.parametrize("size_hw", SIZES)
@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("max_views", [None, 1])
def test_one_picture(size_hw, num_images, max_views):
    """AnyRes when it is alone, a gray square among several, the base view alone."""
    options = VisualOptions(max_views=max_views)
    check([picture(size_hw)], [plan_image(size_hw, GEOMETRY, options, num_images=num_images)])


def test_random_sizes():
    rng = np.random.default_rng(1)
    for _ in range(60):
        size_hw = tuple(int(side) for side in np.exp(rng.uniform(0, np.log(400), 2)))
        policy = str(rng.choice(["paper", "anyres"]))
        plan = plan_image(
            size_hw,
            GEOMETRY,
            VisualOptions(token_policy=policy),
            num_images=int(rng.integers(1, 3)),
        )
        check([picture(size_hw)], [plan])


def everything():
    options = VisualOptions(token_policy="anyres")
    media, plans = [], []
    for size_hw in SIZES:
        media.append(picture(size_hw, len(plans)))
        plans.append(plan_image(size_hw, GEOMETRY, options, num_images=len(SIZES)))
    media.insert(2, np.stack([picture((40, 55), frame) for frame in range(3)]))
    plans.insert(2, plan_video(3, (40, 55), GEOMETRY, options))
    return media, plans


def test_everything_at_once():
    check(*everything())


@pytest.mark.skipif(not HAS_NATIVE, reason="the native extension is not built")
def test_everything_by_the_native_back_end():
    ops = make_ops(CPU, "native", threads=2)
    assert ops.reads_pictures
    check(*everything(), ops)


# One frame a group, two, all at once. Odd sizes, one row, one column, a size that stays.
@pytest.mark.parametrize("group_bytes", [1, 2 * 3 * 91 * 150, pixels_module.GROUP_BYTES])
@pytest.mark.parametrize("num_frames", [1, 2, 5, 32])
def test_clips(monkeypatch, num_frames, group_bytes):
    monkeypatch.setattr(pixels_module, "GROUP_BYTES", group_bytes)
    media, plans = clips(num_frames)
    check(media, plans)
    if HAS_NATIVE:
        check(media, plans, make_ops(CPU, "native", threads=2))


@pytest.mark.parametrize("side", [28, 15])
def test_frames_are_resized_in_one_call_a_pass(side):
    calls = []

    def resample(source, *args, **options):
        calls.append(len(source))
        return OPS.resample(source, *args, **options)

    geometry = VisualGeometry(side, 5, ((side, side),), 9)
    loader = PixelLoader(replace(OPS, resample=resample), CPU)
    for num_frames in (1, 2, 5, 32):
        frames = np.stack([picture((31, 45), frame) for frame in range(num_frames)])
        plan = plan_video(num_frames, (31, 45), geometry, VisualOptions())
        loaded = loader.load([frames], [plan])
        np.testing.assert_array_equal(views_of(loaded, side), build_media_views([frames], [plan]))
        assert calls == [num_frames] * 2
        calls.clear()


def test_what_is_resized_at_once_is_bounded(monkeypatch):
    """Before, between and after the passes, however long one side is; one frame at least."""
    monkeypatch.setattr(pixels_module, "GROUP_BYTES", 1 << 16)
    calls = []

    def resample(source, first, coefficients, axis, out, **options):
        calls.append((len(source), max(source.nbytes, out.nbytes)))
        return OPS.resample(source, first, coefficients, axis, out, **options)

    loader = PixelLoader(replace(OPS, resample=resample), CPU)
    for size_hw in SIZES[1:]:
        frames = np.stack([picture(size_hw, frame) for frame in range(9)])
        loader.load([frames], [plan_video(9, size_hw, GEOMETRY, VisualOptions())])
    assert {num_frames for num_frames, _ in calls} >= {1, 9}
    assert all(num_frames == 1 or num_bytes <= 1 << 16 for num_frames, num_bytes in calls)


def test_groups_cover_all_views():
    views = picture((5 * SIDE, SIDE)).reshape(5, SIDE, SIDE, 3)
    pixels = view_pixels(views, CPU)
    groups = list(pixels.groups(2))
    assert [group.num_views for group in groups] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([views_of(group) for group in groups]), views)


def test_upload_of_read_only_and_strided_pictures():
    wide = picture((60, 80))
    wide.setflags(write=False)
    plan = plan_image((60, 40), GEOMETRY, VisualOptions(), num_images=1)
    check([wide[:, ::2]], [plan])
