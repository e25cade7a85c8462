"""The specialisations of project_and_place that the projectors of the models launch."""

from collections.abc import Iterator

import torch

from ovfast.kernels import place
from tests.support.aot import Variant

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _pool_variant(dtype: str, width: int) -> Variant:
    block_d, num_warps = place.pool_config(width)
    aligned = width % 16 == 0
    return Variant(
        kernel=place._pool_rows_kernel,
        name=f"{dtype}-block{block_d}" + ("" if aligned else "-unaligned"),
        arguments={
            "hidden_ptr": f"*{dtype}",
            "index_ptr": "*i32",
            "weight_ptr": "*fp32",
            "out_ptr": f"*{dtype}",
            "D": width,
            "stride_hm": width,
            "stride_im": 4,
            "stride_wm": 4,
            "stride_om": width,
        },
        constexprs={"BLOCK_D": block_d},
        options={"num_warps": num_warps, "enable_fp_fusion": True},
        # Four taps, one load each in half precision and two in float32.
        min_wide_loads=(8 if dtype == "fp32" else 4) if aligned else 0,
    )


def product_name(dtype: str, tile: place.Tile, *, pooled: bool) -> str:
    return f"{dtype}-{tile.block_m}x{tile.block_n}" + ("-pooled" if pooled else "")


def _variant(dtype: str, num_rows: int, width: int, *, pooled: bool) -> Variant:
    tile = place.launch_config(num_rows, width, DTYPES[dtype])
    return Variant(
        kernel=place._project_and_place_kernel,
        name=product_name(dtype, tile, pooled=pooled),
        arguments={
            "hidden_ptr": f"*{dtype}",
            "index_ptr": "*i32",
            "linear_weight_ptr": f"*{dtype}",
            "linear_bias_ptr": f"*{dtype}",
            "newline_ptr": f"*{dtype}",
            "token_ids_ptr": "*i32",
            "embed_tokens_ptr": f"*{dtype}",
            "out_ptr": f"*{dtype}",
            "R": 4725,  # not specialised, whatever it is
            "D": width,
            "stride_hm": width,
            "stride_im": 4,
            "stride_ln": width,
            "stride_em": width,
            "stride_om": width,
        },
        constexprs={
            "POOLED": pooled,
            "EVEN_D": width % tile.block_k == 0,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": place._GROUP_M,
        },
        # Asynchronous copies past L1, which are 128 bits wide or not made.
        instructions=("LDGSTS.E.BYPASS",),
        options={
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "enable_fp_fusion": True,
        },
    )


def _products() -> Iterator[Variant]:
    for dtype in DTYPES:
        for pooled in (False, True):
            for num_rows in ROWS:
                yield _variant(dtype, num_rows, 896, pooled=pooled)


# A picture of 1024 × 768, and the smallest. A width is not specialised but for being a multiple of
# 64, as those of the language models and the demo's are.
ROWS = (4725, 730)
PRODUCTS = tuple({variant.name: variant for variant in _products()}.values())
# 896: the block of every real language model; 41: no alignment to use.
POOLS = (
    *(_pool_variant(dtype, 896) for dtype in DTYPES),
    *(_pool_variant(dtype, 41) for dtype in ("bf16", "fp32")),
)
VARIANTS = (*PRODUCTS, *POOLS)

# wgmma; float32 has no tensor core that keeps its bits.
SM90_INSTRUCTIONS = {
    variant.name: ("HGMMA",) for variant in PRODUCTS if not variant.name.startswith("fp32")
}
