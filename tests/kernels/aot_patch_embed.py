"""The specialisations of patch_embed that ship, at real sizes."""

import torch

from ovfast.kernels import patch_embed
from tests.support.aot import Variant

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _variant(dtype: str, image_size: int, hidden_size: int) -> Variant:
    patch, row = 14, 64
    block_m, block_n, num_warps, num_stages = patch_embed.launch_config(_DTYPES[dtype])
    return Variant(
        kernel=patch_embed._patch_embed_kernel,
        name=f"{dtype}-{image_size}px-{hidden_size}",
        arguments={
            "pixels_ptr": "*u8",
            "windows_ptr": "*i64",
            "weight_ptr": f"*{dtype}",
            "offset_ptr": "*fp32",
            "out_ptr": f"*{dtype}",
            "N": hidden_size,
            "stride_wn": patch * row,
            "stride_vm": hidden_size,
            "stride_om": hidden_size,
        },
        constexprs={
            "SIDE": image_size // patch,
            "PATCH": patch,
            "ROW": row,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
        min_wide_loads=2,  # of offset
        instructions=("LDGSTS.E.BYPASS.128",),  # of the weight, ahead of its use
    )


# The real tower in every dtype, and the demo's.
VARIANTS = (
    *(_variant(dtype, 384, 1152) for dtype in ("bf16", "fp16", "fp32")),
    _variant("bf16", 56, 144),
)
SM90_INSTRUCTIONS = {
    variant.name: ("HGMMA",) for variant in VARIANTS if not variant.name.startswith("fp32")
}
