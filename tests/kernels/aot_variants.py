"""The specialisations that the launchers ship, and the committed table of what they need."""

import json
from pathlib import Path
from types import ModuleType

from tests.kernels import (
    aot_attention,
    aot_causal_attention,
    aot_decode_attention,
    aot_decode_finish,
    aot_decode_head,
    aot_decode_mlp,
    aot_decode_out,
    aot_decode_qkv,
    aot_fused_linear,
    aot_layer_norm,
    aot_patch_embed,
    aot_place,
    aot_prefill_rope,
    aot_quantize_rows,
    aot_resize,
    aot_rms_norm,
    aot_sample_best,
    aot_sample_draw,
    aot_scaled_linear,
    aot_silu_mul,
)
from tests.support.aot import SMALL_NAME, SMALL_SM, Variant

TABLE_PATH = Path(__file__).with_name("aot_table.json")
# Each names the specialisations of one operation.
MODULES = (
    aot_attention,
    aot_causal_attention,
    aot_decode_attention,
    aot_decode_finish,
    aot_decode_head,
    aot_decode_mlp,
    aot_decode_out,
    aot_decode_qkv,
    aot_fused_linear,
    aot_layer_norm,
    aot_patch_embed,
    aot_place,
    aot_prefill_rope,
    aot_quantize_rows,
    aot_resize,
    aot_rms_norm,
    aot_sample_best,
    aot_sample_draw,
    aot_scaled_linear,
    aot_silu_mul,
)
DEFAULT_SM = 90
ALL_SM = (80, 90, 100)

# kernel → specialisation → "sm_90" → Triton "3.9" → Resources
Table = dict[str, dict[str, dict[str, dict[str, dict[str, int]]]]]


def read_table() -> Table:
    table: Table = json.loads(TABLE_PATH.read_text()) if TABLE_PATH.exists() else {}
    return table


VARIANTS = tuple(variant for module in MODULES for variant in module.VARIANTS)
# Mnemonics that the binaries for sm_90 must have besides those of every target.
SM90_INSTRUCTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    (variant.kernel_name, variant.name): module.SM90_INSTRUCTIONS[variant.name]
    for module in MODULES
    for variant in module.VARIANTS
    if variant.name in getattr(module, "SM90_INSTRUCTIONS", {})
}


def targets(module: ModuleType, variant: Variant) -> tuple[int, ...]:
    """For what a specialisation is compiled: those for little shared memory for one such device,
    and what a module names in SMS; programmatic dependent launch is for sm_90 and later alone.
    """
    if variant.name.endswith(SMALL_NAME):
        return (SMALL_SM,)
    own: dict[str, tuple[int, ...]] = getattr(module, "SMS", {})
    return own.get(variant.name, ALL_SM)


# (specialisation, target)
COMPILES = tuple(
    (variant, sm)
    for module in MODULES
    for variant in module.VARIANTS
    for sm in targets(module, variant)
)
