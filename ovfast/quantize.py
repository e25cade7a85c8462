"""Weights in int8, int4 and float8, by plain torch: what the kernels compute, and their oracle.

Float8 (e4m3, on CUDA): a row of a weight has a float32 scale, largest magnitude / 448. The rows
that a prefill multiplies have one each too; a decode step leaves its own as they are. All below
is of int8 and int4, on the native back end.

A group of neighbouring inputs of one output shares a scale, stored as bfloat16; the last group of a
row may be shorter. A weight is factor · scale · q.

An input whose weights are all far larger or smaller than those of the others would take the
precision of its groups, or lose its own. So each input has a factor, the power of two next to its
largest weight over the median of these: weights are divided by it, exactly, and what multiplies
them is multiplied by it. (The scaling of SmoothQuant, Xiao et al. 2022, from the weights alone.)

- int8: groups of 128, q in [-127, 127]; scale = largest magnitude / 127, rounded upwards.
- int4: groups of 32, q in [-8, 7], as llama.cpp's Q4_0: the weight of the largest magnitude (the
  first, where several are as large) becomes -8; scale = that weight / -8, rounded to the nearest.

The scale is rounded first and q = weight / scale after it, to the nearest, halves to even. A group
whose scale is 0 has q = 0. Inputs of a layer, times their factors, are quantised in the same groups
to 8 bits, with float32 scales: largest magnitude / 127. A decode step with int8 quantises them to
16 bits (/ 32767), so that what they lose is a 256th of what the weights lost.

AVX2 multiplies int8 of tower and prefill with seven bits of each input (csrc/dot_avx2.inl.h):
inputs are in [-63, 63], their scale is the largest magnitude / 63, and a group of weights in which
a sum of four products might not fit 16 bits is halved, to the nearest, halves to even, and its
scale doubled.

Attention of the tower and of a prefill multiplies integers too. A head's query or key has one
scale, and integers so large that no sum of products overflows 32 bits (12 bits and a sign where a
head has 64 or 72 dimensions); its value has one, and 10 bits and a sign. In each block of 128 keys
a query's weights, relative to that of its largest score there and times the scales of their values,
are rounded to 16383rds of the largest such product.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ovfast.storage import GROUPS

QuantizedKind = Literal["int8", "int4"]
InputBits = Literal[16, 8, 7]

LARGEST_INT8 = 127
LOWEST_INT4, HIGHEST_INT4 = -8, 7
LARGEST_EXPONENT = 30  # of a factor
LARGEST_SUM_OF_FOUR = 258  # weights of one sign, with inputs of seven bits
LARGEST_WEIGHT, LARGEST_VALUE = 16383, 1023  # of attention
LARGEST_FLOAT8 = 448.0
LEAST = 1e-30  # of attention: a row without a larger magnitude has the scale of this one
KEY_BLOCK = 128


class Quantized(NamedTuple):
    """A weight (rows, cols): q int8 of its shape; scales (rows, groups) and factors (cols,)."""

    q: Tensor
    scales: Tensor
    factors: Tensor


def input_factors(weight: Tensor) -> Tensor:
    """The factor of each input of a linear layer.

    Args:
        weight: (rows, cols), finite.

    Returns:
        (cols,) float32, powers of two.
    """
    largest = F.pad(weight.float().abs(), (0, 0, 0, 1)).amax(0)  # a row of zeros: of no rows too
    positive = largest[largest > 0]
    if not len(positive):
        return torch.ones_like(largest)
    ratios = largest / positive.median()  # the lower of two
    # The exponent of √2 · ratio is that of the next power of two.
    exponents = ((ratios * 1.41421356).view(torch.int32) >> 23) - 127
    limited = exponents.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.where(largest > 0, torch.exp2(limited), 1.0)


def quantize(weight: Tensor, kind: QuantizedKind) -> Quantized:
    """Quantises the weight of a linear layer.

    Args:
        weight: (rows, cols), finite.
        kind: "int8" or "int4".

    Returns:
        q, scales (float32 whose values are bfloat16), and the factors of the inputs.
    """
    factors = input_factors(weight)
    grouped = _grouped(weight.float() / factors, GROUPS[kind])
    magnitude = grouped.abs()
    if kind == "int8":
        # A float32 in [n, n + 1) units of a bfloat16 goes to n + 1, whole units stay.
        bits = (magnitude.amax(-1) / LARGEST_INT8).view(torch.int32)
        scales = ((bits + 0xFFFF) & -0x10000).view(torch.float32)
        lowest, highest = -LARGEST_INT8, LARGEST_INT8
    else:
        # argmax gives the first of several.
        largest = grouped.gather(-1, magnitude.argmax(-1, keepdim=True)).squeeze(-1)
        scales = (largest / LOWEST_INT4).bfloat16().float()
        lowest, highest = LOWEST_INT4, HIGHEST_INT4
    q = _divided(grouped, scales, lowest, highest).to(torch.int8)
    return Quantized(q.flatten(1)[:, : weight.shape[1]].contiguous(), scales, factors)


def dequantize(q: Tensor, scales: Tensor, group: int) -> Tensor:
    """Computes scale · q in the dtype of the scales; the factors are left out.

    Args:
        q: (rows, cols) int8 or int16.
        scales: (rows, groups) float.
        group: inputs that share a scale.

    Returns:
        (rows, cols).
    """
    return q * scales.repeat_interleave(group, dim=1)[:, : q.shape[1]]


def halve_large_groups(q: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Makes int8 weights fit products with inputs of seven bits.

    Args:
        q: (rows, cols) int8.
        scales: (rows, groups) float.

    Returns:
        q and scales, changed in the groups where the positive weights of 0, 1, 4 and 5, or of 2,
        3, 6 and 7, of eight neighbours sum to more than 258, or the negative ones to less than
        -258.
    """
    grouped = _grouped(q.int(), GROUPS["int8"])
    # Eight neighbours: [line][half of it][input].
    fours = grouped.view(*grouped.shape[:2], -1, 2, 2, 2)
    sums = torch.stack([part.sum((-3, -1)) for part in (fours.clamp(min=0), -fours.clamp(max=0))])
    halves = (sums.amax((0, -2, -1)) > LARGEST_SUM_OF_FOUR).unsqueeze(-1)
    grouped = torch.where(halves, (grouped / 2).round().int(), grouped)
    q = grouped.flatten(1)[:, : q.shape[1]].contiguous().to(torch.int8)
    return q, torch.where(halves.squeeze(-1), scales * 2, scales)


def quantize_rows(x: Tensor, group: int, bits: InputBits = 8) -> tuple[Tensor, Tensor]:
    """Quantises the inputs of a linear layer.

    Args:
        x: (rows, cols) float32.
        group: inputs that share a scale.
        bits: of q, with its sign.

    Returns:
        q (rows, cols) int8, or int16 where it has 16 bits, and scales (rows, groups) float32; the
        scale of a group that holds inf or NaN is NaN.
    """
    grouped, largest = _grouped(x.float(), group), 2 ** (bits - 1) - 1
    # inf · 0 is NaN: the outputs of such a row are NaN instead of wrong.
    scales = grouped.abs().amax(-1) / largest + (grouped * 0).sum(-1)
    q = _divided(grouped, scales, -largest, largest)
    q = q.to(torch.int16 if bits == 16 else torch.int8)
    return q.flatten(1)[:, : x.shape[1]].contiguous(), scales


def fake_quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: QuantizedKind,
    *,
    input_bits: InputBits = 8,
    upcast: bool = False,
) -> Tensor:
    """Computes the layer as the quantised one rounds its operands, by a float product.

    Args:
        x: (rows, cols) float32.
        weight: (out_features, cols), finite; not quantised yet.
        bias: (out_features,) or None.
        kind: how the weight is stored.
        input_bits: of x; with 7, large groups of int8 weights are halved, as AVX2 does.
        upcast: whether the same operands are multiplied in float64: the truth of tests.

    Returns:
        (rows, out_features) float32, or float64 where upcast.
    """
    dtype = torch.float64 if upcast else torch.float32
    group = GROUPS[kind]
    q, scales, factors = quantize(weight, kind)
    if input_bits == 7 and kind == "int8":
        q, scales = halve_large_groups(q, scales)
    operand = dequantize(q, scales.to(dtype), group)
    q, scales = quantize_rows(x.float() * factors, group, input_bits)
    x = dequantize(q, scales.to(dtype), group)
    return F.linear(x, operand, None if bias is None else bias.to(dtype))


def fake_quantized_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Sequence[int], *, upcast: bool = False
) -> Tensor:
    """`reference.causal_attention` as the quantised one rounds its operands.

    Args:
        q: (rows, num_heads, head_dim) float32.
        k: (num_kv_heads, num_keys, head_dim), key j at position j.
        v: as k.
        positions: of the rows of q.
        upcast: whether the same queries, keys and values are multiplied in float64, with weights
            that are not rounded: the truth of tests.

    Returns:
        (rows, num_heads · head_dim) float32, or float64 where upcast.
    """
    dtype = torch.float64 if upcast else torch.float32
    head_dim = q.shape[-1]
    largest = min(32767, math.floor(math.sqrt(2.13e9 / head_dim)))
    group = q.shape[1] // len(k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    (q, q_scales), (k, k_scales) = _quantized_rows(q, largest), _quantized_rows(k, largest)
    v, v_scales = _quantized_rows(v, LARGEST_VALUE)
    q, k, v, q_scales, k_scales, v_scales = (
        x.to(dtype) for x in (q.transpose(0, 1), k, v, q_scales.transpose(0, 1), k_scales, v_scales)
    )
    scores = q @ k.transpose(1, 2) * (q_scales * math.log2(math.e) * head_dim**-0.5)
    scores = scores * k_scales.transpose(1, 2)
    seen = torch.arange(k.shape[1]) <= torch.tensor(positions)[:, None]
    scores = scores.masked_fill(~seen, -math.inf)
    most = scores.amax(-1, keepdim=True)
    out, total = torch.zeros_like(q), torch.zeros_like(most)
    for first in range(0, k.shape[1], KEY_BLOCK):
        block = slice(first, first + KEY_BLOCK)
        part, scales = scores[..., block], v_scales[:, block].transpose(1, 2)
        block_most = part.amax(-1, keepdim=True)
        block_most = torch.where(block_most == -math.inf, 0.0, block_most)
        weights = torch.exp2(part - block_most)
        scaled = weights * torch.where(seen[:, block], scales, 0.0)
        if not upcast:
            largest_product = scaled.amax(-1, keepdim=True)
            unit = largest_product / LARGEST_WEIGHT
            per_unit = LARGEST_WEIGHT / torch.where(largest_product == 0, 1.0, largest_product)
            scaled = (scaled * per_unit).round() * unit
        factor = torch.exp2(block_most - most)
        out += factor * (scaled @ v[:, block])
        total += factor * weights.sum(-1, keepdim=True)
    return (out / total).transpose(0, 1).flatten(1)


def quantize_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a weight, or the rows that a prefill multiplies with one.

    Args:
        x: (rows, cols) float.

    Returns:
        q (rows, cols) float8_e4m3fn, and scales (rows,) float32, 1 for a row without a magnitude
        above 1e-30 and NaN for one that holds inf or NaN.
    """
    x = x.float()
    largest = x.abs().amax(1)
    scales = torch.where(largest > LEAST, largest / LARGEST_FLOAT8, 1.0) + (x * 0).sum(1)
    return (x * (1 / scales)[:, None]).to(torch.float8_e4m3fn), scales


def fake_float8(x: Tensor) -> Tensor:
    """What float8 keeps of x: (rows, cols) float64."""
    q, scales = quantize_float8(x)
    return q.double() * scales.double()[:, None]


def _quantized_rows(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """(..., dims) float32 → integers of the same shape, and their scales (..., 1)."""
    scales = x.abs().amax(-1, keepdim=True).clamp(min=LEAST) / largest
    return (x * (1 / scales)).round().clamp(-largest, largest), scales


def _grouped(values: Tensor, group: int) -> Tensor:
    """(rows, cols) → (rows, groups, group), zeros behind the last column."""
    rows, cols = values.shape
    num_groups = -(-cols // group)
    return F.pad(values, (0, num_groups * group - cols)).view(rows, num_groups, group)


def _divided(grouped: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
    divisors = torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    q = (grouped / divisors).round().clamp(lowest, highest)
    return torch.where(scales.unsqueeze(-1) == 0, 0.0, q)
