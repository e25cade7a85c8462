"""Shipped specialisations compile for GPUs that are not here, as lean as the committed table."""

from pathlib import Path

import pytest

from tests.support.interpreter import INTERPRETING

pytest.importorskip("triton", reason="needs triton")
if INTERPRETING:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from ovfast.kernels import fused_linear as fl
from ovfast.kernels import place
from ovfast.kernels.shared_memory import LARGE, SMALL
from ovfast.ops_triton import VIEWS_A_STEP
from tests.kernels import aot_fused_linear, aot_place
from tests.kernels.aot_variants import COMPILES, DEFAULT_SM, MODULES, SM90_INSTRUCTIONS, read_table
from tests.support.aot import (
    SMALL_SM,
    TRITON_MINOR,
    Variant,
    compile_variant,
    early_weight_reads,
)

# Shared memory that one block may have.
MAX_SHARED_BYTES = {80: 166_912, 89: SMALL, 90: LARGE, 100: LARGE}


# One specialisation of each operation, for one target, in the quick suite.
QUICK = [module.VARIANTS[0] for module in MODULES]


def _marks(variant: Variant, sm: int) -> list[pytest.MarkDecorator]:
    """The rest takes minutes: CI runs all of sm_90, and one of each operation for the others."""
    is_first = any(variant is quick for quick in QUICK)
    if sm == DEFAULT_SM:
        return [] if is_first else [pytest.mark.slow]
    if is_first or sm == SMALL_SM:
        return [pytest.mark.slow]
    return [pytest.mark.slow, pytest.mark.matrix]


PARAMS = [
    pytest.param(
        variant, sm, id=f"{variant.kernel_name}-{variant.name}-sm_{sm}", marks=_marks(variant, sm)
    )
    for variant, sm in COMPILES
]


@pytest.mark.parametrize(("variant", "sm"), PARAMS)
def test_resources(
    variant: Variant, sm: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compile here, not in an older run
    resources, sass = compile_variant(variant, sm)
    assert resources.stack_bytes == 0
    assert resources.spill_instructions == 0
    assert resources.shared_bytes <= MAX_SHARED_BYTES[sm]
    assert resources.wide_loads >= variant.min_wide_loads
    if "w_ptr" in variant.arguments and variant.constexprs["USE_PDL"]:
        assert resources.early_wide_loads, "no weights are asked for before the wait"
    if variant.kernel_name in (
        "_decode_qkv_kernel",
        "_decode_gate_up_kernel",
        "_decode_head_kernel",
    ):
        assert early_weight_reads(sass) == []
    own = SM90_INSTRUCTIONS.get((variant.kernel_name, variant.name), ()) if sm == 90 else ()
    for instruction in (*variant.instructions, *own):
        assert instruction in sass
    versions = read_table()[variant.kernel_name][variant.name][f"sm_{sm}"]
    if TRITON_MINOR in versions:
        assert resources.as_dict() == versions[TRITON_MINOR], "intended? then `make aot-table`"


# A tile changes with the count of 64 rows alone. The projector has any number of rows from one view
# on, a placed prompt from one pooled frame on.
@pytest.mark.parametrize("dtype", aot_fused_linear.DTYPES)
def test_every_tile_that_is_reached_is_in_the_table(dtype: str) -> None:
    torch_dtype, table = aot_fused_linear.DTYPES[dtype], read_table()
    tokens, widths = aot_fused_linear.TOKENS, aot_fused_linear.LAYERS["projector"].widths
    assert range(1, VIEWS_A_STEP + 1) == aot_fused_linear.VIEWS
    for name, layer in aot_fused_linear.LAYERS.items():
        rows = [num_views * tokens for num_views in aot_fused_linear.VIEWS]
        if layer.gather:
            rows = [tokens, *range(768, 2 * rows[-1], 64)]
        tiles = {fl.launch_config(m, n, torch_dtype) for m in rows for n in layer.widths}
        names = {aot_fused_linear.variant_name(dtype, name, tile) for tile in tiles}
        assert names <= table["_fused_linear_kernel"].keys()
    rows = [14 * 14 + 1, *range(256, 2 * 64 * tokens, 64)]
    tiles = {place.launch_config(m, n, torch_dtype) for m in rows for n in widths}
    for pooled in (False, True):
        names = {aot_place.product_name(dtype, tile, pooled=pooled) for tile in tiles}
        assert names <= table["_project_and_place_kernel"].keys()
    assert {f"{dtype}-block{place.pool_config(n)[0]}" for n in widths} <= table[
        "_pool_rows_kernel"
    ].keys()


def test_table_names_what_is_shipped() -> None:
    shipped = {(variant.kernel_name, variant.name, f"sm_{sm}") for variant, sm in COMPILES}
    listed = {
        (kernel, name, sm)
        for kernel, names in read_table().items()
        for name, targets in names.items()
        for sm in targets
    }
    assert listed == shipped
    assert len(shipped) == len(COMPILES), "two specialisations share a name"
