"""AnyRes geometry against upstream's numbers, upstream's code and its own invariants."""

import dataclasses
import math
import random

import numpy as np
import pytest

from ovfast.anyres import VisualGeometry, VisualOptions, VisualPlan, plan_image, plan_video
from ovfast.errors import ConfigError, MediaError, OptionError

PINPOINTS = tuple((384 * rows, 384 * cols) for rows in range(1, 7) for cols in range(1, 7))
GEOMETRY = VisualGeometry(384, 14, PINPOINTS, 9)
PAPER = VisualOptions()
ORIG = VisualOptions(unpad_rounding="orig")

# Counted by upstream's own code (original rounding); every pair is height x width.
VECTORS = """
size         canvas     grid views resized offset map unpadded final tokens
336x336      384x384    1x1 2   384x384    0x0    27x27    27x27    27x27   1485
384x384      384x384    1x1 2   384x384    0x0    27x27    27x27    27x27   1485
384x385      384x768    1x2 3   384x385    0x191  27x54    27x28    27x28   1512
375x500      384x768    1x2 3   384x512    0x128  27x54    27x36    27x36   1728
480x640      768x768    2x2 5   576x768    96x0   54x54    40x54    40x54   2929
640x480      768x768    2x2 5   768x576    0x96   54x54    54x40    54x40   2943
600x800      768x1152   2x3 7   768x1024   0x64   54x81    54x73    54x73   4725
750x1000     768x1152   2x3 7   768x1024   0x64   54x81    54x73    54x73   4725
768x1024     768x1152   2x3 7   768x1024   0x64   54x81    54x73    54x73   4725
1024x768     1152x768   3x2 7   1024x768   64x0   81x54    73x54    73x54   4744
1024x1024    1152x1152  3x3 10  1152x1152  0x0    81x81    81x81    81x81   7371
899x1024     1152x1152  3x3 10  1012x1152  70x0   81x81    71x81    71x81   6551
720x1280     768x1536   2x4 9   768x1366   0x85   54x108   54x96    54x96   5967
1080x1920    1152x1920  3x5 16  1080x1920  36x0   81x135   75x135   60x108  7269
1920x1080    1920x1152  5x3 16  1920x1080  0x36   135x81   135x75   108x60  7317
1920x480     1920x768   5x2 11  1920x480   0x144  135x54   135x34   135x34  5454
1536x2048    1536x2304  4x6 25  1536x2048  0x128  108x162  108x144  70x93   7309
3000x4000    1920x2304  5x6 31  1728x2304  96x0   135x162  121x162  70x93   7309
4000x3000    2304x1920  6x5 31  2304x1728  0x96   162x135  162x121  93x70   7332
2160x3840    1536x2304  4x6 25  1296x2304  120x0  108x162  92x162   61x107  7317
2304x2304    2304x2304  6x6 37  2304x2304  0x0    162x162  162x162  81x81   7371
10000x10000  2304x2304  6x6 37  2304x2304  0x0    162x162  162x162  81x81   7371
1153x945     1536x1152  4x3 13  1406x1152  65x0   108x81   98x81    98x81   8765
944x1153     1152x1536  3x4 13  1152x1408  0x64   81x108   81x98    81x98   8748
1x1          384x384    1x1 2   384x384    0x0    27x27    27x27    27x27   1485
7x3          384x384    1x1 2   384x165    0x109  27x27    27x11    27x11   1053
5000x1       384x384    1x1 2   384x1      0x191  27x27    27x1     27x1    783
1x5000       384x384    1x1 2   1x384      191x0  27x27    1x27     1x27    757
100x5000     384x2304   1x6 7   47x2304    168x0  27x162   3x162    3x162   1218
5000x100     2304x384   6x1 7   2304x47    0x168  162x27   162x3    162x3   1377
641x481      768x768    2x2 5   768x577    0x95   54x54    54x40    54x40   2943
701x700      768x768    2x2 5   768x767    0x0    54x54    54x54    54x54   3699
224x224      384x384    1x1 2   384x384    0x0    27x27    27x27    27x27   1485
1872x1456    1920x1536  5x4 21  1920x1494  0x21   135x108  135x104  92x71   7353
1872x832     1920x1152  5x3 16  1920x854   0x149  135x81   135x59   122x53  7317
1584x1232    1920x1536  5x4 21  1920x1494  0x21   135x108  135x104  92x71   7353
1568x1323    1920x1536  5x4 21  1821x1536  49x0   135x108  127x108  87x74   7254
423x188      768x384    2x1 3   768x342    0x21   54x27    54x23    54x23   2025
1729x741     1920x768   5x2 11  1792x768   64x0   135x54   125x54   125x54  7604
624x1872     768x1920   2x5 11  640x1920   64x0   54x135   44x135   44x135  6713
"""
# Sizes whose unpadded side is a whole number that floating point misses: (original, HF) tokens.
ROUNDINGS = [
    ((1872, 832), 7317, 7329),
    ((832, 1872), 7248, 7263),
    ((1584, 1232), 7353, 7281),
    ((1232, 1584), 7332, 7261),
    ((1568, 1323), 7254, 7329),
    ((1323, 1568), 7241, 7315),
    ((1872, 1456), 7353, 7281),
    ((1456, 1872), 7332, 7261),
    ((423, 188), 2025, 2133),
    ((1729, 741), 7604, 7714),
    ((624, 1872), 6713, 6985),
]


def plan(
    size_hw: tuple[int, int], options: VisualOptions = PAPER, num_images: int = 1
) -> VisualPlan:
    return plan_image(size_hw, GEOMETRY, options, num_images=num_images)


def pair(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


@pytest.mark.parametrize("line", VECTORS.strip().splitlines()[1:], ids=lambda line: line.split()[0])
def test_conformance_vectors(line: str) -> None:
    size, canvas, grid, views, resized, offset, full, unpadded, final, tokens = line.split()
    p = plan(pair(size), ORIG)
    assert (p.size_hw, p.canvas_hw, p.grid_hw) == (pair(size), pair(canvas), pair(grid))
    assert (p.resized_hw, p.offset_hw) == (pair(resized), pair(offset))
    assert (p.map_hw, p.kept_hw, p.final_hw) == (pair(full), pair(unpadded), pair(final))
    assert (p.num_views, p.num_tokens) == (int(views), int(tokens))


@pytest.mark.parametrize(("size_hw", "orig_tokens", "hf_tokens"), ROUNDINGS)
def test_unpad_roundings(size_hw: tuple[int, int], orig_tokens: int, hf_tokens: int) -> None:
    assert plan(size_hw, ORIG).num_tokens == orig_tokens
    assert plan(size_hw, PAPER).num_tokens == hf_tokens


def test_largest_token_count_is_8765() -> None:
    """Every reachable unpadded map: one side full, the other of the parity of its full side."""
    counts = set()
    for full in range(1, 7):
        for other in range(1, 7):
            for n in range(27 * (other - 1), 27 * other + 1):
                kept = n + (27 * other - n) % 2
                for height, width in ((27 * full, kept), (kept, 27 * full)):
                    ratio = math.sqrt(height * width / (9 * 729))
                    if ratio > 1.1:
                        height, width = int(height // ratio), int(width // ratio)
                    counts.add(729 + height * (width + 1))
    assert sorted(counts)[-4:] == [8721, 8748, 8759, 8765]
    assert plan((1153, 945)).num_tokens == 8765
    rng = random.Random(0)
    for _ in range(5000):
        size_hw = (int(2 ** rng.uniform(0, 13)), int(2 ** rng.uniform(0, 13)))
        assert plan(size_hw).num_tokens in counts


def hf_tokens(processor_class: type, size_hw: tuple[int, int], anyres_max: int) -> int:
    """The count of transformers' processor, called without building tokenizers and the like."""

    class ImageProcessor:
        image_grid_pinpoints = [list(pinpoint) for pinpoint in PINPOINTS]  # noqa: RUF012

    processor = object.__new__(processor_class)
    processor.image_processor = ImageProcessor()
    processor.num_image_tokens = 729
    processor.vision_aspect_ratio = f"anyres_max_{anyres_max}"
    return processor._get_number_of_features(*size_hw, 384, 384)


@pytest.mark.parametrize("anyres_max", [1, 4, 9, 16])
def test_counts_as_transformers(anyres_max: int) -> None:
    llava = pytest.importorskip("transformers.models.llava_onevision.processing_llava_onevision")
    rng = random.Random(anyres_max)
    options = VisualOptions(anyres_max=anyres_max)
    for _ in range(500):
        size_hw = (int(2 ** rng.uniform(0, 13)), int(2 ** rng.uniform(0, 13)))
        expected = hf_tokens(llava.LlavaOnevisionProcessor, size_hw, anyres_max)
        assert plan(size_hw, options).num_tokens == expected, size_hw


def test_rounding_differs_rarely() -> None:
    rng = random.Random(1)
    sizes = [(rng.randint(1, 3000), rng.randint(1, 3000)) for _ in range(10_000)]
    differ = [s for s in sizes if plan(s, ORIG).num_tokens != plan(s, PAPER).num_tokens]
    assert len(differ) <= 5  # 13 of 400 000 upstream; more means a wrong rounding


def test_order_of_pinpoints_decides_only_exact_ties() -> None:
    swapped = tuple(sorted(PINPOINTS, key=lambda hw: (hw[1], hw[0])))
    other = dataclasses.replace(GEOMETRY, grid_pinpoints_hw=swapped)
    rng = random.Random(2)
    for _ in range(3000):
        size_hw = (rng.randint(1, 4000), rng.randint(1, 4000))
        assert plan(size_hw) == plan_image(size_hw, other, PAPER, num_images=1)


def test_first_of_two_equal_pinpoints_wins() -> None:
    # A 100 × 100 picture fits both equally well, with the same waste.
    for pinpoints in [((384, 768), (768, 384)), ((768, 384), (384, 768))]:
        geometry = VisualGeometry(384, 14, pinpoints, 9)
        assert plan_image((100, 100), geometry, PAPER, num_images=1).canvas_hw == pinpoints[0]


def test_policies_count_pictures() -> None:
    size_hw = (480, 640)
    assert plan(size_hw, PAPER, 1).num_tokens == 2929
    square = plan(size_hw, PAPER, 2)
    assert (square.kind, square.num_views, square.num_tokens, square.fill) == (
        "square",
        1,
        730,
        127,
    )
    assert (square.canvas_hw, square.resized_hw, square.offset_hw) == ((640, 640), size_hw, (80, 0))
    assert square.num_newlines == 1
    lmms_eval = VisualOptions(token_policy="lmms_eval")
    assert plan(size_hw, lmms_eval, 1) == plan(size_hw)
    plain = plan(size_hw, lmms_eval, 2)
    assert (plain.num_tokens, plain.num_newlines, plain.newline) == (729, 0, False)
    assert plan(size_hw, VisualOptions(token_policy="anyres"), 5) == plan(size_hw)


@pytest.mark.parametrize("max_views", range(1, 39))
def test_max_views_takes_the_best_grid_within_the_bound(max_views: int) -> None:
    bounded = VisualOptions(max_views=max_views)
    allowed = tuple(p for p in PINPOINTS if p[0] * p[1] // 384**2 + 1 <= max_views)
    for size_hw in [(480, 640), (3000, 4000), (5000, 100), (1, 1), (2304, 2304)]:
        got = plan(size_hw, bounded)
        assert got.num_views <= max_views
        if max_views == 1:
            assert (got.num_views, got.num_tokens, got.num_newlines) == (1, 730, 1)
            assert not got.has_crops
        else:
            geometry = dataclasses.replace(GEOMETRY, grid_pinpoints_hw=allowed)
            assert got == plan_image(size_hw, geometry, PAPER, num_images=1)


def test_no_pinpoint_within_the_bound_leaves_the_base_view() -> None:
    geometry = VisualGeometry(384, 14, ((768, 768),), 9)
    got = plan_image((500, 500), geometry, VisualOptions(max_views=4), num_images=1)
    assert (got.num_views, got.num_tokens) == (1, 730)


def test_anyres_max_of_options_goes_before_the_checkpoint() -> None:
    size_hw = (2304, 2304)
    assert plan(size_hw).final_hw == (81, 81)
    assert plan(size_hw, VisualOptions(anyres_max=4)).final_hw == (54, 54)
    assert plan(size_hw, VisualOptions(anyres_max=100)).final_hw == (162, 162)
    unlimited = VisualGeometry(384, 14, PINPOINTS, None)
    assert plan_image(size_hw, unlimited, PAPER, num_images=1).num_tokens == 729 + 162 * 163
    options = VisualOptions(anyres_max=9)
    assert plan_image(size_hw, unlimited, options, num_images=1) == plan(size_hw)


def test_video() -> None:
    video = plan_video(32, (720, 1280), GEOMETRY, PAPER)
    assert (video.kind, video.num_views, video.num_tokens) == ("video", 32, 6273)
    assert (video.final_hw, video.resized_hw, video.num_newlines) == ((14, 14), (384, 384), 1)
    assert plan_video(1, (1, 1), GEOMETRY, PAPER).num_tokens == 197
    even = VisualGeometry(56, 14, ((56, 56),), 9)
    assert plan_video(3, (50, 50), even, PAPER).num_tokens == 3 * 4 + 1


TOWERS = [(56, 14), (32, 8), (28, 14), (14, 14), (30, 7), (384, 14)]


@pytest.mark.parametrize(("image_size", "patch_size"), TOWERS)
def test_invariants_over_towers_and_extreme_sizes(image_size: int, patch_size: int) -> None:
    pinpoints = tuple((image_size * r, image_size * c) for r in range(1, 7) for c in range(1, 7))
    rng = random.Random(image_size)
    sizes = [(1, 5000), (5000, 1), (1, 1), (1, 100_000), (99_999, 2), (6000, 6000)]
    sizes += [(int(2 ** rng.uniform(0, 13)), int(2 ** rng.uniform(0, 13))) for _ in range(150)]
    for anyres_max in (None, 1, 9):
        geometry = VisualGeometry(image_size, patch_size, pinpoints, anyres_max)
        for size_hw in sizes:
            check_invariants(plan_image(size_hw, geometry, PAPER, num_images=1), geometry)


def check_invariants(p: VisualPlan, geometry: VisualGeometry) -> None:
    rows, cols = p.grid_hw
    view, side = geometry.image_size, geometry.grid_side
    assert p.canvas_hw in geometry.grid_pinpoints_hw
    assert p.canvas_hw == (rows * view, cols * view)
    assert p.map_hw == (rows * side, cols * side)
    assert p.num_views == rows * cols + 1
    for resized, offset, canvas in zip(p.resized_hw, p.offset_hw, p.canvas_hw, strict=True):
        assert 1 <= resized <= canvas
        assert offset == (canvas - resized) // 2
    assert p.canvas_hw[0] == p.resized_hw[0] or p.canvas_hw[1] == p.resized_hw[1]
    for final, kept, full in zip(p.final_hw, p.kept_hw, p.map_hw, strict=True):
        assert final <= kept <= full
        assert final >= 1 or kept == 0
    assert p.num_newlines == p.final_hw[0]
    assert p.num_tokens == side**2 + p.final_hw[0] * (p.final_hw[1] + 1)
    assert len(p.table.index) == p.num_tokens


def test_thin_map_keeps_a_row_where_upstream_would_divide_to_zero() -> None:
    geometry = VisualGeometry(24, 8, ((24, 144),), 1)
    p = plan_image((1, 144), geometry, PAPER, num_images=1)
    assert (p.kept_hw, p.final_hw) == ((1, 18), (1, 12))


def test_even_maps_may_be_unpadded_to_nothing() -> None:
    """As upstream: no map row at all, or rows of nothing but their newline."""
    geometry = VisualGeometry(32, 8, ((32, 32),), 9)
    wide = plan_image((1, 5000), geometry, PAPER, num_images=1)
    tall = plan_image((5000, 1), geometry, PAPER, num_images=1)
    assert (wide.final_hw, wide.num_tokens) == ((0, 4), 16)
    assert (tall.final_hw, tall.num_tokens) == ((4, 0), 16 + 4)
    assert (tall.table.index[16:] == -1).all()


def test_plans_and_tables_are_shared() -> None:
    assert plan((777, 1111)) is plan((777, 1111))
    assert plan((768, 1024)).table is plan((600, 800)).table


@pytest.mark.parametrize(
    "bad",
    [
        {"token_policy": "llava"},
        {"token_policy": None},
        {"token_policy": ["paper"]},
        {"unpad_rounding": "HF"},
        {"anyres_max": 0},
        {"anyres_max": True},
        {"anyres_max": 9.0},
        {"max_views": 0},
        {"max_views": -1},
        {"max_views": "2"},
        {"max_views": False},
        {"num_frames": 0},
        {"num_frames": None},
        {"num_frames": 1.5},
        {"fps": 0},
        {"fps": -1.0},
        {"fps": math.nan},
        {"fps": math.inf},
        {"fps": True},
        {"fps": "1"},
        {"exif": 1},
        {"exif": None},
    ],
    ids=str,
)
def test_bad_options_are_refused(bad: dict) -> None:
    (name,) = bad
    with pytest.raises(OptionError, match=f"^{name}=.*expected") as caught:
        VisualOptions(**bad)
    assert isinstance(caught.value, ValueError)


def test_good_options() -> None:
    assert VisualOptions(fps=1).fps == 1
    assert VisualOptions(anyres_max=10**6, max_views=1, num_frames=1, fps=0.5, exif=False)
    with pytest.raises(TypeError):
        VisualOptions(max_crops=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("size_hw", [(0, 5), (5, 0), (-1, 5), (1.0, 5), (True, 5), (5,), 5, "55"])
def test_bad_sizes_are_refused(size_hw: object) -> None:
    with pytest.raises(MediaError, match="expected"):
        plan_image(size_hw, GEOMETRY, PAPER, num_images=1)  # type: ignore[arg-type]
    with pytest.raises(MediaError, match="expected"):
        plan_video(2, size_hw, GEOMETRY, PAPER)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_frames", [0, -1, 2.0, True, None])
def test_bad_frame_counts_are_refused(num_frames: object) -> None:
    with pytest.raises(MediaError, match="expected at least 1 frame"):
        plan_video(num_frames, (5, 5), GEOMETRY, PAPER)  # type: ignore[arg-type]


def test_numpy_sizes_become_python_integers() -> None:
    got = plan((np.int64(480), np.int32(640)))
    assert got == plan((480, 640))
    assert {type(side) for side in got.size_hw} == {int}


@pytest.mark.parametrize(
    "bad",
    [
        {"patch_size": 0},
        {"patch_size": 385},
        {"grid_pinpoints_hw": ((384, 400),)},
        {"grid_pinpoints_hw": ((0, 384),)},
        {"anyres_max": 0},
    ],
    ids=str,
)
def test_bad_geometry_is_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match="expected"):
        dataclasses.replace(GEOMETRY, **bad)
