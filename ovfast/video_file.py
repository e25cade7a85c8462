"""Video files: which frames of a clip are taken, and their decoding with PyAV.

Owns counting, choosing and decoding frames; clips as arrays or lists of pictures are media.py's.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from ovfast.errors import MediaError
from ovfast.media_limits import MediaLimits, check_clip

if TYPE_CHECKING:
    import av.container
    import av.video

UInt8Array = npt.NDArray[np.uint8]

# Decoders round the sides of a frame up: by at most 127 pixels, on sides of at most 65535.
_MAX_PADDING = 2**24
_INT_MAX = 2**31 - 1  # the most FFmpeg's max_pixels takes
_ATTACHED_PICTURE = 0x400  # FFmpeg's disposition of cover art
_PICTURE_BRANDS = frozenset({"avif", "heic", "heix", "mif1"})  # MP4 files of one picture


def choose_frames(
    num_stream_frames: int, average_fps: float, *, num_frames: int, fps: float | None
) -> list[int]:
    """Choose which frames of a file are used (model.md 3.8).

    With `fps`, every round(average_fps / fps)-th frame; without, or where those are more than
    `num_frames`, linspace(0, N − 1, num_frames) truncated to integers. Unlike the tutorial, a clip
    of fewer than `num_frames` frames is taken whole instead of repeating frames.

    Args:
        num_stream_frames: N, frames in the file.
        average_fps: of the file; used only with `fps`.
        num_frames: the most to choose.
        fps: wanted frames per second, or None.

    Returns:
        Frame numbers, rising.
    """
    indices = list(range(num_stream_frames))
    if fps is not None:
        indices = indices[:: max(1, round(average_fps / fps))]
    if len(indices) > num_frames:
        spread = np.linspace(0, num_stream_frames - 1, num_frames)
        indices = [int(index) for index in spread]
    return indices


def decode_clip(
    file: BinaryIO,
    name: str,
    limits: MediaLimits,
    num_frames: int,
    fps: float | None,
    exif: bool,
) -> UInt8Array:
    """Decodes the chosen frames of a clip.

    Args:
        file: the encoded clip, seekable.
        name: of the clip, for messages.
        limits: of the clip.
        num_frames: frames to choose at most.
        fps: frames per second to choose instead.
        exif: turn frames as the clip's display matrix says.

    Returns:
        (frames, height, width, 3).

    Raises:
        MediaError: not decodable, no frames, or beyond a limit.
    """
    try:
        import av
    except ImportError as error:
        raise MediaError(
            f"video {name} needs PyAV, which is not installed; without it, expected an array or a "
            "list of frames. Run 'pip install av'."
        ) from error
    try:
        with _open_clip(file, limits) as container:
            count, average_fps = _probe_clip(container, name, limits, fps)
        while True:
            indices = choose_frames(count, average_fps, num_frames=num_frames, fps=fps)
            check_clip(len(indices), (1, 1), limits)
            file.seek(0)
            with _open_clip(file, limits) as container:
                frames, decoded = _decode_frames(container, indices, limits, exif)
                if count == 1:
                    _refuse_picture(container, name)
            if frames is not None:
                return frames
            # Packets without a picture of their own (field pairs, hidden frames): count was high.
            count = decoded
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(
            f"video {name} cannot be decoded ({type(error).__name__}: {error}); expected a "
            "complete, valid clip in one file, with frames of at most "
            f"{limits.max_frame_pixels} pixels (MediaLimits.max_frame_pixels). Check that it was "
            "written or downloaded completely."
        ) from error


def _open_clip(file: BinaryIO, limits: MediaLimits) -> "av.container.InputContainer":
    import av

    # A clip may be a playlist ("ffconcat", HLS); without the list FFmpeg opens the files it names.
    options = {"protocol_whitelist": "none", **_decoder_options(limits)}
    return av.open(file, "r", options=options, metadata_errors="replace")


def _decoder_options(limits: MediaLimits) -> dict[str, str]:
    """No frame far beyond the limit is allocated; frames may be larger than the header says."""
    return {"max_pixels": str(min(limits.max_frame_pixels + _MAX_PADDING, _INT_MAX))}


def _video_stream(container: "av.container.InputContainer") -> "av.video.VideoStream | None":
    for stream in container.streams.video:
        is_cover = stream.disposition.value & _ATTACHED_PICTURE  # a Flag, no IntFlag, up to PyAV 15
        if not is_cover and stream.codec_context is not None:
            return stream
    return None


def _probe_clip(
    container: "av.container.InputContainer", name: str, limits: MediaLimits, fps: float | None
) -> tuple[int, float]:
    stream = _video_stream(container)
    if stream is None:
        raise MediaError(
            f"video {name} has no video stream that can be decoded (streams: "
            f"{[each.type for each in container.streams]}); expected one. Check the file."
        )
    context = stream.codec_context
    # Zero means unknown before decoding; then the first frame is checked.
    check_clip(1, (context.height or 1, context.width or 1), limits)
    rate = stream.average_rate or stream.guessed_rate
    if fps is not None and not rate:
        raise MediaError(
            f"video {name} does not say its frame rate; expected one for fps={fps}. Use fps=None."
        )
    # Counted, because the header's number is often absent or wrong.
    count = 0
    for packet in container.demux(stream):
        count += bool(packet.size and not packet.is_discard)
        if count > limits.max_stream_frames:
            raise MediaError(
                f"video {name} has more than {limits.max_stream_frames} frames in its file, the "
                "most allowed. Cut it or raise MediaLimits.max_stream_frames."
            )
    return count, float(rate or 0.0)


def _refuse_picture(container: "av.container.InputContainer", name: str) -> None:
    """Refuses the formats that are pictures; one frame of a GIF or a clip's format is a clip."""
    demuxer, brand = container.format.name, container.metadata.get("major_brand")
    is_picture = demuxer in {"image2", "ico"} or demuxer.endswith("_pipe")
    if is_picture or brand in _PICTURE_BRANDS:
        raise MediaError(
            f"video {name} is a picture; expected a clip. For a video made of frames pass a list "
            "of them, videos=[[frame, ...]]; a picture goes to images=."
        )


def _decode_frames(
    container: "av.container.InputContainer",
    indices: Sequence[int],
    limits: MediaLimits,
    exif: bool,
) -> tuple[UInt8Array | None, int]:
    stream = _video_stream(container)
    assert stream is not None
    stream.thread_type = "AUTO"
    stream.codec_context.options = _decoder_options(limits)
    try:
        return _take_frames(container.decode(stream), indices, limits, exif)
    finally:
        # Closing a decoder joins its threads while PyAV holds the GIL, for which they wait where
        # av.logging has a level and they have something to say. Here they finish without it.
        stream.codec_context.flush_buffers()


def _take_frames(
    decoder: "Iterator[av.video.VideoFrame]",
    indices: Sequence[int],
    limits: MediaLimits,
    exif: bool,
) -> tuple[UInt8Array | None, int]:
    frames: UInt8Array | None = None
    size: tuple[int, int] | None = None
    taken = decoded = 0
    for frame in decoder:
        check_clip(1, (frame.height, frame.width), limits)
        if decoded == indices[taken]:
            if size is None:
                size = frame.height, frame.width
                check_clip(len(indices), size, limits)
            # A stream that changes its size half-way is brought to the first frame's.
            picture = frame.to_ndarray(format="rgb24", height=size[0], width=size[1])
            picture = np.rot90(picture, round(frame.rotation / 90) if exif else 0)
            if frames is None:
                frames = np.empty((len(indices), *picture.shape), np.uint8)
            frames[taken] = picture
            taken += 1
            if taken == len(indices):
                return frames, decoded + 1
        decoded += 1
    return None, decoded
