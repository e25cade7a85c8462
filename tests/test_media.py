"""Media: every kind of source, every refusal, and that nothing leaks or warns."""

import base64
import contextlib
import io
import logging
import os
import re
import struct
import subprocess
import sys
import textwrap
import warnings
import wave
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from ovfast.errors import MediaError, OptionError
from ovfast.media import _FORMATS, MediaLimits, choose_frames, load_image, load_video
from ovfast.media_sources import decoding

RNG = np.random.default_rng(7)
PICTURE = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = encode(Image.fromarray(PICTURE), "PNG")


def png_header(width: int, height: int) -> bytes:
    """A grey PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def iptc(content: bytes) -> bytes:
    """An IPTC file that declares 8×8 pixels and holds another file, which Pillow opens."""
    fields = [
        (3, 20, struct.pack(">I", 8)),
        (3, 30, struct.pack(">I", 8)),
        (3, 60, b"\1\0"),
        (3, 120, b"\5"),
    ]
    fields += [(8, 10, content[at : at + 32_000]) for at in range(0, len(content), 32_000)]
    return b"".join(struct.pack(">BBBH", 28, *key, len(data)) + data for *key, data in fields)


def write_clip(
    path: Path,
    num_frames: int,
    *,
    codec: str = "ffv1",
    size: tuple[int, int] = (48, 64),
    rate: int = 10,
    rotation: float | None = None,
    pts: list[int] | None = None,
    noise: bool = False,
) -> Path:
    """A clip whose frame i is grey 5·i, or noise, with a white mark in the top left corner."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.bit_rate = 4_000_000
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for index in range(num_frames):
            picture = np.full((*size, 3), 5 * index, np.uint8)
            if noise:
                picture = np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8)
            picture[:16, :16] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index if pts is None else pts[index]
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_jpegs(path: Path, sizes_hw: list[tuple[int, int]]) -> Path:
    """A clip of 64×64, as its header says, of pictures of any size."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuvj420p"
        for index, (height, width) in enumerate(sizes_hw):
            packet = av.Packet(encode(Image.new("RGB", (width, height)), "JPEG"))
            packet.pts = packet.dts = index
            packet.time_base = Fraction(1, 10)
            packet.stream = stream
            container.mux(packet)
    return path


def grey_levels(frames: np.ndarray) -> list[int]:
    """The frame numbers that `write_clip` painted."""
    return [round(float(frame[-8:, -8:].mean()) / 5) for frame in frames]


# Pictures: sources


@pytest.mark.parametrize(
    "make",
    [
        str,
        lambda path: path,
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: memoryview(path.read_bytes()),
        lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        lambda path: "data:;base64," + base64.b64encode(path.read_bytes()).decode(),
        lambda path: "DATA:image/png;charset=x;BASE64," + base64.encodebytes(PNG).decode(),
        lambda path: Image.open(path.open("rb")),
        lambda path: Image.fromarray(PICTURE),
        lambda path: PICTURE,
        lambda path: np.asfortranarray(PICTURE),
        lambda path: PICTURE[::-1][::-1],
        lambda path: torch.from_numpy(PICTURE.copy()),
        lambda path: torch.from_numpy(PICTURE.transpose(2, 0, 1).copy()).permute(1, 2, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_every_source_gives_the_same_picture(make, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    loaded = load_image(make(path))
    assert loaded.dtype == np.uint8
    assert loaded.flags.c_contiguous
    assert loaded.flags.writeable
    np.testing.assert_array_equal(loaded, PICTURE)


def test_a_read_only_array_is_copied():
    frozen = PICTURE.copy()
    frozen.flags.writeable = False
    loaded = load_image(frozen)
    loaded[0, 0] = 0
    np.testing.assert_array_equal(frozen, PICTURE)


def test_neither_torch_nor_pyav_is_needed_for_pictures(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "av", None)
    np.testing.assert_array_equal(load_image(PNG), PICTURE)
    np.testing.assert_array_equal(load_video(PICTURE[None]), PICTURE[None])


def test_pyav_is_imported_lazily():
    code = "import sys, ovfast.media; assert 'av' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("kind", sorted(_FORMATS))
def test_formats_of_pictures(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    colour = (200, 100, 50)
    loaded = load_image(encode(Image.new("RGB", (16, 8), colour), kind))
    assert np.abs(loaded.astype(int) - colour).max() <= 4
    assert loaded.shape == (8, 16, 3)


# Pictures: odd but valid

GREY = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
DEEP = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=-1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_keeps_the_high_byte(kind):
    loaded = load_image(encode(Image.fromarray(DEEP), kind))
    np.testing.assert_array_equal(loaded, grey((DEEP >> 8).astype(np.uint8)))


@pytest.mark.parametrize(
    ("mode", "data"),
    [
        ("I;16", DEEP.astype("<u2")),
        ("I;16B", DEEP.astype(">u2")),
        ("I", DEEP.astype("<i4")),
    ],
)
def test_16_bit_pil_images(mode, data):
    image = Image.frombytes(mode, (7, 5), data.tobytes())
    np.testing.assert_array_equal(load_image(image), grey((DEEP >> 8).astype(np.uint8)))


def test_16_bit_rgb_png():
    deep = RNG.integers(0, 65536, (3, 4, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]:
        parts += [struct.pack(">I", len(data)), kind, data]
        parts.append(struct.pack(">I", zlib.crc32(kind + data)))
    np.testing.assert_array_equal(load_image(b"".join(parts)), deep >> 8)


def test_grey_one_bit_and_grey_alpha():
    np.testing.assert_array_equal(load_image(Image.fromarray(GREY)), grey(GREY))
    bits = encode(Image.fromarray(GREY).point(lambda v: 255 * (v > 90), "1"), "PNG")
    np.testing.assert_array_equal(load_image(bits), grey(np.where(GREY > 90, 255, 0)))
    with_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (7, 5), 0)])
    np.testing.assert_array_equal(load_image(encode(with_alpha, "PNG")), grey(GREY))


def test_alpha_is_dropped_and_not_composited():
    rgba = np.dstack([PICTURE, np.zeros((5, 7), np.uint8)])
    np.testing.assert_array_equal(load_image(encode(Image.fromarray(rgba), "PNG")), PICTURE)


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palettes_keep_their_colours_whatever_is_transparent(transparency):
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    if transparency is not None:
        image.info["transparency"] = transparency
    wanted = [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    assert load_image(image).tolist() == wanted
    assert load_image(encode(image, "PNG")).tolist() == wanted


def test_cmyk_and_other_colour_spaces():
    cmyk = Image.new("CMYK", (4, 3), (0, 255, 255, 0))
    assert load_image(encode(cmyk, "TIFF")).tolist() == [[[255, 0, 0]] * 4] * 3
    ycbcr = Image.new("RGB", (2, 2), (200, 100, 50)).convert("YCbCr")
    assert np.abs(load_image(ycbcr).astype(int) - [200, 100, 50]).max() <= 2
    for mode in ("RGBa", "La", "PA", "RGBX", "HSV", "LAB"):
        assert load_image(Image.new(mode, (2, 3))).shape == (3, 2, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_used_and_logged(kind, caplog):
    frames = [Image.new("RGB", (8, 8), colour) for colour in [(255, 0, 0), (0, 255, 0)]]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with caplog.at_level(logging.INFO, logger="ovfast"):
        loaded = load_image(data)
    assert loaded.tolist() == [[[255, 0, 0]] * 8] * 8
    assert [record.name for record in caplog.records] == ["ovfast"]
    assert "several frames" in caplog.text


def test_one_frame_says_nothing(caplog):
    with caplog.at_level(logging.DEBUG, logger="ovfast"):
        for kind in ("GIF", "WEBP", "PNG", "JPEG"):
            load_image(encode(Image.new("RGB", (8, 8)), kind))
    assert not caplog.records


def test_mpo_is_a_jpeg(caplog):
    frames = [Image.new("RGB", (16, 8), (250, 0, 0)), Image.new("RGB", (16, 8), (0, 0, 250))]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.INFO, logger="ovfast"):
        loaded = load_image(data)
    assert np.abs(loaded.astype(int) - [250, 0, 0]).max() <= 4
    assert not caplog.records


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_pictures(size_hw):
    picture = RNG.integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    np.testing.assert_array_equal(load_image(encode(Image.fromarray(picture), "PNG")), picture)


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,  # not a value of the standard
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(PICTURE), "PNG", exif=exif)
    np.testing.assert_array_equal(load_image(data), UPRIGHT[orientation](PICTURE))
    np.testing.assert_array_equal(load_image(data, exif=False), PICTURE)
    opened = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(load_image(opened), UPRIGHT[orientation](PICTURE))
    np.testing.assert_array_equal(np.asarray(opened), PICTURE)  # the caller's image is left alone


def test_damaged_exif_does_not_spoil_the_picture():
    data = encode(Image.fromarray(PICTURE), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x00")
    np.testing.assert_array_equal(load_image(data), PICTURE)


# Pictures: refusals


def refuse(source: object, match: str, **options: object) -> str:
    with pytest.raises(MediaError, match=match) as caught:
        load_image(source, **options)
    text = str(caught.value)
    assert "expected" in text or "allowed" in text  # what is allowed
    assert len(re.findall(r"[.!] ", text)) >= 1  # and what to do
    assert len(text) < 600
    return text


@pytest.mark.parametrize(
    "url",
    ["http://x/a.png", "https://x/a.png", "ftp://x/a", "file:///tmp/a.png", "FILE:/a", "s3://b/k"],
)
def test_urls_are_refused(url):
    assert "download" in refuse(url, "is a URL")


def test_paths_that_are_no_files(tmp_path):
    refuse(tmp_path, "is a directory")
    refuse(tmp_path / "missing.png", "No such file")
    refuse("", "cannot be opened")
    refuse("a\0b", "null")
    assert "data URI" in refuse("iVBORw0KGgo" * 1000, "cannot be opened")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "pipe")
    (tmp_path / "empty.png").touch()
    refuse(tmp_path / "empty.png", "is empty")
    refuse(b"", "is empty")
    refuse("data:;base64,", "is empty")


@pytest.mark.parametrize("source", [None, 3, 2.5, object(), {}, [PICTURE], (PICTURE,)])
def test_unknown_kinds(source):
    refuse(source, "expected")


def test_file_objects_are_told_to_read():
    assert "file.read()" in refuse(io.BytesIO(PNG), "BytesIO")


def test_damaged_files(tmp_path):
    jpeg = encode(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    refuse(jpeg[: len(jpeg) // 2], "truncated")
    refuse(PNG[: len(PNG) // 2], "cannot be decoded|no known")
    for kind in ("WEBP", "GIF", "TIFF"):
        data = encode(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
        refuse(data[: len(data) // 2], "cannot be decoded|no known")
    refuse(b"not a picture" * 50, "no known picture format")
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(PNG[:40] + b"\xff" * 20 + PNG[60:])
    refuse(damaged, "damaged.png")


def test_noise_in_files_raises_media_error_or_decodes():
    sources = [encode(Image.fromarray(PICTURE), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")]
    noise = np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about odd metadata are not ours
        for data in sources:
            for _ in range(40):
                spoilt = bytearray(data)
                for place in noise.integers(0, len(data), 6):
                    spoilt[place] = noise.integers(0, 256)
                try:
                    loaded = load_image(spoilt)
                except MediaError:
                    continue
                assert loaded.ndim == 3


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("data:image/png,abc", "not a base64 data URI"),
        ("data:image/png;base64", "not a base64 data URI"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,abcde", "not valid base64"),
        ("data:image/png;base64,日本", "not valid base64"),
    ],
)
def test_bad_data_uris(uri, match):
    refuse(uri, match)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((0, 4, 3), np.uint8), "0×4"),
        (np.zeros((4, 0, 3), np.uint8), "4×0"),
        (np.zeros((4, 4, 3), np.float32), r"float32.*\* 255"),
        (np.full((4, 4, 3), np.nan), "float64"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((4, 4, 3), bool), "bool"),
        (np.zeros((4, 4, 5), np.uint8), r"\(4, 4, 5\).*:3"),
        (np.zeros((4, 4, 4), np.uint8), "alpha"),
        (np.zeros((4, 4, 1), np.uint8), "repeat"),
        (np.zeros((4, 4), np.uint8), "stack"),
        (np.zeros((3, 4, 4), np.uint8), "channels-first"),
        (np.zeros((2, 4, 4, 3), np.uint8), "videos="),
        (np.zeros(3, np.uint8), r"\(3,\)"),
        (np.array(3, np.uint8), r"\(\)"),
        (np.array([["a"]]), "dtype"),
        (torch.zeros(4, 4, 3), "float32"),
        (torch.zeros(4, 4, 3, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "channels-first"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8, device="meta"), "host"),
    ],
)
def test_arrays_of_other_kinds(array, match):
    refuse(array, match)


def test_pil_images_of_unknown_range():
    refuse(Image.new("F", (3, 3)), "mode F")
    refuse(encode(Image.new("F", (3, 3)), "TIFF"), "mode F")
    refuse(Image.new("I", (3, 3), 70_000), "70000")
    refuse(Image.new("I", (3, 3), -1), "-1")
    refuse(Image.new("RGB", (0, 3)), "3×0")


def test_a_closed_pil_image_is_refused():
    image = Image.open(io.BytesIO(PNG))
    image.close()
    refuse(image, "cannot be decoded")


# Limits


def test_a_huge_declared_size_is_refused_before_decoding_and_without_warning():
    text = refuse(png_header(60_000, 60_000), "60000×60000")
    assert "max_image_pixels" in text


def test_sizes_that_pillow_warns_about_are_judged_by_our_limit_alone():
    # 100 Mpixel: above Pillow's warning, below our limit, so it is decoded (and found cut off).
    refuse(png_header(10_000, 10_000), "truncated")
    # 200 Mpixel: above Pillow's error; a caller may allow it.
    refuse(png_header(20_000, 10_000), "200000000 pixels")
    refuse(
        png_header(20_000, 10_000),
        "truncated",
        limits=MediaLimits(max_image_pixels=10**9),
    )


def test_the_bomb_check_holds_in_threads_and_leaves_global_state_alone():
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    bomb, large = png_header(60_000, 60_000), png_header(10_000, 10_000)

    def attempt(index: int) -> str:
        source = (bomb, PNG, bomb, PNG, large)[index % 5]
        try:
            return "ok" if np.array_equal(load_image(source), PICTURE) else "wrong"
        except MediaError as error:
            return "bomb" if "allowed" in str(error) else re.findall("truncated", str(error))[0]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(attempt, range(40)))
    assert results == ["bomb", "ok", "bomb", "ok", "truncated"] * 8
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n%%EndComments\nshowpage\n%%EOF\n"
LARGE = encode(Image.new("L", (2000, 1000)), "PNG")
ICO = struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(LARGE), 22) + LARGE
ICNS = b"icns" + struct.pack(">I4sI", len(LARGE) + 16, b"ic07", len(LARGE) + 8) + LARGE


@pytest.mark.parametrize("data", [EPS, iptc(EPS), iptc(LARGE), ICO, ICNS])
def test_files_of_other_files_are_not_opened(data, monkeypatch):
    """Pillow would decode 2000×1000 pixels from a header of 8×8, or start Ghostscript."""
    for call in ("Popen", "call", "check_call", "run"):
        monkeypatch.setattr(subprocess, call, None)
    refuse(data, "no known picture format", limits=MediaLimits(max_image_pixels=100))


class Container(ImageFile.ImageFile):
    """A format of 8×8 pixels whose reader decodes 2000×1000."""

    def _open(self) -> None:
        self._size, self._mode = (8, 8), "L"

    def load(self) -> object:
        self.im = Image.new("L", (2000, 1000)).im
        return Image.Image.load(self)


def test_what_a_pil_image_decodes_to_is_within_the_limit():
    limits = MediaLimits(max_image_pixels=1000)
    refuse(Container(io.BytesIO()), "1000×2000 = 2000000 pixels", limits=limits)


@pytest.mark.parametrize("name", ["bytes", "path", "uri"])
def test_encoded_size_limit(name, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    source = {
        "bytes": PNG,
        "path": path,
        "uri": "data:;base64," + base64.b64encode(PNG).decode(),
    }[name]
    assert load_image(source, limits=MediaLimits(max_image_bytes=len(PNG))).shape == (5, 7, 3)
    limits = MediaLimits(max_image_bytes=len(PNG) - 3)
    refuse(source, "max_image_bytes", limits=limits)
    if name == "uri":
        monkeypatch.setattr(base64, "b64decode", None)  # refused before decoding
        refuse(source + "A" * 40, "max_image_bytes", limits=limits)


def test_pixel_limit_holds_for_every_source():
    limits = MediaLimits(max_image_pixels=34)
    for source in (PICTURE, PNG, Image.fromarray(PICTURE), torch.from_numpy(PICTURE.copy())):
        refuse(source, "5×7 = 35 pixels", limits=limits)
        assert load_image(source, limits=MediaLimits(max_image_pixels=35)).shape == (5, 7, 3)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "9"])
def test_limits_are_validated(value):
    with pytest.raises(OptionError, match="max_image_pixels"):
        MediaLimits(max_image_pixels=value)


# Videos


@pytest.mark.parametrize(
    ("count", "average_fps", "num_frames", "fps", "wanted"),
    [
        (100, 25.0, 8, None, [0, 14, 28, 42, 56, 70, 84, 99]),
        (8, 25.0, 8, None, list(range(8))),
        (5, 25.0, 8, None, list(range(5))),  # fewer than asked for: all, once each
        (1, 25.0, 8, None, [0]),
        (9, 25.0, 1, None, [0]),
        (100, 25.0, 8, 1.0, [0, 25, 50, 75]),
        (100, 29.97, 8, 1.0, [0, 30, 60, 90]),
        (100, 25.0, 8, 100.0, [0, 14, 28, 42, 56, 70, 84, 99]),  # step of at least 1, too many
        (10, 25.0, 32, 1000.0, list(range(10))),
        (100, 25.0, 3, 1.0, [0, 49, 99]),  # more than num_frames: spread
        (0, 25.0, 8, None, []),
        (0, 25.0, 8, 1.0, []),
    ],
)
def test_choice_of_frames(count, average_fps, num_frames, fps, wanted):
    assert choose_frames(count, average_fps, num_frames=num_frames, fps=fps) == wanted


def test_choice_of_frames_never_repeats():
    for count in range(1, 200):
        for num_frames in (1, 2, 31, 32, 33):
            chosen = choose_frames(count, 0.0, num_frames=num_frames, fps=None)
            assert len(chosen) == min(count, num_frames)
            assert chosen == sorted(set(chosen))
            if num_frames <= count:
                assert chosen == np.linspace(0, count - 1, num_frames).astype(int).tolist()


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("clip.mkv", "ffv1"),  # no frame count in the header
        ("clip.mp4", "libx264"),  # B-frames: packets are not in display order
        ("clip.ts", "libx264"),
        ("clip.webm", "libvpx"),  # hidden frames have packets of their own
        ("clip.avi", "mpeg4"),
    ],
)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_frames_of_a_file(name, codec, as_bytes, tmp_path):
    path = write_clip(tmp_path / name, 40, codec=codec)
    source = path.read_bytes() if as_bytes else path
    frames = load_video(source, num_frames=5)
    assert frames.shape == (5, 48, 64, 3)
    assert frames.dtype == np.uint8
    assert frames.flags.c_contiguous
    assert frames.flags.writeable
    assert grey_levels(frames) == [0, 9, 19, 29, 39]
    assert frames[:, 2:12, 2:12].min() > 230
    assert grey_levels(load_video(source, num_frames=32, fps=2)) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert grey_levels(load_video(str(path), num_frames=64)) == list(range(40))


def test_lossless_pixels(tmp_path):
    frames = load_video(write_clip(tmp_path / "clip.mkv", 3, size=(33, 41)))
    wanted = np.empty((3, 33, 41, 3), np.uint8)
    for index in range(3):
        wanted[index] = 5 * index
    wanted[:, :16, :16] = 255
    np.testing.assert_array_equal(frames, wanted)


def test_a_count_that_is_too_high_is_corrected(tmp_path, monkeypatch):
    import ovfast.video_file as video_file

    probe = video_file._probe_clip
    monkeypatch.setattr(video_file, "_probe_clip", lambda *args: (probe(*args)[0] + 9, 10.0))
    path = write_clip(tmp_path / "clip.mkv", 20)
    assert grey_levels(load_video(path, num_frames=3)) == [0, 9, 19]


def test_variable_frame_rate(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", 6, pts=[0, 1, 2, 30, 31, 60])
    assert grey_levels(load_video(path, num_frames=3)) == [0, 2, 5]


def test_display_rotation(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 2, codec="libx264", rotation=90)
    frames = load_video(path)  # 90 degrees against the clock: top left goes to bottom left
    assert frames.shape == (2, 64, 48, 3)
    assert frames[:, -12:-4, 4:12].min() > 230
    assert frames[:, 4:12, 4:12].max() < 30
    assert load_video(path, exif=False).shape == (2, 48, 64, 3)


def test_animated_gif_is_a_clip():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [Image.new("RGB", (16, 16), colour) for colour in colours]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    pytest.importorskip("av")
    assert load_video(data)[:, 8, 8].tolist() == [list(colour) for colour in colours]


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_animations_are_clips(kind):
    pytest.importorskip("av")
    frames = [Image.fromarray(RNG.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(3)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    assert len(load_video(data)) == 3
    assert len(load_video(data, num_frames=1)) == 1


def test_one_frame_of_a_format_of_clips_is_a_clip(tmp_path):
    assert load_video(write_clip(tmp_path / "clip.mp4", 1, codec="libx264")).shape[0] == 1
    assert load_video(encode(Image.new("RGB", (16, 16)), "GIF")).shape[0] == 1


@pytest.mark.parametrize("kind", sorted(_FORMATS - {"DIB", "GIF", "MPO", "TGA"}))
@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_picture_is_no_video(kind, as_bytes, tmp_path):
    pytest.importorskip("av")
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    path = tmp_path / f"frame.{ {'JPEG': 'jpg', 'JPEG2000': 'jp2'}.get(kind, kind.lower()) }"
    path.write_bytes(encode(Image.new("RGB", (64, 48)), kind))
    refuse_video(
        path.read_bytes() if as_bytes else path, r"is a picture; expected.*videos=\[\[frame"
    )


def test_arrays_and_lists_are_used_as_they_are(tmp_path):
    clip = RNG.integers(0, 256, (40, 5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(load_video(clip, num_frames=4), clip)
    np.testing.assert_array_equal(load_video(torch.from_numpy(clip), fps=1.0), clip)
    np.testing.assert_array_equal(load_video(clip[:, ::-1]), clip[:, ::-1])
    (tmp_path / "frame.png").write_bytes(PNG)
    mixed = [PICTURE, PNG, tmp_path / "frame.png", Image.fromarray(PICTURE)]
    np.testing.assert_array_equal(load_video(mixed), np.stack([PICTURE] * 4))
    np.testing.assert_array_equal(load_video(tuple(clip)), clip)


def refuse_video(source: object, match: str, **options: object) -> None:
    with pytest.raises(MediaError, match=match) as caught:
        load_video(source, **options)
    assert "expected" in str(caught.value) or "allowed" in str(caught.value)


def test_bad_video_sources(tmp_path):
    refuse_video(None, "NoneType")
    refuse_video("https://x/clip.mp4", "is a URL")
    refuse_video(tmp_path, "directory")
    refuse_video(tmp_path / "no.mp4", "No such file")
    refuse_video(b"", "empty")
    refuse_video([], "no frames")
    refuse_video(Image.fromarray(PICTURE), "PIL image")
    refuse_video(PICTURE, r"x\[None\]")
    refuse_video(np.zeros((0, 4, 4, 3), np.uint8), "no frames")
    refuse_video(np.zeros((2, 0, 4, 3), np.uint8), "0×4")
    refuse_video(np.zeros((2, 4, 4, 3), np.float32), "float32")
    refuse_video(np.zeros((2, 3, 4, 4), np.uint8), "channels-first")
    refuse_video([PICTURE, PICTURE[:4]], "frame 1 of a video is 4×7")
    refuse_video([PICTURE, None], "NoneType")


def test_bad_video_files(tmp_path, capfd):
    pytest.importorskip("av")
    clip = write_clip(tmp_path / "clip.mp4", 30, codec="libx264").read_bytes()
    refuse_video(b"not a video" * 100, "cannot be decoded")
    refuse_video(clip[: len(clip) // 2], "cannot be decoded")
    noise = bytearray(write_clip(tmp_path / "noise.mkv", 30).read_bytes())
    noise[len(noise) // 4 :] = RNG.bytes(len(noise) - len(noise) // 4)
    with contextlib.suppress(MediaError):
        assert load_video(bytes(noise)).shape[1:] == (48, 64, 3)
    sound = io.BytesIO()
    with wave.open(sound, "wb") as writer:
        writer.setparams((1, 2, 8000, 0, "NONE", ""))
        writer.writeframes(b"\0\0" * 8000)
    refuse_video(sound.getvalue(), "no video stream.*audio")
    refuse_video(write_clip(tmp_path / "none.avi", 0, codec="mpeg4"), "no frames|cannot|no video")
    assert capfd.readouterr() == ("", "")


def test_clips_are_closed_while_ffmpeg_logs(tmp_path):
    """Its threads want the GIL for each message, so the GIL must be free until they are done."""
    clip = bytearray(
        write_clip(
            tmp_path / "clip.ts", 16, codec="libx264", size=(240, 320), noise=True
        ).read_bytes()
    )
    for place in np.random.default_rng(0).integers(len(clip) // 4, len(clip), 400):
        clip[place] ^= 0x55
    (tmp_path / "clip.ts").write_bytes(clip)
    code = f"""
        import contextlib, logging, av, ovfast.media
        logging.getLogger("libav").setLevel(logging.CRITICAL)
        av.logging.set_level(av.logging.ERROR)
        for index in range(40):
            with contextlib.suppress(ovfast.MediaError):
                options = dict(num_frames=2, fps=1.0 if index % 2 else None)
                ovfast.media.load_video({str(tmp_path / "clip.ts")!r}, **options)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(run, check=True, timeout=60, cwd=Path(__file__).parents[1])


def test_a_playlist_opens_no_other_file(tmp_path, monkeypatch):
    pytest.importorskip("av")
    path = write_clip(tmp_path / "clip.mkv", 3)
    monkeypatch.chdir(tmp_path)
    refuse_video(b"ffconcat version 1.0\nfile clip.mkv\n", "cannot be decoded")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n"
    refuse_video(playlist.encode(), "cannot be decoded")


def test_video_limits(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", 20)
    size = path.stat().st_size
    for limits, match in [
        (MediaLimits(max_video_bytes=size - 1), "max_video_bytes"),
        (MediaLimits(max_stream_frames=19), "max_stream_frames"),
        (MediaLimits(max_video_frames=7), "max_video_frames"),
        (MediaLimits(max_frame_pixels=48 * 64 - 1), "max_frame_pixels"),
        (MediaLimits(max_video_pixels=8 * 48 * 64 - 1), "max_video_pixels"),
    ]:
        refuse_video(path, match, limits=limits, num_frames=8)
    exact = MediaLimits(
        max_video_bytes=size,
        max_stream_frames=20,
        max_video_frames=8,
        max_frame_pixels=48 * 64,
        max_video_pixels=8 * 48 * 64,
    )
    assert len(load_video(path, limits=exact, num_frames=8)) == 8
    clip = np.zeros((9, 4, 4, 3), np.uint8)
    refuse_video(clip, "max_video_frames", limits=MediaLimits(max_video_frames=8))
    refuse_video(list(clip), "max_video_frames", limits=MediaLimits(max_video_frames=8))
    refuse_video(list(clip), "max_video_pixels", limits=MediaLimits(max_video_pixels=143))
    refuse_video(clip, "max_frame_pixels", limits=MediaLimits(max_frame_pixels=15))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_frame_of_a_file_is_within_the_limit(index, tmp_path):
    """Frames 0 and 2 go on; frame 1 is only decoded on the way."""
    limits = MediaLimits(max_frame_pixels=64 * 64)
    sizes = [(64, 64)] * 3
    assert load_video(write_jpegs(tmp_path / "clip.avi", sizes), num_frames=2).shape[0] == 2
    sizes[index] = (64, 80)
    path = write_jpegs(tmp_path / "clip.avi", sizes)
    refuse_video(path, "64×80.*max_frame_pixels", limits=limits, num_frames=2)
    assert load_video(path, num_frames=2, limits=MediaLimits(max_frame_pixels=10**15)).shape[0] == 2
    # Far beyond the limit a frame is not even decoded.
    sizes[index] = (4200, 4200)
    path = write_jpegs(tmp_path / "clip.avi", sizes)
    refuse_video(path, "cannot be decoded.*4096 pixels", limits=limits, num_frames=2)


def test_a_frame_of_another_size_is_resized_to_the_first(tmp_path):
    path = write_jpegs(tmp_path / "clip.avi", [(64, 64), (32, 48), (96, 16)])
    assert load_video(path).shape == (3, 64, 64, 3)


def test_without_pyav_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mkv", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    refuse_video(path, "pip install av")
    assert load_video([PICTURE]).shape == (1, 5, 7, 3)


def test_no_file_descriptor_leaks(tmp_path):
    clip = write_clip(tmp_path / "clip.mkv", 3)
    path, cut = tmp_path / "picture.png", tmp_path / "cut.png"
    path.write_bytes(PNG)
    cut.write_bytes(PNG[:60])
    broken = tmp_path / "broken.mkv"
    broken.write_bytes(clip.read_bytes()[:300])

    def attempt(load, source) -> None:
        try:
            load(source)
        except MediaError:
            assert source in (cut, broken)

    def round_of_loads() -> None:
        for load, source in [
            (load_image, path),
            (load_image, cut),
            (load_video, clip),
            (load_video, broken),
        ]:
            attempt(load, source)

    round_of_loads()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        round_of_loads()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_one_open_picture_several_times(kind):
    """Its decoder is one: threads that share it read garbage."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(
        buffer, kind
    )
    expected = load_image(buffer.getvalue())
    for _ in range(5):
        opened = Image.open(io.BytesIO(buffer.getvalue()))
        with decoding([opened, opened, opened], limits=MediaLimits(), exif=True) as pictures:
            assert all(np.array_equal(picture, expected) for picture in pictures)
