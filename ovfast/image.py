"""Pictures to tower views: resize, pad and crop, byte-identical to Pillow's arithmetic.

Resizing is Pillow's bicubic, which no float implementation reproduces. The padded canvas of AnyRes
is never built: crops are cut from the resized picture by address. Pixels stay uint8 here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ovfast import reference_pixels
from ovfast.anyres import VisualPlan
from ovfast.errors import MediaError
from ovfast.reference_pixels import UInt8Array

__all__ = ["build_media_views", "build_video_views", "build_views", "resize"]

# pack(resized, offset_hw, grid_hw, fill, out): cuts the padded picture into crops, row-major.
Pack = Callable[[UInt8Array, tuple[int, int], tuple[int, int], int, UInt8Array], Any]

STRIP_PIXELS = 4_000_000  # pixels of a padded strip of a square; bounds the memory to 12 MB
# Above this side the 22-bit coefficients of the resize need not keep a constant color constant.
MAX_SQUARE_SIDE = 1 << 20


def resize(image: UInt8Array, size_hw: tuple[int, int]) -> UInt8Array:
    """Resizes as Pillow's BICUBIC does, antialiased when shrinking.

    Args:
        image: (height, width, 3) uint8.
        size_hw: wanted (height, width).

    Returns:
        (height, width, 3) uint8; the input itself when it already has the size.
    """
    if image.shape[:2] == size_hw:
        return image
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((size_hw[1], size_hw[0]), Image.Resampling.BICUBIC))


def build_views(
    image: UInt8Array,
    plan: VisualPlan,
    out: UInt8Array | None = None,
    *,
    pack: Pack | None = None,
) -> UInt8Array:
    """Makes the views of one picture: the squashed base view, then the crops row by row.

    Args:
        image: (height, width, 3) uint8, of the plan's size.
        plan: of this picture, "anyres" or "square".
        out: (num_views, image_size, image_size, 3) uint8 to fill, or None to allocate.
        pack: `pack_views` of an Ops; None takes the reference.

    Returns:
        (num_views, image_size, image_size, 3) uint8: `out` if it was given.

    Raises:
        MediaError: if the picture is not what the plan was made for.
    """
    if plan.kind == "video":
        raise MediaError("a video plan for one picture; expected frames. Call build_video_views.")
    _check(image, "image", plan.size_hw)
    out = _output(plan, out)
    view = (plan.image_size, plan.image_size)
    if plan.kind == "square":
        out[0] = _resize_square(image, plan.image_size, plan.offset_hw, plan.fill)
        return out
    out[0] = resize(image, view)
    if plan.has_crops:
        resized = resize(image, plan.resized_hw)
        cut = pack or reference_pixels.pack_views
        cut(resized, plan.offset_hw, plan.grid_hw, plan.fill, out[1:])
    return out


def build_video_views(
    frames: UInt8Array, plan: VisualPlan, out: UInt8Array | None = None
) -> UInt8Array:
    """Makes one squashed view of each frame.

    Args:
        frames: (num_frames, height, width, 3) uint8, of the plan's size and number.
        plan: of this video.
        out: (num_frames, image_size, image_size, 3) uint8 to fill, or None to allocate.

    Returns:
        (num_frames, image_size, image_size, 3) uint8: `out` if it was given.

    Raises:
        MediaError: if the frames are not what the plan was made for.
    """
    if plan.kind != "video" or len(frames) != plan.num_frames:
        raise MediaError(
            f"{len(frames)} frames with a plan of kind {plan.kind!r} for {plan.num_frames} frames;"
            " expected a video plan of that many frames. Call plan_video."
        )
    out = _output(plan, out)
    for frame, view in zip(frames, out, strict=True):
        _check(frame, "frame", plan.size_hw)
        view[...] = resize(frame, (plan.image_size, plan.image_size))
    return out


def build_media_views(
    media: Sequence[UInt8Array], plans: Sequence[VisualPlan], *, pack: Pack | None = None
) -> UInt8Array:
    """Makes the views of several pictures and videos, those of the first plan first.

    Args:
        media: for each plan a picture (height, width, 3) or frames (frames, height, width, 3).
        plans: of the media; at least one.
        pack: `pack_views` of an Ops; None takes the reference.

    Returns:
        (num_views, image_size, image_size, 3) uint8.

    Raises:
        MediaError: if a medium is not what its plan was made for.
    """
    side = plans[0].image_size
    views = np.empty((sum(plan.num_views for plan in plans), side, side, 3), np.uint8)
    row = 0
    for pixels, plan in zip(media, plans, strict=True):
        out = views[row : row + plan.num_views]
        if plan.kind == "video":
            build_video_views(pixels, plan, out)
        else:
            build_views(pixels, plan, out, pack=pack)
        row += plan.num_views
    return views


def _check(image: UInt8Array, what: str, size_hw: tuple[int, int]) -> None:
    expected = (*size_hw, 3)
    if image.dtype != np.uint8 or image.shape != expected:
        raise MediaError(
            f"{what} of shape {image.shape} and dtype {image.dtype}; expected uint8 of shape"
            f" {expected} (height, width, RGB), for which the plan was made"
        )


def _output(plan: VisualPlan, out: UInt8Array | None) -> UInt8Array:
    shape = (plan.num_views, plan.image_size, plan.image_size, 3)
    if out is None:
        return np.empty(shape, np.uint8)
    assert out.shape == shape, f"out has shape {out.shape}; the plan needs {shape}"
    assert out.dtype == np.uint8, f"out has dtype {out.dtype}; expected uint8"
    return out


def _resize_square(
    image: UInt8Array, side: int, offset_hw: tuple[int, int], fill: int
) -> UInt8Array:
    """Pads to a square and resizes it, without building the square.

    Pillow resizes a square horizontally first, with a rounding to 8 bits between the passes, and
    a constant row stays constant. So each pass may run alone, and only over what is not padding.
    """
    height, width = image.shape[:2]
    longest = max(height, width)
    if longest > MAX_SQUARE_SIDE:
        raise MediaError(
            f"picture of height {height} and width {width} among several; expected sides of at"
            f" most {MAX_SQUARE_SIDE}. Resize it first."
        )
    top, left = offset_hw
    columns = np.full((longest, side, 3), fill, np.uint8)
    strip_rows = max(1, STRIP_PIXELS // longest)
    for start in range(0, height, strip_rows):
        strip = image[start : start + strip_rows]
        if width < longest:
            padded = np.full((len(strip), longest, 3), fill, np.uint8)
            padded[:, left : left + width] = strip
            strip = padded
        columns[top + start : top + start + len(strip)] = resize(strip, (len(strip), side))
    return resize(columns, (side, side))
