"""The specialisations of resample that ship."""

from ovfast.kernels import resize
from tests.support.aot import Variant

ANY = 7  # for a size that the kernel is not specialised on: neither 1 nor a multiple of 16


def _variant(axis: int, row_bytes: int, suffix: str = "") -> Variant:
    block_y, block_x, num_warps = resize.launch_config(axis)
    kernel = resize._resample_vertical_kernel if axis == 0 else resize._resample_horizontal_kernel
    lengths = ("H", "M") if axis == 0 else ("W",)
    sizes = (*lengths, "R", "T", "offset", "fill", "stride_cm", "stride_ct")
    return Variant(
        kernel=kernel,
        name=f"block{block_y}x{block_x}{suffix}",
        arguments={
            "source_ptr": "*u8",
            "first_ptr": "*i32",
            "coefficients_ptr": "*i32",
            "out_ptr": "*u8",
            **dict.fromkeys(sizes, ANY),
            **dict.fromkeys(("N", "stride_sy", "stride_oy"), row_bytes),
        },
        constexprs={"BLOCK_Y": block_y, "BLOCK_X": block_x},
        options={"num_warps": num_warps, "enable_fp_fusion": True},
    )


# The horizontal pass reads single bytes whatever the width; the vertical one words where rows of
# a view of 384 pixels are aligned.
VARIANTS = (_variant(1, ANY), _variant(0, 3 * 384), _variant(0, ANY, "-unaligned"))
