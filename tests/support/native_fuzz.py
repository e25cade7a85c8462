"""Calls every function of ovfast._C with random arguments; a program, because a crash ends it.

    python -m tests.support.native_fuzz SEED NUM_CALLS REPORT

Functions and methods are found by introspection. One with an entry in PLAUSIBLE gets arguments that
fit, of which some are spoilt; any other gets arbitrary ones. REPORT holds the call that runs, and
at the end a JSON object: name -> [calls, calls without an error].
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

from tests.support.native_arguments import PLAUSIBLE, Arguments, Maker, native

ALLOWED = (TypeError, ValueError, OverflowError, MemoryError)
DTYPES = ("float32", "float16", "float64", "uint8", "uint16", "int32", "int64", ">f4", "S3", "O")
INTEGERS = (-(2**70), -(2**63), -(2**31), -1, 0, 1, 2, 3, 255, 2**20, 2**31, 2**62, 2**63, 2**70)
ADDRESS_SPACE = 8 << 30  # bytes: a huge request is then a MemoryError, not the end of the machine
CLASSES = (native.Decoder, native.PackedWeights, native.ThreadPool)


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
        uninitialised(m.one_of(*CLASSES)), spoilt_array(m, m.floats(m.size(5, 0), m.size(5, 0))),
    )  # fmt: skip
    return m.one_of(*anything)


def uninitialised(kind: type) -> Any:
    return kind.__new__(kind)


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
        lambda: overlapping(array, axis),
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


def overlapping(array: np.ndarray, axis: int) -> np.ndarray:
    strides = list(array.strides)
    strides[axis] = strides[axis] // 2 // array.itemsize * array.itemsize
    return np.lib.stride_tricks.as_strided(array, strides=strides)


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
    return re.findall(r"[(,] ?(\w+):", first_line.partition(" -> ")[0])


def functions() -> dict[str, tuple[Any, list[str]]]:
    found = {}
    for name, value in vars(native).items():
        if isinstance(value, type):
            found[name] = (value, parameters_of(value.__init__)[1:])
            for method, function in vars(value).items():
                if not method.startswith("_") and callable(function):
                    found[f"{name}.{method}"] = (method_of(function), parameters_of(function))
        elif callable(value):
            found[name] = (value, parameters_of(value))
    return found


def method_of(function: Any) -> Any:
    def call(**values: Any) -> Any:
        return function(values.pop("self"), **values)

    return call


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
