"""Attention of one new token a row over the row's cache, in splits of SPLIT keys: for each split
m = max(s), l = Σ exp2(s − m), acc = Σ exp2(s − m) · v, where s = q · k · d^-0.5 · log2 e.

m is in the log2 domain: the scale and log2 e are folded into one factor. A row's attention, which
decode_out makes, is Σ acc · exp2(m − M) / Σ l · exp2(m − M) over its splits, M the largest m.

Layout: q (rows, num_heads, d); k_cache and v_cache (num_slots, num_kv_heads, max_positions, d), one
layer of a cache; acc (rows, num_heads, max_splits, d); m and l (rows, num_heads, max_splits). Any
outer strides, d contiguous. Dtypes: q and the cache float32, float16 or bfloat16, all the same;
acc, m and l float32; slots and positions int32. Scores and sums are float32; the probabilities
are rounded to the storage dtype before they meet v, after l has counted them unrounded.

A program owns one split of one KV head of one row: the query heads of the group are the rows of
one product, padded to 16, so each key is read once. A split and the order of its keys depend on
the row's own length alone, so its bits depend neither on the rows beside it nor on the grid. A
program of an unused row (slot -1) or of a split beyond the row's length writes nothing.

With PDL the dependents are let go only after this kernel's own wait: whatever ran before the
previous kernel has ended by then.

Roofline: memory. Each key and value of a row is read once: 4096 positions of 4 KV heads of 128 in
half precision are 8.4 MB, 2 µs at 4.2 TB/s.
"""

import torch
import triton
import triton.language as tl

from ovfast.kernels.shared_memory import LARGE, SMALL, shared_bytes

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LOG2_E = 1.4426950408889634
SPLIT = 256  # keys of a program
GROUP_ROWS = 16  # rows of the product: query heads of a KV head, padded
MAX_ROWS = 16


@triton.jit
def _decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    positions_ptr,
    acc_ptr,
    m_ptr,
    l_ptr,
    score_scale,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_am,
    stride_ah,
    stride_as,
    stride_mm,
    stride_mh,
    stride_ms,
    stride_lm,
    stride_lh,
    stride_ls,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # int64: a layer of a cache can hold more than 2**31 elements.
    slot = tl.load(slots_ptr + row).to(tl.int64)
    num_keys = tl.load(positions_ptr + row) + 1 - split * SPLIT
    if (slot >= 0) & (num_keys > 0):
        num_keys = tl.minimum(num_keys, SPLIT)
        group = tl.arange(0, GROUP_ROWS)
        heads = kv_head * GROUP + group
        cols = tl.arange(0, HEAD_BLOCK)[None, :]
        group_mask = (group[:, None] < GROUP) & (cols < HEAD_DIM)
        keys = tl.arange(0, BLOCK_N)[:, None]
        first_key = split.to(tl.int64) * SPLIT
        k_ptr += slot * stride_kb + kv_head.to(tl.int64) * stride_kh + first_key * stride_kn
        v_ptr += slot * stride_vb + kv_head.to(tl.int64) * stride_vh + first_key * stride_vn
        q_ptrs = q_ptr + row * stride_qm + heads[:, None] * stride_qh + cols
        q = tl.load(q_ptrs, mask=group_mask, other=0.0)

        acc = tl.zeros((GROUP_ROWS, HEAD_BLOCK), dtype=tl.float32)
        row_max = tl.full((GROUP_ROWS,), float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros((GROUP_ROWS,), dtype=tl.float32)
        # Every block holds a key of the row, so no maximum stays -inf.
        for first in range(0, num_keys, BLOCK_N):
            is_key = first + keys < num_keys
            # HEAD_DIM is a constexpr multiple of 8: the mask is constant over a 128-bit load.
            mask = is_key & (cols < HEAD_DIM)
            k = tl.load(k_ptr + (first + keys) * stride_kn + cols, mask=mask, other=0.0)
            v = tl.load(v_ptr + (first + keys) * stride_vn + cols, mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores = tl.where(tl.trans(is_key), scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1) * score_scale)
            p = tl.exp2(scores * score_scale - new_max[:, None])
            decay = tl.exp2(row_max - new_max)
            row_sum = row_sum * decay + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
            row_max = new_max

        acc_ptrs = acc_ptr + row.to(tl.int64) * stride_am + heads[:, None] * stride_ah
        tl.store(acc_ptrs + split * stride_as + cols, acc, mask=group_mask)
        m_ptrs = m_ptr + row * stride_mm + heads * stride_mh + split * stride_ms
        l_ptrs = l_ptr + row * stride_lm + heads * stride_lh + split * stride_ls
        tl.store(m_ptrs, row_max, mask=group < GROUP)
        tl.store(l_ptrs, row_sum, mask=group < GROUP)


def supports(head_dim: int) -> bool:
    """Whether the kernel takes heads of this size: a multiple of 8 from 8 to 128."""
    return head_dim % 8 == 0 and 8 <= head_dim <= 128


def launch_config(
    head_dim: int, group: int, dtype: torch.dtype, shared_bytes: int = LARGE
) -> tuple[dict[str, int], dict[str, int]]:
    """Picks the meta-parameters and the launch options; not yet measured on a device.

    Half precision: blocks of 64 keys, of which the pipeline holds a whole split of heads of 64 (64
    KB) and three quarters of one of 128 (96 KB), because few programs run at a small batch. float32
    multiplies without tensor cores; 32 keys of 128 spill registers.

    Args:
        head_dim: that `supports` allows.
        group: query heads of a KV head, at most GROUP_ROWS.
        dtype: of q and the cache.
        shared_bytes: that one block may have: where it is SMALL, a split of heads of 128 has a
            stage less.

    Returns:
        Meta-parameters by name, and options by name.
    """
    head_block = max(triton.next_power_of_2(head_dim), 16)
    block_n = 64
    if dtype == torch.float32:
        block_n = 32 if head_block < 128 else 16
    meta = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "GROUP_ROWS": GROUP_ROWS,
        "HEAD_BLOCK": head_block,
        "BLOCK_N": block_n,
        "SPLIT": SPLIT,
    }
    stages = 5 if head_block < 128 else 3 if shared_bytes <= SMALL else 4
    return meta, {"num_warps": 4, "num_stages": stages}


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    acc: torch.Tensor,
    m: torch.Tensor,
    l: torch.Tensor,  # noqa: E741  the field's letter
    *,
    num_splits: int,
    num_rows: int = MAX_ROWS,
    pdl: bool = False,
) -> None:
    """Partial attention of one token a row over the keys 0 … positions[row] of its slot.

    Args:
        q: (16, num_heads, d) float32, float16 or bfloat16.
        k_cache: (num_slots, num_kv_heads, max_positions, d), dtype of q.
        v_cache: as k_cache.
        slots: (16,) int32, the slot of each row, -1 for an unused row. Values are trusted:
            checking them would read the device.
        positions: (16,) int32, the position of the new token, whose key is in the cache already.
            Not read for an unused row.
        acc: (16, num_heads, max_splits, d) float32, written in place for the splits that hold
            keys of the row, as m and l; other elements keep what they hold.
        m: (16, num_heads, max_splits) float32, the largest score, in the log2 domain.
        l: (16, num_heads, max_splits) float32, the sum of exp2(score − m).
        num_splits: splits to look at, at least positions // SPLIT + 1 of every row.
        num_rows: rows from num_rows on are unused.
        pdl: start before the previous kernel ends; from sm_90 on.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or last-dimension stride, a head size that `supports`
            refuses, or more query heads a KV head than GROUP_ROWS.
    """
    _check_inputs(q, k_cache, v_cache)
    _check_partials(q, acc, m, l, slots, positions)
    if not 0 <= num_rows <= MAX_ROWS or not 0 <= num_splits <= m.shape[2]:
        raise ValueError(
            f"num_rows is {num_rows} and num_splits {num_splits}; expected at most {MAX_ROWS} and "
            f"{m.shape[2]}, as many as acc holds"
        )
    if num_rows == 0 or num_splits == 0:
        return
    num_kv_heads = k_cache.shape[1]
    meta, options = launch_config(
        q.shape[2], q.shape[1] // num_kv_heads, q.dtype, shared_bytes(q.device)
    )
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(q):
        _decode_attention_kernel[(num_rows, num_kv_heads, num_splits)](
            q,
            k_cache,
            v_cache,
            slots,
            positions,
            acc,
            m,
            l,
            q.shape[2] ** -0.5 * _LOG2_E,
            *q.stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *acc.stride()[:3],
            *m.stride(),
            *l.stride(),
            **meta,
            **options,
            USE_PDL=pdl,
            launch_pdl=pdl,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )


def _check_q(name: str, q: torch.Tensor) -> None:
    if q.dtype not in _DTYPES:
        raise TypeError(f"{name} is {q.dtype}; expected one of {_DTYPES}. Convert it before")
    if q.ndim != 3 or q.shape[0] != MAX_ROWS or q.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(q.shape)}; expected ({MAX_ROWS}, num_heads ≥ 1, d)"
        )
    if not supports(q.shape[2]):
        raise ValueError(
            f"{name} has heads of {q.shape[2]}; expected a multiple of 8 from 8 to 128"
        )
    if q.stride(2) != 1:
        raise ValueError(f"{name} has last-dimension stride {q.stride(2)}; expected 1")


def _check_inputs(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    _check_q("q", q)
    num_heads, head_dim = q.shape[1:]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype != q.dtype:
            raise TypeError(f"{name} is {cache.dtype}; expected {q.dtype}, as q. Convert it before")
        if cache.ndim != 4 or cache.shape[3] != head_dim or cache.shape != k_cache.shape:
            raise ValueError(
                f"{name} has shape {tuple(cache.shape)}; expected (num_slots, num_kv_heads, "
                f"max_positions, {head_dim}), the same for both"
            )
        if cache.device != q.device:
            raise ValueError(f"{name} is on {cache.device}; q is on {q.device}. Move one of them")
        if cache.stride(3) != 1:
            raise ValueError(f"{name} has last-dimension stride {cache.stride(3)}; expected 1")
    num_kv_heads = k_cache.shape[1]
    if num_kv_heads == 0 or num_heads % num_kv_heads or num_heads > GROUP_ROWS * num_kv_heads:
        raise ValueError(
            f"q has {num_heads} heads and the cache {num_kv_heads}; expected a multiple of them, "
            f"at most {GROUP_ROWS} times as many"
        )


def _check_partials(
    q: torch.Tensor,
    acc: torch.Tensor,
    m: torch.Tensor,
    l: torch.Tensor,  # noqa: E741
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    num_rows, num_heads, head_dim = q.shape
    max_splits = acc.shape[2] if acc.ndim == 4 else 0
    partial = (num_rows, num_heads, max_splits)
    expected = (
        ("acc", acc, (*partial, head_dim), torch.float32),
        ("m", m, partial, torch.float32),
        ("l", l, partial, torch.float32),
        ("slots", slots, (num_rows,), torch.int32),
        ("positions", positions, (num_rows,), torch.int32),
    )
    for name, tensor, shape, dtype in expected:
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {dtype}. Allocate it so")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {q.device}. Move it")
    for name, tensor in (("acc", acc), ("slots", slots), ("positions", positions)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has last-dimension stride {tensor.stride(-1)}; expected 1")
