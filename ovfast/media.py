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
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from ovfast.errors import MediaError
from ovfast.media_limits import MediaLimits, check_clip, check_pixels
from ovfast.video_file import choose_frames, decode_clip

__all__ = ["MediaLimits", "choose_frames", "load_image", "load_video"]

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
# Formats whose header says what will be decoded. Of Pillow's others EPS starts Ghostscript, stubs
# call what the program has registered, IPTC, ICO, ICNS and BLP hold a picture of another size.
# HEIF and JXL come with packages that register them.
_COMMON_FORMATS = {"BMP", "DIB", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
_RARE_FORMATS = {"AVIF", "DDS", "HEIF", "JPEG2000", "JXL", "PCX", "QOI", "SGI", "TGA"}
_FORMATS = frozenset(_COMMON_FORMATS | _RARE_FORMATS)
_PICTURES = (
    "a path, encoded bytes, a data URI, a PIL image, or a uint8 array or tensor (height, width, 3)"
)
_CLIPS = (
    "a path, encoded bytes, a uint8 array or tensor (frames, height, width, 3), or a list of frames"
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
        check_pixels(array.shape[0], array.shape[1], "image", limits.max_image_pixels)
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
        check_clip(array.shape[0], array.shape[1:3], limits)
        return _own(array)
    if isinstance(source, Image.Image):
        raise MediaError(f"video is a PIL image; expected {_CLIPS}. Pass [image] for one frame.")
    with _open_source(source, "video", limits.max_video_bytes, "max_video_bytes") as file:
        return decode_clip(file, _describe(source), limits, num_frames, fps, exif)


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
    file, tried = io.BytesIO(data), set[str]()
    for initialise in (Image.preinit, Image.init):
        initialise()
        untried = [key for key in Image.ID if key in _FORMATS and key not in tried]
        for key in [key for key in untried if key in Image.OPEN]:
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
        f"image {name} is in no known picture format; expected PNG, JPEG, WebP, GIF, TIFF, BMP, "
        "AVIF or JPEG 2000. Convert it; clips go to videos=, and HEIC needs pillow-heif."
    )


def _undecodable(name: str, error: BaseException) -> MediaError:
    return MediaError(
        f"image {name} cannot be decoded ({type(error).__name__}: {error}); expected a complete, "
        "valid picture. Check that it was written or downloaded completely."
    )


def _decode_picture(picture: Image.Image, name: str, limits: MediaLimits, exif: bool) -> UInt8Array:
    _check_size(picture.size, name, limits)
    # The further pictures of an MPO are a camera's previews.
    if picture.format != "MPO" and _ask(lambda: picture.is_animated, False):  # type: ignore[attr-defined]
        _logger.info("image %s holds several frames or pages; one of them is used", name)
    try:
        picture.load()
        _check_size(picture.im.size, name, limits)  # what was decoded, whatever the header said
        rgb = _to_rgb(picture, name)
        orientation = _ask(lambda: picture.getexif().get(_ORIENTATION_TAG), None)
        method = _ORIENTATIONS.get(orientation) if exif else None
        return np.array(rgb if method is None else rgb.transpose(method))
    except MediaError:
        raise
    except Exception as error:  # decoders raise anything on damaged data
        raise _undecodable(name, error) from error


def _check_size(size: tuple[int, int], name: str, limits: MediaLimits) -> None:
    width, height = size
    check_pixels(height, width, f"image {name}", limits.max_image_pixels)


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


def _stack_pictures(sources: Sequence[object], limits: MediaLimits, exif: bool) -> UInt8Array:
    check_clip(len(sources), (1, 1), limits)
    first = load_image(sources[0], limits=limits, exif=exif)
    check_clip(len(sources), first.shape[:2], limits)
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
