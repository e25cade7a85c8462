"""The specialisations of quantize_rows that are compiled ahead of time."""

from ovfast.kernels import quantize_rows
from tests.support.aot import Variant, small

WIDTHS = {"0.5b": 896, "0.5b-mlp": 4864, "7b": 3584, "7b-mlp": 18944, "72b": 8192, "72b-mlp": 29568}


def _variant(dtype: str, size: str) -> Variant:
    width = WIDTHS[size]
    block_d, num_warps = quantize_rows.launch_config(width)
    return Variant(
        kernel=quantize_rows._quantize_rows_kernel,
        name=f"{dtype}-{size}",
        arguments={
            "x_ptr": f"*{dtype}",
            "out_ptr": "*fp8e4nv",
            "scales_ptr": "*fp32",
            "D": width,
            "stride_xm": width,
            "stride_om": width,
        },
        constexprs={"BLOCK_D": block_d},
        options={"num_warps": num_warps, "enable_fp_fusion": True},
        min_wide_loads=2,
    )


VARIANTS = (
    *(_variant("bf16", size) for size in WIDTHS),
    _variant("fp16", "0.5b-mlp"),
    small(_variant("bf16", "7b-mlp")),
)
# Float8 is not of sm_80.
SMS: dict[str, tuple[int, ...]] = {variant.name: (90, 100) for variant in VARIANTS}
