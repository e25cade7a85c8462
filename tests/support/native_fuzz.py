"""Calls every function of ovfast._C with random arguments; a program, because a crash ends it.

    python -m tests.support.native_fuzz SEED NUM_CALLS REPORT

Functions are found by introspection. One with an entry in PLAUSIBLE gets arguments that fit, of
which some are spoilt; any other gets arbitrary ones. REPORT holds the call that runs, and at the
end a JSON object: name -> [calls, calls without an error].
"""

import contextlib
import json
import os
import re
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ovfast import _C as native

Arguments = dict[str, Any]
ALLOWED = (TypeError, ValueError, OverflowError, MemoryError)
DTYPES = ("float32", "float16", "float64", "uint8", "uint16", "int32", "int64", ">f4", "S3", "O")
INTEGERS = (-(2**70), -(2**63), -(2**31), -1, 0, 1, 2, 3, 255, 2**20, 2**31, 2**62, 2**63, 2**70)
KINDS = ("float32", "float16", "bfloat16", "int8", "int4")
ADDRESS_SPACE = 8 << 30  # bytes: a huge request is then a MemoryError, not the end of the machine
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
        "exact_activations": m.one_of(False, True),
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
    "PackedWeights": packed_weights,
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


def spoilt(m: Maker, value: Any) -> Any:
    """Another value: near the given one or anything at all."""
    if isinstance(value, np.ndarray) and m.rng.random() < 0.8:
        return spoilt_array(m, value)
    if isinstance(value, int) and m.rng.random() < 0.5:
        return value + m.one_of(-1, 1)
    if isinstance(value, list) and m.rng.random() < 0.5:
        return [spoilt(m, item) for item in value]
    anything = (
        None, "", "float32", "ü\0", b"x", [], {}, object(), 1.5, float("nan"), float("inf"), True,
        m.pool, m.one_of(*INTEGERS), np.ma.masked, np.float32(3), np.zeros(()), slice(None),
        spoilt_array(m, m.floats(m.size(5, 0), m.size(5, 0))),
    )  # fmt: skip
    return m.one_of(*anything)


def spoilt_array(m: Maker, array: np.ndarray) -> np.ndarray:
    axis = int(m.rng.integers(array.ndim)) if array.ndim else 0
    if array.ndim == 0:
        return array.reshape(1)
    choices: tuple[Callable[[], np.ndarray], ...] = (
        lambda: array.astype(m.one_of(*DTYPES)),
        lambda: np.flip(array, axis),
        lambda: array[..., None],
        lambda: array[0] if len(array) else array,
        lambda: np.take(array, range(m.size(array.shape[axis], 0)), axis),
        lambda: np.concatenate([array, array], axis),
        lambda: np.repeat(array, 2, axis)[tuple([slice(None)] * axis + [slice(None, None, 2)])],
        lambda: np.broadcast_to(np.take(array, [0], axis), array.shape) if array.size else array,
        lambda: np.lib.stride_tricks.as_strided(array, strides=[0] * array.ndim),
        lambda: np.asfortranarray(array),
        lambda: np.swapaxes(array, 0, -1),
        lambda: misaligned(array),
        lambda: read_only(array),
        lambda: array.view(np.recarray),
        lambda: np.ma.masked_array(array),
        lambda: np.full_like(array, m.one_of(0, 1, 127)) if array.dtype != object else array,
        lambda: extreme(m, array),
    )
    return m.one_of(*choices)()


def misaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    return raw[1 : array.nbytes + 1].view(array.dtype).reshape(array.shape)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def extreme(m: Maker, array: np.ndarray) -> np.ndarray:
    array = array.copy()
    if array.size and array.dtype.kind in "iuf":
        limits = np.iinfo(array.dtype) if array.dtype.kind != "f" else np.finfo(array.dtype)
        array.flat[m.rng.integers(array.size)] = m.one_of(limits.min, limits.max)
    return array


def parameters_of(function: Any) -> list[str]:
    """Names from the signature that pybind11 writes into a docstring."""
    first_line = (function.__doc__ or "").partition("\n")[0]
    names = re.findall(r"[(,] ?(\w+):", first_line.partition(" -> ")[0])
    return [name for name in names if name != "self"]


def functions() -> dict[str, tuple[Any, list[str]]]:
    found = {}
    for name, value in vars(native).items():
        if isinstance(value, type):
            found[name] = (value, parameters_of(value.__init__))
        elif callable(value):
            found[name] = (value, parameters_of(value))
    return found


def arguments(m: Maker, name: str, parameters: list[str]) -> Arguments:
    if name not in PLAUSIBLE:
        guess = {"pool": m.pool, "weights": m.packed(3, 5)}
        return {p: guess.get(p, spoilt(m, m.floats(m.size(5), m.size(5)))) for p in parameters}
    values = PLAUSIBLE[name](m) | {"pool": m.pool}
    call = {parameter: values[parameter] for parameter in parameters if parameter in values}
    for _ in range(m.one_of(0, 0, 1, 1, 2)):
        if call:
            victim = m.one_of(*call)
            call[victim] = spoilt(m, call[victim])
    arrays = [p for p in call if isinstance(call[p], np.ndarray)]
    if len(arrays) > 1 and m.rng.random() < 0.05:
        call[m.one_of(*arrays)] = call[m.one_of(*arrays)]
    return call


def main(seed: int, num_calls: int, report: Path) -> None:
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # it needs more address space than that
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("ignore")
    counts: dict[str, list[int]] = {name: [0, 0] for name in functions()}
    with report.open("w") as log, np.errstate(all="ignore"):
        for call in range(num_calls):
            m = Maker(np.random.default_rng([seed, call]))
            for name, (function, parameters) in functions().items():
                log.seek(0)
                log.write(f"call {call} of {name}, seed {seed}".ljust(80))
                log.flush()
                with contextlib.suppress(*ALLOWED):
                    made = arguments(m, name, parameters)
                    counts[name][0] += 1
                    function(**made)
                    counts[name][1] += 1
    report.write_text(json.dumps(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
