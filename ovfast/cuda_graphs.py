"""Captured work by shape: which shapes are captured, how much memory they may take, which go first.

`GraphCache` is the policy and knows no device; `CudaCapture` records on a CUDA device. A shape is
computed eagerly when first seen, which also compiles its kernels, and captured when it comes again:
a shape seen once is not worth the capture. Captured work equals eager work bit for bit, as both
launch the same kernels on the same values.

What is captured shares one pool of memory, which comes free as a whole, with the last recording. So
the pool counts until then, and where it leaves no room all recordings go.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["DEFAULT_GRAPH_BYTES", "CudaCapture", "GraphCache"]

DEFAULT_GRAPH_BYTES = 1 << 30
# Works on tensors at fixed addresses; what changes between calls is its argument, if it takes one.
Body = Callable[..., None]

logger = logging.getLogger(__name__)


class Captured(Protocol):
    """Work recorded for one shape.

    Attributes:
        nbytes: device memory of its own, free again when it is released.
        pool_bytes: what the shared pool grew by for it, free again when all are released.
    """

    nbytes: int
    pool_bytes: int

    def replay(self, tensor: Tensor | None) -> None:
        """Does what the recorded body does, to `tensor` if it takes one."""

    def release(self) -> None:
        """Frees its memory; it is not replayed again."""


class GraphCache:
    """Replays work by key under a ceiling of memory; the least recently used goes first.

    The ceiling holds after each `run`; a capture may pass it while it is made. Not thread-safe:
    called inside the engine's steps.

    Args:
        capture: records a body, on a tensor of the shape it will be replayed with.
        max_bytes: ceiling of all recordings together; 0 captures nothing.
    """

    def __init__(self, capture: Callable[[Body, Tensor | None], Captured], max_bytes: int) -> None:
        self._capture, self._max_bytes = capture, max_bytes
        self._graphs: OrderedDict[Hashable, Captured] = OrderedDict()
        self._pool_bytes = 0
        self._seen: set[Hashable] = set()
        self._refused: set[Hashable] = set()

    @property
    def nbytes(self) -> int:
        """Memory held by recordings and their pool."""
        return self._pool_bytes + sum(graph.nbytes for graph in self._graphs.values())

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """What is recorded, the least recently used first."""
        return tuple(self._graphs)

    def run(self, key: Hashable, body: Body, tensor: Tensor | None = None) -> None:
        """Does `body(tensor)` or `body()` once, replayed where it has been recorded.

        Args:
            key: names the body, the tensor's shape, and whatever else decides what is launched.
            body: overwrites the tensor.
            tensor: input and output; None for a body that takes none.
        """
        graph = self._graphs.get(key)
        if graph is None and key in self._seen and key not in self._refused:
            graph = self._record(key, body, tensor)
        if graph is None:
            call(body, tensor)
            self._seen.add(key)
            return
        self._graphs.move_to_end(key)
        graph.replay(tensor)

    def has_room(self) -> bool:
        """Whether one more, as large as the largest so far, would leave all in place."""
        largest = max((g.nbytes + g.pool_bytes for g in self._graphs.values()), default=0)
        return self.nbytes + max(largest, 1) <= self._max_bytes

    def is_refused(self, key: Hashable) -> bool:
        """Whether a recording failed or never fits: the key runs without."""
        return key in self._refused

    def clear(self) -> None:
        """Frees all recordings."""
        while self._graphs:
            self._graphs.popitem()[1].release()
        self._pool_bytes = 0

    def _record(self, key: Hashable, body: Body, tensor: Tensor | None) -> Captured | None:
        if self._max_bytes <= 0:
            return None
        shares_pool = self.nbytes > 0
        need_bytes = self._add(key, body, tensor)
        if need_bytes > self._max_bytes and shares_pool:
            # The pool is too large, perhaps for others' sake: what it takes alone is seen alone.
            self.clear()
            need_bytes = self._add(key, body, tensor)
        if need_bytes > self._max_bytes:
            logger.info(
                "the graph of %r takes %d bytes, above graph_memory_bytes=%d; it runs without",
                key,
                need_bytes,
                self._max_bytes,
            )
            self.clear()
            self._refused.add(key)
        self._evict(key)
        return self._graphs.get(key)

    def _add(self, key: Hashable, body: Body, tensor: Tensor | None) -> int:
        """Captures; the bytes that would be held with all others evicted, 0 if it failed."""
        try:
            graph = self._capture(body, tensor)
        except RuntimeError as error:  # memory, or whatever else a capture does not allow
            logger.warning("capturing %r failed (%s); it runs without a graph", key, error)
            self.clear()  # with the pool, which may have grown
            self._refused.add(key)
            return 0
        self._graphs[key] = graph
        self._pool_bytes += graph.pool_bytes
        return self._pool_bytes + graph.nbytes

    def _evict(self, kept: Hashable) -> None:
        """Releases the least recently used that hold memory of their own, but for one."""
        for key in [key for key, graph in self._graphs.items() if graph.nbytes and key != kept]:
            if self.nbytes <= self._max_bytes:
                return
            self._graphs.pop(key).release()


def call(body: Body, tensor: Tensor | None) -> None:
    """Calls a body with its tensor, if it takes one."""
    if tensor is None:
        body()
    else:
        body(tensor)


class CudaCapture:
    """Records bodies as CUDA graphs that share one memory pool.

    They may share it because only one runs at a time and none keeps anything there between runs:
    input and output live in a buffer of the graph's own. The pool's memory comes free with the last
    graph; the next one begins a new pool.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # torch names the handle's type privately
        self._num_graphs = 0  # in the pool
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, body: Body, tensor: Tensor | None) -> Captured:
        with torch.cuda.device(self._device):
            if self._stream is None:
                # torch's own is of the device that captured first in the process.
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            if self._num_graphs == 0:
                self._pool = torch.cuda.graph_pool_handle()
            buffer = None if tensor is None else torch.zeros_like(tensor)
            # Capturing empties torch's cache, which would hide what the graph takes.
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            free_before, _ = torch.cuda.mem_get_info(self._device)
            graph, outer = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
            try:
                # thread_local: other threads of the process may allocate on the device meanwhile.
                with torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ):
                    call(body, buffer)
            finally:
                torch.cuda.set_stream(outer)  # a capture that fails leaves its own
            free_after, _ = torch.cuda.mem_get_info(self._device)
        self._num_graphs += 1
        return _CudaGraph(graph, buffer, max(0, free_before - free_after), self._released)

    def _released(self) -> None:
        self._num_graphs -= 1


class _CudaGraph:
    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        buffer: Tensor | None,
        pool_bytes: int,
        released: Callable[[], None],
    ) -> None:
        self._graph, self._buffer, self._released = graph, buffer, released
        self.nbytes, self.pool_bytes = 0 if buffer is None else buffer.nbytes, pool_bytes

    def replay(self, tensor: Tensor | None) -> None:
        if tensor is None or self._buffer is None:
            self._graph.replay()
            return
        self._buffer.copy_(tensor)
        self._graph.replay()
        tensor.copy_(self._buffer)

    def release(self) -> None:
        self._graph.reset()
        self._buffer = None
        self._released()
