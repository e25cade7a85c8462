"""Output projection of a decode layer's attention: partials = W · Σ acc_s 2^(m_s) / Σ l_s 2^(m_s).

Layout: attention leaves, for each row, head and split of SPLIT positions, acc (16, num_heads,
max_splits, head_dim), unnormalised, with its maximum m in the log2 domain and its sum l, both
(16, num_heads, max_splits); all float32. Row r has position[r] // SPLIT + 1 splits; what lies
behind them is not read. A program combines the heads of its columns of the weight (H, num_heads ·
head_dim), in the order of the splits, rounds to the weight's dtype (float32, float16 or bfloat16,
or beside float8 to a given one) and leaves a partial sum in partials (S, 16, H) float32. A row with
slot -1 is zero.

The maximum is taken along the way, as in the attention itself: a split behind a row's last changes
neither maximum, sum nor values, so a row's bits do not depend on a longer one beside it.

Roofline: memory, each weight read once a step: 896 × 896 in half precision are 1.6 MB, 0.4 µs at
4.2 TB/s, so launch and latency weigh more; 3584 × 3584 are 25.7 MB, 6 µs. Every block of weight
rows reads its heads' acc again: at 7B and 28 splits 45 MB from L2.
"""

import torch
import triton
import triton.language as tl

from ovfast.kernels.decode_attention import SPLIT
from ovfast.kernels.decode_tiles import (
    ROWS,
    TRITON_DTYPES,
    Blocks,
    check_num_rows,
    check_tensor,
    check_weight,
    dot_parts,
    scaled_sum,
    split_tiles,
    store_partial,
    weight_tile,
)

_BLOCK_K = 256
SPLITS_AT_ONCE = 2  # whose loads are in flight; four spilled registers at 0.5B on sm_100


@triton.jit
def _combine(
    acc_ptr,
    m_ptr,
    l_ptr,
    counts,
    first_head,
    max_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
):
    """(16, BLOCK_HEADS · HEAD_DIM) float32: the heads of all rows, zero where there is none."""
    heads = first_head + tl.arange(0, BLOCK_HEADS)[None, :]
    row_heads = (tl.arange(0, 16)[:, None] * NUM_HEADS + heads) * max_splits
    dims = tl.arange(0, HEAD_DIM)[None, None, :]
    row_max = tl.full((16, BLOCK_HEADS), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((16, BLOCK_HEADS), dtype=tl.float32)
    values = tl.zeros((16, BLOCK_HEADS, HEAD_DIM), dtype=tl.float32)
    for first_split in range(0, tl.max(counts, 0), SPLITS_AT_ONCE):
        # Unrolled, so that the loads of several splits are in flight.
        for step in tl.static_range(SPLITS_AT_ONCE):
            split = first_split + step
            mask = (heads < NUM_HEADS) & (split < counts)[:, None]
            offsets = row_heads + split
            m = tl.load(m_ptr + offsets, mask=mask, other=float("-inf"))
            l = tl.load(l_ptr + offsets, mask=mask, other=0.0)  # noqa: E741
            # int64: 16 rows of 64 heads of 128 with 16 384 splits would be 2**31.
            acc_offsets = offsets.to(tl.int64)[:, :, None] * HEAD_DIM + dims
            acc = tl.load(acc_ptr + acc_offsets, mask=mask[:, :, None], other=0.0)
            new_max = tl.maximum(row_max, m)
            # Where nothing came yet, -inf less -inf would be NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            decay = tl.exp2(row_max - shift)
            weight = tl.exp2(m - shift)
            row_sum = row_sum * decay + l * weight
            values = values * decay[:, :, None] + acc * weight[:, :, None]
            row_max = new_max
    values = values / tl.where(row_sum > 0.0, row_sum, 1.0)[:, :, None]
    return tl.reshape(values, (16, BLOCK_HEADS * HEAD_DIM))


@triton.jit(do_not_specialize=["num_rows", "max_splits"])
def _decode_out_kernel(
    acc_ptr,
    m_ptr,
    l_ptr,
    slots_ptr,
    positions_ptr,
    w_ptr,
    scales_ptr,  # None: the weight is not float8
    partials_ptr,
    num_rows,
    max_splits,
    stride_wn,
    H: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
    DTYPE: tl.constexpr,  # to which the heads are rounded
    USE_PDL: tl.constexpr,
):
    K: tl.constexpr = NUM_HEADS * HEAD_DIM
    first_row = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    first_col = part * (TILES * BLOCK_K)
    w = weight_tile(w_ptr, stride_wn, first_row, first_col, K, H, BLOCK_N, BLOCK_K)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    rows = tl.arange(0, 16)
    mask = rows < num_rows
    used = tl.load(slots_ptr + rows, mask=mask, other=-1) >= 0
    positions = tl.load(positions_ptr + rows, mask=mask, other=0)
    counts = tl.where(used, positions // SPLIT + 1, 0)
    out = tl.zeros((K_PARTS, BLOCK_N, 16), dtype=tl.float32)
    for tile in range(TILES):
        next_col = first_col + BLOCK_K
        # A part's last tile is not followed by the next part's first.
        end = tl.where(tile + 1 < TILES, K, 0)
        next_w = weight_tile(w_ptr, stride_wn, first_row, next_col, end, H, BLOCK_N, BLOCK_K)
        x = _combine(
            acc_ptr, m_ptr, l_ptr, counts, first_col // HEAD_DIM, max_splits,
            NUM_HEADS, HEAD_DIM, BLOCK_K // HEAD_DIM, SPLITS_AT_ONCE,
        )  # fmt: skip
        out = dot_parts(out, w, x.to(DTYPE), BLOCK_N, BLOCK_K, K_PARTS)
        w = next_w
        first_col = next_col
    out = scaled_sum(out, scales_ptr, first_row, H, BLOCK_N, DTYPE)
    store_partial(partials_ptr, out, part, first_row, num_rows, H, BLOCK_N)


def launch_config(hidden_size: int) -> Blocks:
    """Picks the blocks, the same for every dtype; not yet measured on a device.

    256 columns are 4 heads of 64 or 2 of 128. Up to 1024 rows a program has one tile of 16 KB: 112
    programs at 0.5B. Above, it has two in flight, and 2 programs of 4 warps an SM: 224 at 7B.

    Args:
        hidden_size: rows of the weight.

    Returns:
        The blocks.
    """
    if hidden_size <= 1024:
        return Blocks(32, _BLOCK_K, 8, 8)
    return Blocks(32, _BLOCK_K, 4, 4)


def _out_tiles(hidden_size: int, in_features: int) -> tuple[int, int]:
    """(splits, tiles a split)."""
    blocks = launch_config(hidden_size)
    num_tiles = triton.cdiv(in_features, blocks.BLOCK_K)
    return split_tiles(num_tiles, triton.cdiv(hidden_size, blocks.BLOCK_N))


def out_splits(hidden_size: int, in_features: int) -> int:
    """The number of partials that decode_out writes: 4 at 0.5B, 2 at 7B, 1 at 72B."""
    return _out_tiles(hidden_size, in_features)[0]


def supports(head_dim: int) -> bool:
    """Whether decode_out takes heads of this size."""
    return 16 <= head_dim <= _BLOCK_K and head_dim & (head_dim - 1) == 0


def decode_out(
    acc: torch.Tensor,
    m: torch.Tensor,
    l: torch.Tensor,  # noqa: E741
    slots: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor,
    partials_out: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    num_rows: int = ROWS,
    pdl: bool = False,
) -> None:
    """Combines the splits of attention and multiplies by the output projection, in partial sums.

    Args:
        acc: (16, num_heads, max_splits, d) float32, d a power of two from 16 to 256.
        m: (16, num_heads, max_splits) float32.
        l: as m.
        slots: (16,) int32, -1 for a row without a request.
        positions: (16,) int32, below 256 · max_splits where the slot is not -1.
        weight: (H, num_heads · d) float32, float16, bfloat16 or float8.
        partials_out: (out_splits(H, num_heads · d), 16, H) float32, written.
        scales: float32, one for each row of a float8 weight; None for others.
        dtype: to which heads are rounded; None is the weight's, which float8 cannot be.
        num_rows: rows from here on are neither read nor written.
        pdl: programmatic dependent launch; sm_90 and later.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or stride.
    """
    check_num_rows(num_rows)
    heads_dtype = check_weight(weight, scales, dtype or weight.dtype)
    head_dim = _check_acc(acc)
    num_heads, max_splits = acc.shape[1:3]
    hidden_size, in_features = weight.shape
    splits, tiles = _out_tiles(hidden_size, in_features)
    expected = (
        ("weight", weight, (hidden_size, num_heads * head_dim), weight.dtype),
        ("m", m, (ROWS, num_heads, max_splits), torch.float32),
        ("l", l, (ROWS, num_heads, max_splits), torch.float32),
        ("slots", slots, (ROWS,), torch.int32),
        ("positions", positions, (ROWS,), torch.int32),
        ("acc", acc, tuple(acc.shape), torch.float32),
        ("partials_out", partials_out, (splits, ROWS, hidden_size), torch.float32),
    )
    for name, tensor, shape, wanted in expected:
        check_tensor(name, tensor, shape, wanted, weight.device, contiguous=name != "weight")
    blocks = launch_config(hidden_size)
    grid = (triton.cdiv(hidden_size, blocks.BLOCK_N), splits)
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(weight):
        _decode_out_kernel[grid](
            acc,
            m,
            l,
            slots,
            positions,
            weight,
            scales,
            partials_out,
            num_rows,
            max_splits,
            weight.stride(0),
            H=hidden_size,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            TILES=tiles,
            SPLIT=SPLIT,
            SPLITS_AT_ONCE=SPLITS_AT_ONCE,
            DTYPE=TRITON_DTYPES[heads_dtype],
            USE_PDL=pdl,
            **blocks.meta(),
            **blocks.options(),
            launch_pdl=pdl,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )


def _check_acc(acc: torch.Tensor) -> int:
    """Returns head_dim."""
    if acc.ndim != 4 or acc.shape[0] != ROWS or 0 in acc.shape:
        raise ValueError(
            f"acc has shape {tuple(acc.shape)}; expected ({ROWS}, num_heads, max_splits, head_dim)"
        )
    head_dim = acc.shape[3]
    if not supports(head_dim):
        raise ValueError(
            f"head_dim is {head_dim}; expected a power of two from 16 to {_BLOCK_K}. "
            "Use the plain projection"
        )
    return head_dim
