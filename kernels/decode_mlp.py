"""The MLP of a decode layer: mlp = silu(gate) · up of rms_norm(residual + Σ partials), then down.

Layout: gate_up's rows are interleaved once by `pack_gate_up_rows` (gate 0, up 0, gate 1, …), so
that a program holds both factors. mlp (16, I). down's product is cut along K into partials
(S, 16, H) float32, which the next projection adds in order. Dtypes: weights and mlp float32,
float16 or bfloat16, all the same, or a weight in float8 with scales; residuals and partials
float32. Roundings are upstream's: the
normalised value, its product with the norm's weight, gate, up, silu, and the product; down's sum
stays float32.

Roofline: memory, each weight read once a step. At 0.5B gate_up are 17.4 MB and down 8.7 MB in
half precision, 4.2 µs and 2.1 µs at 4.2 TB/s; at 7B 272 MB and 136 MB, 65 µs and 32 µs.
"""

import torch
import triton
import triton.language as tl

from ovfast.kernels.decode_tiles import (
    RESIDUAL_BLOCK,
    ROWS,
    Blocks,
    check_normed,
    check_num_rows,
    check_residual_out,
    check_tensor,
    check_weight,
    dot_parts,
    normed_product,
    scaled_sum,
    split_tiles,
    store_partial,
    store_residual,
    tile_dtype,
    weight_tile,
)


@triton.jit(do_not_specialize=["num_rows"])
def _decode_gate_up_kernel(
    residual_ptr,
    partials_ptr,
    residual_out_ptr,
    norm_ptr,
    w_ptr,
    scales_ptr,  # None: the weight is not float8
    mlp_ptr,
    eps,
    num_rows,
    stride_wn,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - the intermediate size has this letter everywhere
    NUM_PARTIALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_N
    w = weight_tile(w_ptr, stride_wn, first_row, 0, H, 2 * I, BLOCK_N, BLOCK_K, H > BLOCK_K)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    out = normed_product(
        w, w_ptr, scales_ptr, stride_wn, first_row, residual_ptr, partials_ptr, norm_ptr, eps,
        num_rows, 2 * I, H, NUM_PARTIALS, BLOCK_N, BLOCK_K, K_PARTS,
    )  # fmt: skip
    dtype = mlp_ptr.dtype.element_ty
    out = out.to(dtype).to(tl.float32)
    gate, up = tl.split(tl.permute(tl.reshape(out, (BLOCK_N // 2, 2, 16)), (0, 2, 1)))
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    cols = first_row // 2 + tl.arange(0, BLOCK_N // 2)[:, None]
    rows = tl.arange(0, 16)[None, :]
    mask = (rows < num_rows) & (cols < I)
    tl.store(mlp_ptr + rows * I + cols, (silu * up).to(dtype), mask=mask)
    store_residual(residual_ptr, partials_ptr, residual_out_ptr, num_rows, H, NUM_PARTIALS, BLOCK_H)


@triton.jit(do_not_specialize=["num_rows"])
def _decode_down_kernel(
    mlp_ptr,
    w_ptr,
    scales_ptr,  # None: the weight is not float8
    partials_ptr,
    num_rows,
    stride_wn,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    first_col = split * (TILES * BLOCK_K)
    w = weight_tile(w_ptr, stride_wn, first_row, first_col, I, H, BLOCK_N, BLOCK_K)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    rows = tl.arange(0, 16)[:, None]
    acc = tl.zeros((K_PARTS, BLOCK_N, 16), dtype=tl.float32)
    for tile in range(TILES):
        next_col = first_col + BLOCK_K
        # A split's last tile is not followed by the next split's first.
        end = tl.where(tile + 1 < TILES, I, 0)
        next_w = weight_tile(w_ptr, stride_wn, first_row, next_col, end, H, BLOCK_N, BLOCK_K)
        cols = first_col + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(mlp_ptr + rows * I + cols, mask=(rows < num_rows) & (cols < I), other=0.0)
        acc = dot_parts(acc, w, x, BLOCK_N, BLOCK_K, K_PARTS)
        w = next_w
        first_col = next_col
    out = scaled_sum(acc, scales_ptr, first_row, H, BLOCK_N, mlp_ptr.dtype.element_ty)
    store_partial(partials_ptr, out, split, first_row, num_rows, H, BLOCK_N)


def gate_up_config(hidden_size: int, dtype: torch.dtype) -> Blocks:
    """Picks the blocks of gate_up; not yet measured on a device.

    Up to 1024 columns are one tile, loaded whole before the wait: 304 programs of 57 KB at 0.5B,
    one an SM at a time. 16 rows on 8 warps would be two an SM, but took 173 registers a thread.
    Above, 64 rows a program, since every program reads the residual twice from L2.

    Args:
        hidden_size: columns of the weight.
        dtype: of the weight.

    Returns:
        The blocks.
    """
    if dtype == torch.float32:
        return Blocks(16, min(max(triton.next_power_of_2(hidden_size), 64), 256), 4, 8)
    if hidden_size <= 1024:
        return Blocks(32, max(triton.next_power_of_2(hidden_size), 256), 16, 16)
    return Blocks(64, 128, 4, 4)


def down_config(hidden_size: int) -> Blocks:
    """Picks the blocks of down, the same for every dtype; not yet measured on a device."""
    if hidden_size <= 1024:
        return Blocks(16, 512, 8, 8)
    return Blocks(32, 256, 4, 4)


def _down_tiles(hidden_size: int, intermediate_size: int) -> tuple[int, int]:
    """(splits, tiles a split)."""
    blocks = down_config(hidden_size)
    num_tiles = triton.cdiv(intermediate_size, blocks.BLOCK_K)
    return split_tiles(num_tiles, triton.cdiv(hidden_size, blocks.BLOCK_N))


def down_splits(hidden_size: int, intermediate_size: int) -> int:
    """The number of partials that decode_down writes: 5 at 0.5B, 2 at 7B, 1 at 72B."""
    return _down_tiles(hidden_size, intermediate_size)[0]


def pack_gate_up_rows(intermediate_size: int) -> torch.Tensor:
    """Row permutation of the packed weight: packed = cat(gate, up)[permutation].

    Args:
        intermediate_size: rows of gate and of up.

    Returns:
        (2 · intermediate_size,) int64: 0, I, 1, I + 1, …
    """
    return torch.arange(2 * intermediate_size).view(2, -1).t().flatten()


def decode_gate_up(
    residual_in: torch.Tensor,
    partials: torch.Tensor | None,
    residual_out: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    mlp: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    num_rows: int = ROWS,
    pdl: bool = False,
) -> None:
    """Projects the normalised rows to gate and up and multiplies silu(gate) by up.

    Args:
        residual_in: (16, H) float32.
        partials: (S, 16, H) float32, added to it in order, or None.
        residual_out: (16, H) float32, the sum; another buffer than residual_in.
        norm_weight: (H,), dtype of weight; beside float8 any of the others, which then is meant
            by "dtype of weight".
        eps: of the norm.
        weight: (2 · I, H) float32, float16, bfloat16 or float8, packed by `pack_gate_up_rows`.
        mlp: (16, I), dtype of weight, written.
        scales: float32, one for each row of a float8 weight; None for others.
        num_rows: rows from here on are neither read nor written.
        pdl: programmatic dependent launch; sm_90 and later.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or stride.
    """
    num_partials = check_normed(residual_in, partials, norm_weight, weight, scales, num_rows)
    check_residual_out(residual_out, residual_in)
    if weight.shape[0] % 2:
        raise ValueError(f"weight has {weight.shape[0]} rows; expected gate and up, 2 · I")
    intermediate_size = weight.shape[0] // 2
    check_tensor("mlp", mlp, (ROWS, intermediate_size), norm_weight.dtype, weight.device)
    blocks = gate_up_config(weight.shape[1], tile_dtype(weight, norm_weight.dtype))
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(weight):
        _decode_gate_up_kernel[(triton.cdiv(weight.shape[0], blocks.BLOCK_N),)](
            residual_in,
            residual_in if partials is None else partials,
            residual_out,
            norm_weight,
            weight,
            scales,
            mlp,
            eps,
            num_rows,
            weight.stride(0),
            H=weight.shape[1],
            I=intermediate_size,
            NUM_PARTIALS=num_partials,
            BLOCK_H=RESIDUAL_BLOCK,
            USE_PDL=pdl,
            **blocks.meta(),
            **blocks.options(),
            launch_pdl=pdl,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )


def decode_down(
    mlp: torch.Tensor,
    weight: torch.Tensor,
    partials_out: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    num_rows: int = ROWS,
    pdl: bool = False,
) -> None:
    """Multiplies mlp by down, in partial sums along K.

    Args:
        mlp: (16, I), dtype of weight; beside float8 any of the others.
        weight: (H, I) float32, float16, bfloat16 or float8.
        partials_out: (down_splits(H, I), 16, H) float32, written.
        scales: float32, one for each row of a float8 weight; None for others.
        num_rows: rows from here on are neither read nor written.
        pdl: programmatic dependent launch; sm_90 and later.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or stride.
    """
    check_num_rows(num_rows)
    dtype = check_weight(weight, scales, mlp.dtype)
    hidden_size, intermediate_size = weight.shape
    splits, tiles = _down_tiles(hidden_size, intermediate_size)
    device = weight.device
    check_tensor("mlp", mlp, (ROWS, intermediate_size), dtype, device)
    check_tensor("partials_out", partials_out, (splits, ROWS, hidden_size), torch.float32, device)
    blocks = down_config(hidden_size)
    grid = (triton.cdiv(hidden_size, blocks.BLOCK_N), splits)
    with torch.cuda.device_of(weight):
        _decode_down_kernel[grid](
            mlp,
            weight,
            scales,
            partials_out,
            num_rows,
            weight.stride(0),
            H=hidden_size,
            I=intermediate_size,
            TILES=tiles,
            USE_PDL=pdl,
            **blocks.meta(),
            **blocks.options(),
            launch_pdl=pdl,
            enable_fp_fusion=True,
        )
