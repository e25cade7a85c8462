"""SwiGLU of interleaved pairs: out[i] = round(silu(gate_up[2i])) · gate_up[2i + 1].

Layout: row-major, any row stride, last dimension contiguous; gate and up stand side by side, as
the packed weights make them. Dtypes: gate_up and out float32, float16 or bfloat16, the same. silu
is float32; as upstream it is rounded to the storage dtype before it meets up, and their product
again.

Roofline: memory. Each element is read once and half as many are written: 7300 rows of 2 · 18944 in
half precision are 830 MB, 198 µs at 4.2 TB/s.
"""

import torch
import triton
import triton.language as tl

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _silu_mul_pairs_kernel(
    gate_up_ptr,
    out_ptr,
    I,  # noqa: E741  as in the shapes
    stride_gm,
    stride_om,
    BLOCK_I: tl.constexpr,
):
    # int64: 2**31 elements are 57 thousand rows of width 2 · 18944, which a batch can reach.
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_I
    pair_cols = 2 * first + tl.arange(0, 2 * BLOCK_I)
    # One load of both, in 128 bits, where two of stride 2 would be 16 bits each.
    pairs = tl.load(gate_up_ptr + row * stride_gm + pair_cols, mask=pair_cols < 2 * I, other=0.0)
    gate, up = tl.split(tl.reshape(pairs, (BLOCK_I, 2)))
    gate = gate.to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    y = silu.to(tl.float32) * up.to(tl.float32)
    cols = first + tl.arange(0, BLOCK_I)
    tl.store(out_ptr + row * stride_om + cols, y.to(up.dtype), mask=cols < I)


def launch_config(width: int) -> tuple[int, int]:
    """Picks (BLOCK_I, num_warps) for rows of `width` pairs; not yet measured on a device.

    Eight pairs a thread: two 128-bit loads and one 128-bit store in half precision.

    Args:
        width: pairs of a row, at least 1.

    Returns:
        The pairs one program handles and its warps.
    """
    block_i = min(max(triton.next_power_of_2(width), 32), 1024)
    return block_i, max(block_i // 256, 1)


def silu_mul_pairs(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) · up of interleaved pairs.

    Args:
        gate_up: (rows, 2 · I) float32, float16 or bfloat16: gate_0, up_0, gate_1, up_1, …
        out: (rows, I), dtype of gate_up, written in place; must not overlap it. None allocates it.

    Returns:
        out.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or last-dimension stride.
    """
    if gate_up.dtype not in _DTYPES:
        raise TypeError(f"gate_up is {gate_up.dtype}; expected one of {_DTYPES}. Convert it before")
    if gate_up.ndim != 2 or gate_up.shape[1] == 0 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}; expected (rows, 2 · I), I ≥ 1")
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = gate_up.new_empty(num_rows, width)
    _check_out(out, gate_up)
    if num_rows == 0:
        return out
    block_i, num_warps = launch_config(width)
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(gate_up):
        _silu_mul_pairs_kernel[(num_rows, triton.cdiv(width, block_i))](
            gate_up,
            out,
            width,
            gate_up.stride(0),
            out.stride(0),
            BLOCK_I=block_i,
            num_warps=num_warps,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )
    return out


def _check_out(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    if out.dtype != gate_up.dtype:
        raise TypeError(f"out is {out.dtype}; expected {gate_up.dtype}, as gate_up. Allocate it so")
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected {shape}")
    if out.device != gate_up.device:
        raise ValueError(f"out is on {out.device}; gate_up is on {gate_up.device}. Move one")
    for name, tensor in (("gate_up", gate_up), ("out", out)):
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name} has last-dimension stride {tensor.stride(1)}; expected 1")
