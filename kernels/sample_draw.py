"""Drawing a token for each row, as `sampling.sample` does for one.

w = exp((score − top) / temperature), 0 where less than min_p or not in `kept`, of top_k and top_p;
the token is the first id whose Σ w, in the order of ids, exceeds u · Σ all w, and has w > 0. u is
Philox4x32-10 of (seed, number of the token), the upper 24 bits of its first word. `sample_weights`
leaves the sum of w of each SAMPLE_BLOCK ids, `sample_draw` finds the block and then the id in it.

Numbers: scores and weights are float32, sums float64: inside a block, over the blocks, then the
blocks before plus the ids inside. That order is one for all rows, so a token does not depend on
the neighbours. Plain torch adds in another order and may round exp differently: another token
where u falls within about 1e-6 of the edge between two.

Layout: scores as in sample_best; sums (16, V / SAMPLE_BLOCK) float64. A program of sample_weights
owns SAMPLE_BLOCK ids of one row, one of sample_draw a row.

Roofline: memory, a row's logits once from L2: 608 KB at 0.5B.
"""

import torch
import triton
import triton.language as tl

from ovfast.kernels.decode_tiles import ROWS, check_tensor
from ovfast.kernels.sample_best import (
    SAMPLE_BLOCK,
    Masks,
    allowed_scores,
    check_scores,
    mask_pointers,
    sample_blocks,
    sample_options,
)

_HIGHEST_ID = tl.constexpr(2**31 - 1)
# Below it a division could overflow to inf or, flushed to zero, give 0 / 0.
_MIN_TEMPERATURE = tl.constexpr(1e-30)


@triton.jit
def _weights(
    scores,
    block_max_ptr,
    temperature_ptr,
    min_p_ptr,
    kept_ptr,
    row,
    ids,
    V: tl.constexpr,
    NUM_MAXIMA: tl.constexpr,
    BLOCK_MAXIMA: tl.constexpr,
    KEPT: tl.constexpr,
):
    """float64 weights of ids, of which the likeliest has 1; kept_ptr is of the row."""
    blocks = tl.arange(0, BLOCK_MAXIMA)
    maxima_ptr = block_max_ptr + row * NUM_MAXIMA + blocks
    top = tl.max(tl.load(maxima_ptr, mask=blocks < NUM_MAXIMA, other=float("-inf")), 0)
    temperature = tl.maximum(tl.load(temperature_ptr + row), _MIN_TEMPERATURE)
    weights = tl.exp(tl.div_rn(scores - top, temperature))
    weights = tl.where(weights >= tl.load(min_p_ptr + row), weights, 0.0)
    if KEPT:
        is_kept = tl.load(kept_ptr + ids, mask=ids < V, other=0) != 0
        weights = tl.where(is_kept, weights, 0.0)
    return weights.to(tl.float64)


@triton.jit
def _uniform(seed_ptr, counts_ptr, row):
    """A float64 in [0, 1) by the row's seed, (low, high) words in int64, and its count."""
    seed = (tl.load(seed_ptr + 2 * row + 1) << 32) | tl.load(seed_ptr + 2 * row)
    count = tl.load(counts_ptr + row)
    low, high = (count & 0xFFFFFFFF).to(tl.uint32), (count >> 32).to(tl.uint32)
    zero = low * 0
    word, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return (word >> 8).to(tl.float64) * 5.9604644775390625e-08  # 2⁻²⁴


@triton.jit(do_not_specialize=["first_row"])
def _sample_weights_kernel(
    logits_ptr,
    forbidden_ptr,
    penalty_ptr,
    seen_ptr,
    is_stop_ptr,
    counts_ptr,
    min_new_tokens_ptr,
    block_max_ptr,
    temperature_ptr,
    min_p_ptr,
    kept_ptr,
    sums_ptr,
    first_row,
    V: tl.constexpr,
    NUM_MAXIMA: tl.constexpr,
    BLOCK_MAXIMA: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKS: tl.constexpr,
    KEPT: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    block, row = tl.program_id(0), first_row + tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    scores = allowed_scores(
        logits_ptr, forbidden_ptr, penalty_ptr, seen_ptr, is_stop_ptr, counts_ptr,
        min_new_tokens_ptr, row, ids, V, MASKS,
    )  # fmt: skip
    weights = _weights(
        scores, block_max_ptr, temperature_ptr, min_p_ptr, kept_ptr + tl.program_id(1) * V, row,
        ids, V, NUM_MAXIMA, BLOCK_MAXIMA, KEPT,
    )  # fmt: skip
    tl.store(sums_ptr + row * tl.num_programs(0) + block, tl.sum(weights, 0))


@triton.jit(do_not_specialize=["first_row"])
def _sample_draw_kernel(
    logits_ptr,
    forbidden_ptr,
    penalty_ptr,
    seen_ptr,
    is_stop_ptr,
    counts_ptr,
    min_new_tokens_ptr,
    block_max_ptr,
    temperature_ptr,
    min_p_ptr,
    kept_ptr,
    sums_ptr,
    seed_ptr,
    drawn_ptr,
    first_row,
    V: tl.constexpr,
    NUM_MAXIMA: tl.constexpr,
    BLOCK_MAXIMA: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKS: tl.constexpr,
    KEPT: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = first_row + tl.program_id(0)
    blocks = tl.arange(0, BLOCK_SUMS)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sums = tl.load(sums_ptr + row * NUM_SUMS + blocks, mask=blocks < NUM_SUMS, other=0.0)
    cumulative = tl.cumsum(sums, 0)
    target = tl.max(cumulative, 0) * _uniform(seed_ptr, counts_ptr, row)
    # A scan may round a later sum below an earlier one, so what weighs nothing is left out.
    is_beyond = (cumulative > target) & (sums > 0.0)
    block = tl.min(tl.where(is_beyond, blocks, NUM_SUMS - 1), 0)
    before = tl.sum(tl.where(blocks == block - 1, cumulative, 0.0), 0)

    ids = block * BLOCK + tl.arange(0, BLOCK)
    scores = allowed_scores(
        logits_ptr, forbidden_ptr, penalty_ptr, seen_ptr, is_stop_ptr, counts_ptr,
        min_new_tokens_ptr, row, ids, V, MASKS,
    )  # fmt: skip
    weights = _weights(
        scores, block_max_ptr, temperature_ptr, min_p_ptr, kept_ptr + tl.program_id(0) * V, row,
        ids, V, NUM_MAXIMA, BLOCK_MAXIMA, KEPT,
    )  # fmt: skip
    is_beyond = (before + tl.cumsum(weights, 0) > target) & (weights > 0.0)
    token = tl.min(tl.where(is_beyond, ids, _HIGHEST_ID), 0)
    # The sum of the block was rounded up above the target: the last that weighs something.
    last = tl.max(tl.where(weights > 0.0, ids, 0), 0)
    tl.store(drawn_ptr + row, tl.where(token == _HIGHEST_ID, last, token))


def power_of_2(num_blocks: int) -> int:
    """Lanes of a program that reads something of every block of a row."""
    lanes: int = triton.next_power_of_2(num_blocks)
    return max(lanes, 32)


def sample_weights(
    logits: torch.Tensor,
    forbidden: torch.Tensor,
    block_max: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    sums: torch.Tensor,
    *,
    masks: Masks | None = None,
    kept: torch.Tensor | None = None,
    first_row: int = 0,
    num_rows: int = ROWS,
    pdl: bool = False,
) -> None:
    """The sum of the weights of each SAMPLE_BLOCK ids.

    Args:
        logits: (16, V) float32.
        forbidden: (V,) int8, not 0 for an id that may not be chosen.
        block_max: (16, head_blocks(V)) float32, with the same masks.
        temperature: (16,) float32; rows of 0 get sums without a meaning.
        min_p: (16,) float32, the least weight that is kept.
        sums: (16, sample_blocks(V)) float64, written.
        masks: as in `sample_best`.
        kept: (num_rows, V) bool, ids that top_k and top_p leave; None for all.
        first_row: rows before it are neither read nor written.
        num_rows: rows from it on.
        pdl: programmatic dependent launch; sm_90 and later.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or stride.
    """
    vocab_size = check_scores(logits, forbidden, block_max, masks, first_row, num_rows)
    _check_weights(logits, temperature, min_p, sums, kept, num_rows)
    with torch.cuda.device_of(logits):
        _sample_weights_kernel[(sample_blocks(vocab_size), num_rows)](
            logits,
            forbidden,
            *mask_pointers(masks, logits),
            block_max,
            temperature,
            min_p,
            logits if kept is None else kept.view(torch.int8),
            sums,
            first_row,
            V=vocab_size,
            NUM_MAXIMA=block_max.shape[1],
            BLOCK_MAXIMA=power_of_2(block_max.shape[1]),
            BLOCK=SAMPLE_BLOCK,
            MASKS=masks is not None,
            KEPT=kept is not None,
            USE_PDL=pdl,
            **sample_options(pdl=pdl),
        )


def sample_draw(
    logits: torch.Tensor,
    forbidden: torch.Tensor,
    block_max: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    sums: torch.Tensor,
    seed: torch.Tensor,
    counts: torch.Tensor,
    drawn: torch.Tensor,
    *,
    masks: Masks | None = None,
    kept: torch.Tensor | None = None,
    first_row: int = 0,
    num_rows: int = ROWS,
    pdl: bool = False,
) -> None:
    """One token for each row, by the sums of `sample_weights` with the same arguments.

    Args:
        logits: (16, V) float32.
        forbidden: (V,) int8.
        block_max: (16, head_blocks(V)) float32.
        temperature: (16,) float32.
        min_p: (16,) float32.
        sums: (16, sample_blocks(V)) float64.
        seed: (16, 2) int64, low and high 32 bits.
        counts: (16,) int64, number of the token in each output, from 0.
        drawn: (16,) int32, written: below V; without a meaning for rows of temperature 0.
        masks: as in `sample_best`.
        kept: (num_rows, V) bool or None.
        first_row: rows before it are neither read nor written.
        num_rows: rows from it on.
        pdl: programmatic dependent launch; sm_90 and later.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or stride.
    """
    vocab_size = check_scores(logits, forbidden, block_max, masks, first_row, num_rows)
    _check_weights(logits, temperature, min_p, sums, kept, num_rows)
    check_tensor("seed", seed, (ROWS, 2), torch.int64, logits.device)
    check_tensor("counts", counts, (ROWS,), torch.int64, logits.device)
    check_tensor("drawn", drawn, (ROWS,), torch.int32, logits.device)
    pointers = mask_pointers(masks, logits)
    with torch.cuda.device_of(logits):
        _sample_draw_kernel[(num_rows,)](
            logits,
            forbidden,
            *pointers[:3],
            counts,
            pointers[4],
            block_max,
            temperature,
            min_p,
            logits if kept is None else kept.view(torch.int8),
            sums,
            seed,
            drawn,
            first_row,
            V=vocab_size,
            NUM_MAXIMA=block_max.shape[1],
            BLOCK_MAXIMA=power_of_2(block_max.shape[1]),
            NUM_SUMS=sums.shape[1],
            BLOCK_SUMS=power_of_2(sums.shape[1]),
            BLOCK=SAMPLE_BLOCK,
            MASKS=masks is not None,
            KEPT=kept is not None,
            USE_PDL=pdl,
            **sample_options(pdl=pdl),
        )


def _check_weights(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    sums: torch.Tensor,
    kept: torch.Tensor | None,
    num_rows: int,
) -> None:
    vocab_size, device = logits.shape[1], logits.device
    check_tensor("temperature", temperature, (ROWS,), torch.float32, device)
    check_tensor("min_p", min_p, (ROWS,), torch.float32, device)
    check_tensor("sums", sums, (ROWS, sample_blocks(vocab_size)), torch.float64, device)
    if kept is not None:
        check_tensor("kept", kept, (num_rows, vocab_size), torch.bool, device)
