"""What a checkpoint's JSON files say about pictures: canvases, anyres_max, normalisation.

Used by config.py only; a saved setting that differs from what ovfast computes raises ConfigError.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovfast.json_fields import Fields, load_json

__all__ = ["check_preprocessor", "read_anyres_max", "read_pinpoints"]

# The training scripts' spelling, such as "(1x1),...,(6x6)".
PINPOINT_RANGE = r"\((\d\d?)x(\d\d?)\),\.\.\.,\((\d\d?)x(\d\d?)\)"


def read_pinpoints(top: Fields, image_size: int, *, swap: bool) -> tuple[tuple[int, int], ...]:
    """Canvas sizes as (height, width); `swap` for the original's (width, height) pairs."""
    value = top.values.get("image_grid_pinpoints")
    if value is None and not swap:
        value = [[384 * row, 384 * col] for row in range(1, 7) for col in range(1, 7)]
    if isinstance(value, str):
        ends = re.fullmatch(
            r"\((\d\d?)x(\d\d?)\),\.\.\.,\((\d\d?)x(\d\d?)\)", value.replace(" ", "")
        )
        if ends is None:
            raise top.fail("image_grid_pinpoints", "pairs, or a range such as '(1x1),...,(6x6)'")
        a, b, c, d = map(int, ends.groups())
        value = [[image_size * i, image_size * j] for i in range(a, c + 1) for j in range(b, d + 1)]
    if (
        not isinstance(value, list)
        or not value
        or not all(_is_canvas(p, image_size) for p in value)
    ):
        raise top.fail(
            "image_grid_pinpoints", f"a list of pairs of positive multiples of {image_size}"
        )
    return tuple((pair[1], pair[0]) if swap else (pair[0], pair[1]) for pair in value)


def _is_canvas(pair: object, image_size: int) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(side) is int and side > 0 and side % image_size == 0 for side in pair)
    )


def read_anyres_max(fields: Fields, key: str, default: str | None) -> int | None:
    """N of 'anyres_max_N'; None for plain 'anyres', which never shrinks."""
    value = fields.values.get(key, default)
    match = re.fullmatch(r"anyres(?:_max_([1-9]\d{0,5}))?", value) if type(value) is str else None
    if match is None:
        raise fields.fail(key, "'anyres' or 'anyres_max_N'", "use one that ovfast computes")
    return int(match[1]) if match[1] else None


def check_preprocessor(path: Path, parsed: Mapping[str, Any]) -> None:
    """Raise where the picture settings saved with the checkpoint differ from what is computed."""
    images: list[Fields] = []
    preprocessor = load_json(path / "preprocessor_config.json")
    if preprocessor is not None:
        images.append(Fields(path / "preprocessor_config.json", preprocessor))
    processor = load_json(path / "processor_config.json")
    if processor is not None:
        fields = Fields(path / "processor_config.json", processor)
        if processor.get("image_processor") is not None:
            images.append(fields.section("image_processor"))
        fields.require("num_image_tokens", (parsed["vision"].tokens_per_view, None))
        fields.require("vision_feature_select_strategy", ("full", "patch", None))
        if processor.get("vision_aspect_ratio") is not None:
            anyres_max = read_anyres_max(fields, "vision_aspect_ratio", None)
            if anyres_max != parsed["anyres_max"]:
                raise fields.fail("vision_aspect_ratio", "the value of config.json")
    for image in images:
        _check_image_processor(image, parsed)


def _check_image_processor(fields: Fields, parsed: Mapping[str, Any]) -> None:
    side = parsed["vision"].image_size
    for key in ("image_mean", "image_std"):
        if fields.values.get(key, [0.5] * 3) not in ([0.5] * 3, 0.5, None):
            raise fields.fail(key, "[0.5, 0.5, 0.5]", "use one that ovfast computes")
    for key in ("do_resize", "do_rescale", "do_normalize", "do_pad"):
        fields.require(key, (True, None))
    fields.require("do_center_crop", (False, None))
    fields.require("resample", (3, None))
    if abs(fields.number("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise fields.fail("rescale_factor", "1/255")
    size = fields.values.get("size")
    if size not in (None, side, [side, side]) and not (
        isinstance(size, dict) and all(value in (side, None) for value in size.values())
    ):
        raise fields.fail("size", f"the tower's image_size {side}")
    if isinstance(fields.values.get("image_grid_pinpoints"), list):
        swap = parsed["video_token_id"] is None
        if set(read_pinpoints(fields, side, swap=swap)) != set(parsed["grid_pinpoints_hw"]):
            raise fields.fail("image_grid_pinpoints", "the pairs of config.json")
