"""Scores of ids from the logits of rows, and the best of each 64 ids.

score = logit; of a seen id with the row's repetition penalty: logit · penalty below 0, else
logit / penalty; −inf where an id is forbidden, or ends the answer before min_new_tokens.
`sample_best` leaves of scores what decode_head leaves of logits: of each block the largest,
block_max (16, num_blocks) float32, inf where one is NaN, and block_argmax int32, the lowest id that
has it.

Layout: logits (16, V) float32; forbidden (V,) int8. A program owns SAMPLE_BLOCK ids of one row.

Roofline: memory, a row's logits once from L2: 608 KB at 0.5B.
"""

import torch
import triton
import triton.language as tl

from ovfast.kernels.decode_head import HEAD_BLOCK, head_blocks
from ovfast.kernels.decode_tiles import ROWS, check_tensor

SAMPLE_BLOCK = 1024  # ids of a program
_HIGHEST_ID = tl.constexpr(2**31 - 1)
# penalty, seen, is_stop, counts, min_new_tokens.
Masks = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit
def allowed_scores(
    logits_ptr,
    forbidden_ptr,
    penalty_ptr,
    seen_ptr,
    is_stop_ptr,
    counts_ptr,
    min_new_tokens_ptr,
    row,
    ids,
    V: tl.constexpr,
    MASKS: tl.constexpr,
):
    """Scores of ids, any shape; −inf where an id is not allowed or not below V."""
    scores = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=0.0)
    if MASKS:
        penalty = tl.load(penalty_ptr + row)
        is_seen = tl.load(seen_ptr + row * V + ids, mask=ids < V, other=0) != 0
        penalised = tl.where(scores < 0, scores * penalty, tl.div_rn(scores, penalty))
        scores = tl.where(is_seen, penalised, scores)
        is_stop = tl.load(is_stop_ptr + row * V + ids, mask=ids < V, other=0) != 0
        is_early = tl.load(counts_ptr + row) < tl.load(min_new_tokens_ptr + row)
        scores = tl.where(is_stop & is_early, float("-inf"), scores)
    forbidden = tl.load(forbidden_ptr + ids, mask=ids < V, other=1)
    return tl.where(forbidden == 0, scores, float("-inf"))


@triton.jit(do_not_specialize=["first_row"])
def _sample_best_kernel(
    logits_ptr,
    forbidden_ptr,
    penalty_ptr,
    seen_ptr,
    is_stop_ptr,
    counts_ptr,
    min_new_tokens_ptr,
    block_max_ptr,
    block_argmax_ptr,
    first_row,
    V: tl.constexpr,
    NUM_MAXIMA: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    MASKS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = first_row + tl.program_id(1)
    blocks = tl.program_id(0) * (BLOCK // HEAD_BLOCK) + tl.arange(0, BLOCK // HEAD_BLOCK)
    ids = blocks[:, None] * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[None, :]
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    scores = allowed_scores(
        logits_ptr, forbidden_ptr, penalty_ptr, seen_ptr, is_stop_ptr, counts_ptr,
        min_new_tokens_ptr, row, ids, V, MASKS,
    )  # fmt: skip
    scores = tl.where(scores == scores, scores, float("inf"))  # as decode_head tells NaN
    best = tl.max(scores, 1)
    candidates = tl.where(scores == best[:, None], ids, _HIGHEST_ID)
    out = row * NUM_MAXIMA + blocks
    tl.store(block_max_ptr + out, best, mask=blocks < NUM_MAXIMA)
    tl.store(block_argmax_ptr + out, tl.min(candidates, 1), mask=blocks < NUM_MAXIMA)


def sample_blocks(vocab_size: int) -> int:
    """The number of programs of a row."""
    return -(-vocab_size // SAMPLE_BLOCK)


def sample_best(
    logits: torch.Tensor,
    forbidden: torch.Tensor,
    block_max: torch.Tensor,
    block_argmax: torch.Tensor,
    *,
    masks: Masks | None = None,
    first_row: int = 0,
    num_rows: int = ROWS,
    pdl: bool = False,
) -> None:
    """The best allowed id of each 64 ids, as decode_head leaves it where nothing is masked.

    Args:
        logits: (16, V) float32.
        forbidden: (V,) int8, not 0 for an id that may not be chosen.
        block_max: (16, head_blocks(V)) float32, written; inf where a score is NaN.
        block_argmax: (16, head_blocks(V)) int32, written.
        masks: (16,) float32 penalty; (16, V) bool seen, ids that it touches; (16, V) bool is_stop,
            ids not allowed before (16,) int64 counts reach (16,) int64 min_new_tokens.
        first_row: rows before it are neither read nor written.
        num_rows: rows from it on.
        pdl: programmatic dependent launch; sm_90 and later.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or stride.
    """
    vocab_size = check_scores(logits, forbidden, block_max, masks, first_row, num_rows)
    check_tensor("block_argmax", block_argmax, tuple(block_max.shape), torch.int32, logits.device)
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(logits):
        _sample_best_kernel[(sample_blocks(vocab_size), num_rows)](
            logits,
            forbidden,
            *mask_pointers(masks, logits),
            block_max,
            block_argmax,
            first_row,
            V=vocab_size,
            NUM_MAXIMA=block_max.shape[1],
            BLOCK=SAMPLE_BLOCK,
            HEAD_BLOCK=HEAD_BLOCK,
            MASKS=masks is not None,
            USE_PDL=pdl,
            **sample_options(pdl=pdl),
        )


def sample_options(*, pdl: bool) -> dict[str, int | bool]:
    """The launch options of every kernel over scores; not yet measured.

    Nothing is fused: a score times the penalty is rounded before the maximum is taken from it, as
    in plain torch, or the best id could be another one.
    """
    return {"num_warps": 4, "launch_pdl": pdl, "enable_fp_fusion": False}


def mask_pointers(masks: Masks | None, unused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The five tensors that a kernel takes for masks; `unused` where there are none."""
    if masks is None:
        return (unused,) * 5
    penalty, seen, is_stop, counts, min_new_tokens = masks
    return penalty, seen.view(torch.int8), is_stop.view(torch.int8), counts, min_new_tokens


def check_scores(
    logits: torch.Tensor,
    forbidden: torch.Tensor,
    block_max: torch.Tensor,
    masks: Masks | None,
    first_row: int,
    num_rows: int,
) -> int:
    """Checks what every kernel over scores reads.

    Returns:
        vocab_size.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, device, stride or range of rows.
    """
    check_rows(first_row, num_rows)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected ({ROWS}, V)")
    vocab_size, device = logits.shape[1], logits.device
    check_tensor("logits", logits, (ROWS, vocab_size), torch.float32, device)
    check_tensor("forbidden", forbidden, (vocab_size,), torch.int8, device)
    num_maxima = head_blocks(vocab_size)
    check_tensor("block_max", block_max, (ROWS, num_maxima), torch.float32, device)
    if masks is not None:
        penalty, seen, is_stop, counts, min_new_tokens = masks
        check_tensor("penalty", penalty, (ROWS,), torch.float32, device)
        for name, tensor in (("seen", seen), ("is_stop", is_stop)):
            check_tensor(name, tensor, (ROWS, vocab_size), torch.bool, device)
        for name, tensor in (("counts", counts), ("min_new_tokens", min_new_tokens)):
            check_tensor(name, tensor, (ROWS,), torch.int64, device)
    return vocab_size


def check_rows(first_row: int, num_rows: int) -> None:
    """Raises unless first_row… are num_rows of ROWS."""
    if first_row < 0 or num_rows < 1 or first_row + num_rows > ROWS:
        raise ValueError(
            f"first_row is {first_row}, num_rows is {num_rows}; expected 1 or more of {ROWS} rows"
        )
