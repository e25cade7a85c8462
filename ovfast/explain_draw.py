"""The drawing of a plan, with Pillow alone: panels, token maps, a bar and a table.

Owns pixels, colors and positions. The page is 1480 pixels wide, its height as the content needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ovfast.anyres import VisualPlan
from ovfast.reference_pixels import UInt8Array

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom, as Pillow

PAPER: Color = (255, 255, 255)
INK: Color = (28, 34, 43)
MUTED: Color = (105, 114, 126)
LINE: Color = (205, 211, 219)
HATCH_LIGHT: Color = (236, 238, 241)
HATCH_DARK: Color = (168, 176, 187)
GRID: Color = (255, 196, 0)
BASE: Color = (66, 114, 196)
MAP: Color = (38, 150, 130)
NEWLINE: Color = (228, 120, 40)
CURRENT: Color = (255, 240, 196)

PAGE_WIDTH, MARGIN, GAP = 1480, 40, 40
PANELS_TOP, PANEL_HEIGHT = 170, 350
PANEL_LEFTS, PANEL_WIDTHS = (40, 440, 1080), (360, 600, 360)
CAPTION_HEIGHT = 56
MAPS_TOP = PANELS_TOP + CAPTION_HEIGHT + PANEL_HEIGHT + GAP
LEGEND_HEIGHT = 4 * 34
BAR_HEIGHT = 130
ROW_HEIGHT = 34


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Plans by (max_views, anyres_max), the pair in use if any, and what anyres_max=None means."""

    plans: Mapping[tuple[int | None, int | None], VisualPlan]
    current: tuple[int | None, int | None] | None
    default_limit: str


def draw_page(
    image: UInt8Array,
    plan: VisualPlan,
    lines: Sequence[str],
    tokens: Mapping[str, int],
    table: Alternatives,
) -> Image.Image:
    """Draws the whole page.

    Args:
        image: (height, width, 3) uint8 picture or frame.
        plan: made for it.
        lines: a headline, then lines below it.
        tokens: "base", "map", "newlines" and "total".
        table: what other options would give; may be empty.

    Returns:
        The page, RGB.
    """
    maps = _token_maps(image, plan)
    bar_top = MAPS_TOP + CAPTION_HEIGHT + GAP
    bar_top += max(LEGEND_HEIGHT, *(picture.height for picture in maps))
    table_top = bar_top + BAR_HEIGHT
    num_rows = len({max_views for max_views, _ in table.plans})
    height = table_top + (num_rows + 4) * ROW_HEIGHT + GAP if num_rows else table_top
    page = Image.new("RGB", (PAGE_WIDTH, height), PAPER)
    draw = ImageDraw.Draw(page)
    _write(draw, (MARGIN, 30), lines[0], 34)
    for number, line in enumerate(lines[1:]):
        _write(draw, (MARGIN, 82 + 26 * number), line, 19, MUTED)
    _draw_panels(page, image, plan)
    for column, (picture, caption) in enumerate(zip(maps, _map_captions(plan), strict=True)):
        _place(page, column, MAPS_TOP, picture, *caption)
    _draw_legend(draw, plan)
    _draw_bar(draw, bar_top, plan, tokens)
    if num_rows:
        _draw_table(draw, table_top, table)
    return page


def draw_canvas(image: UInt8Array, plan: VisualPlan, bounds: tuple[int, int]) -> Image.Image:
    """The canvas with the picture in it, padding hatched, grid lines and view numbers.

    Args:
        image: (height, width, 3) uint8.
        plan: of this picture; without a canvas the base view stands for it.
        bounds: width and height that the drawing may take.

    Returns:
        The drawing, RGB.
    """
    canvas = canvas_picture(image, plan, bounds)
    rows, cols = plan.grid_hw
    draw = ImageDraw.Draw(canvas)
    for row in range(rows):
        for col in range(cols):
            box = _cell(canvas.size, plan.grid_hw, row, col)
            draw.rectangle(box, outline=GRID, width=2)
            _draw_label(draw, box, str(1 + row * cols + col))
    if not plan.has_crops:
        draw.rectangle((0, 0, canvas.width - 1, canvas.height - 1), outline=GRID, width=2)
    return canvas


def canvas_picture(image: UInt8Array, plan: VisualPlan, bounds: tuple[int, int]) -> Image.Image:
    """The scaled canvas without marks: the picture where it lies, hatching elsewhere."""
    view = (plan.image_size, plan.image_size)
    full = plan.canvas_hw if plan.canvas_hw != (0, 0) else view
    inner = plan.resized_hw if plan.canvas_hw != (0, 0) else view
    width, height = _fit((full[1], full[0]), bounds)
    canvas = Image.new("RGB", (width, height), HATCH_LIGHT)
    hatch(canvas, (0, 0, width, height))
    top, left = (offset * width // full[1] for offset in plan.offset_hw)
    size = (max(1, round(inner[1] * width / full[1])), max(1, round(inner[0] * height / full[0])))
    canvas.paste(_picture(image, size), (left, top))
    return canvas


def hatch(page: Image.Image, box: Box) -> None:
    """Fills a box with diagonal lines."""
    width, height = box[2] - box[0], box[3] - box[1]
    if width < 1 or height < 1:
        return
    y, x = np.mgrid[:height, :width]
    dark = ((x + y) % 9 < 2)[..., None]
    pattern = np.where(dark, np.array(HATCH_DARK, np.uint8), np.array(HATCH_LIGHT, np.uint8))
    page.paste(Image.fromarray(pattern), box[:2])


def _draw_panels(page: Image.Image, image: UInt8Array, plan: VisualPlan) -> None:
    height, width = plan.size_hw
    original = _picture(image, _fit((width, height), (PANEL_WIDTHS[0], PANEL_HEIGHT)))
    unit = "Frame" if plan.kind == "video" else "Original"
    _place(page, 0, PANELS_TOP, original, unit, f"{height} × {width} (height × width)")
    view = f"{plan.image_size} × {plan.image_size}"
    canvas = draw_canvas(image, plan, (PANEL_WIDTHS[1], PANEL_HEIGHT))
    size = f"{plan.canvas_hw[0]} × {plan.canvas_hw[1]}"
    if plan.kind == "video":
        _place(page, 1, PANELS_TOP, canvas, "View of each frame", f"{view}, squashed")
        return
    if plan.kind == "square":
        note = f"{size}, gray where hatched"
        _place(page, 1, PANELS_TOP, canvas, "Square canvas", note)
        side = canvas_picture(image, plan, (PANEL_HEIGHT, PANEL_HEIGHT))
        _place(page, 2, PANELS_TOP, side, "View 0", f"the square resized to {view}")
        return
    if plan.has_crops:
        rows, cols = plan.grid_hw
        note = f"{size}, {rows} × {cols} crops of {view}; hatched: black padding"
        _place(page, 1, PANELS_TOP, canvas, f"Canvas with views 1 to {rows * cols}", note)
    else:
        draw = ImageDraw.Draw(page)
        _caption(draw, 1, PANELS_TOP, "No canvas, no crops", "max_views leaves the base view only")
    base = _picture(image, (PANEL_HEIGHT, PANEL_HEIGHT))
    _place(page, 2, PANELS_TOP, base, "View 0, the base view", f"all of it, squashed to {view}")


def _token_maps(image: UInt8Array, plan: VisualPlan) -> tuple[Image.Image, Image.Image]:
    """One square of color a token: the map with what is kept, and what is left of it."""
    map_h, map_w = plan.map_hw
    width, height = _fit((map_w, map_h), (PANEL_WIDTHS[0], PANEL_HEIGHT))
    bounds = (PANEL_WIDTHS[1], PANEL_HEIGHT)
    token_map = canvas_picture(image, plan, bounds).resize((map_w, map_h), Image.Resampling.BOX)
    row0, row1, col0, col1 = plan.kept
    whole = token_map.resize((width, height), Image.Resampling.NEAREST)
    top, bottom = row0 * height // map_h, -(-row1 * height // map_h)
    left, right = col0 * width // map_w, -(-col1 * width // map_w)
    for box in ((0, 0, width, top), (0, bottom, width, height)):
        hatch(whole, box)
    for box in ((0, 0, left, height), (right, 0, width, height)):
        hatch(whole, box)
    if plan.has_crops:
        edge = (left, top, max(left, right - 1), max(top, bottom - 1))
        ImageDraw.Draw(whole).rectangle(edge, outline=MAP, width=2)
    if min(plan.final_hw) < 1:  # small towers may keep no token of a very thin picture
        return whole, Image.new("RGB", (1, 1), PAPER)
    final_h, final_w = plan.final_hw
    kept = token_map.crop((col0, row0, col1, row1))
    return whole, _with_newlines(
        kept.resize((final_w, final_h), Image.Resampling.BOX), plan, bounds
    )


def _map_captions(plan: VisualPlan) -> tuple[tuple[str, str], tuple[str, str]]:
    kept, full = (f"{height} × {width}" for height, width in (plan.kept_hw, plan.map_hw))
    title = "Token map of the crops" if plan.has_crops else "Token map of a view"
    if plan.kept_hw == plan.map_hw:
        return (title, f"{full}, nothing unpadded"), _final_caption(plan)
    return (title, f"{full}, {kept} kept; hatched: unpadded"), _final_caption(plan)


def _final_caption(plan: VisualPlan) -> tuple[str, str]:
    size = f"{plan.final_hw[0]} × {plan.final_hw[1]}"
    if plan.kind == "video":
        return f"Pooled to {size}", "each frame; one newline after the last frame"
    if not plan.has_crops:
        return f"Kept whole: {size}", f"followed by {'one' if plan.newline else 'no'} newline"
    note = "then one newline after every row"
    if plan.final_hw == plan.kept_hw:
        return f"Not shrunk: {size}", note
    return f"Shrunk to {size}", f"bilinear, {note}"


def _with_newlines(final: Image.Image, plan: VisualPlan, bounds: tuple[int, int]) -> Image.Image:
    """The final map with the newline tokens at its right edge."""
    strip = 12
    size = _fit(final.size, (bounds[0] - strip, bounds[1]))
    out = Image.new("RGB", (size[0] + strip, size[1]), PAPER)
    out.paste(final.resize(size, Image.Resampling.NEAREST), (0, 0))
    draw = ImageDraw.Draw(out)
    box = (size[0] + 3, 0, size[0] + strip - 1, size[1] - 1)
    if plan.has_crops:
        draw.rectangle(box, fill=NEWLINE)
    elif plan.newline:
        step = max(4, size[1] // plan.final_hw[0])
        draw.rectangle((box[0], max(0, box[3] - step), box[2], box[3]), fill=NEWLINE)
    return out


def _draw_legend(draw: ImageDraw.ImageDraw, plan: VisualPlan) -> None:
    left, top = PANEL_LEFTS[2], MAPS_TOP
    _write(draw, (left, top), "How to read it", 21)
    entries: list[tuple[Color, str]] = []
    if plan.has_crops:
        entries.append((GRID, "edge of a view, with its number"))
        entries.append((HATCH_DARK, "padding, and tokens that are dropped"))
        entries.append((MAP, "edge of the tokens that are kept"))
    elif plan.kind == "square":
        entries.append((HATCH_DARK, "gray padding; its tokens are kept"))
    if plan.num_newlines:
        entries.append((NEWLINE, "newline tokens"))
    for number, (color, text) in enumerate(entries):
        y = top + CAPTION_HEIGHT + 34 * number
        draw.rectangle((left, y, left + 20, y + 20), fill=color)
        _write(draw, (left + 32, y - 2), text, 18)


def _draw_bar(
    draw: ImageDraw.ImageDraw, top: int, plan: VisualPlan, tokens: Mapping[str, int]
) -> None:
    """One bar of all tokens, its parts named below with their counts."""
    names = {
        "base": ("base view" if plan.kind == "anyres" else "view", BASE),
        "map": ("frames" if plan.kind == "video" else "map of crops", MAP),
        "newlines": ("newlines", NEWLINE),
    }
    width, left, legend = PAGE_WIDTH - 2 * MARGIN, MARGIN, MARGIN
    _write(draw, (MARGIN, top), f"{tokens['total']} tokens", 21)
    parts = [name for name in names if tokens[name]]
    for name in parts:
        label, color = names[name]
        share = max(3, round(width * tokens[name] / tokens["total"]))
        right = min(left + share, MARGIN + width)
        draw.rectangle((min(left, right - 3), top + 34, right - 1, top + 62), fill=color)
        left = right
        draw.rectangle((legend, top + 76, legend + 16, top + 92), fill=color)
        percent = 100 * tokens[name] / tokens["total"]
        text = f"{label}: {tokens[name]} ({percent:.3g} %)"
        _write(draw, (legend + 26, top + 73), text, 18)
        legend += 26 + round(draw.textlength(text, _font(18))) + 40


def _draw_table(draw: ImageDraw.ImageDraw, top: int, table: Alternatives) -> None:
    bounds = list(dict.fromkeys(max_views for max_views, _ in table.plans))
    limits = list(dict.fromkeys(anyres_max for _, anyres_max in table.plans))
    first = (130, 100, 110)  # widths of max_views, views, canvas grid
    step = (PAGE_WIDTH - 2 * MARGIN - sum(first)) // len(limits)
    rights = [MARGIN + sum(first[: n + 1]) for n in range(3)]
    rights += [rights[-1] + step * (n + 1) for n in range(len(limits))]
    title = "Views and tokens under other options (as the only picture of a request)"
    _write(draw, (MARGIN, top), title, 21)
    names = ["max_views", "views", "grid"]
    names += [f"None ({table.default_limit})" if n is None else str(n) for n in limits]
    head = top + 44 + ROW_HEIGHT
    _write(draw, (PAGE_WIDTH - MARGIN - 12, top + 44), "tokens with anyres_max", 18, MUTED, "ra")
    _draw_row(draw, head, rights, names, MUTED)
    for number, max_views in enumerate(bounds):
        y = head + ROW_HEIGHT * (number + 1)
        draw.line((MARGIN, y - 6, PAGE_WIDTH - MARGIN, y - 6), fill=LINE)
        for column, limit in enumerate(limits):
            if (max_views, limit) == table.current:
                left = rights[2 + column]
                draw.rectangle((left + 12, y - 5, rights[3 + column], y + 27), fill=CURRENT)
        plans = [table.plans[max_views, limit] for limit in limits]
        grid = f"{plans[0].grid_hw[0]} × {plans[0].grid_hw[1]}" if plans[0].has_crops else "none"
        cells = [str(max_views), str(plans[0].num_views), grid]
        _draw_row(draw, y, rights, cells + [str(p.num_tokens) for p in plans], INK)


def _draw_row(
    draw: ImageDraw.ImageDraw, y: int, rights: Sequence[int], cells: Sequence[str], color: Color
) -> None:
    for right, cell in zip(rights, cells, strict=True):
        _write(draw, (right - 12, y), cell, 18, color, anchor="ra")


def _place(
    page: Image.Image, column: int, top: int, picture: Image.Image, title: str, note: str
) -> None:
    _caption(ImageDraw.Draw(page), column, top, title, note)
    page.paste(picture, (PANEL_LEFTS[column], top + CAPTION_HEIGHT))


def _caption(draw: ImageDraw.ImageDraw, column: int, top: int, title: str, note: str) -> None:
    _write(draw, (PANEL_LEFTS[column], top), title, 21)
    _write(draw, (PANEL_LEFTS[column], top + 28), note, 16, MUTED)


def _draw_label(draw: ImageDraw.ImageDraw, box: Box, text: str) -> None:
    """A number in the upper left corner of a view, readable on any picture."""
    size = max(9, min(20, (box[2] - box[0]) // 4, (box[3] - box[1]) // 4))
    half = size * 3 // 4
    x, y = box[0] + half + size // 2, box[1] + half + size // 3
    draw.rounded_rectangle((x - half, y - half, x + half, y + half), half // 2, fill=INK)
    _write(draw, (x, y), text, size, PAPER, anchor="mm")


def _write(
    draw: ImageDraw.ImageDraw,
    xy: tuple[int, int],
    text: str,
    size: int,
    color: Color = INK,
    anchor: str = "la",
) -> None:
    # Pillow's own font has no multiplication sign.
    draw.text(xy, text.replace("×", "x"), color, _font(size), anchor=anchor)


def _cell(size: tuple[int, int], grid_hw: tuple[int, int], row: int, col: int) -> Box:
    (width, height), (rows, cols) = size, grid_hw
    right, bottom = (col + 1) * width // cols - 1, (row + 1) * height // rows - 1
    return col * width // cols, row * height // rows, right, bottom


def _fit(size: tuple[int, int], bounds: tuple[int, int]) -> tuple[int, int]:
    """The largest (width, height) of the same shape inside bounds, at least one pixel each."""
    scale = min(bounds[0] / size[0], bounds[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _picture(image: UInt8Array, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC)


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
