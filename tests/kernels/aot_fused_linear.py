"""The specialisations of fused_linear that the tower and the projector launch."""

import torch

from ovfast.kernels import fused_linear as fl
from tests.support.aot import Variant

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TOKENS = 729  # of a view


def _variant(
    name: str,
    shape: tuple[int, int, int],
    dtype: str = "bf16",
    *,
    activation: str | None = None,
    residual: bool = False,
    gather: bool = False,
    tile: fl.Tile | None = None,
) -> Variant:
    num_rows, width, depth = shape
    tile = tile or fl.launch_config(num_rows, width, _DTYPES[dtype])
    arguments: dict[str, str | int] = {
        "x_ptr": f"*{dtype}",
        "weight_ptr": f"*{dtype}",
        "bias_ptr": f"*{dtype}",
        "out_ptr": f"*{dtype}",
        "M": 729,  # not specialised, whatever it is
        "N": width,
        "K": depth,
        "stride_xm": depth,
        "stride_wn": depth,
        "stride_rm": width if residual else 0,
        "stride_om": width,
    }
    absent = {}
    for pointer, used, kind in (
        ("residual_ptr", residual, f"*{dtype}"),
        ("rows_ptr", gather, "*i32"),
    ):
        if used:
            arguments[pointer] = kind
        else:
            absent[pointer] = None
    return Variant(
        kernel=fl._fused_linear_kernel,
        name=f"{dtype}-{name}-{tile.block_m}x{tile.block_n}",
        arguments=arguments,
        constexprs={
            **absent,
            "ACTIVATION": activation,
            "EVEN_K": depth % tile.block_k == 0,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": fl._GROUP_M,
        },
        # Asynchronous copies past L1, which are 128 bits wide or not made.
        instructions=("LDGSTS.E.BYPASS",),
        options={
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "enable_fp_fusion": True,
        },
    )


def _tower_variants(num_views: int) -> tuple[Variant, ...]:
    m = num_views * _TOKENS
    return (
        _variant("qkv", (m, 3456, 1152)),
        _variant("out", (m, 1152, 1152), residual=True),
        _variant("fc1", (m, 4304, 1152), activation="gelu_tanh"),
        _variant("fc2", (m, 1152, 4304), residual=True),
    )


_ALL = (
    *_tower_variants(1),
    *_tower_variants(7),
    *_tower_variants(37),
    _variant("qkv", (2 * _TOKENS, 3456, 1152)),
    _variant("qkv", (10 * _TOKENS, 3456, 1152)),
    _variant("projector", (7 * _TOKENS, 896, 1152), activation="gelu_erf", gather=True),
    _variant("projector", (16 * _TOKENS, 896, 1152), activation="gelu_erf", gather=True),
    _variant("projector", (7 * _TOKENS, 3584, 1152), activation="gelu_erf", gather=True),
    _variant("demo", (_TOKENS, 192, 144), activation="gelu_erf", gather=True),
    _variant("fc2", (7 * _TOKENS, 1152, 4304), "fp16", residual=True),
    _variant("fc1", (7 * _TOKENS, 4304, 1152), "fp32", activation="gelu_tanh"),
    _variant("fc2", (7 * _TOKENS, 1152, 4304), "fp32", residual=True),
)
# Two counts of views may share a tile.
VARIANTS = tuple({variant.name: variant for variant in _ALL}.values())

# wgmma; float32 has no tensor core that keeps its bits.
SM90_INSTRUCTIONS = {
    variant.name: ("HGMMA",) for variant in VARIANTS if not variant.name.startswith("fp32")
}
