"""From decoded pictures to what the tower reads: windows into pictures that lie in one buffer.

Owns the way of pixels to the device: views built on the host (`view_pixels`), or pictures copied as
they are and resized there (`PictureLoader`), with padding and crops as addresses only. Both give
the same bytes. Which one runs is the back end's choice, `Ops.reads_pictures`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from ovfast.anyres import VisualPlan
from ovfast.ops import Ops
from ovfast.reference_pixels import UInt8Array
from ovfast.resize_table import resize_table, vertical_first
from ovfast.staging import Staging, to_device

__all__ = ["PixelLoader", "Pixels", "view_pixels"]

TABLES_KEPT = 256  # resize tables on the device: a few tens of KB each
# Frames of a clip that are copied and resized at once, 45 of 640 × 360: it bounds what they take
# of pinned memory, twice, and of the device; the host fills the next ones beside the copy.
GROUP_BYTES = 32 << 20
ALIGNMENT = 16  # bytes; where a picture or a clip starts in the buffer


@dataclass(frozen=True, slots=True)
class Pixels:
    """Views of a request, on the model's device.

    Attributes:
        buffer: (num_bytes,) uint8.
        windows: (num_views, 7) int64, as `reference_pixels.patch_embed` reads them.
    """

    buffer: Tensor
    windows: Tensor

    @property
    def num_views(self) -> int:
        return len(self.windows)

    def groups(self, num_views: int) -> Iterator["Pixels"]:
        """The same views, at most so many at a time."""
        for first in range(0, len(self.windows), num_views):
            yield Pixels(self.buffer, self.windows[first : first + num_views])


def view_pixels(views: UInt8Array, device: torch.device) -> Pixels:
    """Pixels of views that are built already: (num_views, side, side, 3) uint8."""
    side = views.shape[1]
    windows = np.zeros((len(views), 7), np.int64)
    windows[:, 0] = np.arange(len(views)) * side * side * 3
    windows[:, 1:4] = (3 * side, side, side)
    buffer = torch.from_numpy(views).flatten()
    return Pixels(to_device(buffer, device), to_device(torch.from_numpy(windows), device))


class PixelLoader:
    """Copies pictures and videos to the device and resizes them there.

    Args:
        ops: of the device.
        device: of the model.
    """

    def __init__(self, ops: Ops, device: torch.device) -> None:
        self._ops, self._device = ops, device
        self._staging = Staging(device)
        self._table = lru_cache(maxsize=TABLES_KEPT)(partial(_device_table, device))

    def load(self, media: Sequence[UInt8Array], plans: Sequence[VisualPlan]) -> Pixels:
        """The views of some plans, in their order.

        Args:
            media: for each plan the picture (height, width, 3) or the frames (frames, height,
                width, 3), uint8.
            plans: at least one.
        """
        layout = _Layout()
        for plan in plans:
            layout.add(plan)
        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=self._device)
        windows = self._staging.upload(np.array(layout.windows, np.int64))
        regions = iter(layout.regions)
        for pixels, plan in zip(media, plans, strict=True):
            frames = pixels if plan.kind == "video" else pixels[None]
            outs = [next(regions).frames(buffer) for _ in range(_pictures_of(plan))]
            for some in _groups(frames.shape, plan.image_size):
                source = self._staging.upload(frames[some])
                for out in outs:
                    self._fill(source, plan, out[some])
        return Pixels(buffer, windows)

    def _fill(self, source: Tensor, plan: VisualPlan, out: Tensor) -> None:
        """Resizes frames (frames, height, width, 3) into their part of the buffer."""
        source_hw, size_hw = source.shape[1:3], out.shape[1:3]
        canvas_hw, offset_hw = (source_hw[0], source_hw[1]), (0, 0)
        if plan.kind == "square":
            canvas_hw, offset_hw = plan.canvas_hw, plan.offset_hw
        axes = [
            axis
            for axis in ((0, 1) if vertical_first(canvas_hw, (size_hw[0], size_hw[1])) else (1, 0))
            if canvas_hw[axis] != size_hw[axis] or source_hw[axis] != canvas_hw[axis]
        ]
        if not axes:
            out.copy_(source)
        for position, axis in enumerate(axes):
            shape = list(source.shape)
            shape[axis - 3] = size_hw[axis]
            is_last = position == len(axes) - 1
            target = out if is_last else torch.empty(shape, dtype=torch.uint8, device=out.device)
            first, coefficients = self._table(canvas_hw[axis], size_hw[axis])
            source = self._ops.resample(
                source, first, coefficients, axis, target, offset=offset_hw[axis], fill=plan.fill
            )


def _device_table(device: torch.device, size_in: int, size_out: int) -> tuple[Tensor, Tensor]:
    table = resize_table(size_in, size_out)
    first, coefficients = map(torch.from_numpy, (table.first, table.coefficients))
    return to_device(first, device), to_device(coefficients, device)


def _groups(shape: Sequence[int], side: int) -> Iterator[slice]:
    """Frames that are resized at once to (side, side); shape: (frames, height, width, 3)."""
    num_frames, height, width, _ = shape
    # Pixels before, between and after the passes, whichever comes first.
    frame_bytes = 3 * max(height, side) * max(width, side)
    size = max(1, GROUP_BYTES // frame_bytes)
    for first in range(0, num_frames, size):
        yield slice(first, first + size)


def _pictures_of(plan: VisualPlan) -> int:
    """Resized pictures that one source is made into: the base view, and what crops are cut from."""
    return 1 + plan.has_crops


@dataclass(frozen=True, slots=True)
class _Region:
    """A resized picture in the buffer, or the frames of a clip one behind another."""

    offset: int
    size_hw: tuple[int, int]
    num_frames: int

    @property
    def frame_bytes(self) -> int:
        return 3 * self.size_hw[0] * self.size_hw[1]

    def frames(self, buffer: Tensor) -> Tensor:
        """(frames, height, width, 3) of the buffer."""
        own = buffer[self.offset : self.offset + self.num_frames * self.frame_bytes]
        return own.view(self.num_frames, *self.size_hw, 3)


class _Layout:
    """Places resized pictures one after another and lists the windows of their views."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.regions: list[_Region] = []
        self.windows: list[tuple[int, ...]] = []

    def add(self, plan: VisualPlan) -> None:
        side = plan.image_size
        region = self._region((side, side), max(1, plan.num_frames))
        for frame in range(region.num_frames):
            self._window(region, 0, 0, plan.fill, frame)
        if plan.has_crops:
            region = self._region(plan.resized_hw)
            (rows, cols), (top, left) = plan.grid_hw, plan.offset_hw
            for row in range(rows):
                for col in range(cols):
                    self._window(region, row * side - top, col * side - left, plan.fill)

    def _region(self, size_hw: tuple[int, int], num_frames: int = 1) -> _Region:
        region = _Region(self.num_bytes, size_hw, num_frames)
        self.regions.append(region)
        num_bytes = num_frames * region.frame_bytes
        self.num_bytes += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return region

    def _window(self, region: _Region, top: int, left: int, fill: int, frame: int = 0) -> None:
        height, width = region.size_hw
        offset = region.offset + frame * region.frame_bytes
        self.windows.append((offset, 3 * width, height, width, top, left, fill))
