"""Shows what a plan does with a picture: as a drawing, as a few lines of text, as plain data.

Owns what is told: padding, views, tokens of each part, and how `max_views` and `anyres_max` would
change them. The drawing itself is in `explain_draw`. Every size is height × width.
"""

import dataclasses
import os
from typing import Any

from PIL import Image

from ovfast.anyres import VisualGeometry, VisualOptions, VisualPlan, plan_image
from ovfast.explain_draw import Alternatives, draw_page
from ovfast.reference_pixels import UInt8Array

__all__ = ["as_dict", "explain_image", "explain_png", "explain_text"]

MAX_VIEWS_SHOWN = (1, 2, 3, 5, 7, 10, 17, 26)
ANYRES_MAX_SHOWN = (None, 1, 4, 9, 16)


def as_dict(plan: VisualPlan, geometry: VisualGeometry, options: VisualOptions) -> dict[str, Any]:
    """The plan as plain data, for JSON.

    Args:
        plan: of a picture or a video.
        geometry: of the checkpoint.
        options: under which the plan was made.

    Returns:
        Sizes (pairs are height, width), padding share of the canvas, tokens by part, the options,
        and for pictures `alternatives`: views and tokens under other options.
    """
    return {
        "kind": plan.kind,
        "size_hw": list(plan.size_hw),
        "num_frames": plan.num_frames,
        "canvas_hw": list(plan.canvas_hw),
        "resized_hw": list(plan.resized_hw),
        "offset_hw": list(plan.offset_hw),
        "grid_hw": list(plan.grid_hw),
        "padding_fraction": padding_fraction(plan),
        "num_views": plan.num_views,
        "map_hw": list(plan.map_hw),
        "kept": list(plan.kept),
        "final_hw": list(plan.final_hw),
        "tokens": tokens_by_part(plan),
        "options": dataclasses.asdict(options),
        "alternatives": [
            {
                "max_views": max_views,
                "anyres_max": anyres_max,
                "num_views": other.num_views,
                "grid_hw": list(other.grid_hw),
                "num_tokens": other.num_tokens,
            }
            for (max_views, anyres_max), other in alternatives(plan, geometry, options).items()
        ],
    }


def explain_text(plan: VisualPlan, geometry: VisualGeometry, options: VisualOptions) -> str:
    """The plan in a few lines.

    Args:
        plan: of a picture or a video.
        geometry: of the checkpoint.
        options: under which the plan was made.

    Returns:
        Lines without a trailing newline.
    """
    lines = [headline(plan), layout_line(plan), token_line(plan)]
    table = alternatives(plan, geometry, options)
    if table:
        alone = "Alone in a request, by" if plan.kind == "square" else "By"
        by_views = {a: p for (a, b), p in table.items() if b == options.anyres_max}
        by_limit = {b: p for (a, b), p in table.items() if a == options.max_views}
        lines.append(f"{alone} max_views: {_steps(by_views)}.")
        lines.append(f"{alone} anyres_max: {_steps(by_limit)}.")
    return "\n".join(lines)


def explain_image(
    image: UInt8Array, plan: VisualPlan, geometry: VisualGeometry, options: VisualOptions
) -> Image.Image:
    """Draws the plan of a picture.

    Args:
        image: (height, width, 3) uint8 picture, or a frame of a video.
        plan: made for it.
        geometry: of the checkpoint.
        options: under which the plan was made.

    Returns:
        An RGB picture: original, canvas with numbered views and hatched padding, base view, token
        map, tokens by part, and a table of alternatives.
    """
    table = Alternatives(
        plans=alternatives(plan, geometry, options),
        current=None if plan.kind == "square" else (options.max_views, options.anyres_max),
        default_limit=_limit(geometry),
    )
    lines = (headline(plan), layout_line(plan), token_line(plan))
    return draw_page(image, plan, lines, tokens_by_part(plan), table)


def explain_png(
    path: str | os.PathLike[str],
    image: UInt8Array,
    plan: VisualPlan,
    geometry: VisualGeometry,
    options: VisualOptions,
) -> None:
    """Writes the drawing of `explain_image` as a PNG file.

    Args:
        path: of the file to write.
        image: (height, width, 3) uint8 picture, or a frame of a video.
        plan: made for it.
        geometry: of the checkpoint.
        options: under which the plan was made.
    """
    explain_image(image, plan, geometry, options).save(path, format="PNG")


def tokens_by_part(plan: VisualPlan) -> dict[str, int]:
    """Tokens of the base view (or the only one), of the map of crops or frames, of newlines."""
    newlines = plan.num_newlines
    base = 0 if plan.kind == "video" else plan.tokens_per_view
    crops = plan.num_tokens - base - newlines
    return {"base": base, "map": crops, "newlines": newlines, "total": plan.num_tokens}


def padding_fraction(plan: VisualPlan) -> float:
    """Share of the canvas that is padding; 0 without a canvas."""
    canvas = plan.canvas_hw[0] * plan.canvas_hw[1]
    return 1 - plan.resized_hw[0] * plan.resized_hw[1] / canvas if canvas else 0.0


def alternatives(
    plan: VisualPlan, geometry: VisualGeometry, options: VisualOptions
) -> dict[tuple[int | None, int | None], VisualPlan]:
    """Plans of the same picture as an AnyRes one under other (max_views, anyres_max)."""
    if plan.kind == "video":
        return {}
    view = geometry.image_size
    most = max((h * w // view**2 + 1 for h, w in geometry.grid_pinpoints_hw), default=1)
    bounds = {bound for bound in MAX_VIEWS_SHOWN if bound < most}
    if options.max_views is not None:
        bounds.add(options.max_views)
    limits = {limit for limit in ANYRES_MAX_SHOWN if limit is not None}
    if options.anyres_max is not None:
        limits.add(options.anyres_max)
    table = {}
    for max_views in (*sorted(bounds), None):
        for anyres_max in (None, *sorted(limits)):
            changed = dataclasses.replace(options, max_views=max_views, anyres_max=anyres_max)
            other = plan_image(plan.size_hw, geometry, changed, num_images=1)
            table[max_views, anyres_max] = other
    return table


def headline(plan: VisualPlan) -> str:
    """What goes in and what comes out."""
    frames = f"{plan.num_frames} frame{'s' * (plan.num_frames > 1)}"
    what = frames if plan.kind == "video" else "Picture"
    return f"{what} of {_size(plan.size_hw)}: {_views(plan)}, {plan.num_tokens} tokens"


def layout_line(plan: VisualPlan) -> str:
    """How pixels become views."""
    view = _size((plan.image_size, plan.image_size))
    if plan.kind == "video":
        return f"Every frame is squashed to {view}; its map is pooled to {_size(plan.final_hw)}."
    if plan.kind == "square":
        return f"One of several: padded with gray to {_size(plan.canvas_hw)}, resized to {view}."
    if not plan.has_crops:
        return f"Only the base view: the whole picture squashed to {view}."
    return (
        f"Canvas {_size(plan.canvas_hw)} = {_size(plan.grid_hw)} views of {view}; picture resized"
        f" to {_size(plan.resized_hw)}; {padding_fraction(plan):.0%} padding; plus the base view."
    )


def token_line(plan: VisualPlan) -> str:
    """How views become tokens."""
    parts = tokens_by_part(plan)
    if plan.kind == "video":
        height, width = plan.final_hw
        return (
            f"Tokens: {plan.num_frames} · {height} · {width} = {parts['map']}, and 1 newline"
            f" = {parts['total']}."
        )
    if not plan.has_crops:
        return f"Tokens: view {parts['base']} + newline {parts['newlines']} = {parts['total']}."
    shrunk = "" if plan.final_hw == plan.kept_hw else f", shrunk to {_size(plan.final_hw)}"
    return (
        f"Tokens: base {parts['base']} + map {_size(plan.map_hw)}, unpadded to"
        f" {_size(plan.kept_hw)}{shrunk} = {parts['map']} + newlines {parts['newlines']}"
        f" = {parts['total']}."
    )


def _steps(plans: dict[int | None, VisualPlan]) -> str:
    """Views and tokens by the value of an option, without repetitions."""
    steps: list[str] = []
    for value, plan in plans.items():
        cost = f"{_views(plan)}, {plan.num_tokens} tokens"
        if value is None or not any(step.endswith(f": {cost}") for step in steps):
            steps.append(f"{value}: {cost}")
    return "; ".join(steps)


def _views(plan: VisualPlan) -> str:
    return f"{plan.num_views} view{'s' * (plan.num_views > 1)}"


def _size(size_hw: tuple[int, int]) -> str:
    return f"{size_hw[0]} × {size_hw[1]}"


def _limit(geometry: VisualGeometry) -> str:
    return "no limit" if geometry.anyres_max is None else str(geometry.anyres_max)
