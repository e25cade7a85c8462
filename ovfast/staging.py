"""Host memory to the device without waiting: from ordinary memory a copy would wait for the stream.

`Staging` is for what is large: pinned buffers, a copy stream, events. A copy runs beside what the
device computes; the caller's stream waits for it, the host does not, unless it comes to the same
pinned buffer again. `to_device` is for what is small, in the order of the caller's stream. On a CPU
both use the arrays where they lie.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Staging", "to_device"]

NUM_BUFFERS = 2  # one is filled by the host while the device reads the other


@dataclass(slots=True)
class _Buffer:
    pinned: Tensor
    done: torch.cuda.Event


class Staging:
    """Copies arrays to one device; not thread-safe.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[_Buffer] = []
        self._stream: torch.cuda.Stream | None = None

    def upload(self, array: NDArray[np.generic]) -> Tensor:
        """The array on the device; ready for the current stream at once.

        Args:
            array: any shape; copied, so that it may change after the call (on a CPU it may not).
        """
        if self._device.type != "cuda":
            return torch.from_numpy(np.ascontiguousarray(array))
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        compute = torch.cuda.current_stream(self._device)
        buffer = self._next_buffer(array.nbytes)
        staged = buffer.pinned[: array.nbytes].numpy().view(array.dtype).reshape(array.shape)
        np.copyto(staged, array)
        with torch.cuda.stream(self._stream):
            source = torch.from_numpy(staged)
            out = torch.empty(source.shape, dtype=source.dtype, device=self._device)
            out.copy_(source, non_blocking=True)
            buffer.done.record(self._stream)
        compute.wait_event(buffer.done)
        out.record_stream(compute)
        return out

    def _next_buffer(self, num_bytes: int) -> _Buffer:
        """A buffer that the device has read, at least so large; the oldest one."""
        full = len(self._buffers) == NUM_BUFFERS
        buffer = self._buffers.pop(0) if full else _new_buffer(num_bytes)
        buffer.done.synchronize()
        if buffer.pinned.numel() < num_bytes:
            buffer = _new_buffer(num_bytes)
        self._buffers.append(buffer)
        return buffer


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, ready for the current stream.

    Args:
        tensor: any shape and dtype; copied, so that it may change after the call (on a CPU it may
            not).
        device: where to.
    """
    if device.type != "cuda":
        return tensor
    # torch keeps the pinned block from other use until the copy has been made.
    return tensor.pin_memory().to(device, non_blocking=True)


def _new_buffer(num_bytes: int) -> _Buffer:
    size = 1 << max(16, (max(1, num_bytes) - 1).bit_length())
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return _Buffer(pinned, torch.cuda.Event())  # type: ignore[no-untyped-call]
