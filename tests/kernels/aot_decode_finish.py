"""The specialisations of decode_finish compiled ahead of time."""

from ovfast.kernels import decode_finish
from ovfast.kernels.decode_head import head_blocks
from tests.support.aot import Variant

VOCAB_SIZES = {"0.5b": 152000, "7b": 152128}


def _variant(size: str, *, random: bool = False, seen: bool = False, pdl: bool = False) -> Variant:
    num_blocks = head_blocks(VOCAB_SIZES[size])
    block, num_warps = decode_finish.finish_config(num_blocks)
    integers = ("block_argmax", "drawn", "slots", "positions", "tokens", "output")
    flags = {"random": random, "seen": seen, "pdl": pdl}
    return Variant(
        kernel=decode_finish._decode_finish_kernel,
        name="-".join([size, *(name for name, is_on in flags.items() if is_on)]),
        arguments={
            **{f"{name}_ptr": "*fp32" for name in ("block_max", "temperature")},
            **{f"{name}_ptr": "*i8" for name in ("is_stop", "seen")},
            **{f"{name}_ptr": "*i32" for name in integers},
            **{f"{name}_ptr": "*i64" for name in ("max_new_tokens", "counts")},
            "first_row": 5,
        },
        constexprs={
            "V": VOCAB_SIZES[size],
            "NUM_BLOCKS": num_blocks,
            "BLOCK": block,
            "RANDOM": random,
            "MARKS_SEEN": seen,
            "USE_PDL": pdl,
        },
        options={"num_warps": num_warps, "launch_pdl": pdl, "enable_fp_fusion": True},
    )


VARIANTS = (
    _variant("0.5b"),
    _variant("0.5b", pdl=True),
    _variant("0.5b", random=True, pdl=True),
    _variant("0.5b", random=True, seen=True),
    _variant("0.5b", random=True, seen=True, pdl=True),
    _variant("0.5b", seen=True),
    _variant("7b"),
)

# Programmatic dependent launch is of sm_90 and later.
SMS: dict[str, tuple[int, ...]] = {
    variant.name: (90, 100) if variant.name.endswith("pdl") else (80, 90, 100)
    for variant in VARIANTS
}
