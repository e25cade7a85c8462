"""Float32 linear layers on the CPU: the library call that is fastest for the number of rows.

`torch.nn.functional.linear` ends in MKL, which on AMD reads a weight with one core (14 GB/s of
31) for one row. For many rows oneDNN is 10–25 % faster on a CPU with AVX-512, MKL 10–15 % on one
without. All calls here are torch's own. Which one runs depends on the CPU and on shapes only;
results do not change with the number of threads.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

NARROW_ROWS = 4  # up to so many rows the time is that of reading the weight
CHUNKS = (16, 8, 4, 2)
NARROW_WIDTH = 2048  # from this many columns on a batched product of several rows loses


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x @ weightᵀ + bias; other dtypes and devices than float32 on the CPU as torch does.

    Args:
        x: (rows, in_features), last dimension contiguous.
        weight: (out_features, in_features), contiguous.
        bias: (out_features,) or None.

    Returns:
        (rows, out_features), contiguous.
    """
    rows, in_features = x.shape
    if rows == 0 or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if rows <= NARROW_ROWS and (rows == 1 or in_features < NARROW_WIDTH):
        chunks = next((n for n in CHUNKS if weight.shape[0] % n == 0), None)
        if chunks is not None:
            out = _batched(x, weight.view(chunks, -1, in_features))
            return out if bias is None else out.add_(bias)
    if not _prefers_onednn():
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _batched(x: Tensor, slices: Tensor) -> Tensor:
    """One batched product over slices of the weight: 30 GB/s with one thread as with two."""
    chunks, slice_rows, in_features = slices.shape
    rows = x.shape[0]
    if in_features < NARROW_WIDTH:
        product = torch.bmm(slices, x.t().expand(chunks, in_features, rows))
        return product.view(chunks * slice_rows, rows).t().contiguous()
    product = torch.bmm(x.expand(chunks, rows, in_features), slices.transpose(1, 2))
    return product.view(rows, chunks * slice_rows)  # a single row


@cache
def _prefers_onednn() -> bool:
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    # The operation that torch's own compiler emits for linear layers; not in every build.
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")
