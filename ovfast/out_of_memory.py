"""Which errors mean that memory ran out, and what they are turned into.

torch has an error of its own for what its allocator cannot give. Libraries that allocate for
themselves, and the driver, say it in words.
"""

import traceback

import torch

from ovfast.errors import CapacityError

__all__ = ["capacity_error", "free_frames", "is_out_of_memory"]

WORDS = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def free_frames(error: BaseException) -> None:
    """Lets go of what the functions that an error came through held: it may be kept for long.

    Who tries again with less does so where the error is handled, and needs the memory there.
    """
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__


def capacity_error(error: BaseException) -> CapacityError | None:
    """What a request that ran out of memory raises; None where `error` says something else."""
    if not is_out_of_memory(error):
        return None
    free_frames(error)
    full = CapacityError(
        f"the device has no memory left for this request ({str(error) or type(error).__name__})."
        " Use fewer or smaller pictures, lower max_views or num_frames, or load with a smaller"
        " max_seq_len or max_batch_size."
    )
    full.__cause__ = error
    return full
