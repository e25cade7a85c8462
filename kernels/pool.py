"""Token pooling through a gather table: out[r] = Σ_{j<4} weight[r, j] · features[index[r, j]].

A row whose first index is negative is the newline vector, copied. The table comes from a visual
plan: the four bilinear neighbours of a pooled token, or one row of weight 1 for a token kept as
it is. Taps of weight 0 are not read, so a kept token costs one read and is copied exactly.

Layout: row-major, any row stride, last dimension contiguous. Dtypes: features, newline and out
float32, float16 or bfloat16, all the same; index int32, weight float32. Sums are float32, in the
order of the taps, with one rounding on store.

Roofline: memory. Each feature row that the table names is read once from memory (its neighbours
find it in L2) and each row of out is written once: 32 frames of 27 × 27 tokens to 14 × 14 at
width 896 in half precision are 53 MB, 13 µs at 4.2 TB/s.
"""

import torch
import triton
import triton.language as tl

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _pool_and_pack_kernel(
    features_ptr,
    index_ptr,
    weight_ptr,
    newline_ptr,
    out_ptr,
    D,
    stride_fm,
    stride_im,
    stride_wm,
    stride_om,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < D
    out_ptrs = out_ptr + row * stride_om + cols
    index_row_ptr = index_ptr + row * stride_im
    if tl.load(index_row_ptr) < 0:
        tl.store(out_ptrs, tl.load(newline_ptr + cols, mask=mask), mask=mask)
    else:
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for tap in tl.static_range(4):
            # int64: 2**31 elements are 2.4 million rows of width 896, which a batch can reach.
            source = tl.load(index_row_ptr + tap).to(tl.int64)
            weight = tl.load(weight_ptr + row * stride_wm + tap)
            # Columns to read, as a number: the interpreter cannot broadcast a scalar bool.
            limit = tl.where(weight != 0.0, D, 0)
            x = tl.load(features_ptr + source * stride_fm + cols, mask=cols < limit, other=0.0)
            acc += weight * x.to(tl.float32)
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_config(width: int) -> tuple[int, int]:
    """Picks (BLOCK_D, num_warps) for rows of `width` elements.

    Eight elements a thread: one 128-bit load in half precision, two in float32.

    Args:
        width: elements of a row, at least 1.

    Returns:
        The columns one program handles and its warps.
    """
    block_d = min(max(triton.next_power_of_2(width), 32), 1024)
    return block_d, max(block_d // 256, 1)


def pool_and_pack(
    features: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    newline: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Pools feature rows by a gather table and copies the newline vector, into `out`.

    Args:
        features: (num_rows, D) float32, float16 or bfloat16.
        index: (R, 4) int32, rows of features; a row that starts with -1 is the newline. Values
            are trusted: checking them would read the device.
        weight: (R, 4) float32; a tap of weight 0 is not read.
        newline: (D,), dtype of features.
        out: (R, D), dtype of features; written in place. Must not overlap the inputs.

    Returns:
        out.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or last-dimension stride.
    """
    _check(features, index, weight, newline, out)
    num_out, width = out.shape
    if num_out == 0:
        return out
    block_d, num_warps = launch_config(width)
    grid = (num_out, triton.cdiv(width, block_d))
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(features):
        _pool_and_pack_kernel[grid](
            features,
            index,
            weight,
            newline,
            out,
            width,
            features.stride(0),
            index.stride(0),
            weight.stride(0),
            out.stride(0),
            BLOCK_D=block_d,
            num_warps=num_warps,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )
    return out


def _check(
    features: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    newline: torch.Tensor,
    out: torch.Tensor,
) -> None:
    if features.dtype not in _DTYPES:
        raise TypeError(f"features is {features.dtype}; expected one of {_DTYPES}")
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"features has shape {tuple(features.shape)}; expected (num_rows, D ≥ 1)")
    if out.ndim != 2:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected (R, {features.shape[1]})")
    num_out, width = out.shape[0], features.shape[1]
    expected = (
        ("index", index, (num_out, 4), torch.int32),
        ("weight", weight, (num_out, 4), torch.float32),
        ("newline", newline, (width,), features.dtype),
        ("out", out, (num_out, width), features.dtype),
    )
    for name, tensor, shape, dtype in expected:
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {dtype}. Convert it before")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.device != features.device:
            raise ValueError(f"{name} is on {tensor.device}; features is on {features.device}")
    for name, tensor in (("features", features), *((item[0], item[1]) for item in expected)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has last-dimension stride {tensor.stride(-1)}; expected 1")
