"""Attention of every token of a view to all tokens of that view: softmax(q · kᵀ · D^-0.5) · v.

Layout: qkv row-major, a row is q, k, v, each (num_heads, head_dim); any row stride, last dimension
contiguous. Dtypes: float32, float16 or bfloat16, out as qkv. Scores, softmax and sums are
float32; the probabilities are rounded to the storage dtype before they meet v, with one rounding
on store.

head_dim need not be a power of two: it is split into HEAD_A, a power of two, and HEAD_B, the rest
padded to one. 72 is 64 + 16: 11 % more products than needed, where one tile of 128 is 78 % more.

A program owns BLOCK_M queries of one head of one view and walks the keys in blocks of BLOCK_N,
always in the same order, so a view's bits do not depend on the views beside it. Only the last
block of keys is masked. Query blocks are the fastest grid axis: programs that read the same keys
run side by side and find them in L2.

Roofline: tensor cores, and close behind them the exponentials. 7 views of 729 tokens with 16
heads of 72 are 17 GFLOP and 60 M exponentials a layer: 22 µs at 790 TFLOP/s.
"""

import torch
import triton
import triton.language as tl

from ovfast.kernels.shared_memory import LARGE, SMALL, shared_bytes

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LOG2_E = 1.4426950408889634


@triton.jit
def _attend_to_block(
    state,
    q_a,
    q_b,
    k_ptr,
    v_ptr,
    stride_qkvm,
    score_scale,
    NUM_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Folds NUM_KEYS ≤ BLOCK_N keys into state = (acc_a, acc_b, row_max, row_sum)."""
    MASK_KEYS: tl.constexpr = NUM_KEYS < BLOCK_N
    acc_a, acc_b, row_max, row_sum = state
    keys = tl.arange(0, BLOCK_N)[:, None]
    offsets_a = keys * stride_qkvm + tl.arange(0, HEAD_A)[None, :]
    if MASK_KEYS:
        k_a = tl.load(k_ptr + offsets_a, mask=keys < NUM_KEYS, other=0.0)
        v_a = tl.load(v_ptr + offsets_a, mask=keys < NUM_KEYS, other=0.0)
    else:
        k_a = tl.load(k_ptr + offsets_a)
        v_a = tl.load(v_ptr + offsets_a)
    scores = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
    if HEAD_B > 0:
        cols_b = HEAD_A + tl.arange(0, HEAD_B)[None, :]
        offsets_b = keys * stride_qkvm + cols_b
        # HEAD_DIM is a constexpr multiple of 8: the mask is constant over a 128-bit load.
        mask_b = cols_b < HEAD_DIM
        if MASK_KEYS:
            mask_b = mask_b & (keys < NUM_KEYS)
        k_b = tl.load(k_ptr + offsets_b, mask=mask_b, other=0.0)
        v_b = tl.load(v_ptr + offsets_b, mask=mask_b, other=0.0)
        scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision="ieee")
    if MASK_KEYS:
        scores = tl.where(tl.arange(0, BLOCK_N)[None, :] < NUM_KEYS, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * score_scale)
    p = tl.exp2(scores * score_scale - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(p, 1)
    p = p.to(v_a.dtype)
    acc_a = tl.dot(p, v_a, acc_a * decay[:, None], input_precision="ieee")
    if HEAD_B > 0:
        acc_b = tl.dot(p, v_b, acc_b * decay[:, None], input_precision="ieee")
    return acc_a, acc_b, new_max, row_sum


@triton.jit
def _attention_kernel(
    qkv_ptr,
    out_ptr,
    stride_qkvm,
    stride_om,
    score_scale,
    N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    # int64: rows · stride passes 2**31 from 853 views on.
    first_key = tl.program_id(2).to(tl.int64) * N
    first_query = first_key + block * BLOCK_M
    rows = tl.arange(0, BLOCK_M)[:, None]
    row_mask = rows < N - block * BLOCK_M
    cols_a = tl.arange(0, HEAD_A)[None, :]
    cols_b = HEAD_A + tl.arange(0, HEAD_B if HEAD_B > 0 else 1)[None, :]
    mask_b = row_mask & (cols_b < HEAD_DIM)

    q_ptr = qkv_ptr + first_query * stride_qkvm + head * HEAD_DIM
    k_ptr = qkv_ptr + first_key * stride_qkvm + (num_heads + head) * HEAD_DIM
    v_ptr = k_ptr + num_heads * HEAD_DIM
    q_a = tl.load(q_ptr + rows * stride_qkvm + cols_a, mask=row_mask, other=0.0)
    q_b = q_a
    if HEAD_B > 0:
        q_b = tl.load(q_ptr + rows * stride_qkvm + cols_b, mask=mask_b, other=0.0)

    state = (
        tl.zeros((BLOCK_M, HEAD_A), dtype=tl.float32),
        tl.zeros((BLOCK_M, HEAD_B if HEAD_B > 0 else 1), dtype=tl.float32),
        tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32),
        tl.zeros((BLOCK_M,), dtype=tl.float32),
    )
    # N is a constexpr for a known trip count: where the loop may be skipped, its accumulators have
    # two sources and ptxas waits after every single wgmma (message C7515).
    NUM_FULL: tl.constexpr = (N - 1) // BLOCK_N
    for _ in range(NUM_FULL):
        state = _attend_to_block(
            state, q_a, q_b, k_ptr, v_ptr, stride_qkvm, score_scale,
            BLOCK_N, HEAD_DIM, HEAD_A, HEAD_B, BLOCK_N,
        )  # fmt: skip
        k_ptr += BLOCK_N * stride_qkvm
        v_ptr += BLOCK_N * stride_qkvm
    acc_a, acc_b, _row_max, row_sum = _attend_to_block(
        state, q_a, q_b, k_ptr, v_ptr, stride_qkvm, score_scale,
        N - NUM_FULL * BLOCK_N, HEAD_DIM, HEAD_A, HEAD_B, TAIL_N,
    )  # fmt: skip

    dtype = out_ptr.dtype.element_ty
    inverse = 1.0 / row_sum[:, None]
    o_ptr = out_ptr + first_query * stride_om + head * HEAD_DIM
    tl.store(o_ptr + rows * stride_om + cols_a, (acc_a * inverse).to(dtype), mask=row_mask)
    if HEAD_B > 0:
        tl.store(o_ptr + rows * stride_om + cols_b, (acc_b * inverse).to(dtype), mask=mask_b)


def head_split(head_dim: int) -> tuple[int, int]:
    """Splits a head into (HEAD_A, HEAD_B), both powers of two or HEAD_B 0, HEAD_A at most 64."""
    # 64: one float32 tile of 128 columns spills registers, two of 64 do not.
    head_a = min(1 << (head_dim.bit_length() - 1), 64)
    rest = head_dim - head_a
    return head_a, max(triton.next_power_of_2(rest), 16) if rest > 0 else 0


def supports(head_dim: int) -> bool:
    """Whether the kernel takes heads of this size: a multiple of 8 from 16 to 128."""
    return head_dim % 8 == 0 and 16 <= head_dim <= 128


def launch_config(
    head_dim: int, tokens_per_view: int, dtype: torch.dtype, shared_bytes: int = LARGE
) -> tuple[dict[str, int], dict[str, int]]:
    """Picks the meta-parameters and the launch options; not yet measured on a device.

    Half precision: 128 queries read the keys from L2 half as often as 64 would, for the same
    padding (729 is 5.7 blocks of 128 or 11.4 of 64), and below 129 registers a thread two
    programs of 8 warps share an SM of sm_90. 132 SMs have at most 128, 256 and 768 rows each of
    1, 2 and 7 views; tiles of 64 would be 128, 192 and 704. float32 multiplies without tensor
    cores, and larger tiles than 32 × 64 spill registers. One tile for any number of views.

    Args:
        head_dim: that `supports` allows.
        tokens_per_view: at least 1.
        dtype: of qkv.
        shared_bytes: that one block may have: where it is SMALL, heads above 72 have two stages.

    Returns:
        Meta-parameters by name, and options by name.
    """
    block_m, block_n = (32, 64) if dtype == torch.float32 else (128, 64)
    head_a, head_b = head_split(head_dim)
    tail = (tokens_per_view - 1) % block_n + 1
    meta = {
        "N": tokens_per_view,
        "HEAD_DIM": head_dim,
        "HEAD_A": head_a,
        "HEAD_B": head_b,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "TAIL_N": max(triton.next_power_of_2(tail), 16),
    }
    is_tight = shared_bytes <= SMALL and head_dim > 72
    return meta, {"num_warps": 8, "num_stages": 2 if is_tight else 3}


def attention(
    qkv: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    num_heads: int,
    tokens_per_view: int,
) -> torch.Tensor:
    """Attention of every token of a view to all tokens of that view, scale head_dim^-0.5.

    Args:
        qkv: (num_views · tokens_per_view, 3 · num_heads · head_dim) float32, float16 or bfloat16;
            q, then k, then v.
        out: (num_views · tokens_per_view, num_heads · head_dim), dtype of qkv, written in place;
            must not overlap qkv. None allocates it.
        num_heads: of q, of k and of v.
        tokens_per_view: compiled in, so each value costs a compilation.

    Returns:
        out.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or last-dimension stride, or a head_dim that `supports`
            refuses.
    """
    head_dim = _check_qkv(qkv, num_heads, tokens_per_view)
    if out is None:
        out = qkv.new_empty(qkv.shape[0], num_heads * head_dim)
    _check_out(out, qkv, num_heads * head_dim)
    num_views = qkv.shape[0] // tokens_per_view
    if num_views == 0:
        return out
    meta, options = launch_config(head_dim, tokens_per_view, qkv.dtype, shared_bytes(qkv.device))
    grid = (triton.cdiv(tokens_per_view, meta["BLOCK_M"]), num_heads, num_views)
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(qkv):
        _attention_kernel[grid](
            qkv,
            out,
            qkv.stride(0),
            out.stride(0),
            head_dim**-0.5 * _LOG2_E,
            **meta,
            **options,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )
    return out


def _check_qkv(qkv: torch.Tensor, num_heads: int, tokens_per_view: int) -> int:
    """Returns head_dim."""
    if qkv.dtype not in _DTYPES:
        raise TypeError(f"qkv is {qkv.dtype}; expected one of {_DTYPES}. Convert it before")
    if num_heads < 1 or tokens_per_view < 1:
        raise ValueError(
            f"num_heads is {num_heads} and tokens_per_view {tokens_per_view}; expected at least 1"
        )
    if qkv.ndim != 2 or qkv.shape[0] % tokens_per_view or qkv.shape[1] % (3 * num_heads):
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; expected (num_views · {tokens_per_view}, "
            f"3 · {num_heads} · head_dim)"
        )
    head_dim = qkv.shape[1] // (3 * num_heads)
    if not supports(head_dim):
        raise ValueError(
            f"head_dim is {head_dim}; expected a multiple of 8 from 16 to 128. "
            "Use torch's scaled_dot_product_attention"
        )
    if qkv.stride(1) != 1:
        raise ValueError(f"qkv has last-dimension stride {qkv.stride(1)}; expected 1")
    return head_dim


def _check_out(out: torch.Tensor, qkv: torch.Tensor, width: int) -> None:
    if out.dtype != qkv.dtype:
        raise TypeError(f"out is {out.dtype}; expected {qkv.dtype}, as qkv. Allocate it so")
    if tuple(out.shape) != (qkv.shape[0], width):
        raise ValueError(f"out has shape {tuple(out.shape)}; expected {(qkv.shape[0], width)}")
    if out.device != qkv.device:
        raise ValueError(f"out is on {out.device}; qkv is on {qkv.device}. Move one of them")
    if out.stride(1) != 1:
        raise ValueError(f"out has last-dimension stride {out.stride(1)}; expected 1")
