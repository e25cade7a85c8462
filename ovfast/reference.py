"""Plain torch implementations of every operation; the oracle of the kernel tests.

Runs on any device torch has. Casts are upstream's: statistics and scores in float32, one rounding
to the storage dtype where transformers rounds. `upcast=True` computes a truth in float64 instead
and never writes to its arguments. Row blocks depend on shapes only, so a request's bits do not
depend on its neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_ROWS = 256  # rows of an explicit causal mask at a time: 256 × 32 768 float32 are 32 MB
PROJECT_ROWS = 1024
GELUS = {"gelu_tanh": "tanh", "gelu_erf": "none"}


TEXT_ROW = -2  # first index of a row of inputs_embeds that is a text embedding; -1 is the newline


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer's parameters in the layout of one back end; here (out, in) and (out,).

    Only the `Ops` that packed it may read it. `weight.shape` is (out, in) in every layout.
    `scales`: (out,) float32, of a weight in float8.
    """

    weight: Any
    bias: Tensor | None
    scales: Tensor | None = None


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


def fused_linear(
    x: Tensor,
    packed: PackedLinear,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    apply_linear: Callable[[Tensor, PackedLinear], Tensor] = packed_linear,
) -> Tensor:
    """A linear layer with what follows it: activation, then the residual stream.

    Args:
        x: (rows, in_features).
        packed: in_features → out_features.
        activation: None, "gelu_tanh" (the tower's) or "gelu_erf" (the projector's).
        residual: (rows, out_features), to which the result is added in place.
        apply_linear: the linear layer of the back end.

    Returns:
        (rows, out_features): residual if it was given.
    """
    out = apply_linear(x, packed)
    if activation is not None:
        out = gelu(out, approximate=GELUS[activation])
    return out if residual is None else residual.add_(out)


def add_linear(
    x: Tensor,
    packed: PackedLinear,
    residual: Tensor,
    *,
    apply_linear: Callable[[Tensor, PackedLinear], Tensor] = packed_linear,
) -> Tensor:
    """Adds a linear layer to the residual stream, (rows, out_features), in place."""
    return residual.add_(apply_linear(x, packed))


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


def gate_up(
    x: Tensor,
    packed: PackedLinear,
    *,
    apply_linear: Callable[[Tensor, PackedLinear], Tensor] = packed_linear,
    apply_silu_mul: Callable[[Tensor], Tensor] = silu_mul,
) -> Tensor:
    """The first half of Qwen2's MLP.

    Args:
        x: (rows, hidden_size).
        packed: hidden_size → 2 · intermediate_size, of `pack_gate_up`.
        apply_linear: the linear layer of the back end.
        apply_silu_mul: `silu_mul` of the back end, for the order of its columns.

    Returns:
        (rows, intermediate_size).
    """
    return apply_silu_mul(apply_linear(x, packed))


def embed(embedding: PackedLinear, token_ids: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows of the embedding.

    Args:
        embedding: (vocab_size, hidden_size), of `pack_embedding`.
        token_ids: (num_tokens,) int32 or int64.
        out: (num_tokens, hidden_size), written in place if given.

    Returns:
        (num_tokens, hidden_size).
    """
    return torch.index_select(embedding.weight, 0, token_ids, out=out)


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


def rope_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """Rotates queries and keys and appends keys and values to one slot of one layer.

    Args:
        qkv: (rows, (num_heads + 2 · num_kv_heads) · head_dim), overwritten.
        cos: (rows, head_dim / 2), of the rows' positions.
        sin: as cos.
        k_cache: (num_kv_heads, max_positions, head_dim), written from `start` on.
        v_cache: as k_cache.
        start: position of the first row.
        num_heads: of the queries.
        num_kv_heads: of the keys and of the values.

    Returns:
        The queries, (rows, num_heads, head_dim).
    """
    rows, stop, num_rotated = len(qkv), start + len(qkv), num_heads + num_kv_heads
    qkv = qkv.view(rows, num_rotated + num_kv_heads, -1)
    rope(qkv[:, :num_rotated], cos, sin)
    k_cache[:, start:stop] = qkv[:, num_heads:num_rotated].transpose(0, 1)
    v_cache[:, start:stop] = qkv[:, num_rotated:].transpose(0, 1)
    return qkv[:, :num_heads]


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


def view_attention(qkv: Tensor, num_heads: int, tokens_per_view: int) -> Tensor:
    """`attention` inside each view.

    Args:
        qkv: (num_views · tokens_per_view, 3 · num_heads · head_dim): queries, keys, values.
        num_heads: of each.
        tokens_per_view: rows of a view.

    Returns:
        (num_views · tokens_per_view, num_heads · head_dim).
    """
    heads = qkv.view(len(qkv), 3, num_heads, -1)
    views = range(0, len(qkv), tokens_per_view)
    outs = [attention(*heads[first : first + tokens_per_view].unbind(1)) for first in views]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


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


@dataclass(frozen=True, slots=True)
class RowTable:
    """What consecutive rows of inputs_embeds are made of.

    Attributes:
        source_rows: (num_sources,) int32, the feature rows that are used.
        index: (num_rows, 4) int32 into source_rows; a row of -1 is the newline, of TEXT_ROW a text
            embedding.
        weight: (num_rows, 4) float32, the shares of the four sources, which sum to 1.
        has_pooled: whether any row has more than one source.
    """

    source_rows: Tensor
    index: Tensor
    weight: Tensor
    has_pooled: bool


def project_sources(
    features: Tensor,
    source_rows: Tensor,
    linear_1: PackedLinear,
    linear_2: PackedLinear,
    like: Tensor,
    apply_fused_linear: Callable[..., Tensor],
) -> Tensor:
    """Both linear layers of the projector over the feature rows in use.

    Args:
        features: (num_rows, vision_hidden_size).
        source_rows: (num_sources,) int32.
        linear_1: vision_hidden_size → hidden_size, followed by the exact GELU.
        linear_2: hidden_size → hidden_size.
        like: a tensor of the result's width, dtype and device.
        apply_fused_linear: `fused_linear` of the back end.

    Returns:
        (num_sources, hidden_size).
    """
    if len(source_rows) < features.shape[0]:
        features = features.index_select(0, source_rows)
    projected = like.new_empty(len(source_rows), like.shape[1])
    for first in range(0, len(source_rows), PROJECT_ROWS):
        block = slice(first, first + PROJECT_ROWS)
        hidden = apply_fused_linear(features[block], linear_1, activation="gelu_erf")
        projected[block] = apply_fused_linear(hidden, linear_2)
    return projected


def project_and_pack(
    features: Tensor,
    table: RowTable,
    linear_1: PackedLinear,
    linear_2: PackedLinear,
    newline: Tensor,
    token_ids: Tensor,
    embedding: PackedLinear,
    out: Tensor,
    *,
    apply_linear: Callable[[Tensor, PackedLinear], Tensor] = packed_linear,
) -> Tensor:
    """Projects the used features, pools and packs them as upstream does, and places the text.

    Args:
        features: (num_views · tokens_per_view, vision_hidden_size).
        table: where each row comes from.
        linear_1: vision_hidden_size → hidden_size, followed by the exact GELU.
        linear_2: hidden_size → hidden_size.
        newline: (hidden_size,).
        token_ids: (num_rows,) int32, read where the table says text.
        embedding: (vocab_size, hidden_size), of `pack_embedding`.
        out: (num_rows, hidden_size), written in place.
        apply_linear: the linear layer of the back end.

    Returns:
        out.
    """
    fused = partial(fused_linear, apply_linear=apply_linear)
    projected = project_sources(features, table.source_rows, linear_1, linear_2, out, fused)
    pool_and_pack(projected, table.index, table.weight, newline, out)
    is_text = table.index[:, 0] == TEXT_ROW
    out[is_text] = embedding.weight[token_ids[is_text].long()]
    return out
