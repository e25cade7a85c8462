"""Synthetic scenes for the demo model: pictures, clips, questions and answers, all from one random
generator.

Four kinds of sample, each with its questions and exact answers:

single   one picture, 1-4 coloured shapes in the four quarters: captions, positions, counts, yes/no
several  2-3 pictures with one shape each: "Which image shows a red circle?"
video    4-8 frames, one moving shape and sometimes one at rest: "Which way does the star move?"
detail   a large picture with one digit of about 14 pixels, which the base view shrinks to about 5

Answers repeat what was asked before they tell what is seen ("The star is red."): a small model then
looks things up by the words just written, which it learns many times faster than from the question.

Nothing here knows of models or tokens. ``layers`` hold, pixel by pixel, which object covers it (0:
none); the trainer turns them into dense labels for the tower.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 235),
    "yellow": (240, 220, 50),
    "purple": (165, 60, 200),
    "cyan": (60, 215, 225),
}
BACKGROUNDS = ((12, 12, 14), (50, 50, 54), (205, 205, 200), (245, 245, 242))
PLACES = ("top left", "top right", "bottom left", "bottom right")
ORDINALS = ("first", "second", "third")
NUMBERS = ("none", "one", "two", "three", "four")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}

# 5x7 glyphs, a row of bits each; drawn scaled with anti-aliasing.
GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn object: a shape (``kind`` in KINDS) or a digit (``kind`` "0"…"9")."""

    kind: str
    colour: str

    @property
    def phrase(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(slots=True)
class Scene:
    """A picture under construction.

    Attributes:
        image: (height, width, 3) uint8 pixels.
        layer: (height, width) uint8, the number of the object covering a pixel, 0 for none.
        things: the objects, number 1 first.
    """

    image: np.ndarray
    layer: np.ndarray
    things: list[Thing] = field(default_factory=list)


@dataclass(slots=True)
class Sample:
    """Media, questions and exact answers.

    Attributes:
        kind: "single", "several", "video" or "detail".
        scenes: the pictures, or the frames of the clip.
        questions: (question, answer) pairs; the first is the one evaluated.
    """

    kind: str
    scenes: list[Scene]
    questions: list[tuple[str, str]]


def blank(rng: np.random.Generator, size_hw: tuple[int, int]) -> Scene:
    """A scene with a plain background of a random grey and a little noise."""
    height, width = size_hw
    base = np.array(BACKGROUNDS[rng.integers(len(BACKGROUNDS))], np.int16)
    base = base + rng.integers(-8, 9)
    noise = rng.integers(-4, 5, (height, width, 1), dtype=np.int16)
    image = np.clip(base + noise, 0, 255).astype(np.uint8)
    return Scene(image, np.zeros((height, width), np.uint8))


def outline(kind: str, row: float, col: float, radius: float) -> list[tuple[float, float]]:
    """Corner points (x, y) of a square, triangle or star."""
    if kind == "square":
        side = 0.86 * radius
        return [
            (col - side, row - side),
            (col + side, row - side),
            (col + side, row + side),
            (col - side, row + side),
        ]
    if kind == "triangle":
        return [
            (col, row - radius),
            (col + radius, row + 0.8 * radius),
            (col - radius, row + 0.8 * radius),
        ]
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.12 * radius, 0.45 * radius)
    return [(col + r * np.cos(a), row + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]


def add_shape(
    rng: np.random.Generator, scene: Scene, thing: Thing, centre: tuple[float, float], radius: float
) -> None:
    """Draws a shape at ``centre`` (row, column) and records it."""
    scene.things.append(thing)
    rgb = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-14, 15, 3), 0, 255)
    row, col = centre
    picture, layer = Image.fromarray(scene.image), Image.fromarray(scene.layer)
    for target, fill in ((picture, tuple(int(v) for v in rgb)), (layer, len(scene.things))):
        draw = ImageDraw.Draw(target)
        if thing.kind == "circle":
            draw.ellipse((col - radius, row - radius, col + radius, row + radius), fill=fill)
        else:
            draw.polygon(outline(thing.kind, row, col, radius), fill=fill)
    scene.image, scene.layer = np.array(picture), np.array(layer)


def add_digit(
    rng: np.random.Generator, scene: Scene, digit: int, top_left: tuple[int, int], height: int
) -> None:
    """Draws a digit of ``height`` pixels, white on dark and black on light ground."""
    bits = np.array([[int(b) for b in row] for row in GLYPHS[digit].split()], np.uint8) * 255
    width = max(1, round(height * 5 / 7))
    mask = (
        np.asarray(Image.fromarray(bits).resize((width, height), Image.Resampling.BOX), np.float32)[
            ..., None
        ]
        / 255
    )
    row, col = top_left
    patch = scene.image[row : row + height, col : col + width]
    ink = 250.0 if patch.mean() < 128 else 10.0
    ink += float(rng.integers(-5, 6))
    patch[:] = np.clip(patch * (1 - mask) + ink * mask, 0, 255).astype(np.uint8)
    scene.things.append(Thing(str(digit), "white" if ink > 128 else "black"))
    scene.layer[row : row + height, col : col + width] = len(scene.things)


def random_thing(rng: np.random.Generator) -> Thing:
    return Thing(KINDS[rng.integers(len(KINDS))], list(COLOURS)[rng.integers(len(COLOURS))])


def fill_quarters(rng: np.random.Generator, scene: Scene, quarters: list[int]) -> dict[int, Thing]:
    """Puts one random shape into each of the given quarters."""
    height, width = scene.layer.shape
    placed = {}
    for quarter in quarters:
        radius = rng.uniform(0.34, 0.45) * min(height, width) / 2
        slack = np.array([height / 4 - radius, width / 4 - radius]).clip(0) * 0.8
        middle = np.array(
            [height * (0.25 + 0.5 * (quarter // 2)), width * (0.25 + 0.5 * (quarter % 2))]
        )
        centre = middle + rng.uniform(-slack, slack)
        placed[quarter] = random_thing(rng)
        add_shape(rng, scene, placed[quarter], (float(centre[0]), float(centre[1])), radius)
    return placed


def shape_questions(rng: np.random.Generator, placed: dict[int, Thing]) -> list[tuple[str, str]]:
    """Every kind of question about shapes in quarters, each drawn once, in random order."""
    things = list(placed.values())
    ordered = sorted(placed.items())
    caption = " ".join(f"A {thing.phrase} at the {PLACES[q]}." for q, thing in ordered)
    quarter = int(rng.integers(4))
    there = f"a {placed[quarter].phrase}" if quarter in placed else "nothing"
    out = [
        ("Describe the picture.", caption),
        (f"What is at the {PLACES[quarter]}?", f"At the {PLACES[quarter]} is {there}."),
        ("How many shapes are there?", f"Shapes: {NUMBERS[len(things)]}."),
    ]
    unique = [(q, t) for q, t in ordered if things.count(t) == 1]
    if unique:
        q, thing = unique[rng.integers(len(unique))]
        where = f"The {thing.phrase} is at the {PLACES[q]}."
        out.append((f"Where is the {thing.phrase}?", where))
    some = things[rng.integers(len(things))] if rng.random() < 0.8 else random_thing(rng)
    if rng.random() < 0.5:
        count = sum(t.kind == some.kind for t in things)
        out.append((f"How many {some.kind}s are there?", counted(f"{some.kind}s", count)))
    else:
        count = sum(t.colour == some.colour for t in things)
        out.append(
            (f"How many {some.colour} shapes are there?", counted(f"{some.colour} shapes", count))
        )
    asked = nearby_thing(rng, things)
    out.append((f"Is there a {asked.phrase}?", yes_or_no(asked, things)))
    kinds = [t for t in things if sum(o.kind == t.kind for o in things) == 1]
    if kinds:
        thing = kinds[rng.integers(len(kinds))]
        out.append((f"What colour is the {thing.kind}?", f"The {thing.kind} is {thing.colour}."))
    return [out[i] for i in rng.permutation(len(out))]


def counted(what: str, count: int) -> str:
    return f"{what.capitalize()}: {NUMBERS[count]}."


def yes_or_no(asked: Thing, things: list[Thing]) -> str:
    return f"{asked.phrase.capitalize()}: {'yes' if asked in things else 'no'}."


def nearby_thing(rng: np.random.Generator, things: list[Thing]) -> Thing:
    """A thing that is there half of the time and otherwise shares a colour or a kind with one that
    is.
    """
    thing = things[rng.integers(len(things))]
    choice = rng.random()
    if choice < 0.5:
        return thing
    other = random_thing(rng)
    return Thing(thing.kind, other.colour) if choice < 0.75 else Thing(other.kind, thing.colour)


def random_size(
    rng: np.random.Generator, low: int, high: int, ratio: float = 1.5
) -> tuple[int, int]:
    """A (height, width) with both sides in [low, high] and a ratio of at most ``ratio``."""
    height = int(rng.integers(low, high + 1))
    least, most = max(low, round(height / ratio)), min(high, round(height * ratio))
    return height, int(rng.integers(least, most + 1))


def single(rng: np.random.Generator) -> Sample:
    """One picture with 1-4 shapes in its quarters."""
    scene = blank(rng, random_size(rng, 48, 112))
    quarters = rng.permutation(4)[: rng.integers(1, 5)]
    placed = fill_quarters(rng, scene, [int(q) for q in quarters])
    return Sample("single", [scene], shape_questions(rng, placed))


def several(rng: np.random.Generator) -> Sample:
    """Two or three pictures with one shape each."""
    scenes = []
    for _ in range(rng.integers(2, 4)):
        scene = blank(rng, random_size(rng, 48, 112))
        height, width = scene.layer.shape
        radius = rng.uniform(0.28, 0.42) * min(height, width)
        centre = (rng.uniform(radius, height - radius), rng.uniform(radius, width - radius))
        add_shape(rng, scene, random_thing(rng), centre, radius)
        scenes.append(scene)
    things = [scene.things[0] for scene in scenes]
    out = []
    for index in rng.permutation(len(things))[:2]:
        phrase, image = things[index].phrase, f"the {ORDINALS[index]} image"
        out.append((f"What does {image} show?", f"{image.capitalize()} shows a {phrase}."))
        if things.count(things[index]) == 1:
            out.append((f"Which image shows a {phrase}?", f"A {phrase} is in {image}."))
    kind = things[rng.integers(len(things))].kind
    count = sum(t.kind == kind for t in things)
    out.append((f"How many images show a {kind}?", counted(f"{kind}s", count)))
    asked = nearby_thing(rng, things)
    out.append((f"Does an image show a {asked.phrase}?", yes_or_no(asked, things)))
    return Sample("several", scenes, [out[i] for i in rng.permutation(len(out))])


def video(rng: np.random.Generator) -> Sample:
    """A clip in which one shape crosses the picture and sometimes another one rests."""
    size_hw = random_size(rng, 48, 84)
    ground = blank(rng, size_hw)
    name = list(DIRECTIONS)[rng.integers(4)]
    mover, extent = random_thing(rng), np.array(size_hw, float)
    radius = rng.uniform(0.2, 0.27) * min(size_hw)
    step = np.array(DIRECTIONS[name], float)
    lane = extent / 2 + rng.uniform(-0.2, 0.2, 2) * extent * (step == 0)
    resting = random_thing(rng)
    with_rest = rng.random() < 0.4 and resting.kind != mover.kind
    if with_rest:  # the lane goes to one side, the shape at rest to the other
        side = rng.choice([-1.0, 1.0])
        lane = extent / 2 + side * 0.22 * extent * (step == 0)
        rest = (
            extent / 2
            - side * 0.25 * extent * (step == 0)
            + rng.uniform(-0.25, 0.25, 2) * extent * (step != 0)
        )
        add_shape(rng, ground, resting, (float(rest[0]), float(rest[1])), radius)
    reach = rng.uniform(0.24, 0.3)
    scenes = []
    for time in np.linspace(-1, 1, int(rng.integers(4, 9))):
        frame = Scene(ground.image.copy(), ground.layer.copy(), list(ground.things))
        centre = lane + time * reach * extent * step
        add_shape(rng, frame, mover, (float(centre[0]), float(centre[1])), radius)
        scenes.append(frame)
    way = name if name in ("up", "down") else f"to the {name}"
    out = [
        (f"Which way does the {mover.kind} move?", f"The {mover.kind} moves {way}."),
        ("What moves?", f"A {mover.phrase} moves."),
        ("What does the video show?", f"A {mover.phrase} moves {way}."),
    ]
    if with_rest:
        still = f"The {resting.kind} does not move."
        out.append((f"Which way does the {resting.kind} move?", still))
    return Sample("video", scenes, [out[i] for i in rng.permutation(len(out))])


def detail(rng: np.random.Generator, low: int = 150, high: int = 170) -> Sample:
    """A picture of ``low`` to ``high`` pixels a side with a few shapes and one small digit.

    The digit stands in an outer ninth, clear of its edges, so that no crop cuts it. At the default
    size it is legible only in the crops.
    """
    scene = blank(rng, random_size(rng, low, high, ratio=1.1))
    height, width = scene.layer.shape
    order = [int(q) for q in rng.permutation(4)]
    placed = fill_quarters(rng, scene, order[: rng.integers(1, 4)])
    free = order[-1]
    size = int(rng.integers(13, 17))
    margin = round(0.02 * height) + 2
    row = rng.integers(margin, max(margin + 1, height // 3 - size - margin))
    col = rng.integers(margin, max(margin + 1, width // 3 - size - margin))
    row = height - size - row if free // 2 else row
    col = width - size - col if free % 2 else col
    digit = int(rng.integers(10))
    add_digit(rng, scene, digit, (int(row), int(col)), size)
    others = [
        ("Where is the digit?", f"The digit is at the {PLACES[free]}."),
        *shape_questions(rng, placed)[:2],
    ]
    questions = [("Which digit is in the picture?", f"The digit is {digit}."), *others]
    return Sample("detail", [scene], questions)


MAKERS = {"single": single, "several": several, "video": video, "detail": detail}


def corpus(rng: np.random.Generator, count: int) -> list[str]:
    """Every question and answer of ``count`` samples of each kind, for the tokenizer."""
    samples = [maker(rng) for maker in MAKERS.values() for _ in range(count)]
    return [text for sample in samples for pair in sample.questions for text in pair]
