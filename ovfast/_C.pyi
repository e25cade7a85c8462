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

# The decode step.

class Decoder:
    def __init__(
        self,
        pool: ThreadPool,
        embedding: PackedWeights,
        norm: NDArray[np.float32],
        head: PackedWeights,
        eps: float,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
    ) -> None: ...
    def add_layer(
        self,
        input_norm: NDArray[np.float32],
        qkv: PackedWeights,
        qkv_bias: NDArray[np.float32],
        o: PackedWeights,
        post_norm: NDArray[np.float32],
        gate_up: PackedWeights,
        down: PackedWeights,
    ) -> None: ...
    def step(
        self,
        k_cache: NDArray[np.float32],
        v_cache: NDArray[np.float32],
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        forbidden: NDArray[np.uint8],
        logits: NDArray[np.float32],
        greedy: NDArray[np.int32],
    ) -> None: ...

# Attention.

def view_attention(
    pool: ThreadPool,
    qkv: NDArray[np.float32],
    num_heads: int,
    tokens_per_view: int,
    out: NDArray[np.float32],
    quantized: bool = False,
) -> None: ...
def causal_attention(
    pool: ThreadPool,
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    positions: NDArray[np.int64] | int,
    out: NDArray[np.float32],
    quantized: bool = False,
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
    wide_inputs: bool = False,
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
def resample(
    pool: ThreadPool,
    source: NDArray[np.uint8],
    first: NDArray[np.int32],
    coefficients: NDArray[np.int32],
    axis: int,
    out: NDArray[np.uint8],
    offset: int = 0,
    fill: int = 0,
) -> None: ...
def patch_embed(
    pool: ThreadPool,
    pixels: NDArray[np.uint8],
    windows: NDArray[np.int64],
    weights: PackedWeights,
    offset: NDArray[np.float32],
    image_size: int,
    out: NDArray[np.float32],
) -> None: ...
def place(
    pool: ThreadPool,
    projected: NDArray[np.float32],
    index: NDArray[np.int32],
    weight: NDArray[np.float32],
    newline: NDArray[np.float32],
    token_ids: NDArray[np.int32] | None,
    embedding: PackedWeights | None,
    out: NDArray[np.float32],
) -> None: ...

# The choice of tokens.

def argmax(
    pool: ThreadPool,
    logits: NDArray[np.float32],
    forbidden: NDArray[np.uint8],
    out: NDArray[np.int32],
) -> None: ...
def sample(
    logits: NDArray[np.float32],
    forbidden: NDArray[np.uint8],
    seen: NDArray[np.uint8] | None,
    suppressed: NDArray[np.int32],
    penalty: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
) -> int: ...

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
