"""The geometry of pictures and videos: views, token counts and gather tables, from sizes alone.

Owns the AnyRes choice of a canvas, the addresses of padding and crops, and the token map after
unpadding and shrinking. Knows no pixels, no tensors and no devices. Every size is (height, width),
also where upstream swaps them.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from ovfast.errors import ConfigError, MediaError, OptionError
from ovfast.pack_table import PackTable, copy_table, grid_table, video_table

__all__ = ["PackTable", "VisualGeometry", "VisualOptions", "VisualPlan", "plan_image", "plan_video"]

TOKEN_POLICIES = ("paper", "anyres", "lmms_eval")
UNPAD_ROUNDINGS = ("hf", "orig")
SHRINK_THRESHOLD = 1.1  # upstream shrinks only above this ratio of side lengths (1.21 in tokens)
BLACK, GRAY = 0, 127  # padding of the AnyRes canvas, and of the square of a multi-image request

PlanKind = Literal["anyres", "square", "video"]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class VisualOptions:
    """How pictures and videos become views and tokens; the latency knob of a request.

    Args:
        token_policy: what one picture of a request costs. "paper": AnyRes when it is the only
            picture, else a gray-padded square of one view plus one newline. "anyres": AnyRes for
            each picture. "lmms_eval": as "paper", but without the newline of the squares.
        unpad_rounding: "hf" rounds the unpadded side to 7 digits first, "orig" truncates.
        anyres_max: the N of anyres_max_N, any integer from 1; None takes the checkpoint's.
        max_views: most views a picture may use; 1 keeps only the base view; None does not limit.
        num_frames: frames sampled from a video file.
        fps: frames per second to sample instead, still at most num_frames; None samples evenly.
        exif: turn pictures as their EXIF orientation says.

    Raises:
        OptionError: for an unknown policy, a wrong type or a value out of range.
    """

    token_policy: str = "paper"
    unpad_rounding: str = "hf"
    anyres_max: int | None = None
    max_views: int | None = None
    num_frames: int = 32
    fps: float | None = None
    exif: bool = True

    def __post_init__(self) -> None:
        self._check_choice("token_policy", TOKEN_POLICIES)
        self._check_choice("unpad_rounding", UNPAD_ROUNDINGS)
        self._check_count("anyres_max", optional=True)
        self._check_count("max_views", optional=True)
        self._check_count("num_frames", optional=False)
        fps = self.fps
        is_number = _is_int(fps) or isinstance(fps, float)
        if fps is not None and not (is_number and math.isfinite(fps) and fps > 0):
            raise OptionError(f"fps={fps!r}; expected a positive number, or None for even sampling")
        if not isinstance(self.exif, bool):
            raise OptionError(f"exif={self.exif!r}; expected True or False")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in allowed:
            raise OptionError(f"{name}={value!r}; expected one of {', '.join(map(repr, allowed))}")

    def _check_count(self, name: str, *, optional: bool) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not _is_int(value) or value < 1:
            hint = ", or None" if optional else ""
            raise OptionError(f"{name}={value!r}; expected an integer of at least 1{hint}")


@dataclass(frozen=True, slots=True)
class VisualGeometry:
    """What the checkpoint fixes about views and grids.

    Args:
        image_size: side of a tower input in pixels.
        patch_size: side of a patch in pixels; what does not fill a patch is dropped by the tower.
        grid_pinpoints_hw: allowed canvas sizes in the checkpoint's order, multiples of image_size.
        anyres_max: the N of anyres_max_N; None for plain "anyres", which never shrinks the map.

    Raises:
        ConfigError: for sizes that no tower or grid can have.
    """

    image_size: int
    patch_size: int
    grid_pinpoints_hw: tuple[tuple[int, int], ...]
    anyres_max: int | None = 9

    def __post_init__(self) -> None:
        if not 1 <= self.patch_size <= self.image_size:
            raise ConfigError(
                f"image_size={self.image_size}, patch_size={self.patch_size}; expected"
                " 1 <= patch_size <= image_size. Check vision_config."
            )
        for height, width in self.grid_pinpoints_hw:
            if min(height, width) < 1 or height % self.image_size or width % self.image_size:
                raise ConfigError(
                    f"grid pinpoint (height {height}, width {width}); expected positive multiples"
                    f" of the tower's image size {self.image_size}. Check image_grid_pinpoints."
                )
        if self.anyres_max is not None and self.anyres_max < 1:
            raise ConfigError(f"anyres_max_{self.anyres_max}; expected anyres_max_1 or more")

    @property
    def grid_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_view(self) -> int:
        return self.grid_side**2


@dataclass(frozen=True, slots=True)
class VisualPlan:
    """All addresses of one picture or video.

    Attributes:
        kind: "anyres", "square" or "video".
        size_hw: of the original picture, or of a video frame.
        num_frames: frames of a video, 0 for a picture.
        canvas_hw: what is cut into views: the pinpoint, for "square" the square of the original,
            for "video" one view; (0, 0) where AnyRes keeps only the base view.
        resized_hw: the picture inside the canvas, at offset_hw (top, left); `fill` elsewhere.
        grid_hw: rows and columns of crops; (0, 0) without crops.
        num_views, num_tokens: what the tower encodes and what the language model reads.
        map_hw: token map of all crops (of one view without crops).
        kept: row0, row1, col0, col1 of the map that unpadding leaves.
        final_hw: the map after shrinking or pooling.
        newline: whether one newline ends the tokens; a grid has one after each map row instead.
    """

    kind: PlanKind
    size_hw: tuple[int, int]
    num_frames: int
    canvas_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    offset_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    num_views: int
    num_tokens: int
    map_hw: tuple[int, int]
    kept: tuple[int, int, int, int]
    final_hw: tuple[int, int]
    fill: int
    image_size: int
    grid_side: int
    newline: bool

    @property
    def tokens_per_view(self) -> int:
        return self.grid_side**2

    @property
    def num_newlines(self) -> int:
        """Tokens that are the newline vector."""
        return self.final_hw[0] if self.has_crops else int(self.newline)

    @property
    def has_crops(self) -> bool:
        return self.grid_hw != (0, 0)

    @property
    def kept_hw(self) -> tuple[int, int]:
        """Size of the map after unpadding, before shrinking."""
        row0, row1, col0, col1 = self.kept
        return row1 - row0, col1 - col0

    @property
    def table(self) -> PackTable:
        """The gather table, cached by shape."""
        if self.kind == "video":
            return video_table(self.num_frames, self.grid_side, self.final_hw)
        if self.has_crops:
            return grid_table(self.grid_hw[1], self.grid_side, self.kept, self.final_hw)
        return copy_table(self.tokens_per_view, self.newline)


def plan_image(
    size_hw: tuple[int, int],
    geometry: VisualGeometry,
    options: VisualOptions,
    *,
    num_images: int,
) -> VisualPlan:
    """Plans one picture.

    Args:
        size_hw: (height, width) of the picture.
        geometry: of the checkpoint.
        options: of the request.
        num_images: pictures in the whole request, videos not counted; decides the token policy.

    Raises:
        MediaError: if the size is not two positive integers.
    """
    size_hw = _check_size(size_hw)
    if options.token_policy == "anyres" or num_images <= 1:
        rounding, max_views = options.unpad_rounding, options.max_views
        anyres_max = geometry.anyres_max if options.anyres_max is None else options.anyres_max
        return _plan_anyres(size_hw, geometry, rounding, max_views, anyres_max)
    return _plan_square(size_hw, geometry, newline=options.token_policy == "paper")


def plan_video(
    num_frames: int, size_hw: tuple[int, int], geometry: VisualGeometry, options: VisualOptions
) -> VisualPlan:
    """Plans one video: every frame is one squashed view, pooled to half its side.

    Args:
        num_frames: frames given to the model; already sampled.
        size_hw: (height, width) of the frames.
        geometry: of the checkpoint.
        options: of the request; none changes how sampled frames are laid out.

    Raises:
        MediaError: if there is no frame, or the size is not two positive integers.
    """
    del options
    size_hw = _check_size(size_hw)
    if not _is_int(num_frames) or num_frames < 1:
        raise MediaError(f"a video of {num_frames!r} frames; expected at least 1 frame")
    side, view = geometry.grid_side, (geometry.image_size, geometry.image_size)
    pooled = math.ceil(side / 2)  # a fixed stride of 2, as upstream's live path
    return replace(
        _one_view(size_hw, geometry),
        kind="video",
        num_frames=num_frames,
        canvas_hw=view,
        resized_hw=view,
        num_views=num_frames,
        num_tokens=num_frames * pooled * pooled + 1,
        final_hw=(pooled, pooled),
    )


def _check_size(size_hw: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = size_hw
    except (TypeError, ValueError):
        raise MediaError(f"size {size_hw!r}; expected a pair (height, width)") from None
    sides: tuple[object, object] = (height, width)  # callers without a type checker send anything
    for side in sides:
        if not isinstance(side, int | np.integer) or isinstance(side, bool) or side < 1:
            raise MediaError(
                f"size (height {height!r}, width {width!r}); expected integers of at least 1."
                " Check that the picture is not empty."
            )
    return int(height), int(width)


# As transformers v5.23 and LLaVA-NeXT: select_best_resolution. Doubles, truncation and the strict
# comparisons are part of the result.
def _best_canvas(
    size_hw: tuple[int, int], candidates_hw: list[tuple[int, int]]
) -> tuple[int, int] | None:
    height, width = size_hw
    best: tuple[int, int] | None = None
    best_effective, best_waste = 0, math.inf
    for canvas_h, canvas_w in candidates_hw:
        scale = min(canvas_w / width, canvas_h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas_h * canvas_w - effective
        if effective > best_effective or (effective == best_effective and waste < best_waste):
            best, best_effective, best_waste = (canvas_h, canvas_w), effective, waste
    return best


def _fit_inside(size_hw: tuple[int, int], canvas_hw: tuple[int, int]) -> tuple[int, int]:
    (height, width), (canvas_h, canvas_w) = size_hw, canvas_hw
    scale_h, scale_w = canvas_h / height, canvas_w / width
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), canvas_h), canvas_w
    return canvas_h, min(math.ceil(width * scale_h), canvas_w)


# As transformers v5.23 unpad_image ("hf") and LLaVA-NeXT unpad_image ("orig"): not the rounding of
# the pixel padding, and the kept side is n or n + 1.
def _unpad(
    size_hw: tuple[int, int], map_hw: tuple[int, int], rounding: str
) -> tuple[int, int, int, int]:
    (height, width), (map_h, map_w) = size_hw, map_hw
    if width / height > map_w / map_h:
        exact = height * (map_w / width)
        padding = (map_h - int(round(exact, 7) if rounding == "hf" else exact)) // 2
        return padding, map_h - padding, 0, map_w
    exact = width * (map_h / height)
    padding = (map_w - int(round(exact, 7) if rounding == "hf" else exact)) // 2
    return 0, map_h, padding, map_w - padding


def _shrink(kept_hw: tuple[int, int], side: int, anyres_max: int | None) -> tuple[int, int]:
    height, width = kept_hw
    if anyres_max is None:
        return kept_hw
    ratio = math.sqrt(height * width / (anyres_max * side**2))
    if ratio <= SHRINK_THRESHOLD:
        return kept_hw
    # Upstream fails on a side of 0, which thin maps of small towers reach; one row stays here.
    return max(1, int(height // ratio)), max(1, int(width // ratio))


@lru_cache(maxsize=1024)
def _plan_anyres(
    size_hw: tuple[int, int],
    geometry: VisualGeometry,
    rounding: str,
    max_views: int | None,
    anyres_max: int | None,
) -> VisualPlan:
    view, side = geometry.image_size, geometry.grid_side
    candidates = [
        pinpoint
        for pinpoint in geometry.grid_pinpoints_hw
        if max_views is None or pinpoint[0] * pinpoint[1] // view**2 < max_views
    ]
    canvas = _best_canvas(size_hw, candidates)
    if canvas is None:
        return _one_view(size_hw, geometry)
    rows, cols = canvas[0] // view, canvas[1] // view
    resized = _fit_inside(size_hw, canvas)
    kept = _unpad(size_hw, (rows * side, cols * side), rounding)
    final = _shrink((kept[1] - kept[0], kept[3] - kept[2]), side, anyres_max)
    return VisualPlan(
        kind="anyres",
        size_hw=size_hw,
        num_frames=0,
        canvas_hw=canvas,
        resized_hw=resized,
        offset_hw=((canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2),
        grid_hw=(rows, cols),
        num_views=1 + rows * cols,
        num_tokens=side * side + final[0] * (final[1] + 1),
        map_hw=(rows * side, cols * side),
        kept=kept,
        final_hw=final,
        fill=BLACK,
        image_size=view,
        grid_side=side,
        newline=False,
    )


def _plan_square(
    size_hw: tuple[int, int], geometry: VisualGeometry, *, newline: bool
) -> VisualPlan:
    height, width = size_hw
    longest = max(height, width)
    return replace(
        _one_view(size_hw, geometry),
        kind="square",
        canvas_hw=(longest, longest),
        resized_hw=size_hw,
        offset_hw=((longest - height) // 2, (longest - width) // 2),
        num_tokens=geometry.tokens_per_view + int(newline),
        fill=GRAY,
        newline=newline,
    )


def _one_view(size_hw: tuple[int, int], geometry: VisualGeometry) -> VisualPlan:
    """AnyRes without crops: the base view and one newline."""
    side = geometry.grid_side
    return VisualPlan(
        kind="anyres",
        size_hw=size_hw,
        num_frames=0,
        canvas_hw=(0, 0),
        resized_hw=(0, 0),
        offset_hw=(0, 0),
        grid_hw=(0, 0),
        num_views=1,
        num_tokens=side * side + 1,
        map_hw=(side, side),
        kept=(0, side, 0, side),
        final_hw=(side, side),
        fill=BLACK,
        image_size=geometry.image_size,
        grid_side=side,
        newline=True,
    )
