"""The specialisations of scaled_linear that are compiled ahead of time."""

from ovfast.kernels import scaled_linear
from tests.support.aot import Variant, small

# What is added, in whose place a head has float32 logits. Widths and depths of all models are
# multiples of 128, so one binary serves them.
KINDS = ("bias", "residual", "plain", "head")
WIDTH, DEPTH = 3584, 18944


def _variant(kind: str, tile: scaled_linear.Tile, dtype: str) -> Variant:
    out_dtype = "fp32" if kind == "head" else dtype
    arguments: dict[str, str | int] = {
        "x_ptr": "*fp8e4nv",
        "weight_ptr": "*fp8e4nv",
        "x_scales_ptr": "*fp32",
        "scales_ptr": "*fp32",
        "out_ptr": f"*{out_dtype}",
        "M": 4755,
        "N": WIDTH,
        "K": DEPTH,
        "stride_xm": DEPTH,
        "stride_wn": DEPTH,
        "stride_rm": WIDTH if kind == "residual" else 0,
        "stride_om": WIDTH,
    }
    without = {}
    for name in ("bias", "residual"):
        if kind == name:
            arguments[f"{name}_ptr"] = f"*{dtype}"
        else:
            without[f"{name}_ptr"] = None
    return Variant(
        kernel=scaled_linear._scaled_linear_kernel,
        name=f"{dtype}-{kind}-{tile.block_m}x{tile.block_n}",
        arguments=arguments,
        constexprs={
            **without,
            "EVEN_K": True,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": scaled_linear._BLOCK_K,
            "GROUP_M": scaled_linear._GROUP_M,
        },
        options={
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "enable_fp_fusion": True,
        },
    )


VARIANTS = (
    *(_variant(kind, tile, "bf16") for kind in KINDS for tile in scaled_linear._TILES),
    *(_variant(kind, scaled_linear._TILES[0], "fp16") for kind in KINDS),
    *(small(_variant("residual", tile, "bf16")) for tile in scaled_linear._TILES),
)
SM90_INSTRUCTIONS = {variant.name: ("QGMMA",) for variant in VARIANTS}
# Float8 is not of sm_80.
SMS: dict[str, tuple[int, ...]] = {variant.name: (90, 100) for variant in VARIANTS}
