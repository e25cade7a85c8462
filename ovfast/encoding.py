"""Encoding media for a handle: their rows, and the beginning of a prompt over them."""

import torch

from ovfast.encoded_media import EncodedMedia, EncodedStore, Held
from ovfast.errors import CapacityError, OptionError, PromptError
from ovfast.model_inputs import ModelInputs
from ovfast.scheduler import Loaded, Scheduler


def encode_media(
    scheduler: Scheduler, store: EncodedStore, inputs: ModelInputs, keep: str
) -> EncodedMedia:
    """Encodes the media of one laid-out prompt; needs no slot.

    Args:
        scheduler: of the engine.
        store: of the engine; takes the handle in.
        inputs: a prompt with pictures or videos.
        keep: "features", or "prefix" for the prompt up to the last of them.

    Returns:
        The handle.

    Raises:
        CapacityError: the store or the device has no room.
        OptionError: the media are encoded already.
        PromptError: no media.
    """
    if inputs.encoded is not None:
        raise OptionError(
            "encode() got ModelInputs over a handle; expected pictures or videos. Use the handle"
            " that there is."
        )
    if not inputs.spans:
        raise PromptError(
            "encode() got a prompt without pictures and videos; expected at least one. Text alone"
            " needs no handle."
        )
    handle = _new_handle(inputs, keep)
    try:
        scheduler.step(lambda loaded: store.add(handle, _reserve(loaded, store, inputs, handle)))
        embeds = scheduler.embed(inputs)
        held = handle.held()
        scheduler.step(lambda loaded: _fill(held, inputs, embeds))
        if held.prefix is not None:
            rows = embeds[: held.prefix.max_positions]
            scheduler.prefill(rows, held.prefix, 0, 0, lambda *_: None, positions_wanted=())
    except BaseException:  # the error's traceback may keep the handle for long
        handle.release()
        raise
    return handle


def _new_handle(inputs: ModelInputs, keep: str) -> EncodedMedia:
    sizes: dict[str, list[tuple[int, ...]]] = {"image": [], "video": []}
    for span in inputs.spans:
        sizes[span.kind].append(inputs.media[span.plan_index].shape)
    return EncodedMedia(
        keep,
        inputs.visual,
        tuple((height, width) for height, width, _ in sizes["image"]),
        tuple((frames, (height, width)) for frames, height, width, _ in sizes["video"]),
        inputs.num_visual_tokens,
        inputs.spans[-1].end if keep == "prefix" else 0,
    )


def _reserve(
    loaded: Loaded, store: EncodedStore, inputs: ModelInputs, handle: EncodedMedia
) -> Held:
    """Memory for a handle; nothing in it yet."""
    model, length = loaded.model, handle.num_prefix_tokens
    hidden_size = model.config.text.hidden_size
    row_bytes = hidden_size * model.dtype.itemsize
    num_bytes = handle.num_visual_tokens * row_bytes + length * loaded.cache.bytes_per_token
    store.check_room(num_bytes)
    try:
        return Held(
            torch.empty(
                (handle.num_visual_tokens, hidden_size), dtype=model.dtype, device=model.device
            ),
            model.new_cache(num_slots=1, max_positions=length) if length else None,
            inputs.sources[:length],
        )
    except (CapacityError, RuntimeError, MemoryError) as error:
        raise CapacityError(
            f"encode() needs {num_bytes} bytes for these media, which {model.device} cannot"
            " reserve. Release handles, or use keep='features' or smaller media."
        ) from error


def _fill(held: Held, inputs: ModelInputs, embeds: torch.Tensor) -> None:
    for span, first in inputs.feature_rows:
        held.features[first : first + span.end - span.start] = embeds[span.start : span.end]
