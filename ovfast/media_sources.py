"""Which media a call brings, and which of them each place of a prompt takes."""

from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image

from ovfast.chat import BARE, Message
from ovfast.errors import PromptError

__all__ = ["image_list", "media_turn", "take_sources", "video_list"]


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
