"""The specialisations of rms_norm that are compiled ahead of time."""

from ovfast.kernels import rms_norm
from tests.support.aot import Variant


def _rms_norm_variant(dtype: str, width: int, min_wide_loads: int) -> Variant:
    block_d, num_warps = rms_norm.launch_config(width)
    return Variant(
        kernel=rms_norm._rms_norm_kernel,
        name=f"{dtype}-width{width}",
        arguments={
            "x_ptr": f"*{dtype}",
            "weight_ptr": f"*{dtype}",
            "out_ptr": f"*{dtype}",
            "D": width,
            "stride_xm": width,
            "stride_om": width,
            "eps": "fp32",
        },
        constexprs={"BLOCK_D": block_d},
        options={"num_warps": num_warps, "enable_fp_fusion": True},
        min_wide_loads=min_wide_loads,
    )


# 0.5B, 7B and 72B, whose rows are the widest. A thread has 16 elements of each of x and weight.
VARIANTS = (
    _rms_norm_variant("bf16", 896, min_wide_loads=4),
    _rms_norm_variant("bf16", 3584, min_wide_loads=4),
    _rms_norm_variant("bf16", 8192, min_wide_loads=4),
    _rms_norm_variant("fp16", 3584, min_wide_loads=4),
    _rms_norm_variant("fp32", 3584, min_wide_loads=8),
)
