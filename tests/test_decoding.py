"""Pictures of a call decoded side by side: by whom, in which order, and what an error leaves."""

import io
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ovfast import Engine, MediaError, OptionError, PromptError, media_sources
from ovfast.media import MediaLimits, load_image
from ovfast.media_sources import MAX_DECODE_THREADS, decoding, image_list
from ovfast.options import Item
from tests.support.engines import open_engine
from tests.support.prompts import picture

OPTIONS: dict[str, Any] = {"limits": MediaLimits(), "exif": True}
DEADLINE_S = 10.0


def png(seed: int, height: int = 20, width: int = 30) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(height, width, seed)).save(file, "PNG")
    return file.getvalue()


BROKEN = png(0)[:80]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with open_engine(tiny_checkpoint, max_batch_size=2) as opened:
        yield opened


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


class Watched:
    """`load_image`, with what it was asked for and by which threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[object, int]] = []
        self.before: Callable[[], object] = lambda: None  # in the thread that is to load a picture
        monkeypatch.setattr(media_sources, "load_image", self)

    def __call__(self, source: object, **options: Any) -> np.ndarray:
        self.calls.append((source, threading.get_ident()))
        self.before()
        return load_image(source, **options)

    @property
    def threads(self) -> set[int]:
        return {thread for _, thread in self.calls}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_what_is_not_encoded_is_loaded_by_the_caller(tmp_path: Path, watched: Watched) -> None:
    """In order, whatever of it is decoded elsewhere."""
    path = tmp_path / "picture.png"
    path.write_bytes(png(1))
    opened = Image.open(io.BytesIO(png(2)))
    own = [picture(20, 30, 3), opened, torch.from_numpy(picture(20, 30, 4)), opened]
    encoded = [png(5), str(path), bytearray(png(6)), path, memoryview(png(7))]
    sources = [source for pair in zip(encoded, own, strict=False) for source in pair]
    expected = [load_image(source) for source in sources]
    with decoding(sources, **OPTIONS) as pictures:
        for found, wanted in zip(pictures, expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    by_caller = [source for source, thread in watched.calls if thread == threading.get_ident()]
    assert [id(source) for source in by_caller] == [id(source) for source in own]


@pytest.mark.parametrize(
    ("processors", "num_pictures", "most"), [(1, 9, 1), (3, 9, 3), (64, 30, MAX_DECODE_THREADS)]
)
def test_threads_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
    watched: Watched,
    processors: int,
    num_pictures: int,
    most: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    watched.before = lambda: time.sleep(0.001)
    sources = [png(seed) for seed in range(num_pictures)]
    with decoding(sources, **OPTIONS) as pictures:
        assert len(list(pictures)) == num_pictures
    assert 1 <= len(watched.threads) <= most
    assert (threading.get_ident() in watched.threads) == (most == 1)


def test_one_picture_needs_no_thread(watched: Watched) -> None:
    with decoding([picture(), png(0)], **OPTIONS) as pictures:
        list(pictures)
    assert watched.threads == {threading.get_ident()}


def test_the_first_error_in_order(watched: Watched) -> None:
    with (
        decoding([png(0), BROKEN, "/no/such/file", png(1)], **OPTIONS) as pictures,
        pytest.raises(MediaError, match="bytes of 80 bytes cannot be decoded"),
    ):
        list(pictures)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """As in a terminal; a shell's background jobs ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def check_few_begun(watched: Watched, before: set[threading.Thread]) -> None:
    """Of many pictures those alone that had been begun, and soon no thread is left."""
    deadline = time.monotonic() + DEADLINE_S
    while not set(threading.enumerate()) <= before:  # an interrupt may cut the wait for them
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert 1 <= len(watched.calls) <= 3 * MAX_DECODE_THREADS


def test_an_error_leaves_nothing_running(watched: Watched) -> None:
    before = set(threading.enumerate())
    watched.before = lambda: time.sleep(0.02)
    with (
        pytest.raises(MediaError),
        decoding([BROKEN, *(png(seed) for seed in range(200))], **OPTIONS) as pictures,
    ):
        list(pictures)
    check_few_begun(watched, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("call", [1, 9])
def test_ctrl_c_leaves_nothing_running(engine: Engine, watched: Watched, call: int) -> None:
    """While threads are started, and while the caller waits for a picture."""
    before, main, numbers = set(threading.enumerate()), threading.get_ident(), itertools.count(1)

    def interrupt_once() -> None:
        if next(numbers) == call:
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.02)

    watched.before = interrupt_once
    pictures = [png(seed) for seed in range(200)]
    with pytest.raises(KeyboardInterrupt):
        engine.generate(["What?"] * 200, images=pictures, max_new_tokens=1)
    check_few_begun(watched, before)
    watched.before = lambda: None
    assert len(engine.generate(["What?"] * 2, images=pictures[:2], max_new_tokens=1)) == 2


def test_pictures_of_a_batch_are_decoded_side_by_side(engine: Engine, watched: Watched) -> None:
    """Four prompts of one picture, all of which are decoded at the same time."""
    images = [png(seed, 20 + seed, 50) for seed in range(4)]
    alone = [engine.generate("What?", images=image, max_new_tokens=3) for image in images]
    meeting = threading.Barrier(4)
    watched.before = lambda: meeting.wait(DEADLINE_S)
    batch = engine.generate(["What?"] * 4, images=images, max_new_tokens=3)
    assert [one.token_ids for one in batch] == [one.token_ids for one in alone]
    assert [one.usage for one in batch] == [one.usage for one in alone]


def test_pictures_find_their_prompts(engine: Engine) -> None:
    """Several, none, of chats, and beside what is laid out or not encoded."""
    images = [png(seed, 20 + 10 * seed, 50) for seed in range(5)]
    opened = Image.open(io.BytesIO(images[4]))
    given: list[Any] = [images[0], None, [images[1], opened, images[2]], [], [opened, images[3]]]
    prompts = [f"Number {i}?" for i in range(len(given))]
    chats = [ask(*pair) for pair in zip(prompts, map(image_list, given), strict=True)]
    alone = [engine.prepare(chat) for chat in chats]
    for batch in (
        [Item(chat, None, None, None) for chat in chats],
        [Item(*pair, None, None) for pair in zip(prompts, given, strict=True)],
        [Item(alone[0], None, None, None), *(Item(chat, None, None, None) for chat in chats[1:])],
    ):
        for found, wanted in zip(engine._inputs(batch, None, None, False), alone, strict=True):
            np.testing.assert_array_equal(found.input_ids, wanted.input_ids)
            np.testing.assert_array_equal(found.views, wanted.views)


def ask(prompt: str, images: list[Any]) -> list[dict[str, Any]]:
    """A chat of pictures and a question."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


# (prompt, images) of a batch, and what is wrong with the first that is wrong.
FIRST_ERRORS: dict[str, tuple[list[tuple[str, Any]], type[Exception], str]] = {
    "media before prompt": (
        [("A", png(0)), ("B", BROKEN), ("<image><image>", png(1))],
        MediaError,
        "cannot be decoded",
    ),
    "prompt before media": (
        [("A", png(0)), ("<image><image>", png(1)), ("B", BROKEN)],
        PromptError,
        "2 <image> markers",
    ),
    "media before media": (
        [("A", [png(0), "/no/file"]), ("B", BROKEN), ("C", png(1))],
        MediaError,
        "'/no/file' cannot be opened",
    ),
    "clip before media": ([("A", [png(0)]), ("B", BROKEN)], MediaError, "video '/no/clip'"),
}


@pytest.mark.parametrize("name", FIRST_ERRORS)
def test_the_first_prompt_that_is_wrong_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing has run then."""
    batch, kind, message = FIRST_ERRORS[name]
    videos = ["/no/clip", None] if name == "clip before media" else None
    monkeypatch.setattr(engine._scheduler, "step", None)
    with pytest.raises(kind, match=message):
        engine.generate([text for text, _ in batch], images=[i for _, i in batch], videos=videos)


def test_options_of_another_type(engine: Engine) -> None:
    visual: Any = {"exif": False}
    with pytest.raises(OptionError, match="expected VisualOptions or None"):
        engine.generate(["A", "B"], images=[png(0), png(1)], visual=visual)
