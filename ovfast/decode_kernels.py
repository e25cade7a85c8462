"""What a back end has to bring to decode rows of requests together."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["DecodeKernels"]


@dataclass(frozen=True, slots=True)
class DecodeKernels:
    """The launches of one decode step for up to 16 rows.

    `models.qwen2_rows` orders those up to the logits, `decode_rows` those that choose from them.

    Attributes:
        split: positions of a part of the context.
        supports: (head_dim) → whether the kernels take it.
        out_splits, down_splits: (hidden_size, in_features) → partial sums they write.
        head_blocks: (vocab_size) → blocks whose best ids `decode_head` reports.
        sample_blocks: (vocab_size) → blocks whose sums `sample_weights` reports.
    """

    split: int
    supports: Callable[[int], bool]
    out_splits: Callable[[int, int], int]
    down_splits: Callable[[int, int], int]
    head_blocks: Callable[[int], int]
    sample_blocks: Callable[[int], int]
    embed_rows: Callable[..., object]
    decode_qkv: Callable[..., object]
    decode_attention: Callable[..., object]
    decode_out: Callable[..., object]
    decode_gate_up: Callable[..., object]
    decode_down: Callable[..., object]
    decode_head: Callable[..., object]
    sample_best: Callable[..., object]
    sample_weights: Callable[..., object]
    sample_draw: Callable[..., object]
    decode_finish: Callable[..., object]
