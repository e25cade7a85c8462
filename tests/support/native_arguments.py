"""Random arguments that fit the functions of ovfast._C, for native_fuzz."""

import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import numpy as np


def load_native() -> Any:
    """ovfast._C without the rest of ovfast, which imports torch for two seconds."""
    if "ovfast._C" not in sys.modules:
        package = Path(__file__).resolve().parents[2] / "ovfast"
        spec = PathFinder.find_spec("ovfast._C", [str(package)])
        if spec is None or spec.loader is None:
            raise ImportError("the native extension is not built")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["ovfast._C"] = module
    return sys.modules["ovfast._C"]


native = load_native()

Arguments = dict[str, Any]
KINDS = ("float32", "float16", "bfloat16", "int8", "int4")
POOLS = [native.ThreadPool(count) for count in (1, 2, 3)]


class Maker:
    """Random values that fit."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.pool = POOLS[rng.integers(len(POOLS))]

    def size(self, most: int = 40, least: int = 1) -> int:
        return int(self.rng.integers(least, most + 1))

    def one_of(self, *values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def floats(self, *shape: int) -> np.ndarray:
        array = self.rng.standard_normal(shape).astype(np.float32)
        if array.size and self.rng.random() < 0.2:
            array.flat[self.rng.integers(array.size)] = self.one_of(np.nan, np.inf, -np.inf, 1e38)
        return array

    def integers(self, dtype: str, low: int, high: int, *shape: int) -> np.ndarray:
        return self.rng.integers(low, high, shape).astype(dtype)

    def packed(self, rows: int, cols: int, kind: str | None = None) -> Any:
        kind = kind or self.one_of(*KINDS)
        return native.pack(self.pool, kind, [self.floats(rows, cols)])


def pack(m: Maker) -> Arguments:
    cols = m.size()
    sources = []
    for _ in range(m.size(3)):
        source = m.floats(m.size(40, 0), cols)
        sources.append(m.one_of(source, source.astype(np.float16), source.view(np.uint16)[:, ::2]))
        if sources[-1].strides[-1] != sources[-1].itemsize:
            sources[-1] = np.ascontiguousarray(sources[-1])
    return {"kind": m.one_of(*KINDS), "sources": sources, "interleaved": m.rng.random() < 0.2}


def packed_weights(m: Maker) -> Arguments:
    weights = m.packed(m.size(), m.size())
    sizes = {"rows": weights.rows, "cols": weights.cols}
    return {"kind": weights.kind, **sizes, "buffer": weights.bytes()}


def linear(m: Maker) -> Arguments:
    num_rows, rows, cols = m.size(40, 0), m.size(), m.size(200)
    activation = m.one_of("none", "gelu_tanh", "gelu_erf", "silu_mul")
    if activation == "silu_mul":
        halves = [m.floats(rows, cols), m.floats(rows, cols)]
        weights = native.pack(m.pool, m.one_of(*KINDS), halves, True)
    else:
        weights = m.packed(rows, cols)
    return {
        "x": m.floats(num_rows, cols),
        "weights": weights,
        "bias": m.one_of(None, m.floats(weights.rows)),
        "activation": activation,
        "accumulates": m.one_of(False, True),
        "out": m.floats(num_rows, rows),
        "wide_inputs": m.one_of(False, True),
        "bfloat16_inputs": m.one_of(False, weights.kind == "bfloat16", True),
    }


def embed(m: Maker) -> Arguments:
    rows, cols, num = m.size(), m.size(), m.size(20, 0)
    ids = m.integers("int32", 0, rows, num)
    return {"weights": m.packed(rows, cols), "ids": ids, "out": m.floats(num, cols)}


def norm(m: Maker) -> Arguments:
    rows, cols = m.size(20, 0), m.size(100)
    parameters = {"weight": m.floats(cols), "bias": m.floats(cols)}
    return {"x": m.floats(rows, cols), **parameters, "eps": 1e-6, "out": m.floats(rows, cols)}


def view_attention(m: Maker) -> Arguments:
    views, tokens, heads, dim = m.size(3), m.size(20), m.size(3), m.size(80)
    return {
        "qkv": m.floats(views * tokens, 3 * heads * dim),
        "num_heads": heads,
        "tokens_per_view": tokens,
        "out": m.floats(views * tokens, heads * dim),
        "quantized": m.one_of(False, True),
    }


def causal_attention(m: Maker) -> Arguments:
    kv_heads, groups, dim, keys = m.size(2), m.size(3), m.size(80), m.size(60)
    rows = m.size(keys, 0)
    start = m.size(keys - rows, 0)
    return {
        "q": m.floats(rows, kv_heads * groups, dim),
        "k": m.floats(kv_heads, keys, dim),
        "v": m.floats(kv_heads, keys, dim),
        "positions": m.one_of(start, np.arange(start, start + rows)),
        "out": m.floats(rows, kv_heads * groups * dim),
        "quantized": m.one_of(False, True),
    }


def cache(m: Maker, kv_heads: int, dim: int) -> Arguments:
    shape = (4, kv_heads, 30, dim)
    return {"k_cache": m.floats(*shape), "v_cache": m.floats(*shape)}


def places(m: Maker, rows: int) -> Arguments:
    slots = m.rng.permutation(4)[:rows].astype(np.int32)
    return {"slots": slots, "positions": m.integers("int32", 0, 30, rows)}


def decode_attention(m: Maker) -> Arguments:
    rows, kv_heads, groups, dim = m.size(4, 0), m.size(2), m.size(3), m.size(80)
    return {
        "q": m.floats(rows, kv_heads * groups, dim),
        **cache(m, kv_heads, dim),
        **places(m, rows),
        "out": m.floats(rows, kv_heads * groups * dim),
    }


def decoder(m: Maker) -> Arguments:
    """Two query heads, one of the keys, head_dim 6, 20 tokens and 30 positions."""
    hidden = m.size(20)
    embedding = m.packed(20, hidden)
    return {
        "embedding": embedding,
        "norm": m.floats(hidden),
        "head": m.one_of(embedding, m.packed(20, hidden)),
        "eps": 1e-6,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 6,
        "cos": m.floats(30, 3),
        "sin": m.floats(30, 3),
    }


def decoder_layer(m: Maker, hidden: int) -> Arguments:
    middle = m.size(40)
    halves = [m.floats(middle, hidden), m.floats(middle, hidden)]
    return {
        "input_norm": m.floats(hidden),
        "qkv": m.packed(24, hidden),
        "qkv_bias": m.floats(24),
        "o": m.packed(hidden, 12),
        "post_norm": m.floats(hidden),
        "gate_up": native.pack(m.pool, m.one_of(*KINDS), halves, True),
        "down": m.packed(hidden, middle),
    }


def add_layer(m: Maker) -> Arguments:
    made = decoder(m)
    layer = decoder_layer(m, made["embedding"].cols)
    return {"self": native.Decoder(pool=m.pool, **made), **layer}


def step(m: Maker) -> Arguments:
    call = add_layer(m)
    decoder = call.pop("self")
    decoder.add_layer(**call)
    rows = m.size(4, 0)
    k_cache, v_cache = m.floats(1, 4, 1, 30, 6), m.floats(1, 4, 1, 30, 6)
    return {
        "self": decoder,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "tokens": m.integers("int32", 0, 20, rows),
        **places(m, rows),
        "forbidden": m.integers("uint8", 0, 2, 20),
        "logits": m.floats(rows, 20),
        "greedy": np.zeros(rows, np.int32),
    }


def rope(m: Maker) -> Arguments:
    rows, kv_heads, groups, dim = m.size(4, 0), m.size(2), m.size(3), 2 * m.size(40)
    heads = kv_heads * groups
    return {
        "qkv": m.floats(rows, (heads + 2 * kv_heads) * dim),
        "cos": m.floats(rows, dim // 2),
        "sin": m.floats(rows, dim // 2),
        "k_cache": m.floats(kv_heads, 30, dim),
        "v_cache": m.floats(kv_heads, 30, dim),
        "start": m.size(26, 0),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
    }


def rope_rows(m: Maker) -> Arguments:
    call = rope(m)
    kv_heads, _, dim = call["k_cache"].shape
    tables = {"cos": m.floats(30, dim // 2), "sin": m.floats(30, dim // 2)}
    return call | tables | cache(m, kv_heads, dim) | places(m, len(call["qkv"]))


def pack_views(m: Maker) -> Arguments:
    side, rows, cols = m.size(9), m.size(3), m.size(3)
    height, width = m.size(side * rows), m.size(side * cols)
    return {
        "resized": m.integers("uint8", 0, 256, height, width, 3),
        "offset_top": m.size(side * rows - height, 0),
        "offset_left": m.size(side * cols - width, 0),
        "grid_rows": rows,
        "grid_cols": cols,
        "fill": m.size(255, 0),
        "out": np.zeros((rows * cols, side, side, 3), np.uint8),
    }


def resample(m: Maker) -> Arguments:
    height, width, out_size, taps, axis = m.size(), m.size(), m.size(), m.size(6), m.size(1, 0)
    length = (height, width)[axis]
    taps = min(taps, length)
    shape = (out_size, width, 3) if axis == 0 else (height, out_size, 3)
    return {
        "source": m.integers("uint8", 0, 256, height, width, 3),
        "first": m.integers("int32", 0, length - taps + 1, out_size),
        "coefficients": m.integers("int32", -1000, 5000, out_size, taps),
        "axis": axis,
        "out": np.zeros(shape, np.uint8),
    }


def patch_embed(m: Maker) -> Arguments:
    side, rows, views = 14 * m.size(2), m.size(20), m.size(2)
    windows = [[0, 90, 20, 30, m.size(9, -9), m.size(9, -9), m.size(255, 0)] for _ in range(views)]
    patches = (side // 14) ** 2
    return {
        "pixels": m.integers("uint8", 0, 256, 20 * 30 * 3 * 2),
        "windows": np.array(windows, np.int64),
        "weights": m.packed(rows, 588, "float32"),
        "offset": m.floats(patches, rows),
        "image_size": side,
        "out": m.floats(views * patches, rows),
    }


def place(m: Maker) -> Arguments:
    num, rows, hidden = m.size(), m.size(), m.size()
    has_text = m.rng.random() < 0.5
    index = m.integers("int32", 0, num, rows, 4)
    index[m.rng.random(rows) < 0.2, 0] = -2 if has_text else -1
    return {
        "projected": m.floats(num, hidden),
        "index": index,
        "weight": m.floats(rows, 4),
        "newline": m.floats(hidden),
        "token_ids": m.integers("int32", 0, 7, rows) if has_text else None,
        "embedding": m.packed(7, hidden) if has_text else None,
        "out": m.floats(rows, hidden),
    }


def argmax(m: Maker) -> Arguments:
    rows, vocab = m.size(4, 0), m.size(300)
    forbidden = m.integers("uint8", 0, 2, vocab)
    return {"logits": m.floats(rows, vocab), "forbidden": forbidden, "out": np.zeros(rows, "int32")}


def sample(m: Maker) -> Arguments:
    vocab = m.size(300)
    return {
        "logits": m.floats(vocab),
        "forbidden": m.integers("uint8", 0, 2, vocab),
        "seen": m.one_of(None, m.integers("uint8", 0, 2, vocab)),
        "suppressed": m.integers("int32", 0, vocab, m.size(3, 0)),
        "penalty": m.one_of(1.0, 1.3),
        "temperature": m.one_of(0.1, 1.0, 5.0),
        "top_k": m.one_of(1, 5),
        "top_p": m.one_of(0.1, 0.9, 1.0),
        "min_p": m.one_of(0.0, 0.1),
        "uniform": float(m.rng.random()),
    }


PLAUSIBLE: dict[str, Callable[[Maker], Arguments]] = {
    "Decoder": decoder,
    "Decoder.add_layer": add_layer,
    "Decoder.step": step,
    "PackedWeights": packed_weights,
    "PackedWeights.bytes": lambda m: {"self": m.packed(m.size(), m.size())},
    "ThreadPool": lambda m: {"num_threads": m.size(1024)},
    "argmax": argmax,
    "causal_attention": causal_attention,
    "decode_attention": decode_attention,
    "embed": embed,
    "layer_norm": norm,
    "linear": linear,
    "pack": pack,
    "pack_views": pack_views,
    "patch_embed": patch_embed,
    "place": place,
    "read_bandwidth": lambda m: {"num_bytes": m.size(2000, 8)},
    "resample": resample,
    "rms_norm": norm,
    "rope_and_store": rope,
    "rope_and_store_rows": rope_rows,
    "sample": sample,
    "use_isa": lambda m: {"isa": m.one_of(*native.isas())},
    "view_attention": view_attention,
}
