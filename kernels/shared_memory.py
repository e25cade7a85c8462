"""The shared memory that one block may have, which bounds a kernel's tiles and pipeline."""

from functools import cache

import torch
import triton

# Of sm_86, sm_89 and sm_120; sm_80 has 166 912 bytes, sm_90 and sm_100 have LARGE.
SMALL, LARGE = 101_376, 232_448


def shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that one block may have on a device; LARGE in the interpreter."""
    return LARGE if device.type != "cuda" else _of_index(device.index or 0)


@cache
def _of_index(index: int) -> int:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["max_shared_mem"])
