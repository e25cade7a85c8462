"""The fixed requests that a verification makes: pictures from integer formulas, so that they are
the same everywhere.

Sizes follow the tower's, so that every checkpoint sees the same geometry: few and many views, a
shrunk map, squares of several pictures, a clip. They are chosen so that no resize depends on the
order of its passes, which Pillow 13 changed: stored references hold for every Pillow.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovfast.anyres import VisualOptions
from ovfast.engine import Engine
from ovfast.model_inputs import ModelInputs

__all__ = ["NUM_NEW_TOKENS", "Case", "expand_prompt", "make_cases", "prepare_case"]

NUM_NEW_TOKENS = 16
MARKERS = re.compile("(<image>|<video>)")

UInt8Array = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One request.

    Attributes:
        name: unique among the cases.
        prompt: complete, with special tokens and the markers of its media.
        images: each (height, width, 3).
        videos: each (frames, height, width, 3).
    """

    name: str
    prompt: str
    images: tuple[UInt8Array, ...] = ()
    videos: tuple[UInt8Array, ...] = ()


def make_cases(image_size: int) -> tuple[Case, ...]:
    """The cases for a tower of a size.

    Args:
        image_size: side of a view in pixels.

    Returns:
        Cases with distinct names, always the same.
    """
    side = image_size
    strip_hw = (max(1, side // 7), 3 * side)
    return (
        Case("text", _chat("Which colours does a rainbow have?")),
        Case("square", _chat("<image>\nWhat is shown here?"), (_picture(side, side, 1),)),
        _one_picture("landscape", side * 7 // 4 + 1, side * 5 // 2 - 3),
        _one_picture("portrait", side * 8 // 5, side * 4 // 3),
        _one_picture("strip", *strip_hw),
        _one_picture("large", side * 5 // 2 + 5, side * 9 // 2 - 7),
        Case(
            "three images",
            _chat("<image>\n<image>\n<image>\nWhich image shows a circle?"),
            (
                _picture(side * 2 // 3, side, 2),
                _picture(side * 5 // 4, side * 3 // 4, 3),
                _picture(side, side + 1, 4),
            ),
        ),
        Case(
            "video",
            _chat("<video>\nWhich way does the shape move?"),
            videos=(_clip(4, side * 3 // 4, side + 5),),
        ),
        Case(
            "interleaved",
            _chat("Compare this picture,\n<image>\nwith this clip:\n<video>\nWhat is different?"),
            (_picture(side * 3 // 2, side * 3 // 2, 5),),
            (_clip(2, side, side),),
        ),
    )


def prepare_case(engine: Engine, case: Case) -> ModelInputs:
    """A case laid out by an engine, with the default visual options, as transformers does it."""
    return engine.prepare(
        case.prompt,
        images=list(case.images) or None,
        videos=list(case.videos) or None,
        visual=VisualOptions(),
        raw=True,
    )


def expand_prompt(case: Case, num_tokens: list[int]) -> str:
    """The prompt with each marker repeated as often as its medium has tokens."""
    counts = iter(num_tokens)
    return MARKERS.sub(lambda marker: marker[0] * next(counts), case.prompt)


def _chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def _one_picture(name: str, height: int, width: int) -> Case:
    return Case(name, _chat("<image>\nDescribe the picture."), (_picture(height, width, 0),))


def _picture(height: int, width: int, seed: int, shift: int = 0) -> UInt8Array:
    """A ramp of colours with a textured disc; `shift` moves the disc to the right."""
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([255 * x // width, 255 * y // height, 0 * x + 53 * seed], axis=2)
    texture = np.stack([7 * x + 3 * y, 5 * x + 11 * y, x * y + 31 * seed], axis=2)
    radius = max(1, min(height, width) // 3)
    inside = (y - height // 2) ** 2 + (x - width // 3 - shift) ** 2 < radius**2
    return np.where(inside[:, :, None], texture, ramp).astype(np.uint8)


def _clip(num_frames: int, height: int, width: int) -> UInt8Array:
    return np.stack([_picture(height, width, 6, i * width // 10) for i in range(num_frames)])
