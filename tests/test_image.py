"""Views byte for byte against Pillow used as upstream uses it, and against upstream's hashes."""

import hashlib
import math
import random
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image

from ovfast import image as image_module
from ovfast.anyres import VisualGeometry, VisualOptions, VisualPlan, plan_image, plan_video
from ovfast.errors import MediaError
from ovfast.image import build_video_views, build_views, resize

GEOMETRY = VisualGeometry(
    384, 14, tuple((384 * rows, 384 * cols) for rows in range(1, 7) for cols in range(1, 7)), 9
)
SMALL = VisualGeometry(
    56, 14, tuple((56 * rows, 56 * cols) for rows in range(1, 7) for cols in range(1, 7)), 9
)
PAPER = VisualOptions()
# SHA-256 (first 16 digits) of upstream's bytes for the synthetic picture, made with Pillow 13:
# height, width, views, picture, base view, all crops, multi-image square.
HASHES = [
    (336, 336, 2, "d8e40da37b36772f", "ec5d0d58e465fc10", "ec5d0d58e465fc10", "ec5d0d58e465fc10"),
    (480, 640, 5, "83e6a4cadcc85c5c", "33c819b668a3c359", "a08aed7bbb60db27", "02a307f68f357190"),
    (641, 481, 5, "4fdd4f349f687305", "11984e0727ba3d1d", "46ebb3dfce985046", "fbb34c3b45ba89ab"),
    (701, 700, 5, "cd71bcb9054da2dc", "d538247e1b17ce9e", "0c0205d8cb8bc7ee", "e8a6e7b274b1d982"),
    (899, 1024, 10, "b3d34a4c1aa17d88", "85a4e4cbc188bb92", "5369c42fa4002824", "1a96255ffbc9c35b"),
    (
        1080,
        1920,
        16,
        "8a1f5e43f2c7c079",
        "0f5c045eb59ecf6f",
        "924bdf12a9e69055",
        "bc3b20a823bd4c7a",
    ),
    (100, 5000, 7, "046351116c43e366", "dba75603e77aba54", "feafe8c253ca386c", "3d0c2c229f7888d7"),
]
PILLOW = tuple(int(part) for part in version("pillow").split(".")[:2])
needs_pillow_13 = pytest.mark.skipif(
    PILLOW < (13, 0), reason="the hashes need the pass order of Pillow 13"
)


def synthetic(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([7 * x + 3 * y, 5 * x + 11 * y, x * y], axis=2).astype(np.uint8)


def noise(size_hw: tuple[int, int], seed: int) -> np.ndarray:
    """Cheap noise with large-scale structure: one random tile, repeated and shifted by address."""
    height, width = size_hw
    tile = np.random.default_rng(seed).integers(0, 256, (61, 67, 3), np.uint8)
    repeated = np.tile(tile, (math.ceil(height / 61), math.ceil(width / 67), 1))[:height, :width]
    return repeated + np.arange(width, dtype=np.uint32)[None, :, None].astype(np.uint8) // 3


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def as_upstream(image: np.ndarray, plan: VisualPlan) -> list[Image.Image]:
    """As LLaVA-NeXT process_anyres_image and expand2square: paste on a canvas, then crop."""
    picture = Image.fromarray(image)
    side = plan.image_size
    if plan.kind == "square":
        longest = max(picture.size)
        canvas = Image.new("RGB", (longest, longest), (127, 127, 127))
        left, top = (longest - picture.width) // 2, (longest - picture.height) // 2
        canvas.paste(picture, (left, top))
        return [canvas.resize((side, side))]
    views = [picture.resize((side, side))]
    canvas_h, canvas_w = plan.canvas_hw
    scale_w, scale_h = canvas_w / picture.width, canvas_h / picture.height
    if scale_w < scale_h:
        size = (canvas_w, min(math.ceil(picture.height * scale_w), canvas_h))
    else:
        size = (min(math.ceil(picture.width * scale_h), canvas_w), canvas_h)
    canvas = Image.new("RGB", (canvas_w, canvas_h), (0, 0, 0))
    canvas.paste(picture.resize(size), ((canvas_w - size[0]) // 2, (canvas_h - size[1]) // 2))
    for top in range(0, canvas_h, side):
        lefts = range(0, canvas_w, side)
        views += [canvas.crop((left, top, left + side, top + side)) for left in lefts]
    return views


def check(image: np.ndarray, plan: VisualPlan) -> None:
    expected = as_upstream(image, plan)
    got = build_views(image, plan)
    assert len(got) == len(expected) == plan.num_views
    for number, view in enumerate(expected):
        assert got[number].tobytes() == view.tobytes(), (plan.size_hw, number)


@needs_pillow_13
@pytest.mark.parametrize("row", HASHES, ids=lambda row: f"{row[0]}x{row[1]}")
def test_hashes_of_upstream(row: tuple) -> None:
    height, width, num_views, source, base, crops, square = row
    image = synthetic(height, width)
    assert digest(image) == source
    views = build_views(image, plan_image((height, width), GEOMETRY, PAPER, num_images=1))
    assert (len(views), digest(views[0]), digest(views[1:])) == (num_views, base, crops)
    plan = plan_image((height, width), GEOMETRY, PAPER, num_images=2)
    assert digest(build_views(image, plan)) == square
    video = plan_video(1, (height, width), GEOMETRY, PAPER)
    assert digest(build_video_views(image[None], video)) == base


def log_uniform_sizes(number: int, most_pixels: float) -> list[tuple[int, int]]:
    """Sides from 1 to 6000; the area is bounded, because Pillow's time grows with it."""
    rng = random.Random(410)
    sizes: list[tuple[int, int]] = []
    while len(sizes) < number:
        height, width = (round(6000 ** rng.random()) for _ in range(2))
        if height * width <= most_pixels:
            sizes.append((height, width))
    return sizes


def test_views_as_pillow_for_200_sizes() -> None:
    sizes = log_uniform_sizes(200, most_pixels=5e6)
    assert {1} & {side for size in sizes for side in size}
    assert max(max(size) for size in sizes) > 4000
    for seed, size_hw in enumerate(sizes):
        image = noise(size_hw, seed)
        # The full tower for a share of the sizes: large canvases are most of the time.
        geometry = GEOMETRY if seed % 2 == 0 else SMALL
        check(image, plan_image(size_hw, geometry, PAPER, num_images=1))
        if max(size_hw) <= 2500 or seed % 8 == 0:
            check(image, plan_image(size_hw, geometry, PAPER, num_images=2))


@pytest.mark.slow
def test_views_as_pillow_for_large_pictures() -> None:
    for seed, size_hw in enumerate([(6000, 6000), (6000, 3000), (2999, 6000), (1, 6000)]):
        for num_images in (1, 2):
            plan = plan_image(size_hw, GEOMETRY, PAPER, num_images=num_images)
            check(noise(size_hw, seed), plan)


@pytest.mark.parametrize("size_hw", [(1, 3), (3, 1), (1, 1), (2, 901), (901, 2), (640, 640)])
def test_squares_of_thin_pictures(size_hw: tuple[int, int]) -> None:
    check(noise(size_hw, 5), plan_image(size_hw, GEOMETRY, PAPER, num_images=3))


def test_square_in_strips_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for size_hw in [(700, 130), (130, 700), (300, 300)]:
        image = noise(size_hw, 1)
        plan = plan_image(size_hw, SMALL, PAPER, num_images=2)
        whole = build_views(image, plan)
        monkeypatch.setattr(image_module, "STRIP_PIXELS", 1)  # strips of one row
        assert np.array_equal(build_views(image, plan), whole)
        monkeypatch.undo()


def test_too_long_square_is_refused() -> None:
    image = np.zeros((1, (1 << 20) + 1, 3), np.uint8)
    plan = plan_image(image.shape[:2], SMALL, PAPER, num_images=2)
    with pytest.raises(MediaError, match="at most 1048576"):
        build_views(image, plan)


def test_padding_is_black_around_the_picture_and_gray_in_squares() -> None:
    image = np.full((480, 640, 3), 200, np.uint8)
    views = build_views(image, plan_image((480, 640), GEOMETRY, PAPER, num_images=1))
    assert (views[1:3, :96] == 0).all()  # 768 × 576 at row 96 of 768 × 768
    assert (views[3:5, 288:] == 0).all()
    assert (views[1:3, 96:] == 200).all()
    assert (views[3:5, :288] == 200).all()
    square = build_views(image, plan_image((480, 640), GEOMETRY, PAPER, num_images=2))[0]
    assert (square[:40] == 127).all()
    assert (square[52:332] == 200).all()


def test_base_view_alone() -> None:
    image = noise((300, 500), 0)
    plan = plan_image((300, 500), GEOMETRY, VisualOptions(max_views=1), num_images=1)
    views = build_views(image, plan)
    assert views.shape == (1, 384, 384, 3)
    assert np.array_equal(views[0], resize(image, (384, 384)))


def test_resize_of_equal_size_is_the_input() -> None:
    image = noise((10, 12), 0)
    assert resize(image, (10, 12)) is image


def test_out_and_pack_are_used() -> None:
    image = noise((480, 640), 0)
    plan = plan_image((480, 640), GEOMETRY, PAPER, num_images=1)
    buffer = np.full((7, 384, 384, 3), 9, np.uint8)
    out = buffer[1:6]
    assert build_views(image, plan, out) is out
    assert np.array_equal(out, build_views(image, plan))
    assert (buffer[0] == 9).all()
    assert (buffer[6] == 9).all()
    calls = []

    def pack(resized, offset_hw, grid_hw, fill, crops) -> None:
        calls.append((resized.shape, offset_hw, grid_hw, fill, crops.shape))

    build_views(image, plan, out, pack=pack)
    assert calls == [((576, 768, 3), (96, 0), (2, 2), 0, (4, 384, 384, 3))]


def test_views_of_a_strided_picture() -> None:
    image = noise((200, 150), 0)
    turned = image.transpose(1, 0, 2)[::-1]
    plan = plan_image((150, 200), SMALL, PAPER, num_images=1)
    expected = build_views(np.ascontiguousarray(turned), plan)
    assert np.array_equal(build_views(turned, plan), expected)


def test_video_frames_are_squashed_in_order() -> None:
    frames = np.stack([noise((90, 160), seed) for seed in range(3)])
    views = build_video_views(frames, plan_video(3, (90, 160), GEOMETRY, PAPER))
    for frame, view in zip(frames, views, strict=True):
        assert view.tobytes() == Image.fromarray(frame).resize((384, 384)).tobytes()


def test_pictures_that_the_plan_was_not_made_for_are_refused() -> None:
    plan = plan_image((480, 640), GEOMETRY, PAPER, num_images=1)
    with pytest.raises(MediaError, match=r"shape \(640, 480, 3\).*expected"):
        build_views(np.zeros((640, 480, 3), np.uint8), plan)
    with pytest.raises(MediaError, match="dtype float32"):
        build_views(np.zeros((480, 640, 3), np.float32), plan)
    video = plan_video(2, (480, 640), GEOMETRY, PAPER)
    with pytest.raises(MediaError, match="build_video_views"):
        build_views(np.zeros((480, 640, 3), np.uint8), video)
    with pytest.raises(MediaError, match="3 frames"):
        build_video_views(np.zeros((3, 480, 640, 3), np.uint8), video)
    with pytest.raises(MediaError, match="plan_video"):
        build_video_views(np.zeros((1, 480, 640, 3), np.uint8), plan)
