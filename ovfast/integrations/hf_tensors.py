"""The tensors of transformers' LlavaOnevisionProcessor, turned back into requests.

Its pixel values are normalised floats that came from bytes; the bytes are recovered exactly, or the
tensor is refused: nothing is rounded to what it might have been.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovfast.anyres import VisualOptions, VisualPlan, plan_image, plan_video
from ovfast.config import ModelConfig
from ovfast.errors import MediaError, OptionError, PromptError
from ovfast.integrations.token_prompts import Kind, Medium, with_views
from ovfast.model_inputs import ModelInputs
from ovfast.reference_pixels import UInt8Array

__all__ = [
    "ANYRES",
    "Row",
    "image_plans",
    "normalise",
    "prompt_rows",
    "recover_bytes",
    "requests",
]

# transformers decides by batch_num_images which pictures are cut into crops; it rounds as "hf".
ANYRES = VisualOptions(token_policy="anyres")
SQUARE = VisualOptions()
SEVERAL = 2  # pictures of one prompt, which makes squares of them


class Row(NamedTuple):
    """One prompt of a padded batch: its ids, (num_tokens,) int64, and where they begin."""

    first: int
    ids: NDArray[np.int64]


def prompt_rows(input_ids: object, attention_mask: object, pad_token_id: int | None) -> list[Row]:
    """The prompts of a padded batch, without their padding.

    Args:
        input_ids: (batch, length) integers.
        attention_mask: (batch, length), 0 at padding on either side; None takes `pad_token_id` for
            padding, where there is one.
        pad_token_id: the padding's id.

    Raises:
        OptionError: tensors of another shape, or a mask with holes.
    """
    right = isinstance(input_ids, Tensor) and input_ids.ndim == 2 and len(input_ids) > 0
    if not isinstance(input_ids, Tensor) or not right or input_ids.is_floating_point():
        raise OptionError(
            f"input_ids={_shape(input_ids)}; expected an integer tensor (batch, length). Call the"
            " processor with return_tensors='pt'."
        )
    ids = input_ids.detach().cpu().to(torch.int64).numpy()
    if attention_mask is None:
        mask = np.ones_like(ids) if pad_token_id is None else (ids != pad_token_id).astype(np.int64)
    elif isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape:
        mask = (attention_mask.detach().cpu() != 0).to(torch.int64).numpy()
    else:
        raise OptionError(
            f"attention_mask={_shape(attention_mask)} for input_ids of shape"
            f" {tuple(input_ids.shape)}; expected the same shape. Pass the processor's."
        )
    return [_row(row, kept, index) for index, (row, kept) in enumerate(zip(ids, mask, strict=True))]


def requests(
    rows: Sequence[Row],
    config: ModelConfig,
    *,
    pixel_values: Any = None,
    image_sizes: Any = None,
    batch_num_images: Any = None,
    pixel_values_videos: Any = None,
) -> list[ModelInputs]:
    """One request a row; pictures and videos go to the rows in order, as the placeholders count.

    Args:
        rows: of `prompt_rows`.
        config: of the checkpoint.
        pixel_values: (num_images, max_views, 3, side, side), filled up with any values, or
            (num_views, 3, side, side).
        image_sizes: (num_images, 2): height and width of the originals.
        batch_num_images: (num_prompts,); pictures of a prompt with several are squares. None cuts
            every picture into crops.
        pixel_values_videos: (num_videos, num_frames, 3, side, side).

    Raises:
        OptionError: tensors of the wrong shape.
        MediaError: pixel values that come from no bytes.
        PromptError: placeholders and pixel values do not fit together.
    """
    images = iter(_images(config, pixel_values, image_sizes, batch_num_images))
    videos = iter(_videos(config, pixel_values_videos))
    media: dict[Kind, Iterator[Medium]] = {"image": images, "video": videos}
    laid_out = [with_views(row.ids, media, config, ANYRES) for row in rows]
    for kind, rest in (("image", images), ("video", videos)):
        if left := len(list(rest)):
            raise PromptError(
                f"{left} {kind}s have no <{kind}> tokens left in input_ids; tokens and features do"
                " not match. Pass the outputs of one processor call."
            )
    return laid_out


def recover_bytes(pixel_values: Tensor) -> UInt8Array:
    """The bytes that normalised pixel values came from.

    Args:
        pixel_values: (num_views, 3, side, side) float32, float16 or bfloat16, normalised with mean
            and deviation 0.5 by any of transformers' processors.

    Returns:
        (num_views, side, side, 3) uint8, of which the same formula makes exactly these values.

    Raises:
        MediaError: there are no such bytes.
    """
    pixels = pixel_values.detach().cpu()
    if not pixels.is_floating_point():
        raise MediaError(
            f"pixel values of dtype {pixels.dtype}; expected normalised floats. Leave do_rescale"
            " and do_normalize on."
        )
    values = pixels.float().numpy()  # what half precision holds, float32 holds too
    if (np.abs(values) <= 1).all():
        levels = (values * 127.5 + 128).astype(np.uint8)  # 127.5 · value + 127.5, rounded
        if any(np.array_equal(table[levels], values) for table in _tables(pixels.dtype)):
            return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))
    raise MediaError(
        "pixel values that are not normalised bytes (mean 0.5, deviation 0.5, scale 1/255);"
        " ovfast computes from bytes and would have to guess them. Pass the processor's output"
        " unchanged, or give the pictures to engine.generate()."
    )


def normalise(views: UInt8Array) -> Tensor:
    """(num_views, side, side, 3) uint8 to (num_views, 3, side, side) float32, as the Pillow
    processor does, to the bit.
    """
    return torch.from_numpy(_tables(torch.float32)[0][views.transpose(0, 3, 1, 2)])


@cache
def _tables(dtype: torch.dtype) -> tuple[NDArray[np.float32], ...]:
    """The value of each byte by each formula of transformers' image and video processors."""
    levels = torch.arange(256, dtype=torch.float64)
    scaled = (levels / 255).float()
    multiplied = levels.float() * torch.tensor(1 / 255, dtype=torch.float32)
    formulas = (
        (scaled - 0.5) / 0.5,
        (levels.float() - 127.5) / 127.5,  # mean and deviation times 255, folded
        (multiplied - 0.5) / 0.5,
    )
    return tuple(values.to(dtype).float().numpy() for values in formulas)


def _images(
    config: ModelConfig, pixel_values: Any, image_sizes: Any, batch_num_images: Any
) -> Iterator[Medium]:
    if pixel_values is None:
        if image_sizes is not None or batch_num_images is not None:
            raise OptionError("image_sizes or batch_num_images without pixel_values; pass both.")
        return
    if not isinstance(pixel_values, Tensor) or pixel_values.ndim not in (4, 5):
        raise OptionError(
            f"pixel_values={_shape(pixel_values)}; expected a tensor (num_images, max_views, 3,"
            " side, side) or (num_views, 3, side, side). Call the processor with"
            " return_tensors='pt'."
        )
    plans = image_plans(config, image_sizes, batch_num_images)
    if pixel_values.ndim == 5 and len(pixel_values) != len(plans):
        raise OptionError(
            f"{len(pixel_values)} pixel_values for {len(plans)} image_sizes; pass both."
        )
    first = 0
    for index, plan in enumerate(plans):
        views = pixel_values[index] if pixel_values.ndim == 5 else pixel_values[first:]
        first += plan.num_views
        yield Medium(plan, _views(views[: plan.num_views], plan, "image"))
    if pixel_values.ndim == 4 and first != len(pixel_values):
        raise OptionError(
            f"{len(pixel_values)} views for pictures that have {first}; expected as many. Pass the"
            " outputs of one processor call."
        )


def image_plans(config: ModelConfig, image_sizes: Any, batch_num_images: Any) -> list[VisualPlan]:
    """Plans of pictures, as transformers' model makes them of their sizes.

    Args:
        config: of the checkpoint.
        image_sizes: (num_images, 2): height and width of the originals.
        batch_num_images: as in `requests`.

    Raises:
        OptionError: the two do not fit together.
    """
    sizes = _integers("image_sizes", image_sizes, 2)
    counts = [1] * len(sizes)
    if batch_num_images is not None:
        counts = [row[0] for row in _integers("batch_num_images", batch_num_images, 1)]
        if sum(counts) != len(sizes) or min(counts) < 0:
            raise OptionError(
                f"batch_num_images={counts} for {len(sizes)} pictures; expected their sum to be"
                " the number of pictures. Pass the processor's."
            )
    is_single = [count == 1 for count in counts for _ in range(count)]
    return [
        plan_image(
            (height, width),
            config.geometry,
            ANYRES if single else SQUARE,
            num_images=1 if single else SEVERAL,
        )
        for (height, width), single in zip(sizes, is_single, strict=True)
    ]


def _videos(config: ModelConfig, pixel_values: Any) -> Iterator[Medium]:
    if pixel_values is None:
        return
    if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 5:
        raise OptionError(
            f"pixel_values_videos={_shape(pixel_values)}; expected a tensor (num_videos,"
            " num_frames, 3, side, side)."
        )
    side = config.vision.image_size
    for frames in pixel_values:
        plan = plan_video(len(frames), (side, side), config.geometry, ANYRES)
        yield Medium(plan, _views(frames, plan, "video"))


def _views(pixels: Tensor, plan: VisualPlan, kind: str) -> UInt8Array:
    expected = (plan.num_views, 3, plan.image_size, plan.image_size)
    if tuple(pixels.shape) != expected:
        raise OptionError(
            f"pixel values of shape {tuple(pixels.shape)} for a {kind} that has {expected} at"
            " this checkpoint. Use its own processor, and image_sizes as (height, width)."
        )
    return recover_bytes(pixels)


def _integers(name: str, values: Any, width: int) -> list[list[int]]:
    """Rows of `width` integers, from a tensor, an array or lists."""
    try:
        rows = torch.as_tensor(np.asarray(values.cpu() if isinstance(values, Tensor) else values))
        if not rows.is_floating_point() and rows.ndim == (1 if width == 1 else 2):
            rows = rows.reshape(len(rows), -1)
            if not len(rows) or rows.shape[1] == width:
                return [[int(value) for value in row] for row in rows]
    except (TypeError, ValueError, RuntimeError):
        pass
    shape = "(num_prompts,)" if width == 1 else "(num_images, 2), height and width"
    raise OptionError(f"{name}={values!r:.100}; expected integers {shape}. Pass the processor's.")


def _row(ids: NDArray[np.int64], mask: NDArray[np.int64], index: int) -> Row:
    kept = np.flatnonzero(mask)
    if not len(kept):
        raise OptionError(f"row {index} of input_ids is padding alone; expected a prompt.")
    first, last = kept[0], kept[-1] + 1
    if last - first != len(kept):
        raise OptionError(
            f"attention_mask of row {index} has zeros between ones; expected padding on the left or"
            " on the right only. Remove the tokens instead."
        )
    return Row(int(first), ids[first:last])


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__}"
