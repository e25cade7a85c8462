"""How weights are kept: names of storages, the bytes they take, and the options that ask for them.

On the native CPU back end the storage of linear layers is a choice of its own, activations and
cache are float32 in any case; "bfloat16-matmul" is bfloat16 whose products are of bfloat16, too.
Elsewhere it is the dtype of weights, activations and cache in one, but for "fp8": then the linear
layers of the language model are float8 (e4m3) beside all that in a dtype.
"""

from typing import Any

import torch

from ovfast.errors import OptionError, QuantizationError

__all__ = [
    "BFLOAT16_MATMUL",
    "DTYPES",
    "GROUPS",
    "MATMUL_PRECISIONS",
    "NATIVE_STORAGES",
    "QUANTIZATIONS",
    "STORAGES",
    "bytes_per_param",
    "dtype_name",
    "load_options",
    "wanted_storage",
    "weight_kind",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Weights that share a bfloat16 scale: neighbouring inputs of one output.
GROUPS = {"int8": 128, "int4": 32}
QUANTIZATIONS = (*GROUPS, "fp8")
NATIVE_STORAGES = (*DTYPES, *GROUPS)
BFLOAT16_MATMUL = "bfloat16-matmul"
MATMUL_PRECISIONS = ("float32", "bfloat16")
STORAGES = (*DTYPES, BFLOAT16_MATMUL, *QUANTIZATIONS)
_BITS = {"int8": 8, "int4": 4}
_SCALE_BYTES = 2


def bytes_per_param(storage: str) -> float:
    """Bytes of one weight of a quantised linear layer, its share of the scale included.

    Not included are the four bytes for each input of a layer in int8 or int4, or for each output
    of one in fp8, below 0.5 %.
    """
    if storage == "fp8":
        return 1.0
    if storage in GROUPS:
        return _BITS[storage] / 8 + _SCALE_BYTES / GROUPS[storage]
    return DTYPES[weight_kind(storage)].itemsize


def weight_kind(storage: str) -> str:
    """How a storage keeps weights, whatever they are multiplied with."""
    return "bfloat16" if storage == BFLOAT16_MATMUL else storage


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def load_options(storage: str) -> dict[str, str | None]:
    """The options of `load` that ask for a storage."""
    if storage in QUANTIZATIONS:
        return {"dtype": "auto", "quantization": storage}
    if storage == BFLOAT16_MATMUL:
        return {"dtype": "bfloat16", "quantization": None, "matmul_precision": "bfloat16"}
    return {"dtype": storage, "quantization": None}


def wanted_storage(dtype: Any, quantization: Any, matmul_precision: Any = "float32") -> str | None:
    """The storage that options of `load` ask for together; None leaves it to the checkpoint.

    Beside quantization="fp8" it is that of all that fp8 leaves alone.

    Raises:
        OptionError: an unknown dtype, or one beside a quantisation; an unknown precision, or one
            that is not for the others.
        QuantizationError: an unknown quantisation.
    """
    name = _dtype_option(dtype)
    if matmul_precision not in MATMUL_PRECISIONS:
        allowed = " or ".join(map(repr, MATMUL_PRECISIONS))
        raise OptionError(f"matmul_precision={matmul_precision!r}; expected {allowed}.")
    if matmul_precision == "bfloat16":
        if quantization is not None or name not in (None, "bfloat16"):
            raise OptionError(
                f"matmul_precision='bfloat16' with dtype={dtype!r}, quantization={quantization!r};"
                " it multiplies weights in bfloat16. Leave both out, or matmul_precision."
            )
        return BFLOAT16_MATMUL
    if quantization is None:
        return name
    if not isinstance(quantization, str) or quantization not in QUANTIZATIONS:
        allowed = ", ".join(map(repr, QUANTIZATIONS))
        raise QuantizationError(
            f"quantization={quantization!r}; expected {allowed}, or None for weights as they are."
        )
    if quantization == "fp8":
        return name
    if name is not None:
        raise OptionError(
            f"dtype={dtype!r} with quantization={quantization!r}; a quantisation decides how"
            " weights are kept, and arithmetic is float32. Leave dtype='auto'."
        )
    return quantization


def _dtype_option(dtype: Any) -> str | None:
    if isinstance(dtype, str) and dtype == "auto":
        return None
    for name, storage in DTYPES.items():
        if dtype is storage or (isinstance(dtype, str) and dtype == name):
            return name
    raise OptionError(
        f"dtype={dtype!r}; expected 'auto', {', '.join(map(repr, DTYPES))} or the torch dtype."
    )
