"""Weights in int8 and int4, by plain torch: what the native kernels compute, and their oracle.

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
"""

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


def _grouped(values: Tensor, group: int) -> Tensor:
    """(rows, cols) → (rows, groups, group), zeros behind the last column."""
    rows, cols = values.shape
    num_groups = -(-cols // group)
    return F.pad(values, (0, num_groups * group - cols)).view(rows, num_groups, group)


def _divided(grouped: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
    divisors = torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    q = (grouped / divisors).round().clamp(lowest, highest)
    return torch.where(scales.unsqueeze(-1) == 0, 0.0, q)
