"""The specialisations of decode_gate_up and decode_down that are compiled ahead of time."""

import torch

from ovfast.kernels import decode_mlp
from ovfast.kernels.decode_out import out_splits
from ovfast.kernels.decode_tiles import RESIDUAL_BLOCK
from tests.support.aot import Variant, small, weight_arguments

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
# hidden_size, num_heads · head_dim, intermediate_size
SIZES = {"0.5b": (896, 896, 4864), "7b": (3584, 3584, 18944), "72b": (8192, 8192, 29568)}


def _gate_up_variant(dtype: str, size: str, min_wide_loads: int, *, pdl: bool = False) -> Variant:
    hidden_size, in_features, intermediate_size = SIZES[size]
    blocks = decode_mlp.gate_up_config(hidden_size, DTYPES[dtype])
    activations, pointers, without = weight_arguments(dtype)
    return Variant(
        kernel=decode_mlp._decode_gate_up_kernel,
        name=f"{dtype}-{size}" + ("-pdl" if pdl else ""),
        arguments={
            **{f"{name}_ptr": f"*{activations}" for name in ("norm", "mlp")},
            **pointers,
            **{f"{name}_ptr": "*fp32" for name in ("residual", "partials", "residual_out")},
            "eps": "fp32",
            "num_rows": 5,
            "stride_wn": hidden_size,
        },
        constexprs={
            "H": hidden_size,
            "I": intermediate_size,
            "NUM_PARTIALS": out_splits(hidden_size, in_features),
            "BLOCK_H": RESIDUAL_BLOCK,
            "USE_PDL": pdl,
            **without,
            **blocks.meta(),
        },
        options={**blocks.options(), "launch_pdl": pdl, "enable_fp_fusion": True},
        min_wide_loads=min_wide_loads,
        instructions=() if dtype == "fp32" else ("HMMA",),
    )


def _down_variant(dtype: str, size: str, min_wide_loads: int, *, pdl: bool = False) -> Variant:
    hidden_size, _, intermediate_size = SIZES[size]
    blocks = decode_mlp.down_config(hidden_size)
    activations, pointers, without = weight_arguments(dtype)
    return Variant(
        kernel=decode_mlp._decode_down_kernel,
        name=f"{dtype}-{size}" + ("-pdl" if pdl else ""),
        arguments={
            "mlp_ptr": f"*{activations}",
            **pointers,
            "partials_ptr": "*fp32",
            "num_rows": 5,
            "stride_wn": intermediate_size,
        },
        constexprs={
            "H": hidden_size,
            "I": intermediate_size,
            "TILES": decode_mlp._down_tiles(hidden_size, intermediate_size)[1],
            "USE_PDL": pdl,
            **without,
            **blocks.meta(),
        },
        options={**blocks.options(), "launch_pdl": pdl, "enable_fp_fusion": True},
        min_wide_loads=min_wide_loads,
        instructions=() if dtype == "fp32" else ("HMMA",),
    )


VARIANTS = (
    _gate_up_variant("bf16", "0.5b", 8),
    _gate_up_variant("bf16", "0.5b", 8, pdl=True),
    _gate_up_variant("fp16", "0.5b", 8),
    _gate_up_variant("fp32", "0.5b", 4),
    _gate_up_variant("bf16", "7b", 8),
    _gate_up_variant("bf16", "7b", 8, pdl=True),
    _gate_up_variant("fp8", "0.5b", 4, pdl=True),
    _gate_up_variant("fp8", "7b", 4, pdl=True),
    _gate_up_variant("bf16", "72b", 8, pdl=True),
    _gate_up_variant("fp8", "72b", 4, pdl=True),
    _down_variant("bf16", "0.5b", 4),
    _down_variant("bf16", "0.5b", 4, pdl=True),
    _down_variant("fp16", "0.5b", 4),
    _down_variant("fp32", "0.5b", 4),
    _down_variant("bf16", "7b", 8),
    _down_variant("bf16", "7b", 8, pdl=True),
    _down_variant("bf16", "72b", 8, pdl=True),
    _down_variant("fp8", "0.5b", 2, pdl=True),
    _down_variant("fp8", "7b", 4, pdl=True),
    _down_variant("fp8", "72b", 4, pdl=True),
    small(_gate_up_variant("fp8", "7b", 4)),
    small(_down_variant("fp8", "7b", 4)),
)

# Programmatic dependent launch is of sm_90 and later, and float8 is not of sm_80.
SMS: dict[str, tuple[int, ...]] = {
    variant.name: (90, 100) if "pdl" in variant.name or "fp8" in variant.name else (80, 90, 100)
    for variant in VARIANTS
}
