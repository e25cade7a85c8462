"""The specialisations of attention that are compiled ahead of time."""

import torch

from ovfast.kernels import attention
from ovfast.kernels.shared_memory import LARGE, SMALL
from tests.support.aot import SMALL_NAME, Variant

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _attention_variant(
    dtype: str,
    tokens: int,
    num_heads: int,
    head_dim: int,
    min_wide_loads: int,
    *,
    small: bool = False,
) -> Variant:
    meta, options = attention.launch_config(
        head_dim, tokens, _DTYPES[dtype], SMALL if small else LARGE
    )
    width = num_heads * head_dim
    return Variant(
        kernel=attention._attention_kernel,
        name=f"{dtype}-head{head_dim}-tokens{tokens}" + SMALL_NAME * small,
        arguments={
            "qkv_ptr": f"*{dtype}",
            "out_ptr": f"*{dtype}",
            "stride_qkvm": 3 * width,
            "stride_om": width,
            "score_scale": "fp32",
        },
        constexprs=meta,
        options={**options, "enable_fp_fusion": True},
        # Queries and the last block of keys; the other keys come by asynchronous copies.
        min_wide_loads=min_wide_loads,
        instructions=("LDGSTS.E.BYPASS.128",) if tokens > meta["BLOCK_N"] else (),
    )


# The tower in each dtype; the demo, whose 16 keys are a tail alone; heads with one part and with
# two whole ones. Half precision: 4 loads of queries for each 64 columns, 1 for 16, and those of
# the last keys and values; the columns above 64 of keys take 64-bit loads, 4 elements a thread.
VARIANTS = (
    _attention_variant("bf16", 729, 16, 72, min_wide_loads=7),
    _attention_variant("fp16", 729, 16, 72, min_wide_loads=7),
    _attention_variant("fp32", 729, 16, 72, min_wide_loads=6),
    _attention_variant("bf16", 16, 2, 72, min_wide_loads=5),
    _attention_variant("bf16", 729, 16, 64, min_wide_loads=6),
    _attention_variant("bf16", 729, 16, 128, min_wide_loads=12),
    _attention_variant("fp32", 729, 16, 128, min_wide_loads=12),
    _attention_variant("bf16", 729, 16, 72, min_wide_loads=7, small=True),
    _attention_variant("bf16", 729, 16, 128, min_wide_loads=12, small=True),
)

SM90_INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    variant.name: ("HGMMA",) for variant in VARIANTS if not variant.name.startswith("fp32")
}
