"""The specialisations of silu_mul_pairs that are compiled ahead of time."""

from ovfast.kernels import silu_mul
from tests.support.aot import Variant


def _silu_mul_pairs_variant(dtype: str, width: int, min_wide_loads: int) -> Variant:
    block_i, num_warps = silu_mul.launch_config(width)
    return Variant(
        kernel=silu_mul._silu_mul_pairs_kernel,
        name=f"{dtype}-block{block_i}",
        arguments={
            "gate_up_ptr": f"*{dtype}",
            "out_ptr": f"*{dtype}",
            "I": width,
            "stride_gm": 2 * width,
            "stride_om": width,
        },
        constexprs={"BLOCK_I": block_i},
        options={"num_warps": num_warps, "enable_fp_fusion": True},
        min_wide_loads=min_wide_loads,
        instructions=("STG.E.128",),
    )


# 4864: 0.5B; 7B's 18944 and 72B's 29568 are the same binary. A thread has 8 pairs.
VARIANTS = (
    _silu_mul_pairs_variant("bf16", 4864, min_wide_loads=2),
    _silu_mul_pairs_variant("fp16", 4864, min_wide_loads=2),
    _silu_mul_pairs_variant("fp32", 4864, min_wide_loads=4),
)
