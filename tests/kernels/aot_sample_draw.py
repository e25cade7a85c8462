"""The specialisations of sample_weights and sample_draw compiled ahead of time."""

from typing import Any

from ovfast.kernels import sample_draw
from ovfast.kernels.decode_head import head_blocks
from tests.kernels.aot_sample_best import VOCAB_SIZES, options_of, score_arguments
from tests.support.aot import Variant


def _variant(
    kernel: Any, size: str, *, masks: bool = False, kept: bool = False, pdl: bool = False
) -> Variant:
    vocab_size = VOCAB_SIZES[size]
    draws = kernel is sample_draw._sample_draw_kernel
    num_maxima, num_sums = head_blocks(vocab_size), sample_draw.sample_blocks(vocab_size)
    flags = {"masks": masks, "kept": kept, "pdl": pdl}
    own = {"seed_ptr": "*i64", "drawn_ptr": "*i32", "counts_ptr": "*i64"}
    sums = {"NUM_SUMS": num_sums, "BLOCK_SUMS": sample_draw.power_of_2(num_sums)}
    return Variant(
        kernel=kernel,
        name="-".join([size, *(name for name, is_on in flags.items() if is_on)]),
        arguments={
            **score_arguments(masks=masks),
            **{f"{name}_ptr": "*fp32" for name in ("block_max", "temperature", "min_p")},
            "kept_ptr": "*i8" if kept else "*fp32",
            "sums_ptr": "*fp64",
            **(own if draws else {}),
        },
        constexprs={
            "V": vocab_size,
            "NUM_MAXIMA": num_maxima,
            "BLOCK_MAXIMA": sample_draw.power_of_2(num_maxima),
            **(sums if draws else {}),
            "BLOCK": sample_draw.SAMPLE_BLOCK,
            "MASKS": masks,
            "KEPT": kept,
            "USE_PDL": pdl,
        },
        options=options_of(pdl=pdl),
    )


VARIANTS = tuple(
    variant
    for kernel in (sample_draw._sample_weights_kernel, sample_draw._sample_draw_kernel)
    for variant in (
        _variant(kernel, "0.5b"),
        _variant(kernel, "0.5b", pdl=True),
        _variant(kernel, "0.5b", kept=True),
        _variant(kernel, "0.5b", masks=True),
        _variant(kernel, "0.5b", masks=True, kept=True),
        _variant(kernel, "0.5b", masks=True, kept=True, pdl=True),
        _variant(kernel, "7b"),
    )
)

# Programmatic dependent launch is of sm_90 and later.
SMS: dict[str, tuple[int, ...]] = {
    variant.name: (90, 100) if variant.name.endswith("pdl") else (80, 90, 100)
    for variant in VARIANTS
}
