"""The specialisations that the launchers ship, and the committed table of what they need."""

import json
from pathlib import Path

from ovfast.kernels import pool
from tests.support.aot import Variant

TABLE_PATH = Path(__file__).with_name("aot_table.json")
DEFAULT_SM = 90
ALL_SM = (80, 90, 100)

# kernel → specialisation → "sm_90" → Triton "3.9" → Resources
Table = dict[str, dict[str, dict[str, dict[str, dict[str, int]]]]]


def read_table() -> Table:
    table: Table = json.loads(TABLE_PATH.read_text()) if TABLE_PATH.exists() else {}
    return table


def _pool_variant(dtype: str, width: int) -> Variant:
    block_d, num_warps = pool.launch_config(width)
    aligned = width % 16 == 0
    return Variant(
        kernel=pool._pool_and_pack_kernel,
        name=f"{dtype}-block{block_d}" + ("" if aligned else "-unaligned"),
        arguments={
            "features_ptr": f"*{dtype}",
            "index_ptr": "*i32",
            "weight_ptr": "*fp32",
            "newline_ptr": f"*{dtype}",
            "out_ptr": f"*{dtype}",
            "D": width,
            "stride_fm": width,
            "stride_im": 4,
            "stride_wm": 4,
            "stride_om": width,
        },
        constexprs={"BLOCK_D": block_d},
        options={"num_warps": num_warps, "enable_fp_fusion": True},
        # Four taps and the newline, one load each in half precision and two in float32.
        min_wide_loads=(10 if dtype == "fp32" else 5) if aligned else 0,
    )


# 896: the block of every real language model; 256: the demo's; 41: no alignment to use.
VARIANTS = tuple(
    _pool_variant(dtype, width) for dtype in ("bf16", "fp16", "fp32") for width in (896, 256, 41)
)
