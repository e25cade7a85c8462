"""Limits of pictures and clips, and the checks of sizes against them."""

from dataclasses import dataclass, fields

from ovfast.errors import MediaError, OptionError


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


def check_pixels(height: int, width: int, name: str, max_pixels: int, limit: str = "") -> None:
    """Refuses a size without pixels or with more than `max_pixels`; `limit` names the field."""
    if height < 1 or width < 1:
        raise MediaError(
            f"{name} is {height}×{width} (height×width); expected at least 1×1. Check its source."
        )
    if height * width > max_pixels:
        raise MediaError(
            f"{name} is {height}×{width} = {height * width} pixels; at most {max_pixels} are "
            f"allowed. Make it smaller or raise MediaLimits.{limit or 'max_image_pixels'}."
        )


def check_clip(num_frames: int, size_hw: tuple[int, int], limits: MediaLimits) -> None:
    """Refuses a clip of no frames, of too many, or of too many pixels in one frame or in all."""
    height, width = size_hw
    if num_frames < 1:
        raise MediaError("video has no frames; expected at least 1. Check its source.")
    if num_frames > limits.max_video_frames:
        raise MediaError(
            f"video has {num_frames} frames; at most {limits.max_video_frames} are allowed. "
            "Choose fewer (num_frames, fps) or raise MediaLimits.max_video_frames."
        )
    check_pixels(height, width, "frame of a video", limits.max_frame_pixels, "max_frame_pixels")
    if num_frames * height * width > limits.max_video_pixels:
        raise MediaError(
            f"video has {num_frames} frames of {height}×{width} pixels; at most "
            f"{limits.max_video_pixels} pixels in all are allowed. Choose fewer frames, make them "
            "smaller or raise MediaLimits.max_video_pixels."
        )
