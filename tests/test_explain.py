"""Explanations: their numbers against the plan, their drawings pixel for pixel where it counts."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovfast import explain_draw as drawing
from ovfast.anyres import VisualGeometry, VisualOptions, VisualPlan, plan_image, plan_video
from ovfast.explain import as_dict, explain_image, explain_png, explain_text

GEOMETRY = VisualGeometry(
    384, 14, tuple((384 * rows, 384 * cols) for rows in range(1, 7) for cols in range(1, 7)), 9
)
TINY = VisualGeometry(
    56, 14, tuple((56 * rows, 56 * cols) for rows in range(1, 4) for cols in range(1, 4)), 9
)
OPTIONS = VisualOptions()
RED = (200, 30, 30)


def red(size_hw: tuple[int, int]) -> np.ndarray:
    return np.broadcast_to(np.array(RED, np.uint8), (*size_hw, 3)).copy()


def plan(size_hw: tuple[int, int], options: VisualOptions = OPTIONS) -> VisualPlan:
    return plan_image(size_hw, GEOMETRY, options, num_images=1)


def colors(pixels: np.ndarray) -> set[tuple[int, ...]]:
    packed = pixels.reshape(-1, 3).astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    distinct = np.flatnonzero(np.bincount(packed, minlength=1 << 24)).tolist()
    return {(value >> 16, value >> 8 & 255, value & 255) for value in distinct}


def share(pixels: np.ndarray, color: tuple[int, int, int]) -> float:
    return float((pixels == np.array(color)).all(axis=-1).mean())


HATCHING = {drawing.HATCH_LIGHT, drawing.HATCH_DARK}


def test_padding_is_hatched_and_the_picture_is_not() -> None:
    """480 × 640 lies in rows 96 to 672 of 768 × 768: 48 to 336 at half size."""
    canvas = np.asarray(drawing.canvas_picture(red((480, 640)), plan((480, 640)), (600, 384)))
    assert canvas.shape == (384, 384, 3)
    assert colors(canvas[:48]) == HATCHING
    assert colors(canvas[336:]) == HATCHING
    assert colors(canvas[48:336]) == {RED}
    assert 0.15 < share(canvas[:48], drawing.HATCH_DARK) < 0.3


def test_side_padding_is_hatched() -> None:
    """640 × 480 lies in columns 96 to 672 of 768 × 768."""
    canvas = np.asarray(drawing.canvas_picture(red((640, 480)), plan((640, 480)), (600, 384)))
    assert colors(canvas[:, :48]) == colors(canvas[:, 336:]) == HATCHING
    assert colors(canvas[:, 48:336]) == {RED}


def test_grid_lines_and_numbers_are_drawn() -> None:
    p = plan((480, 640))
    picture = red((480, 640))
    bare = np.asarray(drawing.canvas_picture(picture, p, (384, 384)))
    marked = np.asarray(drawing.draw_canvas(picture, p, (384, 384)))
    for line in (marked[0], marked[191], marked[192], marked[:, 191], marked[:, 383]):
        assert share(line, drawing.GRID) == 1
    # One number in the upper left corner of each of the four views, nothing else between lines.
    changed = (bare != marked).any(axis=-1)
    for top, left in ((0, 0), (0, 192), (192, 0), (192, 192)):
        view = marked[top + 2 : top + 190, left + 2 : left + 190]
        assert share(view[:60, :60], drawing.INK) > 0.05
        assert not changed[top + 60 : top + 190, left + 60 : left + 190].any()
    numbers = {marked[t : t + 60, c : c + 60].tobytes() for t in (2, 194) for c in (2, 194)}
    assert len(numbers) == 4


def test_map_shows_newlines_and_dropped_tokens() -> None:
    """40 of 54 map rows are kept, and each of them has a newline; a shrunk map has both too."""
    whole, final = map(np.asarray, drawing._token_maps(red((480, 640)), plan((480, 640))))
    dropped = 7 * len(whole) // 54
    assert colors(whole[:dropped]) == HATCHING
    assert colors(whole[-dropped:]) == HATCHING
    assert RED in colors(whole[dropped:-dropped])
    assert not colors(whole[dropped + 2 : -dropped - 2]) & HATCHING
    assert share(final[:, -1], drawing.NEWLINE) == 1
    assert share(final, drawing.NEWLINE) < 0.05
    square = plan_image((480, 640), GEOMETRY, OPTIONS, num_images=2)
    _, final = map(np.asarray, drawing._token_maps(red((480, 640)), square))
    assert 0 < share(final[:, -1], drawing.NEWLINE) < 0.1


def test_bar_is_as_long_as_its_parts() -> None:
    p = plan((480, 640))
    page = np.asarray(explain_image(red((480, 640)), p, GEOMETRY, OPTIONS))
    row = max(range(len(page)), key=lambda y: share(page[y], drawing.BASE))
    assert share(page[row], drawing.BASE) * 1480 == pytest.approx(1400 * 729 / 2929, abs=2)
    assert share(page[row], drawing.MAP) * 1480 == pytest.approx(1400 * 2160 / 2929, abs=2)
    assert share(page[row], drawing.NEWLINE) * 1480 == pytest.approx(1400 * 40 / 2929, abs=2)


def test_nothing_reaches_the_margins() -> None:
    """Whatever the shape, the outer 20 pixels stay blank: no text is cut."""
    cases = [((480, 640), GEOMETRY), ((81, 60), TINY), ((100, 5000), GEOMETRY), ((5000, 1), TINY)]
    for size_hw, geometry in cases:
        for options in (OPTIONS, VisualOptions(max_views=4, anyres_max=123_456)):
            p = plan_image(size_hw, geometry, options, num_images=1)
            page = np.asarray(explain_image(red(size_hw), p, geometry, options))
            edges = (page[:20], page[-20:], page[:, :20], page[:, -20:])
            assert all(colors(edge) == {drawing.PAPER} for edge in edges)


def test_current_options_are_marked_in_the_table() -> None:
    picture = red((480, 640))
    marks = []
    for options in (OPTIONS, VisualOptions(max_views=2), VisualOptions(anyres_max=4)):
        page = np.asarray(explain_image(picture, plan((480, 640), options), GEOMETRY, options))
        mark = (page == np.array(drawing.CURRENT)).all(axis=-1)
        assert mark.any()
        marks.append(tuple(np.argwhere(mark).min(axis=0)))
    assert len(set(marks)) == 3
    square = plan_image((480, 640), GEOMETRY, OPTIONS, num_images=2)
    page = np.asarray(explain_image(picture, square, GEOMETRY, OPTIONS))
    assert drawing.CURRENT not in colors(page)


def test_dict_has_the_numbers_of_the_plan() -> None:
    data = json.loads(json.dumps(as_dict(plan((1080, 1920)), GEOMETRY, OPTIONS)))
    assert data["kind"] == "anyres"
    assert (data["num_views"], data["grid_hw"], data["canvas_hw"]) == (16, [3, 5], [1152, 1920])
    assert (data["resized_hw"], data["offset_hw"]) == ([1080, 1920], [36, 0])
    assert data["padding_fraction"] == pytest.approx(1 - 1080 / 1152)
    assert (data["map_hw"], data["kept"], data["final_hw"]) == (
        [81, 135],
        [3, 78, 0, 135],
        [60, 108],
    )
    assert data["tokens"] == {"base": 729, "map": 6480, "newlines": 60, "total": 7269}
    assert data["options"]["token_policy"] == "paper"


def test_alternatives_are_plans_of_their_options() -> None:
    options = VisualOptions(max_views=12, anyres_max=6)
    data = as_dict(plan((3000, 4000), options), GEOMETRY, options)
    rows = {(row["max_views"], row["anyres_max"]): row for row in data["alternatives"]}
    assert {max_views for max_views, _ in rows} >= {None, 1, 2, 3, 5, 7, 10, 12}
    assert {anyres_max for _, anyres_max in rows} == {None, 1, 4, 6, 9, 16}
    for (max_views, anyres_max), row in rows.items():
        other = plan((3000, 4000), VisualOptions(max_views=max_views, anyres_max=anyres_max))
        assert row["num_views"] == other.num_views
        assert row["num_tokens"] == other.num_tokens
    assert rows[None, None]["num_tokens"] == 7309
    assert rows[12, 6]["num_tokens"] == data["tokens"]["total"]


@pytest.mark.parametrize(
    ("num_images", "policy", "tokens"),
    [
        (2, "paper", {"base": 729, "map": 0, "newlines": 1, "total": 730}),
        (2, "lmms_eval", {"base": 729, "map": 0, "newlines": 0, "total": 729}),
        (2, "anyres", {"base": 729, "map": 2160, "newlines": 40, "total": 2929}),
    ],
)
def test_tokens_of_other_policies(num_images: int, policy: str, tokens: dict) -> None:
    options = VisualOptions(token_policy=policy)
    p = plan_image((480, 640), GEOMETRY, options, num_images=num_images)
    assert as_dict(p, GEOMETRY, options)["tokens"] == tokens
    assert f"{tokens['total']} tokens" in explain_text(p, GEOMETRY, options)


def test_video() -> None:
    p = plan_video(32, (480, 640), GEOMETRY, OPTIONS)
    data = as_dict(p, GEOMETRY, OPTIONS)
    assert data["tokens"] == {"base": 0, "map": 6272, "newlines": 1, "total": 6273}
    assert data["alternatives"] == []
    text = explain_text(p, GEOMETRY, OPTIONS)
    assert "32 frames of 480 × 640: 32 views, 6273 tokens" in text
    page = explain_image(red((480, 640)), p, GEOMETRY, OPTIONS)
    assert RED in colors(np.asarray(page))


def test_text() -> None:
    lines = explain_text(plan((1080, 1920)), GEOMETRY, OPTIONS).splitlines()
    assert lines[0] == "Picture of 1080 × 1920: 16 views, 7269 tokens"
    assert "Canvas 1152 × 1920 = 3 × 5 views of 384 × 384" in lines[1]
    assert "base 729" in lines[2]
    assert "shrunk to 60 × 108 = 6480 + newlines 60 = 7269" in lines[2]
    assert lines[3].startswith("By max_views: 1: 1 view, 730 tokens; 2: 2 views, 1149 tokens;")
    assert "4: 16 views, 3649 tokens" in lines[4]
    alone = plan_image((480, 640), GEOMETRY, OPTIONS, num_images=3)
    assert "Alone in a request, by max_views" in explain_text(alone, GEOMETRY, OPTIONS)


@pytest.mark.parametrize("size_hw", [(1, 5000), (5000, 1), (1, 1), (41, 3)])
@pytest.mark.parametrize("geometry", [GEOMETRY, TINY], ids=["384", "56"])
def test_extreme_pictures_are_drawn(
    size_hw: tuple[int, int], geometry: VisualGeometry, tmp_path: Path
) -> None:
    for num_images in (1, 2):
        p = plan_image(size_hw, geometry, OPTIONS, num_images=num_images)
        path = tmp_path / f"{num_images}.png"
        explain_png(path, red(size_hw), p, geometry, OPTIONS)
        with Image.open(path) as page:
            assert page.format == "PNG"
            assert RED in colors(np.asarray(page))
