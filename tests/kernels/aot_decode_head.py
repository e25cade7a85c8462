"""The specialisations of decode_head and embed_rows compiled ahead of time."""

import torch

from ovfast.kernels import decode_head
from ovfast.kernels.decode_mlp import down_splits
from tests.support.aot import Variant, small, weight_arguments

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
# hidden_size, intermediate_size, vocab_size
SIZES = {"0.5b": (896, 4864, 152000), "7b": (3584, 18944, 152128), "72b": (8192, 29568, 152128)}


def _head_variant(dtype: str, size: str, min_wide_loads: int, *, pdl: bool = False) -> Variant:
    hidden_size, intermediate_size, vocab_size = SIZES[size]
    blocks = decode_head.head_config(hidden_size, DTYPES[dtype])
    activations, pointers, without = weight_arguments(dtype)
    return Variant(
        kernel=decode_head._decode_head_kernel,
        name=f"{dtype}-{size}" + ("-pdl" if pdl else ""),
        arguments={
            **{f"{name}_ptr": "*fp32" for name in ("residual", "partials", "logits", "block_max")},
            "norm_ptr": f"*{activations}",
            **pointers,
            "forbidden_ptr": "*i8",
            "block_argmax_ptr": "*i32",
            "eps": "fp32",
            "num_rows": 5,
            "stride_wn": hidden_size,
        },
        constexprs={
            "H": hidden_size,
            "V": vocab_size,
            "NUM_PARTIALS": down_splits(hidden_size, intermediate_size),
            "USE_PDL": pdl,
            **without,
            **blocks.meta(),
        },
        options={**blocks.options(), "launch_pdl": pdl, "enable_fp_fusion": True},
        min_wide_loads=min_wide_loads,
        instructions=() if dtype == "fp32" else ("HMMA",),
    )


def _embed_variant(dtype: str, size: str, *, pdl: bool = False) -> Variant:
    hidden_size = SIZES[size][0]
    return Variant(
        kernel=decode_head._embed_rows_kernel,
        name=f"{dtype}-{size}" + ("-pdl" if pdl else ""),
        arguments={
            "tokens_ptr": "*i32",
            "table_ptr": f"*{dtype}",
            "residual_ptr": "*fp32",
            "stride_tm": hidden_size,
        },
        constexprs={"H": hidden_size, "BLOCK_H": decode_head._EMBED_BLOCK, "USE_PDL": pdl},
        options={"num_warps": 4, "launch_pdl": pdl, "enable_fp_fusion": True},
        min_wide_loads=1,
    )


VARIANTS = (
    _head_variant("bf16", "0.5b", 8),
    _head_variant("bf16", "0.5b", 8, pdl=True),
    _head_variant("fp16", "0.5b", 8),
    _head_variant("fp32", "0.5b", 8),
    _head_variant("bf16", "7b", 8),
    _head_variant("bf16", "7b", 8, pdl=True),
    _head_variant("fp8", "0.5b", 4, pdl=True),
    _head_variant("bf16", "72b", 8, pdl=True),
    _head_variant("fp8", "7b", 4, pdl=True),
    _head_variant("fp8", "72b", 4, pdl=True),
    small(_head_variant("fp8", "7b", 4)),
    _embed_variant("bf16", "0.5b"),
    _embed_variant("bf16", "0.5b", pdl=True),
    _embed_variant("bf16", "72b", pdl=True),
)

# Programmatic dependent launch is of sm_90 and later, and float8 is not of sm_80.
SMS: dict[str, tuple[int, ...]] = {
    variant.name: (90, 100) if "pdl" in variant.name or "fp8" in variant.name else (80, 90, 100)
    for variant in VARIANTS
}
