"""The specialisations of layer_norm that are compiled ahead of time."""

from ovfast.kernels import layer_norm
from tests.support.aot import Variant


def _layer_norm_variant(dtype: str, width: int, min_wide_loads: int) -> Variant:
    block_d, num_warps = layer_norm.launch_config(width)
    return Variant(
        kernel=layer_norm._layer_norm_kernel,
        name=f"{dtype}-block{block_d}" + ("" if width % 16 == 0 else "-unaligned"),
        arguments={
            "x_ptr": f"*{dtype}",
            "weight_ptr": f"*{dtype}",
            "bias_ptr": f"*{dtype}",
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


# 1152: the tower; 144: the demo; 8192: the widest; 41: no alignment to use. A thread has 16
# elements of each of x, weight and bias, and 8 at width 144.
VARIANTS = (
    _layer_norm_variant("bf16", 1152, min_wide_loads=6),
    _layer_norm_variant("fp16", 1152, min_wide_loads=6),
    _layer_norm_variant("fp32", 1152, min_wide_loads=12),
    _layer_norm_variant("bf16", 144, min_wide_loads=3),
    _layer_norm_variant("bf16", 8192, min_wide_loads=6),
    _layer_norm_variant("bf16", 41, min_wide_loads=0),
)
