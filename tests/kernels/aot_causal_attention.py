"""The specialisations of causal attention that are compiled ahead of time."""

import torch

from ovfast.kernels import causal_attention
from ovfast.kernels.shared_memory import LARGE, SMALL
from tests.support.aot import SMALL_NAME, Variant

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _causal_attention_variant(
    dtype: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    min_wide_loads: int,
    *,
    small: bool = False,
) -> Variant:
    meta, options = causal_attention.launch_config(
        head_dim, _DTYPES[dtype], SMALL if small else LARGE
    )
    group = num_heads // num_kv_heads
    return Variant(
        kernel=causal_attention._causal_attention_kernel,
        name=f"{dtype}-group{group}-head{head_dim}" + SMALL_NAME * small,
        arguments={
            **{f"{name}_ptr": f"*{dtype}" for name in ("q", "k", "v", "out")},
            # Not specialised: nothing is known of them.
            "start": 41,
            "T": 41,
            "score_scale": "fp32",
            "stride_qm": num_heads * head_dim,
            "stride_qh": head_dim,
            "stride_kh": 32_768 * head_dim,
            "stride_kn": head_dim,
            "stride_vh": 32_768 * head_dim,
            "stride_vn": head_dim,
            "stride_om": num_heads * head_dim,
        },
        constexprs={"GROUP": group, **meta},
        options={**options, "enable_fp_fusion": True},
        # The queries; keys and values come by asynchronous copies.
        min_wide_loads=min_wide_loads,
        instructions=("LDGSTS.E.BYPASS.128",),
    )


# 0.5B, 7B and 72B.
VARIANTS = (
    _causal_attention_variant("bf16", 14, 2, 64, min_wide_loads=4),
    _causal_attention_variant("bf16", 28, 4, 128, min_wide_loads=8),
    _causal_attention_variant("bf16", 64, 8, 128, min_wide_loads=8),
    _causal_attention_variant("fp16", 28, 4, 128, min_wide_loads=8),
    _causal_attention_variant("fp32", 14, 2, 64, min_wide_loads=1),
    _causal_attention_variant("fp32", 28, 4, 128, min_wide_loads=2),
    _causal_attention_variant("bf16", 14, 2, 64, min_wide_loads=4, small=True),
    _causal_attention_variant("bf16", 28, 4, 128, min_wide_loads=8, small=True),
)

SM90_INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    variant.name: ("HGMMA",) for variant in VARIANTS if not variant.name.startswith("fp32")
}
