"""The end of a decode step: each row's token from the best ids of blocks, and the row advanced.

token = the lowest id of the largest block_max, or what sample_draw has drawn where the temperature
is above 0; ERROR where that maximum is ±inf: decode_head and sample_best leave inf for NaN, and
-inf where every id is forbidden. Then, for a row in use, counts and positions go up by one, the
output says the token and how the row ended, and a row that is over gives up its slot.

Layout: block_max (16, num_blocks) float32 and block_argmax int32, as decode_head and sample_best
write them; is_stop and seen (16, V) bool; temperature (16,) float32; drawn, slots, positions and
tokens (16,) int32; counts and max_new_tokens (16,) int64; output (16, 2) int32. One program a row.

Roofline: latency. A row reads 2375 blocks of 0.5B, 19 KB from L2.
"""

import torch
import triton
import triton.language as tl

from ovfast.kernels.decode_tiles import ROWS, check_tensor
from ovfast.kernels.sample_best import check_rows

# How a row ended, and what stands for a token of a row in error or without a request.
RUNNING, STOP, LENGTH, ERROR = (tl.constexpr(code) for code in range(4))
ERROR_TOKEN, NO_TOKEN, NO_SLOT = tl.constexpr(-2), tl.constexpr(-1), tl.constexpr(-1)
_MAX_BLOCKS = 1 << 15
_HIGHEST_ID = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["first_row"])
def _decode_finish_kernel(
    block_max_ptr,
    block_argmax_ptr,
    drawn_ptr,
    temperature_ptr,
    seen_ptr,
    is_stop_ptr,
    max_new_tokens_ptr,
    slots_ptr,
    positions_ptr,
    counts_ptr,
    tokens_ptr,
    output_ptr,
    first_row,
    V: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANDOM: tl.constexpr,
    MARKS_SEEN: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = first_row + tl.program_id(0)
    blocks = tl.arange(0, BLOCK)
    mask = blocks < NUM_BLOCKS
    if USE_PDL:
        # Dependents are not let go early: nothing of the next step can begin before this one ends.
        tl.extra.cuda.gdc_wait()
    values = tl.load(block_max_ptr + row * NUM_BLOCKS + blocks, mask=mask, other=float("-inf"))
    ids = tl.load(block_argmax_ptr + row * NUM_BLOCKS + blocks, mask=mask, other=_HIGHEST_ID)
    top = tl.max(values, 0)
    token = tl.min(tl.where(values == top, ids, _HIGHEST_ID), 0)
    if RANDOM:
        is_drawn = tl.load(temperature_ptr + row) > 0.0
        token = tl.where(is_drawn, tl.load(drawn_ptr + row), token)
    is_error = tl.abs(top) == float("inf")
    token = tl.where(is_error, 0, token)

    slot = tl.load(slots_ptr + row)
    used = slot >= 0
    count = tl.load(counts_ptr + row) + used
    ended = tl.where(count >= tl.load(max_new_tokens_ptr + row), LENGTH, RUNNING)
    ended = tl.where(tl.load(is_stop_ptr + row * V + token) != 0, STOP, ended)
    ended = tl.where(is_error, ERROR, ended)
    shown = tl.where(is_error, ERROR_TOKEN, token)
    tl.store(output_ptr + 2 * row, tl.where(used, shown, NO_TOKEN))
    tl.store(output_ptr + 2 * row + 1, tl.where(used, ended, RUNNING))
    tl.store(tokens_ptr + row, token)
    tl.store(counts_ptr + row, count)
    tl.store(positions_ptr + row, tl.load(positions_ptr + row) + used)
    tl.store(slots_ptr + row, tl.where(ended == RUNNING, slot, NO_SLOT))
    if MARKS_SEEN:
        tl.store(seen_ptr + row * V + token, 1)


def finish_config(num_blocks: int) -> tuple[int, int]:
    """(BLOCK, num_warps) of decode_finish: a row's blocks in one program; not yet measured."""
    block = max(triton.next_power_of_2(num_blocks), 32)
    return block, min(max(block // 256, 1), 16)


def decode_finish(
    block_max: torch.Tensor,
    block_argmax: torch.Tensor,
    is_stop: torch.Tensor,
    max_new_tokens: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
    output: torch.Tensor,
    *,
    drawn: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    first_row: int = 0,
    num_rows: int = ROWS,
    pdl: bool = False,
) -> None:
    """Takes each row's most likely allowed id or the drawn one, tells how it ended, advances it.

    Args:
        block_max: (16, num_blocks) float32, at most 32768 blocks.
        block_argmax: (16, num_blocks) int32, below V.
        is_stop: (16, V) bool, ids that end the answer.
        max_new_tokens: (16,) int64, where the answer ends.
        slots: (16,) int32, -1 for a row without a request; written.
        positions: (16,) int32, written.
        counts: (16,) int64, tokens generated; written.
        tokens: (16,) int32, written: the token, 0 in error.
        output: (16, 2) int32, written: the token, -1 without a request, -2 in error; how it ended.
        drawn: (16,) int32, below V, tokens of the rows of which temperature is above 0; or None.
        temperature: (16,) float32, given with drawn.
        seen: (16, V) bool, where tokens are marked as seen; or None.
        first_row: rows before it are neither read nor written.
        num_rows: rows from it on.
        pdl: programmatic dependent launch; sm_90 and later.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or stride.
    """
    check_rows(first_row, num_rows)
    device = block_max.device
    num_blocks, vocab_size = _check_blocks(block_max, block_argmax, is_stop)
    for name, tensor in (("slots", slots), ("positions", positions), ("tokens", tokens)):
        check_tensor(name, tensor, (ROWS,), torch.int32, device)
    for name, tensor in (("counts", counts), ("max_new_tokens", max_new_tokens)):
        check_tensor(name, tensor, (ROWS,), torch.int64, device)
    check_tensor("output", output, (ROWS, 2), torch.int32, device)
    if drawn is not None:
        check_tensor("drawn", drawn, (ROWS,), torch.int32, device)
        if temperature is None:
            raise ValueError("temperature is None; expected a tensor, as drawn is given")
        check_tensor("temperature", temperature, (ROWS,), torch.float32, device)
    if seen is not None:
        check_tensor("seen", seen, (ROWS, vocab_size), torch.bool, device)
    block, num_warps = finish_config(num_blocks)
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(block_max):
        _decode_finish_kernel[(num_rows,)](
            block_max,
            block_argmax,
            tokens if drawn is None else drawn,
            block_max if temperature is None else temperature,
            (is_stop if seen is None else seen).view(torch.int8),
            is_stop.view(torch.int8),
            max_new_tokens,
            slots,
            positions,
            counts,
            tokens,
            output,
            first_row,
            V=vocab_size,
            NUM_BLOCKS=num_blocks,
            BLOCK=block,
            RANDOM=drawn is not None,
            MARKS_SEEN=seen is not None,
            USE_PDL=pdl,
            num_warps=num_warps,
            launch_pdl=pdl,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )


def _check_blocks(
    block_max: torch.Tensor, block_argmax: torch.Tensor, is_stop: torch.Tensor
) -> tuple[int, int]:
    """(number of blocks, vocab_size)."""
    if block_max.ndim != 2 or not 1 <= block_max.shape[1] <= _MAX_BLOCKS:
        raise ValueError(
            f"block_max has shape {tuple(block_max.shape)}; expected ({ROWS}, 1 to {_MAX_BLOCKS})"
        )
    shape, device = (ROWS, block_max.shape[1]), block_max.device
    check_tensor("block_max", block_max, shape, torch.float32, device)
    check_tensor("block_argmax", block_argmax, shape, torch.int32, device)
    vocab_size = is_stop.shape[-1] if is_stop.ndim else 0
    check_tensor("is_stop", is_stop, (ROWS, vocab_size), torch.bool, device)
    return shape[1], vocab_size
