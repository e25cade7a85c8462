"""The specialisations of decode attention that are compiled ahead of time."""

import torch

from ovfast.kernels import decode_attention
from ovfast.kernels.shared_memory import LARGE, SMALL
from tests.support.aot import SMALL_NAME, Variant

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MAX_SPLITS = 128  # 32 768 positions


def _decode_attention_variant(
    dtype: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    pdl: bool,
    min_wide_loads: int,
    *,
    small: bool = False,
) -> Variant:
    group = num_heads // num_kv_heads
    meta, options = decode_attention.launch_config(
        head_dim, group, _DTYPES[dtype], SMALL if small else LARGE
    )
    head = _MAX_SPLITS * decode_attention.SPLIT * head_dim
    strides = {
        "qm": num_heads * head_dim, "qh": head_dim,
        "kb": num_kv_heads * head, "kh": head, "kn": head_dim,
        "vb": num_kv_heads * head, "vh": head, "vn": head_dim,
        "am": num_heads * _MAX_SPLITS * head_dim, "ah": _MAX_SPLITS * head_dim, "as": head_dim,
        "mm": num_heads * _MAX_SPLITS, "mh": _MAX_SPLITS, "ms": 1,
        "lm": num_heads * _MAX_SPLITS, "lh": _MAX_SPLITS, "ls": 1,
    }  # fmt: skip
    return Variant(
        kernel=decode_attention._decode_attention_kernel,
        name=f"{dtype}-group{group}-head{head_dim}" + ("-pdl" if pdl else "") + SMALL_NAME * small,
        arguments={
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}"),
            **dict.fromkeys(("slots_ptr", "positions_ptr"), "*i32"),
            **dict.fromkeys(("acc_ptr", "m_ptr", "l_ptr"), "*fp32"),
            "score_scale": "fp32",
            **{f"stride_{name}": stride for name, stride in strides.items()},
        },
        constexprs={**meta, "USE_PDL": pdl},
        options={**options, "launch_pdl": pdl, "enable_fp_fusion": True},
        # The queries; keys and values come by asynchronous copies.
        min_wide_loads=min_wide_loads,
        instructions=("LDGSTS.E.BYPASS.128",),
    )


# 0.5B, 7B and 72B: heads of 64 and groups of 7, heads of 128 and groups of 7 and 8.
VARIANTS = (
    _decode_attention_variant("bf16", 14, 2, 64, True, min_wide_loads=1),
    _decode_attention_variant("bf16", 28, 4, 128, True, min_wide_loads=1),
    _decode_attention_variant("bf16", 64, 8, 128, True, min_wide_loads=1),
    _decode_attention_variant("bf16", 14, 2, 64, False, min_wide_loads=1),
    _decode_attention_variant("bf16", 28, 4, 128, False, min_wide_loads=1),
    _decode_attention_variant("fp16", 28, 4, 128, False, min_wide_loads=1),
    _decode_attention_variant("fp32", 14, 2, 64, False, min_wide_loads=1),
    _decode_attention_variant("fp32", 28, 4, 128, False, min_wide_loads=1),
    _decode_attention_variant("bf16", 14, 2, 64, False, min_wide_loads=1, small=True),
    _decode_attention_variant("bf16", 28, 4, 128, False, min_wide_loads=1, small=True),
)

# griddepcontrol is an instruction of sm_90.
SMS: dict[str, tuple[int, ...]] = {
    variant.name: (90, 100) for variant in VARIANTS if variant.options.get("launch_pdl")
}
