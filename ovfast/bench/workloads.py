"""The requests that are measured: fixed, named, with new pictures every time.

Owns prompts, sizes and the making of media. A picture is a JPEG of smooth random colours, made
from its seed before any clock starts; no two requests share one, so that no cache of a peer helps.
Prompts are complete, special tokens included: every side gets the same text.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ovfast.errors import OptionError

__all__ = ["WORKLOADS", "Media", "Workload", "encoded_picture", "named_workloads"]

QUESTION = "What is shown here? Describe it in a few words."
FRAME_HW = (360, 640)


@dataclass(frozen=True, slots=True)
class Media:
    """Encoded media of one request: JPEG bytes of pictures, and of the frames of each video."""

    images: tuple[bytes, ...] = ()
    videos: tuple[tuple[bytes, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of request.

    Attributes:
        name: as given on the command line.
        sizes_hw: of its pictures.
        num_frames: of its video; 0 without one.
    """

    name: str
    sizes_hw: tuple[tuple[int, int], ...] = ()
    num_frames: int = 0

    @property
    def prompt(self) -> str:
        """The complete prompt, with a marker for each medium."""
        markers = "<image>\n" * len(self.sizes_hw) + "<video>\n" * bool(self.num_frames)
        return f"<|im_start|>user\n{markers}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"

    @property
    def videos(self) -> tuple[tuple[int, tuple[int, int]], ...]:
        """(frames, their size) of each video."""
        return ((self.num_frames, FRAME_HW),) if self.num_frames else ()

    def media(self, seed: int) -> Media:
        """New media.

        Args:
            seed: of the request; other seeds give other pictures.
        """
        first = seed * 64  # more than the media of any request
        images = (encoded_picture(hw, first + i) for i, hw in enumerate(self.sizes_hw))
        frames = (encoded_picture(FRAME_HW, first + i) for i in range(self.num_frames))
        return Media(tuple(images), (tuple(frames),) if self.num_frames else ())


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("text"),
        Workload("384", ((384, 384),)),
        Workload("640x480", ((480, 640),)),
        Workload("1024x768", ((768, 1024),)),
        Workload("1920x1080", ((1080, 1920),)),
        Workload("four-pictures", ((480, 640), (384, 384), (640, 480), (300, 400))),
        Workload("8-frames", num_frames=8),
        Workload("32-frames", num_frames=32),
    )
}


def named_workloads(names: Iterable[str]) -> list[Workload]:
    """Workloads by name.

    Raises:
        OptionError: there is none of that name.
    """
    names = list(names)
    for name in names:
        if name not in WORKLOADS:
            raise OptionError(f"workload {name!r}; expected one of {', '.join(WORKLOADS)}.")
    return [WORKLOADS[name] for name in dict.fromkeys(names)]


def encoded_picture(size_hw: tuple[int, int], seed: int) -> bytes:
    """A JPEG of smooth random colours."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture = small.resize((size_hw[1], size_hw[0]), Image.Resampling.BICUBIC)
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
