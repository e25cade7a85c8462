"""First launch of a decode layer: x = residual + Σ partials; q, k, v = rope(W rms_norm(x) + bias).

Layout: the weight's rows and the bias are permuted once by `pack_qkv_rows`, so that a program of
BLOCK_N rows holds both members of each rotated pair (i, i + head_dim / 2) of one head. q and the
caches are written in the standard order: q (16, num_heads · head_dim), one layer's caches
(num_slots, num_kv_heads, max_positions, head_dim) at positions[r] of slots[r]. A row with slot -1
writes neither. Dtypes: weights, tables, q and caches float32, float16 or bfloat16, all the same, or
a weight in float8 with scales; residuals and partials float32. Roundings are upstream's: the
normalised value, its product with the norm's weight, the projection, and every product and sum of
rope.

Roofline: memory, each weight read once a step. 1152 × 896 in half precision are 2.1 MB, 0.5 µs at
4.2 TB/s, so launch and latency weigh more; 10240 × 8192 are 168 MB, 40 µs.
"""

import torch
import triton
import triton.language as tl

from ovfast.kernels.decode_tiles import (
    FLOAT8,
    RESIDUAL_BLOCK,
    ROWS,
    Blocks,
    check_normed,
    check_residual_out,
    check_tensor,
    normed_product,
    store_residual,
    tile_dtype,
    weight_tile,
)


@triton.jit(do_not_specialize=["num_rows"])
def _decode_qkv_kernel(
    residual_ptr,
    partials_ptr,
    residual_out_ptr,
    norm_ptr,
    w_ptr,
    scales_ptr,  # None: the weight is not float8
    bias_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    positions_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    eps,
    num_rows,
    stride_wn,
    stride_ks,
    stride_kh,
    stride_kp,
    stride_vs,
    stride_vh,
    stride_vp,
    H: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    N: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    first_row = tl.program_id(0) * BLOCK_N
    w = weight_tile(w_ptr, stride_wn, first_row, 0, H, N, BLOCK_N, BLOCK_K, H > BLOCK_K)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    rows = tl.arange(0, 16)
    slots = tl.load(slots_ptr + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    used = slots >= 0
    positions = tl.load(positions_ptr + rows, mask=used, other=0).to(tl.int64)
    out = normed_product(
        w, w_ptr, scales_ptr, stride_wn, first_row, residual_ptr, partials_ptr, norm_ptr, eps,
        num_rows, N, H, NUM_PARTIALS, BLOCK_N, BLOCK_K, K_PARTS,
    )  # fmt: skip
    dtype = q_ptr.dtype.element_ty
    bias = tl.load(bias_ptr + first_row + tl.arange(0, BLOCK_N)).to(tl.float32)
    out = (out + bias[:, None]).to(dtype).to(tl.float32)

    # BLOCK_N divides HEAD_DIM: a program is inside one head.
    head = first_row // HEAD_DIM
    pairs = (first_row % HEAD_DIM) // 2 + tl.arange(0, BLOCK_N // 2)
    first, second = tl.split(tl.permute(tl.reshape(out, (BLOCK_N // 2, 2, 16)), (0, 2, 1)))
    mask = (pairs >= 0)[:, None] & used[None, :]
    if head < NUM_HEADS + NUM_KV_HEADS:
        angles = positions[None, :] * (HEAD_DIM // 2) + pairs[:, None]
        cos = tl.load(cos_ptr + angles, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angles, mask=mask, other=0.0).to(tl.float32)
        first_sin = (first * sin).to(dtype).to(tl.float32)
        second_sin = (second * sin).to(dtype).to(tl.float32)
        out_first = ((first * cos).to(dtype).to(tl.float32) - second_sin).to(dtype)
        out_second = ((second * cos).to(dtype).to(tl.float32) + first_sin).to(dtype)
        if head < NUM_HEADS:
            out_ptr = q_ptr + rows * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
        else:
            kv_head = head - NUM_HEADS
            out_ptr = k_cache_ptr + slots * stride_ks + kv_head * stride_kh + positions * stride_kp
        tl.store(out_ptr[None, :] + pairs[:, None], out_first, mask=mask)
        tl.store(out_ptr[None, :] + (HEAD_DIM // 2 + pairs)[:, None], out_second, mask=mask)
    else:
        kv_head = head - NUM_HEADS - NUM_KV_HEADS
        out_ptr = v_cache_ptr + slots * stride_vs + kv_head * stride_vh + positions * stride_vp
        tl.store(out_ptr[None, :] + (2 * pairs)[:, None], first.to(dtype), mask=mask)
        tl.store(out_ptr[None, :] + (2 * pairs + 1)[:, None], second.to(dtype), mask=mask)
    store_residual(residual_ptr, partials_ptr, residual_out_ptr, num_rows, H, NUM_PARTIALS, BLOCK_H)


def launch_config(hidden_size: int, head_dim: int, dtype: torch.dtype) -> Blocks:
    """Picks the blocks; not yet measured on a device.

    Up to 1024 columns are one tile, loaded whole before the wait: 72 programs of 28 KB at 0.5B.
    Above, two tiles of 16 KB (float8: 8) are in flight a program: 144 programs at 7B, 320 at 72B.

    Args:
        hidden_size: columns of the weight.
        head_dim: a multiple of 16.
        dtype: of the weight.

    Returns:
        The blocks; BLOCK_N divides head_dim.
    """
    if dtype == torch.float32:
        return Blocks(16, min(max(triton.next_power_of_2(hidden_size), 64), 256), 4, 8)
    if hidden_size <= 1024:
        return Blocks(16, max(triton.next_power_of_2(hidden_size), 128), 8, 8)
    # On 4 warps float8 spilled registers at 72B on sm_100.
    parts = 8 if dtype == FLOAT8 else 4
    return Blocks(16 if head_dim % 32 else 32, 256, parts, parts)


def pack_qkv_rows(num_heads: int, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """Row permutation of the packed weight: packed = weight[permutation], and the bias alike.

    Rows of each q and k head go in pairs 0, d/2, 1, d/2 + 1, …; those of v stay.

    Args:
        num_heads: of q.
        num_kv_heads: of k and of v.
        head_dim: even.

    Returns:
        ((num_heads + 2 · num_kv_heads) · head_dim,) int64.
    """
    rows = torch.arange((num_heads + 2 * num_kv_heads) * head_dim).view(-1, head_dim)
    rotated = rows[: num_heads + num_kv_heads].unflatten(1, (2, -1)).transpose(1, 2)
    return torch.cat((rotated.flatten(), rows[num_heads + num_kv_heads :].flatten()))


def decode_qkv(
    residual_in: torch.Tensor,
    partials: torch.Tensor | None,
    residual_out: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scales: torch.Tensor | None = None,
    num_rows: int = ROWS,
    pdl: bool = False,
) -> None:
    """Projects the rows to q, k and v, rotates q and k, and writes k and v into the caches.

    Args:
        residual_in: (16, H) float32.
        partials: (S, 16, H) float32, added to it in order, or None.
        residual_out: (16, H) float32, the sum; another buffer than residual_in.
        norm_weight: (H,), dtype of weight; beside float8 any of the others, which then is meant
            by "dtype of weight".
        eps: of the norm.
        weight: ((num_heads + 2 · num_kv_heads) · d, H) float32, float16, bfloat16 or float8,
            packed by `pack_qkv_rows`.
        bias: one for each row of weight, its dtype, packed alike.
        cos: (max_positions, d / 2), dtype of weight.
        sin: as cos.
        slots: (16,) int32, -1 for a row without a request.
        positions: (16,) int32, below max_positions where the slot is not -1.
        q: (16, num_heads · d), dtype of weight, written.
        k_cache: (num_slots, num_kv_heads, max_positions, d), any outer strides; written at the
            positions.
        v_cache: as k_cache.
        num_heads: of q.
        num_kv_heads: of k and of v.
        scales: float32, one for each row of a float8 weight, packed alike; None for others.
        num_rows: rows from here on are neither read nor written.
        pdl: programmatic dependent launch; sm_90 and later.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or stride.
    """
    num_partials = check_normed(residual_in, partials, norm_weight, weight, scales, num_rows)
    check_residual_out(residual_out, residual_in)
    head_dim = _check_heads(weight, num_heads, num_kv_heads)
    tables = (bias, cos, sin, slots, positions)
    dtype = norm_weight.dtype
    _check_tables(weight, dtype, tables, q, k_cache, v_cache, num_heads, num_kv_heads, head_dim)
    num_weights, hidden_size = weight.shape
    blocks = launch_config(hidden_size, head_dim, tile_dtype(weight, dtype))
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(weight):
        _decode_qkv_kernel[(num_weights // blocks.BLOCK_N,)](
            residual_in,
            residual_in if partials is None else partials,
            residual_out,
            norm_weight,
            weight,
            scales,
            bias,
            cos,
            sin,
            slots,
            positions,
            q,
            k_cache,
            v_cache,
            eps,
            num_rows,
            weight.stride(0),
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            H=hidden_size,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            NUM_PARTIALS=num_partials,
            BLOCK_H=RESIDUAL_BLOCK,
            USE_PDL=pdl,
            **blocks.meta(),
            **blocks.options(),
            launch_pdl=pdl,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )


def _check_heads(weight: torch.Tensor, num_heads: int, num_kv_heads: int) -> int:
    """Returns head_dim."""
    total = num_heads + 2 * num_kv_heads
    if num_heads < 1 or num_kv_heads < 1 or weight.shape[0] % total:
        raise ValueError(
            f"weight has {weight.shape[0]} rows; expected a multiple of num_heads + 2 · "
            f"num_kv_heads = {total}"
        )
    head_dim = weight.shape[0] // total
    if head_dim % 16:
        raise ValueError(
            f"head_dim is {head_dim}; expected a multiple of 16. Use the plain projection"
        )
    return head_dim


def _check_tables(
    weight: torch.Tensor,
    dtype: torch.dtype,
    tables: tuple[torch.Tensor, ...],
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    bias, cos, sin, slots, positions = tables
    device = weight.device
    if k_cache.ndim != 4:
        raise ValueError(
            f"k_cache has shape {tuple(k_cache.shape)}; expected (num_slots, {num_kv_heads}, "
            f"max_positions, {head_dim})"
        )
    cache_shape = (k_cache.shape[0], num_kv_heads, k_cache.shape[2], head_dim)
    half_shape = (k_cache.shape[2], head_dim // 2)
    check_tensor("bias", bias, (weight.shape[0],), dtype, device)
    check_tensor("cos", cos, half_shape, dtype, device)
    check_tensor("sin", sin, half_shape, dtype, device)
    check_tensor("slots", slots, (ROWS,), torch.int32, device)
    check_tensor("positions", positions, (ROWS,), torch.int32, device)
    check_tensor("q", q, (ROWS, num_heads * head_dim), dtype, device)
    check_tensor("k_cache", k_cache, cache_shape, dtype, device, contiguous=False)
    check_tensor("v_cache", v_cache, cache_shape, dtype, device, contiguous=False)
