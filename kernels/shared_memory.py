"""The shared memory that one block may have, which bounds a kernel's tiles and pipeline."""

from functools import cache

import torch
import triton

# Of sm_86, sm_89 and sm_120; sm_80 has 166 912 bytes, sm_90 and sm_100 have LARGE.
SMALL, LARGE = 101_376, 232_448


def shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that one block may have on a device; LARGE in the interpreter."""
    if device.type != "cuda":
        return LARGE
    return _of_index(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _of_index(index: int) -> int:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["max_shared_mem"])
