"""The specialisations of sample_best compiled ahead of time."""

from typing import Any

from ovfast.kernels import sample_best
from ovfast.kernels.decode_head import HEAD_BLOCK, head_blocks
from tests.support.aot import Variant

VOCAB_SIZES = {"0.5b": 152000, "7b": 152128}


def score_arguments(*, masks: bool) -> dict[str, str | int]:
    """What every kernel over scores takes first; without masks the logits stand for them."""
    types = ("*fp32", "*i8", "*i8", "*i64", "*i64") if masks else ("*fp32",) * 5
    names = ("penalty", "seen", "is_stop", "counts", "min_new_tokens")
    of_masks = {f"{name}_ptr": kind for name, kind in zip(names, types, strict=True)}
    return {"logits_ptr": "*fp32", "forbidden_ptr": "*i8", **of_masks, "first_row": 5}


def options_of(*, pdl: bool) -> dict[str, Any]:
    return dict(sample_best.sample_options(pdl=pdl))


def _variant(size: str, *, masks: bool = False, pdl: bool = False) -> Variant:
    vocab_size = VOCAB_SIZES[size]
    return Variant(
        kernel=sample_best._sample_best_kernel,
        name=size + ("-masks" if masks else "") + ("-pdl" if pdl else ""),
        arguments={
            **score_arguments(masks=masks),
            "block_max_ptr": "*fp32",
            "block_argmax_ptr": "*i32",
        },
        constexprs={
            "V": vocab_size,
            "NUM_MAXIMA": head_blocks(vocab_size),
            "BLOCK": sample_best.SAMPLE_BLOCK,
            "HEAD_BLOCK": HEAD_BLOCK,
            "MASKS": masks,
            "USE_PDL": pdl,
        },
        options=options_of(pdl=pdl),
        min_wide_loads=1,
    )


VARIANTS = (
    _variant("0.5b"),
    _variant("0.5b", pdl=True),
    _variant("0.5b", masks=True),
    _variant("0.5b", masks=True, pdl=True),
    _variant("7b"),
)

# Programmatic dependent launch is of sm_90 and later.
SMS: dict[str, tuple[int, ...]] = {
    variant.name: (90, 100) if variant.name.endswith("pdl") else (80, 90, 100)
    for variant in VARIANTS
}
