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

# Attention.

def view_attention(
    pool: ThreadPool,
    qkv: NDArray[np.float32],
    num_heads: int,
    tokens_per_view: int,
    out: NDArray[np.float32],
) -> None: ...
def causal_attention(
    pool: ThreadPool,
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    positions: NDArray[np.int64] | int,
    out: NDArray[np.float32],
) -> None: ...
def decode_attention(
    pool: ThreadPool,
    q: NDArray[np.float32],
    k_cache: NDArray[np.float32],
    v_cache: NDArray[np.float32],
    slots: NDArray[np.int32],
    positions: NDArray[np.int32],
    out: NDArray[np.float32],
) -> None: ...

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

# Norms.

def layer_norm(
    pool: ThreadPool,
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    eps: float,
    out: NDArray[np.float32],
) -> None: ...
def rms_norm(
    pool: ThreadPool,
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    eps: float,
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

# Rotary position embedding.

def rope_and_store(
    pool: ThreadPool,
    qkv: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    k_cache: NDArray[np.float32],
    v_cache: NDArray[np.float32],
    start: int,
    num_heads: int,
    num_kv_heads: int,
) -> None: ...
def rope_and_store_rows(
    pool: ThreadPool,
    qkv: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    k_cache: NDArray[np.float32],
    v_cache: NDArray[np.float32],
    slots: NDArray[np.int32],
    positions: NDArray[np.int32],
    num_heads: int,
) -> None: ...
