"""The specialisations of rope_and_store that are compiled ahead of time."""

from ovfast.kernels import prefill_rope
from tests.support.aot import Variant


def _rope_and_store_variant(
    dtype: str, num_heads: int, num_kv_heads: int, head_dim: int, min_wide_loads: int
) -> Variant:
    meta, options = prefill_rope.launch_config(head_dim)
    return Variant(
        kernel=prefill_rope._rope_and_store_kernel,
        name=f"{dtype}-heads{num_heads}-head{head_dim}",
        arguments={
            **{f"{name}_ptr": f"*{dtype}" for name in ("qkv", "cos", "sin", "q", "k", "v")},
            # Not specialised: nothing is known of them.
            "start": 41,
            "T": 41,
            "stride_xm": (num_heads + 2 * num_kv_heads) * head_dim,
            "stride_cm": head_dim // 2,
            "stride_sm": head_dim // 2,
            "stride_qm": num_heads * head_dim,
            "stride_qh": head_dim,
            "stride_kh": 32_768 * head_dim,
            "stride_kn": head_dim,
            "stride_vh": 32_768 * head_dim,
            "stride_vn": head_dim,
        },
        constexprs={"NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, **meta},
        options={**options, "enable_fp_fusion": True},
        min_wide_loads=min_wide_loads,
        instructions=("STG.E.128",),  # the values
    )


# 0.5B, 7B and 72B. A thread has 16 elements of a head, and 8 of cos and of sin.
VARIANTS = (
    _rope_and_store_variant("bf16", 14, 2, 64, min_wide_loads=4),
    _rope_and_store_variant("bf16", 28, 4, 128, min_wide_loads=4),
    _rope_and_store_variant("bf16", 64, 8, 128, min_wide_loads=4),
    _rope_and_store_variant("fp16", 28, 4, 128, min_wide_loads=4),
    _rope_and_store_variant("fp32", 28, 4, 128, min_wide_loads=8),
)
