"""RMSNorm of every row: out = round(x · rsqrt(mean(x²) + eps)) · weight.

Layout: row-major, any row stride, last dimension contiguous. Dtypes: x, weight and out float32,
float16 or bfloat16, all the same. A row is read once and stays in registers; the mean of its
squares is float32. As upstream, the normalised value is rounded to the storage dtype before it
meets the weight, and their product again.

Roofline: memory. Each row is read once and written once: 7300 rows of width 3584 in half precision
are 105 MB, 25 µs at 4.2 TB/s, less where x is still in L2.
"""

import torch
import triton
import triton.language as tl

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 8192


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    D,
    stride_xm,
    stride_om,
    eps,
    BLOCK_D: tl.constexpr,
):
    # int64: 2**31 elements are 262 thousand rows of width 8192, which a batch can reach.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    # Loaded late on purpose: held over the sum it would take as many registers as x.
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    dtype = out_ptr.dtype.element_ty
    y = (x * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * stride_om + cols, y.to(dtype), mask=mask)


def launch_config(width: int) -> tuple[int, int]:
    """Picks (BLOCK_D, num_warps) for rows of `width` elements; not yet measured on a device.

    Sixteen elements a thread: two 128-bit loads in half precision, four in float32.

    Args:
        width: elements of a row, 1 to MAX_WIDTH.

    Returns:
        The columns one program handles, all of them, and its warps.
    """
    block_d = max(triton.next_power_of_2(width), 32)
    return block_d, min(max(block_d // 512, 1), 16)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm over the last dimension, normalised in float32.

    Args:
        x: (rows, D) float32, float16 or bfloat16, D at most MAX_WIDTH.
        weight: (D,), dtype of x.
        eps: added to the mean square.
        out: (rows, D), dtype of x, written in place; may be x itself, must not overlap the
            inputs otherwise. None allocates it.

    Returns:
        out.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or last-dimension stride.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _check(x, weight, out)
    num_rows, width = x.shape
    if num_rows == 0:
        return out
    block_d, num_warps = launch_config(width)
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(num_rows,)](
            x,
            weight,
            out,
            width,
            x.stride(0),
            out.stride(0),
            eps,
            BLOCK_D=block_d,
            num_warps=num_warps,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"x is {x.dtype}; expected one of {_DTYPES}. Convert it before")
    if x.ndim != 2 or not 1 <= x.shape[1] <= MAX_WIDTH:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (rows, D), 1 ≤ D ≤ {MAX_WIDTH}")
    num_rows, width = x.shape
    expected = (
        ("x", x, (num_rows, width)),
        ("weight", weight, (width,)),
        ("out", out, (num_rows, width)),
    )
    for name, tensor, shape in expected:
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype}; expected {x.dtype}, as x. Convert it before"
            )
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; x is on {x.device}. Move one of them")
        if width > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has last-dimension stride {tensor.stride(-1)}; expected 1")
