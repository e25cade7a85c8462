"""The specialisations of decode_qkv that are compiled ahead of time."""

import torch

from ovfast.kernels import decode_qkv
from ovfast.kernels.decode_tiles import RESIDUAL_BLOCK
from tests.support.aot import Variant, small, weight_arguments

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
# hidden_size, num_heads, num_kv_heads, head_dim, partials of the layer before
SIZES = {
    "0.5b": (896, 14, 2, 64, 5),
    "7b": (3584, 28, 4, 128, 2),
    "72b": (8192, 64, 8, 128, 1),
}
MAX_POSITIONS = 32768


def _qkv_variant(
    dtype: str, size: str, min_wide_loads: int, *, pdl: bool = False, first_layer: bool = False
) -> Variant:
    hidden_size, num_heads, num_kv_heads, head_dim, num_partials = SIZES[size]
    blocks = decode_qkv.launch_config(hidden_size, head_dim, DTYPES[dtype])
    activations, pointers, without = weight_arguments(dtype)
    stored = ("norm", "bias", "cos", "sin", "q", "k_cache", "v_cache")
    wide = ("residual", "partials", "residual_out")
    return Variant(
        kernel=decode_qkv._decode_qkv_kernel,
        name=f"{dtype}-{size}" + ("-first" if first_layer else "") + ("-pdl" if pdl else ""),
        arguments={
            **{f"{name}_ptr": f"*{activations}" for name in stored},
            **pointers,
            **{f"{name}_ptr": "*fp32" for name in wide},
            "slots_ptr": "*i32",
            "positions_ptr": "*i32",
            "eps": "fp32",
            "num_rows": 5,
            "stride_wn": hidden_size,
            "stride_ks": num_kv_heads * MAX_POSITIONS * head_dim,
            "stride_kh": MAX_POSITIONS * head_dim,
            "stride_kp": head_dim,
            "stride_vs": num_kv_heads * MAX_POSITIONS * head_dim,
            "stride_vh": MAX_POSITIONS * head_dim,
            "stride_vp": head_dim,
        },
        constexprs={
            "H": hidden_size,
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_DIM": head_dim,
            "NUM_PARTIALS": 0 if first_layer else num_partials,
            "BLOCK_H": RESIDUAL_BLOCK,
            "USE_PDL": pdl,
            **without,
            **blocks.meta(),
        },
        options={**blocks.options(), "launch_pdl": pdl, "enable_fp_fusion": True},
        min_wide_loads=min_wide_loads,
        instructions=() if dtype == "fp32" else ("HMMA",),
    )


VARIANTS = (
    _qkv_variant("bf16", "0.5b", 8),
    _qkv_variant("bf16", "0.5b", 8, pdl=True),
    _qkv_variant("bf16", "0.5b", 8, pdl=True, first_layer=True),
    _qkv_variant("fp16", "0.5b", 8),
    _qkv_variant("fp32", "0.5b", 4),
    _qkv_variant("bf16", "7b", 8),
    _qkv_variant("bf16", "7b", 8, pdl=True),
    _qkv_variant("bf16", "72b", 8, pdl=True),
    _qkv_variant("fp8", "0.5b", 4, pdl=True),
    _qkv_variant("fp8", "7b", 4, pdl=True),
    _qkv_variant("fp8", "72b", 4, pdl=True),
    small(_qkv_variant("fp8", "7b", 4)),
)

# Programmatic dependent launch is of sm_90 and later, and float8 is not of sm_80.
SMS: dict[str, tuple[int, ...]] = {
    variant.name: (90, 100) if "pdl" in variant.name or "fp8" in variant.name else (80, 90, 100)
    for variant in VARIANTS
}
