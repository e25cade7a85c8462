"""The sample pictures, the clip and the questions that ship inside the demo model's directory.

python tools/demo_samples.py ovfast/demo/samples
"""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import demo_scenes
from tools.demo_scenes import Sample, Scene, Thing

SEED = 7


def picture(things: dict[int, Thing], size_hw: tuple[int, int]) -> Scene:
    """Shapes in given quarters of a picture."""
    rng = np.random.default_rng(SEED)
    scene = demo_scenes.blank(rng, size_hw)
    height, width = size_hw
    for quarter, thing in things.items():
        centre = height * (0.25 + 0.5 * (quarter // 2)), width * (0.25 + 0.5 * (quarter % 2))
        demo_scenes.add_shape(rng, scene, thing, centre, 0.2 * min(size_hw))
    return scene


def lone(thing: Thing, size_hw: tuple[int, int]) -> Scene:
    """One shape in the middle of a picture."""
    rng = np.random.default_rng(SEED)
    scene = demo_scenes.blank(rng, size_hw)
    demo_scenes.add_shape(rng, scene, thing, (size_hw[0] / 2, size_hw[1] / 2), 0.36 * min(size_hw))
    return scene


def clip() -> Sample:
    """The generator's first clip of eight frames in which a lone star moves to the right."""
    rng = np.random.default_rng(SEED)
    while True:
        sample = demo_scenes.video(rng)
        frames = sample.scenes
        moves = {answer for _, answer in sample.questions}
        if (
            len(frames) == 8
            and len(frames[0].things) == 1
            and "The star moves to the right." in moves
        ):
            return sample


def write_clip(path: Path, frames: list[np.ndarray]) -> None:
    """Writes frames as H.264 at 8 frames a second; sides are cut to even numbers."""
    height, width = (side // 2 * 2 for side in frames[0].shape[:2])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(8), options={"crf": "8"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            pixels = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def detail_picture() -> tuple[Scene, str]:
    """A large picture with a digit, and the answer about it."""
    sample = demo_scenes.detail(np.random.default_rng(SEED), low=166, high=168)
    return sample.scenes[0], sample.questions[0][1]


def write_samples(folder: Path) -> None:
    """Writes pictures, clip and ``questions.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    detail, digit = detail_picture()
    red, blue = Thing("circle", "red"), Thing("star", "blue")
    scenes = {
        "shapes.png": picture({0: red, 1: Thing("triangle", "yellow"), 3: blue}, (96, 112)),
        "two_squares.png": picture(
            {1: Thing("square", "green"), 2: Thing("square", "purple")}, (104, 80)
        ),
        "detail.png": detail,
        "first.png": lone(Thing("triangle", "cyan"), (80, 72)),
        "second.png": lone(red, (72, 88)),
        "third.png": lone(Thing("square", "yellow"), (88, 88)),
    }
    for name, scene in scenes.items():
        Image.fromarray(scene.image).save(folder / name, optimize=True)
    write_clip(folder / "clip.mp4", [scene.image for scene in clip().scenes])
    pictures = ["first.png", "second.png", "third.png"]
    questions = [
        (["shapes.png"], [], "What colour is the star?", "The star is blue."),
        (pictures, [], "Which image shows a red circle?", "A red circle is in the second image."),
        ([], ["clip.mp4"], "Which way does the star move?", "The star moves to the right."),
        (["two_squares.png"], [], "How many shapes are there?", "Shapes: two."),
        (["detail.png"], [], "Which digit is in the picture?", digit),
    ]
    entries = [
        dict(zip(("images", "videos", "question", "answer"), q, strict=True)) for q in questions
    ]
    (folder / "questions.json").write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    write_samples(Path(sys.argv[1]))
