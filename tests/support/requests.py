"""Requests for model tests, built from plans by hand: no tokenizer, no template."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovfast.anyres import VisualGeometry, VisualOptions, VisualPlan, plan_image, plan_video
from ovfast.config import ModelConfig
from ovfast.image import build_video_views, build_views

NUM_TEXT_IDS = 500  # below the special tokens of every random checkpoint


@dataclass(frozen=True)
class Text:
    num_tokens: int


@dataclass(frozen=True)
class Image:
    height: int
    width: int


@dataclass(frozen=True)
class Video:
    num_frames: int
    height: int = 60
    width: int = 100


class Span(NamedTuple):
    start: int
    end: int
    plan_index: int


@dataclass(frozen=True)
class Request:
    """What LlavaOnevision reads, and the pixels it was made from."""

    input_ids: NDArray[np.int64]
    spans: tuple[Span, ...]
    plans: tuple[VisualPlan, ...]
    views: NDArray[np.uint8]
    images: tuple[NDArray[np.uint8], ...]
    media: tuple[NDArray[np.uint8], ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


def geometry_of(config: ModelConfig) -> VisualGeometry:
    vision = config.vision
    return VisualGeometry(
        vision.image_size, vision.patch_size, config.grid_pinpoints_hw, config.anyres_max
    )


def make_request(parts: list[Text | Image | Video], config: ModelConfig, seed: int = 0) -> Request:
    """Random text and pixels in the given order."""
    rng = np.random.default_rng(seed)
    geometry, options = geometry_of(config), VisualOptions()
    num_images = sum(isinstance(part, Image) for part in parts)
    ids: list[int] = []
    spans, plans, views, images, media = [], [], [], [], []
    for part in parts:
        if isinstance(part, Text):
            ids += rng.integers(0, NUM_TEXT_IDS, part.num_tokens).tolist()
            continue
        if isinstance(part, Image):
            size_hw = (part.height, part.width)
            plan = plan_image(size_hw, geometry, options, num_images=num_images)
            media.append(_pixels(rng, (*size_hw, 3)))
            images.append(media[-1])
            views.append(build_views(media[-1], plan))
            placeholder = config.image_token_id
        else:
            size_hw = (part.height, part.width)
            plan = plan_video(part.num_frames, size_hw, geometry, options)
            media.append(_pixels(rng, (part.num_frames, *size_hw, 3)))
            views.append(build_video_views(media[-1], plan))
            placeholder = config.video_token_id
        spans.append(Span(len(ids), len(ids) + plan.num_tokens, len(plans)))
        plans.append(plan)
        ids += [placeholder] * plan.num_tokens
    side = config.vision.image_size
    return Request(
        input_ids=np.array(ids, np.int64),
        spans=tuple(spans),
        plans=tuple(plans),
        views=np.concatenate(views) if views else np.empty((0, side, side, 3), np.uint8),
        images=tuple(images),
        media=tuple(media),
    )


def _pixels(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Smooth in large parts with noise on top, so that neighbouring patches differ."""
    levels = rng.integers(0, 256, (*shape[:-3], 1, 1, 3))
    return ((levels + rng.integers(0, 96, shape)) % 256).astype(np.uint8)
