from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Threads and instruction sets.

class ThreadPool:
    def __init__(self, num_threads: int) -> None: ...
    @property
    def num_threads(self) -> int: ...

def isa() -> str: ...
def isas() -> list[str]: ...
def use_isa(isa: str) -> None: ...
def read_bandwidth(pool: ThreadPool, num_bytes: int) -> float: ...

# Linear layers.

class PackedWeights:
    def __init__(self, kind: str, rows: int, cols: int, buffer: NDArray[np.uint8]) -> None: ...
    @property
    def kind(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...
    def bytes(self) -> NDArray[np.uint8]: ...

def pack(
    pool: ThreadPool, kind: str, sources: Sequence[NDArray[Any]], interleaved: bool = False
) -> PackedWeights: ...
def linear(
    pool: ThreadPool,
    x: NDArray[np.float32],
    weights: PackedWeights,
    bias: NDArray[np.float32] | None,
    activation: str,
    accumulates: bool,
    out: NDArray[np.float32],
) -> None: ...
def embed(
    pool: ThreadPool,
    weights: PackedWeights,
    ids: NDArray[np.int32],
    out: NDArray[np.float32],
) -> None: ...

# Pictures.

def pack_views(
    resized: NDArray[np.uint8],
    offset_top: int,
    offset_left: int,
    grid_rows: int,
    grid_cols: int,
    fill: int,
    out: NDArray[np.uint8],
) -> None: ...
