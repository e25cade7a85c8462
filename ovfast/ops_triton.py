"""The Triton back end of `ops`: kernels under the names and signatures of the operations.

Imports Triton, so `ops` imports this module only when it is asked for.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ovfast import reference
from ovfast.decode_kernels import DecodeKernels
from ovfast.errors import BackendError, QuantizationError
from ovfast.kernels import (
    attention,
    causal_attention,
    decode_attention,
    decode_finish,
    decode_head,
    decode_mlp,
    decode_out,
    decode_qkv,
    fused_linear,
    layer_norm,
    patch_embed,
    place,
    prefill_rope,
    quantize_rows,
    resize,
    rms_norm,
    sample_best,
    sample_draw,
    scaled_linear,
    silu_mul,
)
from ovfast.reference import PackedLinear, RowTable

# Views a tower encodes at once: 64 need 0.4 GB for their widest activations in 16 bits.
VIEWS_A_STEP = 64
FLOAT8_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0)
# Device → fastest attention of a prefill, as `make gpu` found it; no device has been measured yet.
PREFILL_ATTENTION: dict[str, str] = {}
FLASH_DTYPES = (torch.float16, torch.bfloat16)  # all that flash-attn has kernels for

logger = logging.getLogger(__name__)


def triton_fields(
    device: torch.device, wanted_attention: str, *, interpreting: bool
) -> dict[str, Any]:
    """What the Triton back end puts into an `Ops`.

    Args:
        device: of the model.
        wanted_attention: of a prefill: "auto", "sdpa", "triton" or "flash".
        interpreting: whether kernels run in Triton's interpreter.

    Returns:
        Fields of `Ops` by name.

    Raises:
        BackendError: flash-attn is asked for and cannot be imported.
    """
    has_device = torch.cuda.is_available() and not interpreting
    name = wanted_attention
    if name == "auto":
        measured = torch.cuda.get_device_name(device) if has_device else ""
        name = PREFILL_ATTENTION.get(measured, "sdpa")
    # Programmatic dependent launch is Hopper's and later.
    pdl = has_device and torch.cuda.get_device_capability(device) >= (9, 0)
    return {
        "pack_patch": patch_embed.pack_patch_weight,
        "pack_qkv": _pack_qkv,
        "pack_gate_up": _pack_gate_up,
        "fused_linear": _fused_linear,
        "layer_norm": layer_norm.layer_norm,
        "rms_norm": rms_norm.rms_norm,
        "add_linear": _add_linear,
        "gate_up": partial(reference.gate_up, apply_silu_mul=silu_mul.silu_mul_pairs),
        "rope_and_store": _rope_and_store,
        "resample": resize.resample,
        "patch_embed": _patch_embed,
        "view_attention": _view_attention,
        "causal_attention": _causal_attention(name, required=wanted_attention != "auto"),
        "project_and_pack": _project_and_pack,
        "reads_pictures": True,
        "views_a_step": VIEWS_A_STEP,
        "decode": _decode_kernels(pdl=pdl),
    }


def float8_fields(device: torch.device, *, interpreting: bool) -> dict[str, Any]:
    """What an `Ops` has instead where the language model's linear layers are float8.

    A prefill rounds the rows to float8 too, the kernels of a decode step do not.

    Args:
        device: of the model.
        interpreting: whether kernels run in Triton's interpreter.

    Returns:
        Fields of `Ops` by name.

    Raises:
        QuantizationError: the device has no float8.
    """
    if not interpreting and torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        raise QuantizationError(
            f"quantization='fp8' on {torch.cuda.get_device_name(device)}, compute capability"
            f" {major}.{minor}; it needs 8.9 (Ada) or later. Use quantization=None."
        )
    return {
        # Rounded before they are put in order: half the memory is moved.
        "pack_qkv": partial(_pack_qkv, pack=_float8),
        "pack_gate_up": partial(_pack_gate_up, pack=_float8),
        "pack_output": _float8,
        "tie_head": lambda embedding: _float8(embedding.weight),
        "linear": _float8_linear,
        "add_linear": _add_float8_linear,
        "gate_up": partial(
            reference.gate_up,
            apply_linear=_float8_linear,
            apply_silu_mul=silu_mul.silu_mul_pairs,
        ),
        "head": partial(_float8_linear, dtype=torch.float32),
        "quantization": "fp8",
    }


def _add_linear(x: Tensor, packed: PackedLinear, residual: Tensor) -> Tensor:
    """One pass: the product's float32 sums meet the residual before the only rounding."""
    assert packed.bias is None
    return residual.addmm_(x, packed.weight.t())


def _float8(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """A layer with its weight rounded to float8, a scale for each output."""
    rounded, scales = quantize_rows.quantize_rows(weight)
    return PackedLinear(rounded, bias, scales)


def _float8_linear(x: Tensor, packed: PackedLinear, dtype: torch.dtype | None = None) -> Tensor:
    out = torch.empty(len(x), len(packed.weight), dtype=dtype or x.dtype, device=x.device)
    return _scaled_linear(x, packed, out, residual=None)


def _add_float8_linear(x: Tensor, packed: PackedLinear, residual: Tensor) -> Tensor:
    return _scaled_linear(x, packed, residual, residual=residual)


def _scaled_linear(
    x: Tensor, packed: PackedLinear, out: Tensor, *, residual: Tensor | None
) -> Tensor:
    assert packed.scales is not None
    rows, row_scales = quantize_rows.quantize_rows(x)
    return scaled_linear.scaled_linear(
        rows, row_scales, packed.weight, packed.scales, packed.bias, out, residual=residual
    )


def _pack_qkv(
    weight: Tensor,
    bias: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    pack: Callable[[Tensor, Tensor | None], PackedLinear] = PackedLinear,
) -> PackedLinear:
    head_dim = weight.shape[0] // (num_heads + 2 * num_kv_heads)
    rows = decode_qkv.pack_qkv_rows(num_heads, num_kv_heads, head_dim)
    return _permuted(pack(weight, bias), rows)


def _pack_gate_up(
    weight: Tensor, *, pack: Callable[[Tensor, Tensor | None], PackedLinear] = PackedLinear
) -> PackedLinear:
    rows = decode_mlp.pack_gate_up_rows(weight.shape[0] // 2)
    return _permuted(pack(weight, None), rows)


def _permuted(packed: PackedLinear, rows: Tensor) -> PackedLinear:
    """The outputs in another order. Float8 is moved as bytes: torch does not index it."""
    weight, rows = packed.weight, rows.to(packed.weight.device)
    if packed.scales is not None:
        weight = weight.view(torch.uint8)
    others = (None if x is None else x.index_select(0, rows) for x in (packed.bias, packed.scales))
    return PackedLinear(weight.index_select(0, rows).view(packed.weight.dtype), *others)


def _fused_linear(
    x: Tensor,
    packed: PackedLinear,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    function: Any = fused_linear.fused_linear
    out: Tensor = function(
        x, packed.weight, packed.bias, activation=activation, residual=residual, out=residual
    )
    return out


def _patch_embed(
    pixels: Tensor,
    windows: Tensor,
    weight: Tensor,
    offset: Tensor,
    image_size: int,
    dtype: torch.dtype,
) -> Tensor:
    shape = (len(windows) * len(offset), offset.shape[1])
    return patch_embed.patch_embed(
        pixels,
        windows,
        weight,
        offset,
        torch.empty(shape, dtype=dtype, device=pixels.device),
        patch_size=weight.shape[1],
        image_size=image_size,
    )


def _view_attention(qkv: Tensor, num_heads: int, tokens_per_view: int) -> Tensor:
    if not attention.supports(qkv.shape[1] // (3 * num_heads)):
        return reference.view_attention(qkv, num_heads, tokens_per_view)
    return attention.attention(qkv, num_heads=num_heads, tokens_per_view=tokens_per_view)


def _project_and_pack(
    features: Tensor,
    table: RowTable,
    linear_1: PackedLinear,
    linear_2: PackedLinear,
    newline: Tensor,
    token_ids: Tensor,
    embedding: PackedLinear,
    out: Tensor,
) -> Tensor:
    """fc1 and GELU on the rows in use; then pooling, which commutes with fc2, before fc2."""
    assert linear_1.bias is not None
    assert linear_2.bias is not None
    hidden = fused_linear.fused_linear(
        features,
        linear_1.weight,
        linear_1.bias,
        activation="gelu_erf",
        rows=table.source_rows,
    )
    return place.project_and_place(
        hidden,
        table.index,
        table.weight,
        linear_2.weight,
        linear_2.bias,
        newline,
        token_ids,
        embedding.weight,
        out,
        has_pooled=table.has_pooled,
    )


def _rope_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    return prefill_rope.rope_and_store(
        qkv, cos, sin, k_cache, v_cache, start, num_heads=num_heads, num_kv_heads=num_kv_heads
    )


def _causal_attention(
    name: str, *, required: bool = True
) -> Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]:
    """Attention of a prefill. Only torch's upper-left mask keeps SDPA from continuing a prefix."""
    flash = _flash_attention(required=required) if name == "flash" else None

    def attend(q: Tensor, k: Tensor, v: Tensor, positions: Sequence[int]) -> Tensor:
        num_keys = k.shape[1]
        is_suffix = isinstance(positions, range) and positions.stop == num_keys
        if flash is not None and is_suffix and q.dtype in FLASH_DTYPES:
            return flash(q, k, v)
        own = is_suffix and causal_attention.supports(q.shape[-1])
        if own and (name == "triton" or positions != range(num_keys)):
            return causal_attention.causal_attention(q, k, v, num_keys - len(q)).flatten(1)
        return reference.causal_attention(q, k, v, positions)

    return attend


def _flash_attention(*, required: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """flash-attn aligns its causal mask to the lower right, so it continues a prefix as it is.

    None where it cannot be imported and is not required.
    """
    try:
        flash: Any = importlib.import_module("flash_attn")
    except ImportError as error:  # also where it was built for another torch
        if not required:
            logger.warning(
                "flash-attn is the fastest attention of a prefill here and cannot be imported (%s):"
                " torch's runs instead. Install ovfast[flash]",
                error,
            )
            return None
        raise BackendError(
            f"attention='flash' needs the package flash-attn, which cannot be imported ({error})."
            " Install ovfast[flash], or use attention='auto'."
        ) from error

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        out: Tensor = flash.flash_attn_func(q[None], keys, values, causal=True)
        return out[0].flatten(1)

    return attend


def _decode_kernels(*, pdl: bool) -> DecodeKernels:
    return DecodeKernels(
        split=decode_attention.SPLIT,
        supports=lambda head_dim: (
            decode_attention.supports(head_dim) and decode_out.supports(head_dim)
        ),
        out_splits=decode_out.out_splits,
        down_splits=decode_mlp.down_splits,
        head_blocks=decode_head.head_blocks,
        sample_blocks=sample_best.sample_blocks,
        embed_rows=partial(decode_head.embed_rows, pdl=pdl),
        decode_qkv=partial(decode_qkv.decode_qkv, pdl=pdl),
        decode_attention=partial(decode_attention.decode_attention, pdl=pdl),
        decode_out=partial(decode_out.decode_out, pdl=pdl),
        decode_gate_up=partial(decode_mlp.decode_gate_up, pdl=pdl),
        decode_down=partial(decode_mlp.decode_down, pdl=pdl),
        decode_head=partial(decode_head.decode_head, pdl=pdl),
        sample_best=partial(sample_best.sample_best, pdl=pdl),
        sample_weights=partial(sample_draw.sample_weights, pdl=pdl),
        sample_draw=partial(sample_draw.sample_draw, pdl=pdl),
        decode_finish=partial(decode_finish.decode_finish, pdl=pdl),
    )
