"""Pictures in one buffer and windows into them, for the tests of kernels that read pixels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# (picture, top, left, fill) of views of 56 × 56; the pictures are 56 × 56, 70 × 90 and 20 × 33.
IDENTITY = [(0, 0, 0, 0)]
INSIDE = [(1, 0, 0, 0), (1, 14, 34, 0), (1, 3, 7, 127)]
PADDED = [(1, -10, 5, 0), (1, 5, -11, 127), (2, -18, -12, 127), (2, -18, -12, 0)]
BEYOND = [(1, 50, 60, 0), (1, -50, 60, 127), (1, 50, -50, 255), (2, -1, -1, 9)]
OUTSIDE = [(1, 70, 0, 127), (1, -56, 0, 3), (1, 0, 90, 0), (1, 0, -56, 5), (1, 999, -999, 200)]
ALL_VIEWS = [*IDENTITY, *INSIDE, *PADDED, *BEYOND, *OUTSIDE]
SIZES = [(56, 56), (70, 90), (20, 33)]

View = tuple[int, int, int, int]


@dataclass
class Pictures:
    """Pictures in one buffer, windows into it, and what each window shows."""

    pixels: torch.Tensor
    windows: torch.Tensor
    views: list[torch.Tensor]


def lay_out(
    generator: torch.Generator,
    views: list[View],
    sizes: list[tuple[int, int]],
    image: int,
    around: int,
) -> Pictures:
    """Random pictures with gaps between them and behind each row, all of value `around`."""
    pictures = [
        torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8) for size in sizes
    ]
    pixels = [torch.full((19,), around, dtype=torch.uint8)]
    places = []
    for index, picture in enumerate(pictures):
        gap = (0, 5, 16)[index]
        places.append((sum(map(len, pixels)), 3 * picture.shape[1] + gap))
        pixels.append(F.pad(picture.flatten(1), (0, gap), value=around).flatten())
        pixels.append(torch.full((7,), around, dtype=torch.uint8))
    rows = [
        (*places[at], *pictures[at].shape[:2], top, left, fill) for at, top, left, fill in views
    ]
    return Pictures(
        torch.cat(pixels),
        torch.tensor(rows, dtype=torch.int64).reshape(-1, 7),
        [window_of(pictures[at], *rest, image) for at, *rest in views],
    )


def window_of(picture: torch.Tensor, top: int, left: int, fill: int, side: int) -> torch.Tensor:
    """The view, pixel by pixel as windows are defined."""
    y, x = torch.arange(side) + top, torch.arange(side) + left
    inside_y, inside_x = (y >= 0) & (y < len(picture)), (x >= 0) & (x < picture.shape[1])
    view = torch.full((side, side, 3), fill, dtype=torch.uint8)
    view[inside_y[:, None] & inside_x] = picture[y[inside_y]][:, x[inside_x]].reshape(-1, 3)
    return view
