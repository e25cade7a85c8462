"""What the decode projections share: weight tiles, the normalised rows, their product, the checks.

A decode step has at most ROWS rows. A product is dot(weight tile (BLOCK_N, BLOCK_K), rowsᵀ
(BLOCK_K, ROWS)): weights on the wide side. A tile of 16 weight rows has work for two warps along
N and ROWS, so K is cut into K_PARTS, one for each warp, as the batch of a 3-D dot, and the parts
are added at the end: with a 2-D dot every warp would read the whole tile from shared memory.

Weights may be float8 (e4m3) with a float32 scale for each row, which multiplies the finished sum.
They become float16, exactly: one instruction makes two of them, where bfloat16 takes two more. What
they meet is then float16 too; a bfloat16 activation times 2^-6, exactly from 0.004 to 4 million.

Weights never change: the first tile is loaded before the programmatic wait, every next one while
the tile before it is multiplied. Masks bound what is read to the rows in use, and the tiles stay
what they are, so a row's bits do not depend on the rows beside it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

ROWS = 16
RESIDUAL_BLOCK = 64  # columns of the residual that one program writes
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of activations, and of plain weights
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
FLOAT8 = torch.float8_e4m3fn
_INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)  # which knows no assembly
_BFLOAT16_UNIT = tl.constexpr(2.0**-6)  # of bfloat16 activations as float16
# Programs of a split-K projection: about two for each of the 132 SMs of an H100.
_MAX_PROGRAMS = 288


class Blocks(NamedTuple):
    """Meta-parameters of one projection; K_PARTS divides BLOCK_K."""

    BLOCK_N: int
    BLOCK_K: int
    K_PARTS: int
    num_warps: int

    def meta(self) -> dict[str, int]:
        """The constexprs."""
        return {"BLOCK_N": self.BLOCK_N, "BLOCK_K": self.BLOCK_K, "K_PARTS": self.K_PARTS}

    def options(self) -> dict[str, int]:
        """The launch options. One stage: the kernels overlap loads themselves."""
        return {"num_warps": self.num_warps, "num_stages": 1}


def split_tiles(num_tiles: int, num_row_blocks: int) -> tuple[int, int]:
    """Splits the K tiles of a projection over programs, by its shape alone.

    Args:
        num_tiles: along K.
        num_row_blocks: programs along N.

    Returns:
        (splits, tiles a split); only the last split may have fewer.
    """
    splits = min(num_tiles, max(_MAX_PROGRAMS // num_row_blocks, 1))
    tiles = triton.cdiv(num_tiles, splits)
    return triton.cdiv(num_tiles, tiles), tiles


@triton.jit
def weight_tile(
    w_ptr,
    stride_wn,
    first_row,
    first_col,
    end_col,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr = False,
):
    """(BLOCK_N, BLOCK_K), zero from column end_col on and outside the weight's N rows.

    WORDS: whether it holds words of 32 bits, whose numbers `dot_parts` takes out; of float8 it
    does. Numbers of 16 bits that a loop carries are taken out where they were loaded, and in the
    projections of the residual the product of the tile before would wait for them.
    """
    BITS: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth
    WIDTH: tl.constexpr = 32 // BITS if WORDS or BITS == 8 else 1
    if WORDS or BITS == 8:
        w_ptr = w_ptr.to(tl.pointer_type(tl.int32))
    rows = tl.arange(0, BLOCK_N)[:, None]
    cols = first_col // WIDTH + tl.arange(0, BLOCK_K // WIDTH)[None, :]
    mask = cols < end_col // WIDTH
    if N % BLOCK_N != 0:
        mask = mask & (rows < N - first_row)
    stride = stride_wn // WIDTH
    # int64: 2**31 elements are a head of 262 144 rows of 8192.
    tile_ptr = w_ptr + first_row.to(tl.int64) * stride
    # Read once a step: L2 is for what the step reads again.
    return tl.load(
        tile_ptr + rows * stride + cols, mask=mask, other=0, eviction_policy="evict_first"
    )


@triton.jit
def _float16_bits(words):
    """Of the lowest float8 of each word."""
    number = words.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return number.to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def _float16_pairs(words):
    """Words of four float8 as twice as many of two float16."""
    if _INTERPRETING:
        first = _float16_bits(words) | (_float16_bits(words >> 8) << 16)
        second = _float16_bits(words >> 16) | (_float16_bits(words >> 24) << 16)
    else:
        first, second = tl.inline_asm_elementwise(
            "{.reg .b16 low, high; mov.b32 {low, high}, $2;"
            " cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high;}",
            "=r,=r,r",
            [words],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return tl.reshape(tl.join(first, second), (words.shape[0], 2 * words.shape[1]))


@triton.jit
def _numbers(words, DTYPE: tl.constexpr):
    """(BLOCK_N, BLOCK_K) DTYPE of words of 32 bits."""
    if DTYPE.primitive_bitwidth == 32:
        numbers = words.to(DTYPE, bitcast=True)
    else:
        low = words.to(tl.int16).to(DTYPE, bitcast=True)
        high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        numbers = tl.reshape(tl.join(low, high), (words.shape[0], 2 * words.shape[1]))
    return numbers


@triton.jit
def residual_tile(
    residual_ptr,
    partials_ptr,
    num_rows,
    first_col,
    H: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(16, BLOCK) float32: residual + Σ partials, added in their order; unused rows zero."""
    rows = tl.arange(0, 16)[:, None]
    cols = first_col + tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (cols < H)
    x = tl.load(residual_ptr + rows * H + cols, mask=mask, other=0.0)
    for part in tl.static_range(NUM_PARTIALS):
        x += tl.load(partials_ptr + (part * 16 + rows) * H + cols, mask=mask, other=0.0)
    return x


@triton.jit
def dot_parts(acc, w, x, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_PARTS: tl.constexpr):
    """Adds to acc (K_PARTS, BLOCK_N, 16): w (BLOCK_N, BLOCK_K) · x (16, BLOCK_K)ᵀ by parts of K.

    w: of `weight_tile`, whose numbers have x's dtype, or are float8: then a product with bfloat16
    is in units of 2^6, which `scaled_sum` knows.
    """
    PART_K: tl.constexpr = BLOCK_K // K_PARTS
    if w.dtype == tl.int32:
        if w.shape[1] * 4 == BLOCK_K:
            w = _numbers(_float16_pairs(w), tl.float16)
            if x.dtype == tl.bfloat16:
                x = (x.to(tl.float32) * _BFLOAT16_UNIT).to(tl.float16)
            w = w.to(x.dtype)
        else:
            w = _numbers(w, x.dtype)
    w = tl.permute(tl.reshape(w, (BLOCK_N, K_PARTS, PART_K)), (1, 0, 2))
    x = tl.permute(tl.reshape(x, (16, K_PARTS, PART_K)), (1, 2, 0))
    return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def scaled_sum(
    acc, scales_ptr, first_row, N: tl.constexpr, BLOCK_N: tl.constexpr, dtype: tl.constexpr
):
    """(BLOCK_N, 16): the parts of K together, times the scales of the weight's rows if it has any.

    dtype: of the activations.
    """
    out = tl.sum(acc, 0)
    if scales_ptr is not None:
        rows = first_row + tl.arange(0, BLOCK_N)
        scales = tl.load(scales_ptr + rows, mask=rows < N, other=0.0)
        if dtype == tl.bfloat16:
            scales *= 1.0 / _BFLOAT16_UNIT
        out *= scales[:, None]
    return out


@triton.jit
def normed_product(
    w,
    w_ptr,
    scales_ptr,
    stride_wn,
    first_row,
    residual_ptr,
    partials_ptr,
    norm_ptr,
    eps,
    num_rows,
    N: tl.constexpr,
    H: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PARTS: tl.constexpr,
):
    """(BLOCK_N, 16) float32: weight rows times rms_norm(residual + Σ partials).

    w is the tile at column 0. The rows are read twice, for their scale and for the product: 16
    rows of 8192 float32 are more than a program can keep. Where H is one tile, the two reads are
    one.
    """
    dtype = norm_ptr.dtype.element_ty
    squares = tl.zeros((16,), dtype=tl.float32)
    for first_col in range(0, H, BLOCK_K):
        x = residual_tile(residual_ptr, partials_ptr, num_rows, first_col, H, NUM_PARTIALS, BLOCK_K)
        squares += tl.sum(x * x, 1)
    scale = tl.rsqrt(squares / H + eps)
    acc = tl.zeros((K_PARTS, BLOCK_N, 16), dtype=tl.float32)
    for first_col in range(0, H, BLOCK_K):
        next_w = weight_tile(
            w_ptr, stride_wn, first_row, first_col + BLOCK_K, H, N, BLOCK_N, BLOCK_K, H > BLOCK_K
        )
        x = residual_tile(residual_ptr, partials_ptr, num_rows, first_col, H, NUM_PARTIALS, BLOCK_K)
        cols = first_col + tl.arange(0, BLOCK_K)
        norm = tl.load(norm_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
        # As Qwen2RMSNorm: one rounding before the weight and one after it.
        x = (x * scale[:, None]).to(dtype).to(tl.float32) * norm[None, :]
        acc = dot_parts(acc, w, x.to(dtype), BLOCK_N, BLOCK_K, K_PARTS)
        w = next_w
    return scaled_sum(acc, scales_ptr, first_row, N, BLOCK_N, dtype)


@triton.jit
def store_residual(
    residual_ptr,
    partials_ptr,
    out_ptr,
    num_rows,
    H: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Program i writes columns i · BLOCK_H on of residual + Σ partials: no program is the last."""
    rows = tl.arange(0, 16)[:, None]
    stride = tl.num_programs(0) * BLOCK_H
    for first_col in range(tl.program_id(0) * BLOCK_H, H, stride):
        x = residual_tile(residual_ptr, partials_ptr, num_rows, first_col, H, NUM_PARTIALS, BLOCK_H)
        cols = first_col + tl.arange(0, BLOCK_H)[None, :]
        tl.store(out_ptr + rows * H + cols, x, mask=(rows < num_rows) & (cols < H))


@triton.jit
def store_partial(
    partials_ptr,
    out,
    part,
    first_col,
    num_rows,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes out (BLOCK_N, 16) as columns first_col on of partial number `part`."""
    rows = tl.arange(0, 16)[None, :]
    cols = first_col + tl.arange(0, BLOCK_N)[:, None]
    offsets = (part * 16 + rows) * H + cols
    tl.store(partials_ptr + offsets, out, mask=(rows < num_rows) & (cols < H))


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    contiguous: bool = True,
) -> None:
    """Raises unless `tensor` is what a kernel reads.

    Args:
        name: for the message.
        tensor: to check.
        shape: expected.
        dtype: expected.
        device: expected.
        contiguous: whether all strides count; otherwise the last one alone.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, device or stride.
    """
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}; expected {dtype}. Convert it before")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device}. Move one of them")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has last-dimension stride {tensor.stride(-1)}; expected 1")


def check_normed(
    residual_in: torch.Tensor,
    partials: torch.Tensor | None,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    num_rows: int,
) -> int:
    """Checks what every projection of the residual stream reads.

    Returns:
        The number of partials.

    Raises:
        TypeError: a dtype that no kernel takes, or that differs.
        ValueError: a wrong shape, device, stride or number of rows.
    """
    dtype = check_weight(weight, scales, norm_weight.dtype)
    check_num_rows(num_rows)
    device, width = weight.device, weight.shape[1]
    check_tensor("norm_weight", norm_weight, (width,), dtype, device)
    check_tensor("residual_in", residual_in, (ROWS, width), torch.float32, device)
    if partials is None:
        return 0
    num_partials = partials.shape[0]
    check_tensor("partials", partials, (num_partials, ROWS, width), torch.float32, device)
    return num_partials


def check_weight(
    weight: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
) -> torch.dtype:
    """Checks a weight and the scales of its rows.

    Args:
        weight: (rows, columns): of a dtype of DTYPES, or float8 with scales.
        scales: (rows,) float32, or None.
        dtype: of the activations beside a float8 weight.

    Returns:
        The dtype of the activations: that of a plain weight, else `dtype`.

    Raises:
        TypeError: a dtype that no kernel takes, or scales of a plain weight.
        ValueError: a wrong shape, device or stride.
    """
    if weight.dtype not in (*DTYPES, FLOAT8):
        raise TypeError(
            f"weight is {weight.dtype}; expected one of {(*DTYPES, FLOAT8)}. Convert it before"
        )
    if (scales is not None) != (weight.dtype == FLOAT8):
        given = "without" if scales is None else "with"
        raise TypeError(
            f"weight is {weight.dtype} {given} scales; expected them with {FLOAT8} alone"
        )
    if weight.ndim != 2 or weight.shape[1] % 8 or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (rows, a multiple of 8 columns)"
        )
    if weight.stride(1) != 1:
        raise ValueError(f"weight has last-dimension stride {weight.stride(1)}; expected 1")
    if weight.stride(0) * weight.element_size() % 4 or weight.data_ptr() % 4:
        raise ValueError(
            f"weight has row stride {weight.stride(0)} and storage offset"
            f" {weight.storage_offset()}; expected rows that begin at a multiple of 4 bytes"
        )
    if scales is None:
        return weight.dtype
    check_tensor("scales", scales, (weight.shape[0],), torch.float32, weight.device)
    if dtype not in DTYPES:
        raise TypeError(f"activations are {dtype}; expected one of {DTYPES}. Convert them before")
    return dtype


def tile_dtype(weight: torch.Tensor, activations: torch.dtype) -> torch.dtype:
    """What the size of a tile follows: a product in float32 has small ones, whatever the weight."""
    return activations if activations == torch.float32 else weight.dtype


def check_residual_out(residual_out: torch.Tensor, residual_in: torch.Tensor) -> None:
    """Raises unless residual_out is a second buffer like residual_in."""
    check_tensor(
        "residual_out",
        residual_out,
        tuple(residual_in.shape),
        residual_in.dtype,
        residual_in.device,
    )
    if residual_out.data_ptr() == residual_in.data_ptr():
        raise ValueError(
            "residual_out is residual_in; expected two buffers, since every program reads the "
            "one while some write the other"
        )


def check_num_rows(num_rows: int) -> None:
    """Raises unless 1 ≤ num_rows ≤ ROWS."""
    if not 1 <= num_rows <= ROWS:
        raise ValueError(f"num_rows is {num_rows}; expected 1 to {ROWS}. Split the batch")
