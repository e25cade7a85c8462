"""Which media a call brings, which of them each place of a prompt takes, and loading them all."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovfast.anyres import VisualOptions
from ovfast.chat import BARE, Message
from ovfast.errors import PromptError
from ovfast.media import MediaLimits, load_images, load_video

__all__ = ["image_list", "load_media", "media_turn", "take_sources", "video_list"]


def take_sources(
    messages: Sequence[Message],
    kind: Literal["image", "video"],
    given: list[Any],
    *,
    from_sizes: bool,
) -> list[Any]:
    """Sources of all media of a kind in the prompt's order; those without one take the given."""
    wanted: list[Any] = []
    for message in messages:
        for part in message.parts:
            if part.kind == kind:
                wanted.append(BARE if from_sizes else part.source)
            wanted += [BARE for segment in part.segments if segment.kind == kind]
    bare = sum(source is BARE for source in wanted)
    if bare != len(given):
        raise PromptError(
            f"the prompt has {bare} places for {kind}s= and {len(given)} were given; expected as "
            f"many. In a chat, add {{'type': '{kind}'}} parts or remove {kind}s."
        )
    rest = iter(given)
    return [next(rest) if source is BARE else source for source in wanted]


def media_turn(images: object, videos: object) -> list[dict[str, Any]]:
    """A chat of one turn with all pictures, then all videos, and no text: as they stand before a
    question.
    """
    places = [("image", image_list(images)), ("video", video_list(videos))]
    content = [{"type": kind} for kind, media in places for _ in media]
    return [{"role": "user", "content": content}]


def image_list(images: object) -> list[Any]:
    """A list of pictures, of one or several."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def video_list(videos: object) -> list[Any]:
    """A list of videos; a list whose items are all pictures is one video of these frames."""
    if videos is None:
        return []
    if not isinstance(videos, list | tuple):
        return [videos]
    frames = all(isinstance(v, Image.Image) or getattr(v, "ndim", None) == 3 for v in videos)
    return [videos] if videos and frames else list(videos)


def load_media(
    images: Sequence[Any], videos: Sequence[Any], *, limits: MediaLimits, visual: VisualOptions
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Decodes the media of one prompt.

    Args:
        images: each as `load_image` takes it.
        videos: each as `load_video` takes it.
        limits: of the media.
        visual: which frames are taken, and whether pictures are turned as they say.

    Returns:
        uint8 pictures (height, width, 3) and videos (frames, height, width, 3).

    Raises:
        MediaError: a medium cannot be read or breaks a limit.
    """
    pictures = load_images(images, limits=limits, exif=visual.exif)
    clips = [
        load_video(
            source,
            limits=limits,
            num_frames=visual.num_frames,
            fps=visual.fps,
            exif=visual.exif,
        )
        for source in videos
    ]
    return pictures, clips
