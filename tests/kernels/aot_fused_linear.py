"""The specialisations of fused_linear that the tower and the projector launch."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ovfast.kernels import fused_linear as fl
from ovfast.kernels.shared_memory import LARGE, SMALL
from tests.support.aot import SMALL_NAME, Variant

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = 729  # of a view
VIEWS = range(1, 65)  # encoded at once


class Layer(NamedTuple):
    """What a layer of SigLIP, or the projector's first, asks for."""

    widths: tuple[int, ...]
    depth: int
    activation: str | None = None
    residual: bool = False
    gather: bool = False


LAYERS = {
    "qkv": Layer((3456,), 1152),
    "out": Layer((1152,), 1152, residual=True),
    "fc1": Layer((4304,), 1152, activation="gelu_tanh"),
    "fc2": Layer((1152,), 4304, residual=True),
    # Of the three language models. A width is not specialised but for being a multiple of 16.
    "projector": Layer((896, 3584, 8192), 1152, activation="gelu_erf", gather=True),
}
_DEMO = Layer((192,), 144, activation="gelu_erf", gather=True)


def variant_name(dtype: str, layer: str, tile: fl.Tile) -> str:
    return f"{dtype}-{layer}-{tile.block_m}x{tile.block_n}"


def _variant(
    name: str, layer: Layer, num_rows: int, width: int, dtype: str, *, small: bool = False
) -> Variant:
    tile = fl.launch_config(num_rows, width, DTYPES[dtype], SMALL if small else LARGE)
    depth = layer.depth
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
        "stride_rm": width if layer.residual else 0,
        "stride_om": width,
    }
    absent = {}
    for pointer, used, kind in (
        ("residual_ptr", layer.residual, f"*{dtype}"),
        ("rows_ptr", layer.gather, "*i32"),
    ):
        if used:
            arguments[pointer] = kind
        else:
            absent[pointer] = None
    return Variant(
        kernel=fl._fused_linear_kernel,
        name=variant_name(dtype, name, tile) + SMALL_NAME * small,
        arguments=arguments,
        constexprs={
            **absent,
            "ACTIVATION": layer.activation,
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


def _all() -> Iterator[Variant]:
    for dtype in DTYPES:
        for name, layer in LAYERS.items():
            for width in layer.widths:
                for num_views in VIEWS:
                    yield _variant(name, layer, num_views * TOKENS, width, dtype)
    yield _variant("demo", _DEMO, TOKENS, *_DEMO.widths, "bf16")
    for name, layer in LAYERS.items():
        for num_views in VIEWS:
            yield _variant(name, layer, num_views * TOKENS, layer.widths[0], "bf16", small=True)


# Counts of views, and widths, share tiles.
VARIANTS = tuple({variant.name: variant for variant in _all()}.values())

# wgmma; float32 has no tensor core that keeps its bits.
SM90_INSTRUCTIONS = {
    variant.name: ("HGMMA",) for variant in VARIANTS if not variant.name.startswith("fp32")
}
