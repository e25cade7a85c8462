"""The specialisations of decode_out that are compiled ahead of time."""

import triton.language as tl

from ovfast.kernels import decode_out
from tests.support.aot import Variant, small, weight_arguments

DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
# hidden_size, num_heads, head_dim
SIZES = {"0.5b": (896, 14, 64), "7b": (3584, 28, 128), "72b": (8192, 64, 128)}


def _out_variant(dtype: str, size: str, min_wide_loads: int, *, pdl: bool = False) -> Variant:
    hidden_size, num_heads, head_dim = SIZES[size]
    blocks = decode_out.launch_config(hidden_size)
    activations, pointers, without = weight_arguments(dtype)
    return Variant(
        kernel=decode_out._decode_out_kernel,
        name=f"{dtype}-{size}" + ("-pdl" if pdl else ""),
        arguments={
            **{f"{name}_ptr": "*fp32" for name in ("acc", "m", "l", "partials")},
            "slots_ptr": "*i32",
            "positions_ptr": "*i32",
            **pointers,
            "num_rows": 5,
            "max_splits": 5,
            "stride_wn": num_heads * head_dim,
        },
        constexprs={
            "H": hidden_size,
            "NUM_HEADS": num_heads,
            "HEAD_DIM": head_dim,
            "TILES": decode_out._out_tiles(hidden_size, num_heads * head_dim)[1],
            "SPLIT": decode_out.SPLIT,
            "SPLITS_AT_ONCE": decode_out.SPLITS_AT_ONCE,
            "DTYPE": DTYPES[activations],
            "USE_PDL": pdl,
            **without,
            **blocks.meta(),
        },
        options={**blocks.options(), "launch_pdl": pdl, "enable_fp_fusion": True},
        min_wide_loads=min_wide_loads,
        instructions=() if dtype == "fp32" else ("HMMA",),
    )


VARIANTS = (
    _out_variant("bf16", "0.5b", 8),
    _out_variant("bf16", "0.5b", 8, pdl=True),
    _out_variant("fp16", "0.5b", 8),
    _out_variant("fp32", "0.5b", 8),
    _out_variant("bf16", "7b", 8),
    _out_variant("bf16", "7b", 8, pdl=True),
    _out_variant("fp8", "0.5b", 4, pdl=True),
    _out_variant("bf16", "72b", 8, pdl=True),
    _out_variant("fp8", "7b", 4, pdl=True),
    _out_variant("fp8", "72b", 4, pdl=True),
    small(_out_variant("fp8", "7b", 4)),
)

# Programmatic dependent launch is of sm_90 and later, and float8 is not of sm_80.
SMS: dict[str, tuple[int, ...]] = {
    variant.name: (90, 100) if "pdl" in variant.name or "fp8" in variant.name else (80, 90, 100)
    for variant in VARIANTS
}
