"""Plain torch implementations of every operation; the oracle of the kernel tests.

Runs on any device torch has. Casts are upstream's: statistics and scores in float32, one rounding
to the storage dtype where transformers rounds. `upcast=True` computes a truth in float64 instead
and never writes to its arguments. Row blocks depend on shapes only, so a request's bits do not
depend on its neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

UInt8Array = NDArray[np.uint8]

MASK_ROWS = 256  # rows of an explicit causal mask at a time: 256 × 32 768 float32 are 32 MB
PROJECT_ROWS = 1024
PIXEL_SCALE = 1 / 127.5


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer's parameters in the layout of one back end; here (out, in) and (out,).

    Only the `Ops` that packed it may read it.
    """

    weight: Tensor
    bias: Tensor | None


def _truth(x: Tensor) -> Tensor:
    return x.to(torch.float64, copy=True)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, upcast: bool = False
) -> Tensor:
    """Computes x @ weightᵀ + bias.

    Args:
        x: (rows, in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        upcast: compute and return float64.

    Returns:
        (rows, out_features), dtype of x.
    """
    if upcast:
        return F.linear(_truth(x), _truth(weight), None if bias is None else _truth(bias))
    return F.linear(x, weight, bias)


def packed_linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """As `linear`, of a packed layer."""
    return linear(x, packed.weight, packed.bias)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, upcast: bool = False
) -> Tensor:
    """LayerNorm over the last dimension, statistics in float32. x: (rows, hidden_size)."""
    if upcast:
        x, weight, bias = _truth(x), _truth(weight), _truth(bias)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


# As transformers v5.23 Qwen2RMSNorm: the cast to the storage dtype comes before the weight.
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, upcast: bool = False) -> Tensor:
    """RMSNorm over the last dimension, normalised in float32. x: (rows, hidden_size)."""
    wide = _truth(x) if upcast else x.float()
    # The norm reads x once; squaring writes a temporary as large as x.
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    if upcast:
        return (wide * scale).mul_(_truth(weight))
    return (wide * scale).to(x.dtype).mul_(weight)


def gelu(x: Tensor, *, approximate: str, upcast: bool = False) -> Tensor:
    """GELU: `approximate` "tanh" in the tower, "none" (erf) in the projector."""
    return F.gelu(_truth(x) if upcast else x, approximate=approximate)


def silu_mul(gate_up: Tensor, *, upcast: bool = False) -> Tensor:
    """silu(gate) · up.

    Args:
        gate_up: (rows, 2 · intermediate_size), gate first; overwritten.
        upcast: compute and return float64.

    Returns:
        (rows, intermediate_size), a view of gate_up.
    """
    gate, up = (_truth(gate_up) if upcast else gate_up).chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)


# As transformers v5.23 apply_rotary_pos_emb: every product and sum rounds to the storage dtype.
def rope(x: Tensor, cos: Tensor, sin: Tensor, *, upcast: bool = False) -> Tensor:
    """Rotates pairs (i, i + head_dim / 2) in place.

    Args:
        x: (rows, heads, head_dim), overwritten.
        cos: (rows, head_dim / 2), dtype of x.
        sin: as cos.
        upcast: compute and return float64.

    Returns:
        x.
    """
    if upcast:
        x, cos, sin = _truth(x), _truth(cos), _truth(sin)
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    rotated = first * sin
    first.mul_(cos).sub_(second * sin)
    second.mul_(cos).add_(rotated)
    return x


def patch_offset(weight: Tensor, bias: Tensor, position_embedding: Tensor) -> Tensor:
    """What patch_embed adds: position embedding + bias − Σ weight, (tokens_per_view, hidden)."""
    constant = bias.double() - weight.double().sum(dim=1)
    return (position_embedding.double() + constant).float()


def patch_embed(
    view: Tensor, weight: Tensor, offset: Tensor, dtype: torch.dtype, *, upcast: bool = False
) -> Tensor:
    """Embeds the patches of one view straight from its pixels.

    With u = 0…255 the normalised pixel is u / 127.5 − 1, so the product is Σ w·u / 127.5 − Σ w.

    Args:
        view: (side, side, 3) uint8; what does not fill a patch is dropped.
        weight: (hidden_size, 3 · patch²) float32, columns in (channel, row, column) order.
        offset: (tokens_per_view, hidden_size) float32, of `patch_offset`.
        dtype: of the result.
        upcast: compute and return float64.

    Returns:
        (tokens_per_view, hidden_size).
    """
    patch = round((weight.shape[1] // 3) ** 0.5)
    grid = view.shape[0] // patch
    pixels = view[: grid * patch, : grid * patch].reshape(grid, patch, grid, patch, 3)
    patches = pixels.permute(0, 2, 4, 1, 3).to(torch.float64 if upcast else torch.float32)
    patches = patches.reshape(grid * grid, weight.shape[1])
    if upcast:
        return _truth(offset) + (patches @ _truth(weight).t()) / 127.5
    return torch.addmm(offset, patches, weight.t(), alpha=PIXEL_SCALE).to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, *, upcast: bool = False) -> Tensor:
    """Attention of every row to every row, scale head_dim^-0.5.

    Args:
        q: (rows, heads, head_dim), any strides with the last dimension contiguous.
        k: as q.
        v: as q.
        upcast: compute and return float64.

    Returns:
        (rows, heads · head_dim).
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = _sdpa_truth(q, k, v, None) if upcast else F.scaled_dot_product_attention(q, k, v)
    return out[0].transpose(0, 1).flatten(1)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Sequence[int], *, upcast: bool = False
) -> Tensor:
    """Attention of rows at the given positions to all keys up to their own.

    Args:
        q: (rows, num_heads, head_dim).
        k: (num_kv_heads, num_keys, head_dim), key j at position j.
        v: as k.
        positions: of the rows of q, ascending; a range where they are consecutive.
        upcast: compute and return float64.

    Returns:
        (rows, num_heads · head_dim).
    """
    rows, num_heads = q.shape[:2]
    if rows == 0:
        return q.flatten(1)
    num_kv_heads, num_keys = k.shape[:2]
    # Heads that share keys stand side by side: the keys are broadcast, never copied.
    q = q.view(rows, num_kv_heads, num_heads // num_kv_heads, -1).permute(1, 2, 0, 3)
    k, v = k[:, None], v[:, None]
    if not upcast and isinstance(positions, range) and positions == range(num_keys):
        out = _grouped_sdpa(q, k, v, None, is_causal=rows > 1)
        return out.flatten(0, 1).transpose(0, 1).flatten(1)
    blocks = []
    for first in range(0, rows, MASK_ROWS):
        at = torch.tensor(positions[first : first + MASK_ROWS], device=q.device)
        visible = max(positions[first : first + MASK_ROWS]) + 1
        # SDPA's is_causal aligns to the upper left; a prefix needs the lower right.
        mask = torch.arange(visible, device=q.device) <= at[:, None]
        part = (q[:, :, first : first + MASK_ROWS], k[:, :, :visible], v[:, :, :visible])
        blocks.append(_sdpa_truth(*part, mask) if upcast else _grouped_sdpa(*part, mask))
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
    return out.flatten(0, 1).transpose(0, 1).flatten(1)


def _grouped_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False
) -> Tensor:
    group = q.shape[1]
    k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def _sdpa_truth(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = _truth(q) @ _truth(k).transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    out: Tensor = scores.softmax(dim=-1) @ _truth(v)
    return out


def decode_attention(q: Tensor, k: Tensor, v: Tensor, *, upcast: bool = False) -> Tensor:
    """Attention of one token to all keys.

    Args:
        q: (1, num_heads, head_dim).
        k: (num_kv_heads, num_keys, head_dim).
        v: as k.
        upcast: compute and return float64.

    Returns:
        (1, num_heads · head_dim).
    """
    # The heads of a group become rows of one product, so each key is read once for all of them.
    q = q.view(1, k.shape[0], -1, q.shape[-1])
    if upcast:
        return _sdpa_truth(q, k[None], v[None], None).reshape(1, -1)
    return F.scaled_dot_product_attention(q, k[None], v[None]).reshape(1, -1)


Pool = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def pool_and_pack(
    features: Tensor,
    index: Tensor,
    weight: Tensor,
    newline: Tensor,
    out: Tensor,
    *,
    upcast: bool = False,
) -> Tensor:
    """out[r] = Σ weight[r, j] · features[index[r, j]] in float32; the newline where index is -1.

    Args:
        features: (num_rows, hidden_size).
        index: (num_tokens, 4) int32.
        weight: (num_tokens, 4) float32.
        newline: (hidden_size,), dtype of features.
        out: (num_tokens, hidden_size), dtype of features; written in place unless upcast.
        upcast: compute and return float64.

    Returns:
        out, or the float64 truth.
    """
    is_newline = index[:, 0] < 0
    rows = index.clamp(min=0).long()
    if upcast:
        truth = (_truth(features)[rows] * _truth(weight)[..., None]).sum(dim=1)
        truth[is_newline] = _truth(newline)
        return truth
    pooled = (weight[:, 1:] != 0).any(dim=1).nonzero().flatten()
    out[:] = features.index_select(0, rows[:, 0])
    if len(pooled) > 0:
        taps = rows[pooled]
        total = features[taps[:, 0]].float().mul_(weight[pooled, :1])
        for tap in range(1, 4):
            total.addcmul_(features[taps[:, tap]].float(), weight[pooled, tap, None])
        out[pooled] = total.to(out.dtype)
    out[is_newline] = newline
    return out


def project_and_pack(
    features: Tensor,
    source_rows: Tensor,
    index: Tensor,
    weight: Tensor,
    linear_1: PackedLinear,
    linear_2: PackedLinear,
    newline: Tensor,
    out: Tensor,
    *,
    apply_linear: Callable[[Tensor, PackedLinear], Tensor] = packed_linear,
    pool: Pool = pool_and_pack,
) -> Tensor:
    """Projects the used rows of one picture, then pools and packs them, as upstream does.

    Args:
        features: (num_views · tokens_per_view, vision_hidden_size).
        source_rows: (num_sources,) int32, the rows of features that are used.
        index: (num_tokens, 4) int32 into source_rows, -1 for the newline.
        weight: (num_tokens, 4) float32.
        linear_1: vision_hidden_size → hidden_size, followed by the exact GELU.
        linear_2: hidden_size → hidden_size.
        newline: (hidden_size,).
        out: (num_tokens, hidden_size), written in place.
        apply_linear: the linear layer of the back end.
        pool: the pooling of the back end.

    Returns:
        out.
    """
    if len(source_rows) < features.shape[0]:
        features = features.index_select(0, source_rows)
    projected = out.new_empty(len(source_rows), out.shape[1])
    for first in range(0, len(source_rows), PROJECT_ROWS):
        block = slice(first, first + PROJECT_ROWS)
        hidden = gelu(apply_linear(features[block], linear_1), approximate="none")
        projected[block] = apply_linear(hidden, linear_2)
    return pool(projected, index, weight, newline, out)


def pack_views(
    resized: UInt8Array,
    offset_hw: tuple[int, int],
    grid_hw: tuple[int, int],
    fill: int,
    out: UInt8Array,
) -> None:
    """Cuts a picture, padded to a canvas of whole views, into its crops, row by row.

    Args:
        resized: (height, width, 3) uint8, the picture inside the canvas.
        offset_hw: its (top, left) corner in the canvas.
        grid_hw: rows and columns of crops.
        fill: value of the padding.
        out: (rows · cols, side, side, 3) uint8, written completely.
    """
    side = out.shape[1]
    (top, left), (rows, cols) = offset_hw, grid_hw
    height, width = resized.shape[:2]
    out[...] = fill
    for row in range(rows):
        y0, y1 = max(top, row * side), min(top + height, (row + 1) * side)
        for col in range(cols):
            x0, x1 = max(left, col * side), min(left + width, (col + 1) * side)
            if y0 < y1 and x0 < x1:
                view = out[row * cols + col]
                target = view[y0 - row * side : y1 - row * side, x0 - col * side : x1 - col * side]
                target[...] = resized[y0 - top : y1 - top, x0 - left : x1 - left]
