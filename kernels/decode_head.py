"""Both ends of a decode step: logits of rms_norm(residual + Σ partials), and the embedding.

Layout: logits (16, V) float32, not rounded. Each program of the head owns BLOCK_N ids and leaves
the largest logit that is not forbidden, block_max (16, num_blocks) float32, and its id,
block_argmax int32, the lowest among equals; where all are forbidden -inf and the block's first id.
NaN counts as inf, so that whoever picks from the blocks finds it. `embed_rows` begins the next
step: residual (16, H) float32, zero for a token of -1. Dtypes: weights float32, float16 or
bfloat16.

Roofline: memory, each weight of the head read once a step: 152000 × 896 in half precision are
272 MB, 65 µs at 4.2 TB/s; 152128 × 3584 are 1.09 GB, 260 µs.
"""

import torch
import triton
import triton.language as tl

from ovfast.kernels.decode_tiles import (
    ROWS,
    Blocks,
    check_normed,
    check_tensor,
    check_weight,
    normed_product,
    tile_dtype,
    weight_tile,
)

_EMBED_BLOCK = 1024
HEAD_BLOCK = 64  # ids of one program of the head


@triton.jit(do_not_specialize=["num_rows"])
def _decode_head_kernel(
    residual_ptr,
    partials_ptr,
    norm_ptr,
    w_ptr,
    scales_ptr,  # None: the weight is not float8
    logits_ptr,
    forbidden_ptr,
    block_max_ptr,
    block_argmax_ptr,
    eps,
    num_rows,
    stride_wn,
    H: tl.constexpr,
    V: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    block = tl.program_id(0)
    first_id = block * BLOCK_N
    w = weight_tile(w_ptr, stride_wn, first_id, 0, H, V, BLOCK_N, BLOCK_K, H > BLOCK_K)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    logits = normed_product(
        w, w_ptr, scales_ptr, stride_wn, first_id, residual_ptr, partials_ptr, norm_ptr, eps,
        num_rows, V, H, NUM_PARTIALS, BLOCK_N, BLOCK_K, K_PARTS,
    )  # fmt: skip
    ids = first_id + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, 16)
    mask = (rows < num_rows)[None, :] & (ids < V)[:, None]
    tl.store(logits_ptr + rows[None, :] * V + ids[:, None], logits, mask=mask)

    forbidden = tl.load(forbidden_ptr + ids, mask=ids < V, other=1)
    logits = tl.where(logits == logits, logits, float("inf"))
    logits = tl.where((forbidden == 0)[:, None], logits, float("-inf"))
    best = tl.max(logits, 0)
    # Equal to the maximum, then the lowest: -inf equals itself, so an id is always found.
    candidates = tl.where(logits == best[None, :], ids[:, None], first_id + BLOCK_N)
    blocks = rows * tl.num_programs(0) + block
    tl.store(block_max_ptr + blocks, best, mask=rows < num_rows)
    tl.store(block_argmax_ptr + blocks, tl.min(candidates, 0), mask=rows < num_rows)


@triton.jit
def _embed_rows_kernel(
    tokens_ptr,
    table_ptr,
    residual_ptr,
    stride_tm,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # int64: 2**31 elements are a table of 262 144 rows of 8192.
    token = tl.load(tokens_ptr + row).to(tl.int64)
    end = tl.where(token >= 0, H, 0)
    x = tl.load(table_ptr + token * stride_tm + cols, mask=cols < end, other=0.0)
    tl.store(residual_ptr + row * H + cols, x.to(tl.float32), mask=cols < H)


def head_config(hidden_size: int, dtype: torch.dtype) -> Blocks:
    """Picks the blocks of the head; not yet measured on a device.

    64 ids a program, since every program reads the residual twice from L2; two tiles of 16 KB, in
    float8 of 8, are in flight a program. BLOCK_N is the same for all, so that `head_blocks` needs V
    alone.

    Args:
        hidden_size: columns of the weight.
        dtype: of the weight.

    Returns:
        The blocks.
    """
    block_k = min(max(triton.next_power_of_2(hidden_size), 64), 128)
    if dtype == torch.float32:
        return Blocks(HEAD_BLOCK, block_k, 4, 8)
    return Blocks(HEAD_BLOCK, block_k, 4, 4)


def head_blocks(vocab_size: int) -> int:
    """The number of blocks of ids for which decode_head leaves a maximum."""
    return -(-vocab_size // HEAD_BLOCK)


def decode_head(
    residual_in: torch.Tensor,
    partials: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    logits: torch.Tensor,
    forbidden: torch.Tensor,
    block_max: torch.Tensor,
    block_argmax: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    num_rows: int = ROWS,
    pdl: bool = False,
) -> None:
    """Logits of the normalised rows, and for each block of ids the best that is not forbidden.

    Args:
        residual_in: (16, H) float32.
        partials: (S, 16, H) float32, added to it in order, or None.
        norm_weight: (H,), dtype of weight; beside float8 any of the others, which then is meant
            by "dtype of weight".
        eps: of the norm.
        weight: (V, H) float32, float16, bfloat16 or float8.
        logits: (16, V) float32, written.
        forbidden: (V,) int8, not 0 for an id that may not be chosen.
        block_max: (16, head_blocks(V)) float32, written.
        block_argmax: (16, head_blocks(V)) int32, written.
        scales: float32, one for each row of a float8 weight; None for others.
        num_rows: rows from here on are neither read nor written.
        pdl: programmatic dependent launch; sm_90 and later.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or stride.
    """
    num_partials = check_normed(residual_in, partials, norm_weight, weight, scales, num_rows)
    vocab_size, hidden_size = weight.shape
    num_blocks, device = head_blocks(vocab_size), weight.device
    check_tensor("logits", logits, (ROWS, vocab_size), torch.float32, device)
    check_tensor("forbidden", forbidden, (vocab_size,), torch.int8, device)
    check_tensor("block_max", block_max, (ROWS, num_blocks), torch.float32, device)
    check_tensor("block_argmax", block_argmax, (ROWS, num_blocks), torch.int32, device)
    blocks = head_config(hidden_size, tile_dtype(weight, norm_weight.dtype))
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(weight):
        _decode_head_kernel[(num_blocks,)](
            residual_in,
            residual_in if partials is None else partials,
            norm_weight,
            weight,
            scales,
            logits,
            forbidden,
            block_max,
            block_argmax,
            eps,
            num_rows,
            weight.stride(0),
            H=hidden_size,
            V=vocab_size,
            NUM_PARTIALS=num_partials,
            USE_PDL=pdl,
            **blocks.meta(),
            **blocks.options(),
            launch_pdl=pdl,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )


def embed_rows(
    tokens: torch.Tensor,
    embed_tokens: torch.Tensor,
    residual_out: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Writes the embedding of every row's token, zeros for -1.

    Args:
        tokens: (16,) int32, each -1 or below V.
        embed_tokens: (V, H) float32, float16 or bfloat16.
        residual_out: (16, H) float32, written.
        pdl: programmatic dependent launch; sm_90 and later.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or stride.
    """
    check_weight(embed_tokens, None, embed_tokens.dtype)
    width, device = embed_tokens.shape[1], embed_tokens.device
    check_tensor("tokens", tokens, (ROWS,), torch.int32, device)
    check_tensor("residual_out", residual_out, (ROWS, width), torch.float32, device)
    with torch.cuda.device_of(tokens):
        _embed_rows_kernel[(ROWS, triton.cdiv(width, _EMBED_BLOCK))](
            tokens,
            embed_tokens,
            residual_out,
            embed_tokens.stride(0),
            H=width,
            BLOCK_H=_EMBED_BLOCK,
            USE_PDL=pdl,
            num_warps=4,
            launch_pdl=pdl,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )
