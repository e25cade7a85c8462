"""Causal attention of a chunk of rows over a cache: row i attends to the keys 0 … start + i.

softmax(q · kᵀ · d^-0.5) · v. Layout: q (T, num_heads, d); k and v (num_kv_heads, start + T, d), one
slot of a cache; out (T, num_heads · d). Any outer strides, last dimension contiguous. Dtypes:
float32, float16 or bfloat16, all the same. Scores, softmax and sums are float32; the probabilities
are rounded to the storage dtype before they meet v, with one rounding on store.

A program owns BLOCK_M queries of one head, at positions that start at a multiple of BLOCK_M, and
walks the keys from 0 in blocks of BLOCK_N up to the diagonal. What a row meets thus depends on its
position alone: in chunks or in one, its bits are the same. Heads of a group read the same keys,
never a copy. The longest programs start first, all heads of a query block side by side.

Roofline: tensor cores, and close behind them the exponentials. 7300 rows of 28 heads of 128 are 382
GFLOP a layer: 483 µs at 790 TFLOP/s.
"""

import torch
import triton
import triton.language as tl

from ovfast.kernels.shared_memory import LARGE, SMALL, shared_bytes

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LOG2_E = 1.4426950408889634


# start and T differ from call to call: as constants, or known multiples of 16, each kind of them
# would cost a compilation.
@triton.jit(do_not_specialize=["start", "T"])
def _causal_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    start,
    T,
    score_scale,
    stride_qm,
    stride_qh,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    stride_om,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0)
    num_keys = start + T
    first_query = ((num_keys - 1) // BLOCK_M - tl.program_id(1)) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, HEAD_BLOCK)[None, :]
    # Rows before the chunk or behind it are zeros, and not stored.
    is_row = (first_query + rows >= start) & (first_query + rows < num_keys)
    # HEAD_DIM is a constexpr multiple of 8: the mask is constant over a 128-bit load.
    row_mask = is_row & (cols < HEAD_DIM)
    # int64: rows · stride passes 2**31 from 262 thousand rows of 8192 on.
    row_offset = (first_query - start).to(tl.int64)
    q_ptr += row_offset * stride_qm + head * stride_qh
    q = tl.load(q_ptr + rows * stride_qm + cols, mask=row_mask, other=0.0)
    k_ptr += (head // GROUP).to(tl.int64) * stride_kh
    v_ptr += (head // GROUP).to(tl.int64) * stride_vh

    acc = tl.zeros((BLOCK_M, HEAD_BLOCK), dtype=tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    keys = tl.arange(0, BLOCK_N)
    # One loop, with the mask behind a branch: a second one for the diagonal would give the
    # accumulators two sources, and ptxas waits after every single wgmma then (message C7515).
    # Key 0 is in the first block and every row sees it, so no maximum stays -inf.
    for first_key in range(0, tl.minimum(first_query + BLOCK_M, num_keys), BLOCK_N):
        key_mask = (keys[:, None] < num_keys - first_key) & (cols < HEAD_DIM)
        k = tl.load(k_ptr + keys[:, None] * stride_kn + cols, mask=key_mask, other=0.0)
        v = tl.load(v_ptr + keys[:, None] * stride_vn + cols, mask=key_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if first_key + BLOCK_N > first_query + 1:
            is_visible = first_key + keys[None, :] <= first_query + rows
            scores = tl.where(is_visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * score_scale)
        p = tl.exp2(scores * score_scale - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        row_max = new_max
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn

    out = (acc * (1.0 / row_sum[:, None])).to(out_ptr.dtype.element_ty)
    out_ptr += row_offset * stride_om + head * HEAD_DIM
    tl.store(out_ptr + rows * stride_om + cols, out, mask=row_mask)


def supports(head_dim: int) -> bool:
    """Whether the kernel takes heads of this size: a multiple of 8 from 8 to 128."""
    return head_dim % 8 == 0 and 8 <= head_dim <= 128


def launch_config(
    head_dim: int, dtype: torch.dtype, shared_bytes: int = LARGE
) -> tuple[dict[str, int], dict[str, int]]:
    """Picks the meta-parameters and the launch options; not yet measured on a device.

    Half precision: 128 queries read the keys from L2 half as often as 64 would; with heads of 64
    two programs of 8 warps share an SM of sm_90. float32 multiplies without tensor cores.

    Args:
        head_dim: that `supports` allows.
        dtype: of q.
        shared_bytes: that one block may have: where it is SMALL, heads above 64 have two stages.

    Returns:
        HEAD_DIM, HEAD_BLOCK, BLOCK_M and BLOCK_N by name, and options by name.
    """
    head_block = max(triton.next_power_of_2(head_dim), 16)
    # float32: with 32 queries heads of 128 spill on one target or another, in either Triton.
    block_m, block_n = (16, 32) if dtype == torch.float32 else (128, 64)
    meta = {
        "HEAD_DIM": head_dim,
        "HEAD_BLOCK": head_block,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    is_tight = shared_bytes <= SMALL and head_block > 64
    return meta, {"num_warps": 8, "num_stages": 2 if is_tight else 3}


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of row i to the keys 0 … start + i, scale d^-0.5.

    Args:
        q: (T, num_heads, d) float32, float16 or bfloat16.
        k: (num_kv_heads, start + T, d), dtype of q; the keys of q's own rows among them. What
            lies behind them in the cache is not read.
        v: as k.
        start: position of the first row.
        out: (T, num_heads · d), dtype of q, written in place; must not overlap the inputs. None
            allocates it.

    Returns:
        out.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or last-dimension stride, or a head size that `supports`
            refuses.
    """
    _check_q(q)
    num_rows, num_heads, head_dim = q.shape
    if out is None:
        out = q.new_empty(num_rows, num_heads * head_dim)
    num_kv_heads = k.shape[0] if k.ndim == 3 else 0
    if num_kv_heads == 0 or num_heads % num_kv_heads or start < 0:
        raise ValueError(
            f"q has {num_heads} heads, k has shape {tuple(k.shape)} and start is {start}; expected "
            "heads that divide those of q, and start ≥ 0"
        )
    cache_shape = (num_kv_heads, start + num_rows, head_dim)
    _check(
        q,
        ("k", k, cache_shape),
        ("v", v, cache_shape),
        ("out", out, (num_rows, num_heads * head_dim)),
    )
    if num_rows == 0:
        return out
    meta, options = launch_config(head_dim, q.dtype, shared_bytes(q.device))
    block_m = meta["BLOCK_M"]
    num_blocks = (start + num_rows - 1) // block_m - start // block_m + 1
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(q):
        _causal_attention_kernel[(num_heads, num_blocks)](
            q,
            k,
            v,
            out,
            start,
            num_rows,
            head_dim**-0.5 * _LOG2_E,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            out.stride(0),
            GROUP=num_heads // num_kv_heads,
            **meta,
            **options,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )
    return out


def _check_q(q: torch.Tensor) -> None:
    if q.dtype not in _DTYPES:
        raise TypeError(f"q is {q.dtype}; expected one of {_DTYPES}. Convert it before")
    if q.ndim != 3 or q.shape[1] == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (T, num_heads ≥ 1, d)")
    if not supports(q.shape[2]):
        raise ValueError(
            f"q has heads of {q.shape[2]}; expected a multiple of 8 from 8 to 128. "
            "Use torch's scaled_dot_product_attention"
        )


def _check(q: torch.Tensor, *expected: tuple[str, torch.Tensor, tuple[int, ...]]) -> None:
    for name, tensor, shape in (("q", q, tuple(q.shape)), *expected):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {q.dtype}, as q. Convert it")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}; q is on {q.device}. Move one of them")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has last-dimension stride {tensor.stride(-1)}; expected 1")
