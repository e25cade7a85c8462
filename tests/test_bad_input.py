"""Bad input through the whole engine: a typed error that helps, and the next request is right."""

import io
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ovfast
from ovfast import (
    CapacityError,
    Engine,
    MediaError,
    OptionError,
    OVFastError,
    PromptError,
)
from tests.support.engines import free_slots, open_engine
from tests.support.prompts import picture, user

NORMAL = {"prompt": "What is shown?", "images": picture(90, 120), "max_new_tokens": 6}


@dataclass(frozen=True)
class State:
    """What must not grow: slots held, threads, open files."""

    free_slots: int
    threads: int
    files: int


def state_of(engine: Engine) -> State:
    return State(free_slots(engine), threading.active_count(), len(os.listdir("/proc/self/fd")))


@dataclass(frozen=True)
class Fixture:
    engine: Engine
    tokens: tuple[int, ...]


@pytest.fixture(scope="module")
def fixture(tiny_checkpoint: Path) -> Iterator[Fixture]:
    with open_engine(tiny_checkpoint, max_seq_len=512) as engine:
        tokens = engine.generate(**NORMAL).token_ids
        before = state_of(engine)
        yield Fixture(engine, tokens)
        assert state_of(engine) == before


@pytest.fixture
def engine(fixture: Fixture) -> Iterator[Engine]:
    """After each test the same engine answers a normal request with the same tokens."""
    before = state_of(fixture.engine)
    yield fixture.engine
    assert state_of(fixture.engine) == before
    assert fixture.engine.generate(**NORMAL).token_ids == fixture.tokens


def check(kind: type[OVFastError], pattern: str, call: Callable[[], Any]) -> None:
    """The message says what was given and what is allowed (`pattern`), and what to do."""
    with pytest.raises(kind, match=pattern) as caught:
        call()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert len(message) < 800
    assert any(word in message for word in ("expected", "allowed", "holds")), message


def huge_png() -> bytes:
    """Header of a picture of 60 000 × 60 000, without its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + checksum

    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(200, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


PIXELS = picture(20, 20)
BAD_IMAGES: dict[str, tuple[Any, str]] = {
    "missing file": ("no/such.png", r"no/such\.png.*No such file.*Check the path"),
    "directory": (str(Path(__file__).parent), r"is a directory; expected a file\. Pass"),
    "empty file": (b"", r"is empty; expected an encoded image\. Check"),
    "truncated JPEG": (jpeg()[:-2000], r"cannot be decoded.*complete.*Check"),
    "no picture": (b"hello, world", r"no known picture format; expected PNG.*Convert"),
    "huge PNG": (huge_png(), r"60000×60000.*at most 150000000.*raise MediaLimits"),
    "no rows": (PIXELS[:0], r"0×20.*at least 1×1\. Check"),
    "NaN": (np.full((9, 9, 3), np.nan), r"dtype float64; expected uint8.*Undo any normal"),
    "float": (np.zeros((9, 9, 3), np.float32), r"dtype float32; expected uint8"),
    "float tensor": (torch.zeros(9, 9, 3), r"dtype float32; expected uint8"),
    "wrong rank": (PIXELS[0], r"shape \(20, 3\); expected \(height, width, 3\).*Repeat"),
    "a clip": (np.stack([PIXELS] * 2), r"shape \(2, 20, 20, 3\).*a clip goes to videos="),
    "channels first": (PIXELS.transpose(2, 0, 1), r"looks channels-first: np\.moveaxis"),
    "five channels": (np.zeros((9, 9, 5), np.uint8), r"\(9, 9, 5\).*x\[\.\.\., :3\]"),
    "URL": ("https://example.com/cat.jpg", r"is a URL; expected.*download it"),
    "file URL": ("file:///tmp/cat.jpg", r"is a URL"),
    "bad data URI": ("data:image/png;base64,%%%", r"not valid base64.*Encode"),
    "number": (3, r"type int; expected a path.*Convert"),
    "None in a list": (None, r"type NoneType; expected a path"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images(engine: Engine, name: str) -> None:
    image, pattern = BAD_IMAGES[name]
    check(MediaError, pattern, lambda: engine.generate("Q", images=[image]))
    chat = user({"type": "image", "image": image}, "Q")
    if image is not None:
        check(MediaError, pattern, lambda: engine.generate(chat))
        check(MediaError, pattern, lambda: engine.stream("Q", images=image))
        check(MediaError, pattern, lambda: engine.generate(["a", "b"], images=[PIXELS, image]))


BAD_VIDEOS: dict[str, tuple[Any, str]] = {
    "missing file": ("no/such.mp4", r"No such file.*Check the path"),
    "no frames": (np.zeros((0, 9, 9, 3), np.uint8), r"no frames; expected at least 1"),
    "empty list": ([[]], r"no frames; expected at least 1"),
    "corrupt": (b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 20, r"cannot be decoded|no video str"),
    "a picture": (PIXELS[0], r"shape \(20, 3\); expected \(frames, height"),
    "files of frames": ([jpeg()] * 2, r"is a picture; expected.*videos=\[\[frame, \.\.\.\]\]"),
    "float": (np.zeros((2, 9, 9, 3)), r"dtype float64; expected uint8"),
    "two sizes": ([[PIXELS, PIXELS[:10]]], r"frame 1.*10×20.*expected one size\. Resize"),
    "URL": ("https://example.com/clip.mp4", r"is a URL; expected.*download it"),
    "too many": (np.zeros((513, 2, 2, 3), np.uint8), r"513 frames; at most 512.*Choose fewer"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_videos(engine: Engine, name: str) -> None:
    video, pattern = BAD_VIDEOS[name]
    check(MediaError, pattern, lambda: engine.generate("Q", videos=video))


BAD_PROMPTS: dict[str, tuple[type[OVFastError], Any, dict[str, Any], str]] = {
    "marker without picture": (PromptError, "<image> Q", {}, r"1 <image> markers for 0 images"),
    "one marker, two": (PromptError, "<image>", {"images": [PIXELS] * 2}, r"1 .*for 2 images"),
    "chat without place": (PromptError, user("Q"), {"images": PIXELS}, r"0 places.*1 were given"),
    "raw without marker": (PromptError, "Q", {"images": PIXELS, "raw": True}, r"0 <image> mark"),
    "too long": (CapacityError, "word " * 600, {}, r"prompt has \d+ tokens.*holds 512.*Shorten"),
    "too many views": (
        CapacityError,
        "Q",
        {"images": [PIXELS] * 14},
        r"holds 512.*lower .*max_views",
    ),
    "empty": (PromptError, "", {}, r"prompt is ''; expected a question.*Pass some text"),
    "blank": (PromptError, " \n", {}, r"expected a question"),
    "None": (PromptError, None, {}, r"prompt is None; expected a str"),
    "bytes": (PromptError, b"Q", {}, r"expected a str"),
    "number": (PromptError, 5, {}, r"prompt is 5; expected a str"),
    "chat of strings": (PromptError, [{"text": "Q"}], {}, r"expected a dict with exactly 'role'"),
    "unknown role": (PromptError, [{"role": "tool", "content": "Q"}], {}, r"'tool'; expected one"),
    "unknown part": (PromptError, user({"type": "audio"}), {}, r"'audio'; expected text, image"),
    "system twice": (
        PromptError,
        [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
        {"system": "c"},
        r"system= with a chat that has a system turn; expected one",
    ),
    "system of another type": (PromptError, "Q", {"system": 3}, r"system=3; expected a str"),
    "raw of another type": (PromptError, "Q", {"raw": "yes"}, r"raw='yes'; expected True"),
    "lone surrogate": (PromptError, "\ud800", {}, r"lone surrogate.*expected valid Unicode"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_prompts(engine: Engine, name: str) -> None:
    kind, prompt, options, pattern = BAD_PROMPTS[name]
    for call in (engine.generate, engine.stream):
        check(kind, pattern, lambda call=call: call(prompt, **options))
    check(kind, pattern, lambda: engine.score(prompt, ["yes"], **options))


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"max_tokens": 3}, r"unknown option 'max_tokens'; expected one of"),
    "misspelt": ({"temprature": 1}, r"Did you mean 'temperature'\?"),
    "negative temperature": ({"temperature": -1}, r"temperature=-1; expected .* 0 is greedy"),
    "NaN temperature": ({"temperature": float("nan")}, r"temperature=nan; expected a finite"),
    "top_p 2": ({"top_p": 2}, r"top_p=2; expected a finite number above 0 and at most 1"),
    "top_k 0": ({"top_k": 0}, r"top_k=0; expected an integer of at least 1 or None"),
    "no new tokens": ({"max_new_tokens": 0}, r"max_new_tokens=0; expected an integer of at"),
    "empty stop": ({"stop": ""}, r"stop=''; expected a string .* none empty\. Leave"),
    "empty stop in a list": ({"stop": ["a", ""]}, r"none empty"),
    "seed as text": ({"seed": "7"}, r"seed='7'; expected an integer.*Convert the string"),
    "seed as float": ({"seed": 1.5}, r"seed=1\.5; expected an integer of at least 0 or None"),
    "seed as bool": ({"seed": True}, r"seed=True; expected an integer"),
    "huge seed": ({"seed": 2**64}, r"expected less than 2\*\*64\. Take it modulo"),
    "stop ids as int": ({"stop_token_ids": 5}, r"stop_token_ids=5; expected a list.*Put"),
    "visual": ({"visual": {"max_views": 1}}, r"visual=.*expected VisualOptions or None\. Build"),
    "sampling": ({"sampling": {"seed": 1}}, r"expected SamplingParams or None"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options(engine: Engine, name: str) -> None:
    options, pattern = BAD_OPTIONS[name]
    for call in (engine.generate, engine.stream):
        check(OptionError, pattern, lambda call=call: call("Q", **options))
    with pytest.raises(ValueError, match=pattern):
        engine.generate("Q", **options)


ODD_IMAGES: dict[str, Callable[[], Image.Image]] = {
    "CMYK": lambda: Image.fromarray(picture(40, 50)).convert("CMYK"),
    "16-bit": lambda: Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40)),
    "palette": lambda: Image.fromarray(picture(40, 50)).quantize(16),
    "alpha": lambda: Image.fromarray(np.dstack([picture(40, 50), picture(40, 50)[..., 0]])),
    "grey": lambda: Image.fromarray(picture(40, 50)[..., 0]),
    "one bit": lambda: Image.fromarray(picture(40, 50)).convert("1"),
    "1×1": lambda: Image.new("RGB", (1, 1), "red"),
    "5000×1": lambda: Image.new("RGB", (1, 5000), "red"),
    "1×5000": lambda: Image.new("RGB", (5000, 1), "red"),
}
FORMATS = {"CMYK": "JPEG"}


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_pictures_are_answered(engine: Engine, tmp_path: Path, name: str) -> None:
    """From a file, from its bytes and from PIL alike; with the tokens of the plain RGB picture."""
    image = ODD_IMAGES[name]()
    file = tmp_path / "odd"
    image.save(file, FORMATS.get(name, "PNG"))
    stored = Image.open(file)
    sources = [str(file), file.read_bytes(), stored]
    outputs = [engine.generate("Q", images=s, max_new_tokens=4, ignore_eos=True) for s in sources]
    stored.close()
    assert len({output.token_ids for output in outputs}) == 1
    assert outputs[0].usage.views >= 2
    plain = ovfast.media.load_image(str(file))
    expected = engine.generate("Q", images=plain, max_new_tokens=4, ignore_eos=True)
    assert outputs[0].token_ids == expected.token_ids


def test_an_animation_is_its_first_frame(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.fromarray(picture(40, 50, seed)) for seed in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.gif")
    with caplog.at_level(logging.INFO, logger="ovfast"):
        moving, still = (
            engine.generate("Q", images=tmp_path / name, max_new_tokens=4, ignore_eos=True)
            for name in ("a.gif", "b.gif")
        )
    assert moving.token_ids == still.token_ids
    assert [record for record in caplog.records if "several frames" in record.getMessage()]
