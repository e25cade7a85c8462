"""Which media a call brings, which of them each place of a prompt takes, and loading them all."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovfast.anyres import VisualOptions
from ovfast.chat import BARE, Message
from ovfast.errors import PromptError
from ovfast.media import MediaLimits, load_image, load_video

__all__ = [
    "decoding",
    "image_list",
    "load_clips",
    "load_media",
    "media_turn",
    "take_sources",
    "video_list",
]

MAX_DECODE_THREADS = 8
ENCODED = (str, os.PathLike, bytes, bytearray, memoryview)


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
    """A list of videos; a list of PIL images or arrays alone is one video of these frames."""
    if videos is None:
        return []
    if not isinstance(videos, list | tuple):
        return [videos]
    frames = all(isinstance(v, Image.Image) or getattr(v, "ndim", None) == 3 for v in videos)
    return [videos] if videos and frames else list(videos)


@contextmanager
def decoding(
    sources: Sequence[object], *, limits: MediaLimits, exif: bool
) -> Iterator[Iterator[NDArray[np.uint8]]]:
    """Decodes pictures side by side for the length of a `with`.

    Pillow decodes outside the GIL: 16 JPEGs of 1024×768 take 0.7 of the time on two cores. What is
    not encoded is loaded by the caller: an open PIL image is one decoder over one file, which two
    threads must not share, and a tensor of a device is read in the order of the caller's stream.

    Args:
        sources: each as `load_image` takes it.
        limits: of the media.
        exif: whether pictures are turned as they say.

    Yields:
        The pictures, in order; asking for one raises the MediaError of its source. What nobody has
        asked for at the end is not begun any more.
    """
    load = partial(load_image, limits=limits, exif=exif)
    num_encoded = sum(isinstance(source, ENCODED) for source in sources)
    threads = min(num_encoded, len(os.sched_getaffinity(0)), MAX_DECODE_THREADS)
    if threads < 2:
        yield map(load, sources)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        takes: deque[Callable[[], NDArray[np.uint8]]] = deque()
        for source in sources:
            is_encoded = isinstance(source, ENCODED)
            takes.append(pool.submit(load, source).result if is_encoded else partial(load, source))
        yield _taken(takes)
    finally:
        pool.shutdown(cancel_futures=True)


def _taken(takes: deque[Callable[[], NDArray[np.uint8]]]) -> Iterator[NDArray[np.uint8]]:
    """Keeps no picture that was asked for."""
    while takes:
        yield takes.popleft()()


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
    with decoding(images, limits=limits, exif=visual.exif) as pictures:
        return list(pictures), load_clips(videos, limits=limits, visual=visual)


def load_clips(
    videos: Sequence[Any], *, limits: MediaLimits, visual: VisualOptions
) -> list[NDArray[np.uint8]]:
    """Decodes the videos of one prompt, one after another: a decoder has threads of its own.

    Args:
        videos: each as `load_video` takes it.
        limits: of the media.
        visual: which frames are taken, and whether they are turned as they say.

    Returns:
        uint8 (frames, height, width, 3) each.

    Raises:
        MediaError: a video cannot be read or breaks a limit.
    """
    return [
        load_video(
            source,
            limits=limits,
            num_frames=visual.num_frames,
            fps=visual.fps,
            exif=visual.exif,
        )
        for source in videos
    ]
