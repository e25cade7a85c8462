"""Media: path, bytes, data URI, PIL image, array, tensor or video file → uint8 RGB, within limits.

Owns decoding, conversion to RGB, orientation and the choice of a video's frames. Does not resize
and fetches nothing: URLs are refused. No global state of Pillow, of PyAV or of the `warnings`
module is touched, so any number of threads may load at once.
"""

import base64
import binascii
import io
import logging
import os
import re
import stat
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from ovfast.errors import MediaError, OptionError

if TYPE_CHECKING:
    import av.container
    import av.video

UInt8Array = npt.NDArray[np.uint8]

_logger = logging.getLogger("ovfast")

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow hands EPS to an external Ghostscript process.
_REFUSED_FORMATS = frozenset({"EPS"})
# A clip may be a playlist ("ffconcat", HLS); without this FFmpeg would open the files it names.
_AV_OPTIONS = {"protocol_whitelist": "none"}
_ATTACHED_PICTURE = 0x400  # FFmpeg's disposition of cover art
_PICTURES = (
    "a path, encoded bytes, a data URI, a PIL image, or a uint8 array or tensor (height, width, 3)"
)
_CLIPS = (
    "a path, encoded bytes, a uint8 array or tensor (frames, height, width, 3), or a list of frames"
)


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What one picture or clip may cost; all but the arrays' own size are checked before decoding.

    Args:
        max_image_bytes: encoded size of a picture.
        max_image_pixels: height · width of a picture.
        max_video_bytes: encoded size of a clip.
        max_stream_frames: frames in a clip's file, chosen or not (all are decoded on the way).
        max_video_frames: frames of a clip that go on to the model.
        max_frame_pixels: height · width of one frame.
        max_video_pixels: frames · height · width of the frames that go on (3 bytes each).
    """

    max_image_bytes: int = 268_435_456
    max_image_pixels: int = 150_000_000
    max_video_bytes: int = 4_294_967_296
    max_stream_frames: int = 432_000
    max_video_frames: int = 512
    max_frame_pixels: int = 36_000_000
    max_video_pixels: int = 1_000_000_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(
                    f"MediaLimits({field.name}={value!r}); expected an integer of at least 1. "
                    "Use a large number to switch a limit off."
                )


_DEFAULT_LIMITS = MediaLimits()


def load_image(
    source: object, *, limits: MediaLimits = _DEFAULT_LIMITS, exif: bool = True
) -> UInt8Array:
    """Load one picture as RGB.

    Alpha is dropped (not composited), palettes and CMYK are converted, 16-bit samples keep their
    high byte, and of an animation the first frame is taken. A caller's contiguous, writable array
    is returned as it is, not copied; a caller's PIL image is read at its current frame.

    Args:
        source: path, encoded bytes, base64 data URI, PIL image, uint8 array or tensor
            (height, width, 3).
        limits: refused before decoding where exceeded.
        exif: apply the EXIF orientation of files, bytes and PIL images.

    Returns:
        (height, width, 3) uint8, C-contiguous and writable.

    Raises:
        MediaError: unreadable, of an unknown kind, or over a limit.
    """
    array = _as_array(source, "image")
    if array is not None:
        _check_array(array, "image", ("height", "width", "3"))
        _check_pixels(array.shape[0], array.shape[1], "image", limits.max_image_pixels)
        return _own(array)
    if isinstance(source, Image.Image):
        return _decode_picture(source, "PIL image", limits, exif)
    if isinstance(source, (list, tuple)):
        raise MediaError(
            f"image is a {type(source).__name__}; expected one picture: {_PICTURES}. "
            "Pass its items one by one."
        )
    name = _describe(source)
    with _open_source(source, "image", limits.max_image_bytes, "max_image_bytes") as file:
        data = file.read()
    return _decode_picture(_identify_picture(data, name), name, limits, exif)


def load_video(
    source: object,
    *,
    limits: MediaLimits = _DEFAULT_LIMITS,
    num_frames: int = 32,
    fps: float | None = None,
    exif: bool = True,
) -> UInt8Array:
    """Load one clip as RGB frames.

    Frames of a file are chosen by `choose_frames`; arrays, tensors and lists are used as they are.
    Frames keep no more than the chosen pictures in memory while the file is decoded.

    Args:
        source: path, encoded bytes, uint8 array or tensor (frames, height, width, 3), or a list of
            pictures of one size, each anything `load_image` takes.
        limits: refused before decoding where exceeded.
        num_frames: at most so many frames of a file.
        fps: frames per second to take from a file, or None for `num_frames` spread over all of it.
        exif: apply a file's display rotation (multiples of 90 degrees) and the orientation of
            pictures in a list.

    Returns:
        (frames, height, width, 3) uint8, C-contiguous and writable.

    Raises:
        MediaError: unreadable, without frames, of an unknown kind, or over a limit.
    """
    if isinstance(source, (list, tuple)):
        return _stack_pictures(source, limits, exif)
    array = _as_array(source, "video")
    if array is not None:
        _check_array(array, "video", ("frames", "height", "width", "3"))
        _check_clip(array.shape[0], array.shape[1:3], limits)
        return _own(array)
    if isinstance(source, Image.Image):
        raise MediaError(f"video is a PIL image; expected {_CLIPS}. Pass [image] for one frame.")
    with _open_source(source, "video", limits.max_video_bytes, "max_video_bytes") as file:
        return _decode_clip(file, _describe(source), limits, num_frames, fps, exif)


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


def _describe(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return repr(text if len(text) <= 100 else text[:60] + "…" + text[-20:])
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{type(source).__name__} of {memoryview(source).nbytes} bytes"
    return f"object of type {type(source).__name__}"


def _open_source(source: object, what: str, max_bytes: int, limit: str) -> BinaryIO:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data = _decode_data_uri(source, what, max_bytes, limit)
    elif isinstance(source, (str, os.PathLike)):
        return _open_path(source, what, max_bytes, limit)
    else:
        hint = "Pass file.read()." if hasattr(source, "read") else "Convert it to one of these."
        expected = _PICTURES if what == "image" else _CLIPS
        raise MediaError(f"{what} is an {_describe(source)}; expected {expected}. {hint}")
    _check_bytes(len(data), what, _describe(source), max_bytes, limit)
    return io.BytesIO(data)


def _open_path(path: str | os.PathLike[Any], what: str, max_bytes: int, limit: str) -> BinaryIO:
    name, text = _describe(path), os.fsdecode(path)
    if re.match(r"[a-z][a-z0-9+.-]*://|file:", text, re.IGNORECASE):
        raise MediaError(
            f"{what} {name} is a URL; expected {_PICTURES if what == 'image' else _CLIPS}. "
            "ovfast fetches nothing: download it and pass the bytes or a path."
        )
    try:
        status = os.stat(text)
        # Opening a pipe would wait for its writer for ever.
        if not stat.S_ISREG(status.st_mode):
            kind = "directory" if stat.S_ISDIR(status.st_mode) else "device, pipe or socket"
            raise MediaError(f"{what} {name} is a {kind}; expected a file. Pass a file's path.")
        _check_bytes(status.st_size, what, name, max_bytes, limit)
        return open(text, "rb")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        hint = " For base64 text write a data URI: 'data:;base64,…'." if len(text) > 255 else ""
        raise MediaError(
            f"{what} {name} cannot be opened: {reason}; expected the path of a readable file. "
            f"Check the path.{hint}"
        ) from error


def _decode_data_uri(uri: str, what: str, max_bytes: int, limit: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise MediaError(
            f"{what} {_describe(uri)} is not a base64 data URI; expected "
            "'data:[mediatype];base64,…'. Encode the file with base64."
        )
    # Three bytes from four characters; padding and line breaks only make the estimate generous.
    num_bytes = len(payload) // 4 * 3 - 2
    if num_bytes > max_bytes:
        _check_bytes(num_bytes, what, _describe(uri), max_bytes, limit)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(
            f"{what} {_describe(uri)} is not valid base64 ({error}); expected the standard "
            "alphabet with padding. Encode the file with base64."
        ) from error


def _check_bytes(num_bytes: int, what: str, name: str, max_bytes: int, limit: str) -> None:
    if num_bytes == 0:
        raise MediaError(f"{what} {name} is empty; expected an encoded {what}. Check its source.")
    if num_bytes > max_bytes:
        raise MediaError(
            f"{what} {name} has {num_bytes} bytes; at most {max_bytes} are allowed. "
            f"Make it smaller or raise MediaLimits.{limit}."
        )


def _check_pixels(height: int, width: int, name: str, max_pixels: int, limit: str = "") -> None:
    if height < 1 or width < 1:
        raise MediaError(
            f"{name} is {height}×{width} (height×width); expected at least 1×1. Check its source."
        )
    if height * width > max_pixels:
        raise MediaError(
            f"{name} is {height}×{width} = {height * width} pixels; at most {max_pixels} are "
            f"allowed. Make it smaller or raise MediaLimits.{limit or 'max_image_pixels'}."
        )


def _as_array(source: object, what: str) -> npt.NDArray[Any] | None:
    # Without torch in the process nobody can hold a tensor, and it need not be imported.
    tensor_type = getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor_type is None or not isinstance(source, tensor_type):
        return np.asarray(source) if isinstance(source, np.ndarray) else None
    tensor: Any = source
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != "uint8":
        raise _dtype_error(what, dtype)
    try:
        array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise MediaError(
            f"{what} is a tensor that cannot be read on the host ({error}); expected a dense "
            "uint8 tensor. Pass tensor.cpu()."
        ) from error
    return array


def _dtype_error(what: str, dtype: str) -> MediaError:
    hint = "Convert values of 0…255 with x.astype(np.uint8)."
    if "float" in dtype:
        hint = "Undo any normalisation; for 0…1 use (x * 255).round().astype(np.uint8)."
    return MediaError(f"{what} has dtype {dtype}; expected uint8 with values 0…255. {hint}")


def _check_array(array: npt.NDArray[Any], what: str, axes: tuple[str, ...]) -> None:
    if array.dtype != np.uint8:
        raise _dtype_error(what, str(array.dtype))
    shape = array.shape
    if array.ndim != len(axes):
        hint = (
            "Repeat a grey channel with np.stack([x] * 3, axis=-1); a clip goes to videos=, "
            "several pictures go as a list."
            if what == "image"
            else "For a clip of one frame pass x[None]; a picture goes to images=."
        )
    elif shape[-1] == 3:
        return
    elif shape[-3] == 3:
        hint = "It looks channels-first: np.moveaxis(x, -3, -1)."
    elif shape[-1] == 1:
        hint = "Repeat the grey channel with np.repeat(x, 3, axis=-1)."
    else:
        hint = "Drop alpha or further channels with x[..., :3]."
    raise MediaError(f"{what} has shape {shape}; expected ({', '.join(axes)}) in RGB. {hint}")


def _own(array: npt.NDArray[Any]) -> UInt8Array:
    contiguous = np.ascontiguousarray(array)
    return contiguous if contiguous.flags.writeable else contiguous.copy()


def _identify_picture(data: bytes, name: str) -> Image.Image:
    # As Image.open, less its bomb check: that warns through global state, and at a size of its own.
    file, tried = io.BytesIO(data), set(_REFUSED_FORMATS)
    for initialise in (Image.preinit, Image.init):
        initialise()
        for key in [key for key in Image.ID if key not in tried and key in Image.OPEN]:
            tried.add(key)
            factory, accept = Image.OPEN[key]
            verdict = accept is None or accept(data[:16])
            if not verdict or isinstance(verdict, str):  # a str says why Pillow cannot read it
                continue
            file.seek(0)
            try:
                return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
            except Exception as error:
                raise _undecodable(name, error) from error
    raise MediaError(
        f"image {name} is in no known picture format; expected PNG, JPEG, WebP, GIF, TIFF, BMP or "
        "another that Pillow reads. Convert it; clips go to videos=, and HEIC needs pillow-heif."
    )


def _undecodable(name: str, error: BaseException) -> MediaError:
    return MediaError(
        f"image {name} cannot be decoded ({type(error).__name__}: {error}); expected a complete, "
        "valid picture. Check that it was written or downloaded completely."
    )


def _decode_picture(picture: Image.Image, name: str, limits: MediaLimits, exif: bool) -> UInt8Array:
    width, height = picture.size
    _check_pixels(height, width, f"image {name}", limits.max_image_pixels)
    # The further pictures of an MPO are a camera's previews.
    if picture.format != "MPO" and _ask(lambda: picture.is_animated, False):  # type: ignore[attr-defined]
        _logger.info("image %s holds several frames or pages; one of them is used", name)
    try:
        picture.load()
        rgb = _to_rgb(picture, name)
        orientation = _ask(lambda: picture.getexif().get(_ORIENTATION_TAG), None)
        method = _ORIENTATIONS.get(orientation) if exif else None
        return np.array(rgb if method is None else rgb.transpose(method))
    except MediaError:
        raise
    except Exception as error:  # decoders raise anything on damaged data
        raise _undecodable(name, error) from error


def _ask(read: Callable[[], Any], default: Any) -> Any:
    try:
        return read()
    except Exception:  # noqa: BLE001 - damaged metadata does not spoil the picture
        return default


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    mode = picture.mode
    if mode == "RGB":
        return picture
    if mode == "F":
        raise MediaError(
            f"image {name} has float samples (mode F) of unknown range; expected 8- or 16-bit "
            "integers. Scale it to 0…255 and pass a uint8 array or picture.convert('L')."
        )
    if mode == "I" or mode.startswith("I;16"):
        samples = np.asarray(picture)
        if mode == "I" and (samples.min() < 0 or samples.max() > 65535):
            raise MediaError(
                f"image {name} has 32-bit samples from {samples.min()} to {samples.max()}; "
                "expected 0…65535. Scale it to 0…255 and pass a uint8 array."
            )
        # The high byte, as Pillow reads 16-bit RGB; its own convert() would clip at 255.
        return Image.fromarray((samples >> 8).astype(np.uint8)).convert("RGB")
    # Straight from P, transparency given as bytes warns; premultiplied modes have no way to RGB.
    through = {"P": "RGBA", "RGBa": "RGBA", "La": "LA"}.get(mode)
    return (picture.convert(through) if through else picture).convert("RGB")


def _check_clip(num_frames: int, size_hw: tuple[int, int], limits: MediaLimits) -> None:
    height, width = size_hw
    if num_frames < 1:
        raise MediaError("video has no frames; expected at least 1. Check its source.")
    if num_frames > limits.max_video_frames:
        raise MediaError(
            f"video has {num_frames} frames; at most {limits.max_video_frames} are allowed. "
            "Choose fewer (num_frames, fps) or raise MediaLimits.max_video_frames."
        )
    _check_pixels(height, width, "frame of a video", limits.max_frame_pixels, "max_frame_pixels")
    if num_frames * height * width > limits.max_video_pixels:
        raise MediaError(
            f"video has {num_frames} frames of {height}×{width} pixels; at most "
            f"{limits.max_video_pixels} pixels in all are allowed. Choose fewer frames, make them "
            "smaller or raise MediaLimits.max_video_pixels."
        )


def _stack_pictures(sources: Sequence[object], limits: MediaLimits, exif: bool) -> UInt8Array:
    _check_clip(len(sources), (1, 1), limits)
    first = load_image(sources[0], limits=limits, exif=exif)
    _check_clip(len(sources), first.shape[:2], limits)
    frames = np.empty((len(sources), *first.shape), np.uint8)
    frames[0] = first
    for index, source in enumerate(sources[1:], start=1):
        frame = load_image(source, limits=limits, exif=exif)
        if frame.shape != first.shape:
            raise MediaError(
                f"frame {index} of a video is {frame.shape[0]}×{frame.shape[1]} (height×width) and "
                f"frame 0 is {first.shape[0]}×{first.shape[1]}; expected one size. Resize them."
            )
        frames[index] = frame
    return frames


def _decode_clip(
    file: BinaryIO,
    name: str,
    limits: MediaLimits,
    num_frames: int,
    fps: float | None,
    exif: bool,
) -> UInt8Array:
    try:
        import av
    except ImportError as error:
        raise MediaError(
            f"video {name} needs PyAV, which is not installed; without it, expected an array or a "
            "list of frames. Run 'pip install av'."
        ) from error
    try:
        with av.open(file, "r", options=_AV_OPTIONS, metadata_errors="replace") as container:
            count, average_fps = _probe_clip(container, name, limits, fps)
        while True:
            indices = choose_frames(count, average_fps, num_frames=num_frames, fps=fps)
            _check_clip(len(indices), (1, 1), limits)
            file.seek(0)
            with av.open(file, "r", options=_AV_OPTIONS, metadata_errors="replace") as container:
                frames, decoded = _decode_frames(container, indices, limits, exif)
            if frames is not None:
                return frames
            # Packets without a picture of their own (field pairs, hidden frames): count was high.
            count = decoded
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(
            f"video {name} cannot be decoded ({type(error).__name__}: {error}); expected a "
            "complete, valid clip in one file. Check that it was written or downloaded completely."
        ) from error


def _video_stream(container: "av.container.InputContainer") -> "av.video.VideoStream | None":
    for stream in container.streams.video:
        if not int(stream.disposition) & _ATTACHED_PICTURE and stream.codec_context is not None:
            stream.thread_type = "AUTO"
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
    _check_clip(1, (context.height or 1, context.width or 1), limits)
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


def _decode_frames(
    container: "av.container.InputContainer",
    indices: Sequence[int],
    limits: MediaLimits,
    exif: bool,
) -> tuple[UInt8Array | None, int]:
    stream = _video_stream(container)
    assert stream is not None
    frames: UInt8Array | None = None
    size: tuple[int, int] | None = None
    taken = decoded = 0
    for frame in container.decode(stream):
        if decoded == indices[taken]:
            if size is None:
                size = frame.height, frame.width
                _check_clip(len(indices), size, limits)
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
