"""Rotary embedding of queries and keys, and the store of keys and values into a cache.

For a pair (a, b) = (x[i], x[i + d / 2]) of a head: a · cos − b · sin and b · cos + a · sin.

Layout: qkv (T, (num_heads + 2 · num_kv_heads) · d), a row is q, k, v; inside each head of q and k
the elements are interleaved as pairs (0, d / 2, 1, d / 2 + 1, …), as the packed weights make them;
v is plain. cos and sin (T, d / 2). Out in plain order: q (T, num_heads, d), k_cache and v_cache
(num_kv_heads, max_positions, d), one slot of one layer. Any outer strides, last dimension
contiguous. Dtypes: float32, float16 or bfloat16, all the same. Products and sums are float32 with
one rounding on store, where upstream rounds each; v is copied.

Roofline: memory. Each element is read once and written once; cos and sin come from L2 for all heads
but the first: 7300 rows of 4608 in half precision are 135 MB, 32 µs at 4.2 TB/s.
"""

import torch
import triton
import triton.language as tl

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# start and T differ from call to call: as constants, or known multiples of 16, each kind of them
# would cost a compilation.
@triton.jit(do_not_specialize=["start", "T"])
def _rope_and_store_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    start,
    T,
    stride_xm,
    stride_cm,
    stride_sm,
    stride_qm,
    stride_qh,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    head = tl.program_id(0)
    # int64: rows · stride passes 2**31 from 210 thousand rows of 10240 on.
    first_row = tl.program_id(1).to(tl.int64) * BLOCK_T
    rows = tl.arange(0, BLOCK_T)[:, None]
    row_mask = rows < T - first_row
    cols = tl.arange(0, 2 * HALF_BLOCK)[None, :]
    mask = row_mask & (cols < HEAD_DIM)
    x_ptrs = qkv_ptr + first_row * stride_xm + head * HEAD_DIM + rows * stride_xm + cols
    x = tl.load(x_ptrs, mask=mask, other=0.0)
    if head >= NUM_HEADS + NUM_KV_HEADS:
        v_ptr += (head - NUM_HEADS - NUM_KV_HEADS).to(tl.int64) * stride_vh
        v_ptr += (start + first_row) * stride_vn
        tl.store(v_ptr + rows * stride_vn + cols, x, mask=mask)
    else:
        half_cols = tl.arange(0, HALF_BLOCK)[None, :]
        half_mask = row_mask & (half_cols < HEAD_DIM // 2)
        cos_ptrs = cos_ptr + first_row * stride_cm + rows * stride_cm + half_cols
        sin_ptrs = sin_ptr + first_row * stride_sm + rows * stride_sm + half_cols
        cos = tl.load(cos_ptrs, mask=half_mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptrs, mask=half_mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_T, HALF_BLOCK, 2)))
        a, b = a.to(tl.float32), b.to(tl.float32)
        first = (a * cos - b * sin).to(x.dtype)
        second = (b * cos + a * sin).to(x.dtype)
        if head < NUM_HEADS:
            o_ptrs = q_ptr + first_row * stride_qm + head * stride_qh + rows * stride_qm + half_cols
        else:
            k_ptr += (head - NUM_HEADS).to(tl.int64) * stride_kh
            k_ptr += (start + first_row) * stride_kn
            o_ptrs = k_ptr + rows * stride_kn + half_cols
        tl.store(o_ptrs, first, mask=half_mask)
        tl.store(o_ptrs + HEAD_DIM // 2, second, mask=half_mask)


def supports(head_dim: int) -> bool:
    """Whether the kernel takes heads of this size: even, from 2 to 256."""
    return head_dim % 2 == 0 and 2 <= head_dim <= 256


def launch_config(head_dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """Picks the meta-parameters and the launch options; not yet measured on a device.

    Sixteen elements of x a thread: two 128-bit loads in half precision.

    Args:
        head_dim: that `supports` allows.

    Returns:
        HEAD_DIM, HALF_BLOCK and BLOCK_T by name, and options by name.
    """
    half_block = max(triton.next_power_of_2(head_dim // 2), 8)
    block_t = 1024 // half_block
    meta = {"HEAD_DIM": head_dim, "HALF_BLOCK": half_block, "BLOCK_T": block_t}
    return meta, {"num_warps": 4}


def rope_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    start: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates q and k of consecutive positions and stores k and v into one slot of a cache.

    Args:
        qkv: (T, (num_heads + 2 · num_kv_heads) · d) float32, float16 or bfloat16, with q and k
            interleaved as pairs.
        cos: (T, d / 2), dtype of qkv, of the positions start … start + T − 1.
        sin: as cos.
        k_cache: (num_kv_heads, max_positions, d), dtype of qkv; positions start … start + T − 1
            are written in place, in plain order.
        v_cache: as k_cache.
        start: position of the first row.
        num_heads: of q.
        num_kv_heads: of k and of v.
        q_out: (T, num_heads, d), dtype of qkv, written in place; must not overlap qkv. None
            allocates it.

    Returns:
        q_out, in plain order.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or last-dimension stride, positions beyond the cache, or
            a head size that `supports` refuses.
    """
    head_dim = _head_dim(qkv, num_heads, num_kv_heads)
    num_rows = qkv.shape[0]
    if q_out is None:
        q_out = qkv.new_empty(num_rows, num_heads, head_dim)
    cache_shape = (num_kv_heads, k_cache.shape[1] if k_cache.ndim == 3 else 0, head_dim)
    _check(
        qkv,
        ("cos", cos, (num_rows, head_dim // 2)),
        ("sin", sin, (num_rows, head_dim // 2)),
        ("k_cache", k_cache, cache_shape),
        ("v_cache", v_cache, cache_shape),
        ("q_out", q_out, (num_rows, num_heads, head_dim)),
    )
    if start < 0 or start + num_rows > cache_shape[1]:
        raise ValueError(
            f"start is {start} for {num_rows} rows; the cache has {cache_shape[1]} positions"
        )
    if num_rows == 0:
        return q_out
    meta, options = launch_config(head_dim)
    grid = (num_heads + 2 * num_kv_heads, triton.cdiv(num_rows, meta["BLOCK_T"]))
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(qkv):
        _rope_and_store_kernel[grid](
            qkv,
            cos,
            sin,
            q_out,
            k_cache,
            v_cache,
            start,
            num_rows,
            qkv.stride(0),
            cos.stride(0),
            sin.stride(0),
            *q_out.stride()[:2],
            *k_cache.stride()[:2],
            *v_cache.stride()[:2],
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            **meta,
            **options,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )
    return q_out


def _head_dim(qkv: torch.Tensor, num_heads: int, num_kv_heads: int) -> int:
    if qkv.dtype not in _DTYPES:
        raise TypeError(f"qkv is {qkv.dtype}; expected one of {_DTYPES}. Convert it before")
    if num_heads < 1 or num_kv_heads < 1:
        raise ValueError(
            f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}; expected at least 1"
        )
    all_heads = num_heads + 2 * num_kv_heads
    if qkv.ndim != 2 or qkv.shape[1] % all_heads or not supports(qkv.shape[1] // all_heads):
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; expected (T, {all_heads} · d), d even, at most 256"
        )
    return qkv.shape[1] // all_heads


def _check(qkv: torch.Tensor, *expected: tuple[str, torch.Tensor, tuple[int, ...]]) -> None:
    for name, tensor, shape in (("qkv", qkv, tuple(qkv.shape)), *expected):
        if tensor.dtype != qkv.dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {qkv.dtype}, as qkv")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.device != qkv.device:
            raise ValueError(f"{name} is on {tensor.device}; qkv is on {qkv.device}. Move it")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has last-dimension stride {tensor.stride(-1)}; expected 1")
