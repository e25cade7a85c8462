"""Every operation of `Ops` at the shapes a model gives it, with the work that it must do.

Owns shapes and counts; who times them is `kernels` and the repository's pytest-benchmark suite. The
tower's rows are one view, the language model's a block of a prefill or one decoded token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovfast.anyres import VisualOptions, VisualPlan, plan_image
from ovfast.config import ModelConfig
from ovfast.models.rope import rope_table
from ovfast.models.visual_rows import row_table
from ovfast.ops import Ops, PackedLinear, RowTable
from ovfast.pixels import view_pixels
from ovfast.reference_pixels import patch_offset
from ovfast.resize_table import resize_table
from ovfast.storage import bytes_per_param

__all__ = ["Bench", "OpCase", "op_cases"]

BLOCK = 1024  # rows of a prefill's MLP
CONTEXT = 3000
PICTURE_HW = (768, 1024)
Work = Callable[[], Any]


@dataclass(slots=True)
class Bench:
    """One back end with random inputs.

    Args:
        ops: of the back end.
        config: sizes.
        dtype: of activations.
        device: of everything.
        storage: of weights.
    """

    ops: Ops
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    storage: str
    _packed: dict[str, Any] = field(default_factory=dict)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def linear(self, rows: int, cols: int, *, bias: bool = False) -> PackedLinear:
        """A packed layer."""
        added = self.random(rows) if bias else None
        return self.ops.pack_linear(self._weight(rows, cols), added)

    def gate_up(self) -> PackedLinear:
        text = self.config.text
        return self.ops.pack_gate_up(self._weight(2 * text.intermediate_size, text.hidden_size))

    def qkv(self) -> PackedLinear:
        text = self.config.text
        rows = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
        weight, bias = self._weight(rows, text.hidden_size), self.random(rows)
        return self.ops.pack_qkv(weight, bias, text.num_heads, text.num_kv_heads)

    def embedding(self) -> PackedLinear:
        """Made once: it is the largest."""
        if "embedding" not in self._packed:
            text = self.config.text
            weight = self._weight(text.vocab_size, text.hidden_size)
            self._packed["embedding"] = self.ops.pack_embedding(weight)
        packed: PackedLinear = self._packed["embedding"]
        return packed

    def _weight(self, rows: int, cols: int) -> Tensor:
        # The native back end packs what a checkpoint has; others compute in the type given.
        dtype = torch.bfloat16 if self.ops.storage else self.dtype
        values = self.random(rows, cols, dtype=torch.float32).mul_(cols**-0.5)
        return values.to(dtype)


@dataclass(frozen=True, slots=True)
class OpCase:
    """One operation at one shape.

    Attributes:
        name: of the case.
        operation: of `Ops`.
        make: inputs, and the work to be timed.
        flops: 2 a multiply-add.
        weights: parameters that must be read.
        elements: of activations read and written.
        num_bytes: of integers read and written.
    """

    name: str
    operation: str
    make: Callable[[Bench], Work]
    flops: float = 0.0
    weights: int = 0
    elements: int = 0
    num_bytes: int = 0

    def moved_bytes(self, bench: Bench) -> float:
        """What must be read or written, on a back end."""
        activations = self.elements * bench.dtype.itemsize
        return self.weights * bytes_per_param(bench.storage) + activations + self.num_bytes


def op_cases(config: ModelConfig) -> list[OpCase]:
    """All cases of a model's sizes."""
    return [*_pixel_cases(config), *_tower_cases(config), *_text_cases(config)]


def _pixel_cases(config: ModelConfig) -> list[OpCase]:
    side, (height, width) = config.vision.image_size, PICTURE_HW

    def resample(bench: Bench) -> Work:
        source = _pixels(height, width).to(bench.device)
        table = resize_table(height, side)
        first, coefficients = (
            torch.from_numpy(array).to(bench.device) for array in (table.first, table.coefficients)
        )
        out = torch.empty((side, width, 3), dtype=torch.uint8, device=bench.device)
        return lambda: bench.ops.resample(source, first, coefficients, 0, out)

    def pack_views(bench: Bench) -> Work:
        source = _pixels(2 * side, 2 * side).numpy()
        out = np.empty((4, side, side, 3), np.uint8)
        return lambda: bench.ops.pack_views(source, (0, 0), (2, 2), 0, out)

    moved = 3 * width * (height + side)
    return [
        OpCase(f"resample {height} to {side} rows", "resample", resample, num_bytes=moved),
        OpCase("pack_views, 4 views", "pack_views", pack_views, num_bytes=2 * 4 * 3 * side * side),
    ]


def _tower_cases(config: ModelConfig) -> list[OpCase]:
    vision = config.vision
    rows, width, wide = vision.tokens_per_view, vision.hidden_size, vision.intermediate_size

    def norm(bench: Bench) -> Work:
        x, gain, shift = bench.random(rows, width), bench.random(width), bench.random(width)
        return lambda: bench.ops.layer_norm(x, gain, shift, vision.layer_norm_eps)

    def attention(bench: Bench) -> Work:
        qkv = bench.random(rows, 3 * width)
        return lambda: bench.ops.view_attention(qkv, vision.num_heads, rows)

    def embed(bench: Bench) -> Work:
        kept = bench.dtype if not bench.ops.storage else torch.bfloat16
        weight = bench.random(width, vision.patch_dim, dtype=kept)
        offset = patch_offset(weight, bench.random(width), bench.random(rows, width))
        packed = bench.ops.pack_patch(weight)
        side = vision.image_size
        views = view_pixels(_pixels(side, side).numpy()[None], bench.device)
        return lambda: bench.ops.patch_embed(
            views.buffer, views.windows, packed, offset, side, bench.dtype
        )

    def fused(n: int, k: int, activation: str | None, has_residual: bool) -> Any:
        def make(bench: Bench) -> Work:
            x, packed = bench.random(rows, k), bench.linear(n, k, bias=True)
            residual = bench.random(rows, n) if has_residual else None
            return lambda: bench.ops.fused_linear(
                x, packed, activation=activation, residual=residual
            )

        return make

    def fused_case(name: str, n: int, k: int, activation: str | None, residual: bool) -> OpCase:
        return OpCase(
            f"fused_linear {name}, a view",
            "fused_linear",
            fused(n, k, activation, residual),
            flops=2.0 * rows * n * k,
            weights=n * k,
            elements=rows * (n + k + residual * n),
        )

    return [
        OpCase(
            "patch_embed, a view",
            "patch_embed",
            embed,
            flops=2.0 * rows * vision.patch_dim * width,
            weights=vision.patch_dim * width,
            elements=2 * rows * width,
        ),
        OpCase("layer_norm, a view", "layer_norm", norm, elements=2 * rows * width),
        fused_case("qkv", 3 * width, width, None, False),
        OpCase(
            "view_attention, a view",
            "view_attention",
            attention,
            flops=4.0 * rows * rows * width,
            elements=4 * rows * width,
        ),
        fused_case("out", width, width, None, True),
        fused_case("fc1", wide, width, "gelu_tanh", False),
        fused_case("fc2", width, wide, None, True),
        _place_case(config),
    ]


def _place_case(config: ModelConfig) -> OpCase:
    """The projector over a picture of one crop."""
    vision, text = config.vision, config.text
    plan = plan_image(PICTURE_HW, config.geometry, VisualOptions(max_views=1), num_images=1)

    def make(bench: Bench) -> Work:
        features = bench.random(vision.tokens_per_view, vision.hidden_size)
        layers = (
            bench.linear(text.hidden_size, vision.hidden_size, bias=True),
            bench.linear(text.hidden_size, text.hidden_size, bias=True),
        )
        newline, table = bench.random(text.hidden_size), _row_table(plan, bench.device)
        ids = torch.zeros(plan.num_tokens, dtype=torch.int32, device=bench.device)
        out = bench.random(plan.num_tokens, text.hidden_size)
        return lambda: bench.ops.project_and_pack(
            features, table, *layers, newline, ids, bench.embedding(), out
        )

    rows = vision.tokens_per_view
    weights = text.hidden_size * (vision.hidden_size + text.hidden_size)
    return OpCase(
        "project_and_pack, a view",
        "project_and_pack",
        make,
        flops=2.0 * rows * weights,
        weights=weights,
        elements=rows * (vision.hidden_size + text.hidden_size),
    )


def _text_cases(config: ModelConfig) -> list[OpCase]:
    return [
        *(case for rows in (BLOCK, 1) for case in _layer_cases(config, rows)),
        *_attention_cases(config),
        *_vocabulary_cases(config),
    ]


def _layer_cases(config: ModelConfig, rows: int) -> list[OpCase]:
    """A layer's operations, for a block of a prefill or one decoded token."""
    text = config.text
    width, wide = text.hidden_size, text.intermediate_size
    q_size = text.num_heads * text.head_dim
    qkv_size = q_size + 2 * text.num_kv_heads * text.head_dim

    def norm(bench: Bench) -> Work:
        x, gain = bench.random(rows, width), bench.random(width)
        return lambda: bench.ops.rms_norm(x, gain, text.rms_norm_eps)

    def qkv(bench: Bench) -> Work:
        x, packed = bench.random(rows, width), bench.qkv()
        return lambda: bench.ops.linear(x, packed)

    def rope(bench: Bench) -> Work:
        qkv, shape = bench.random(rows, qkv_size), (text.num_kv_heads, rows, text.head_dim)
        cos, sin = rope_table(0, rows, text.head_dim, text.rope_theta, bench.dtype, bench.device)
        caches = bench.random(*shape), bench.random(*shape)
        heads = text.num_heads, text.num_kv_heads
        return lambda: bench.ops.rope_and_store(qkv, cos, sin, *caches, 0, *heads)

    def added(n: int, k: int) -> Any:
        def make(bench: Bench) -> Work:
            x, packed, out = bench.random(rows, k), bench.linear(n, k), bench.random(rows, n)
            return lambda: bench.ops.add_linear(x, packed, out)

        return make

    def gate_up(bench: Bench) -> Work:
        x, packed = bench.random(rows, width), bench.gate_up()
        return lambda: bench.ops.gate_up(x, packed)

    where = f"{rows} rows" if rows > 1 else "a row"

    def product(name: str, operation: str, make: Any, n: int, k: int, out: int) -> OpCase:
        return OpCase(
            f"{name}, {where}",
            operation,
            make,
            flops=2.0 * rows * n * k,
            weights=n * k,
            elements=rows * (k + out),
        )

    return [
        OpCase(f"rms_norm, {where}", "rms_norm", norm, elements=2 * rows * width),
        product("linear qkv", "linear", qkv, qkv_size, width, qkv_size),
        OpCase(f"rope_and_store, {where}", "rope_and_store", rope, elements=2 * rows * qkv_size),
        product("add_linear o", "add_linear", added(width, q_size), width, q_size, 2 * width),
        product("gate_up", "gate_up", gate_up, 2 * wide, width, wide),
        product("add_linear down", "add_linear", added(width, wide), width, wide, 2 * width),
    ]


def _attention_cases(config: ModelConfig) -> list[OpCase]:
    text = config.text
    q_size = text.num_heads * text.head_dim
    cache_shape = (text.num_kv_heads, CONTEXT, text.head_dim)
    kept = 2 * CONTEXT * text.num_kv_heads * text.head_dim

    def causal(bench: Bench) -> Work:
        q = bench.random(BLOCK, text.num_heads, text.head_dim)
        shape = (text.num_kv_heads, BLOCK, text.head_dim)
        k, v = bench.random(*shape), bench.random(*shape)
        return lambda: bench.ops.causal_attention(q, k, v, range(BLOCK))

    def decode(bench: Bench) -> Work:
        q = bench.random(1, text.num_heads, text.head_dim)
        k, v = bench.random(*cache_shape), bench.random(*cache_shape)
        return lambda: bench.ops.decode_attention(q, k, v)

    return [
        OpCase(
            f"causal_attention, {BLOCK} rows",
            "causal_attention",
            causal,
            flops=2.0 * BLOCK * BLOCK * q_size,
            elements=2 * BLOCK * (q_size + text.num_kv_heads * text.head_dim),
        ),
        OpCase(
            f"decode_attention at {CONTEXT}",
            "decode_attention",
            decode,
            flops=4.0 * CONTEXT * q_size,
            elements=kept + 2 * q_size,
        ),
    ]


def _vocabulary_cases(config: ModelConfig) -> list[OpCase]:
    width, words = config.text.hidden_size, config.text.vocab_size

    def embed(bench: Bench) -> Work:
        ids = torch.randint(0, words, (BLOCK,), dtype=torch.int32, device=bench.device)
        embedding = bench.embedding()
        return lambda: bench.ops.embed(embedding, ids, None)

    def head(bench: Bench) -> Work:
        x, packed = bench.random(1, width), bench.embedding()
        return lambda: bench.ops.head(x, packed)

    return [
        OpCase(
            f"embed, {BLOCK} rows", "embed", embed, weights=BLOCK * width, elements=BLOCK * width
        ),
        OpCase(
            "head, a row",
            "head",
            head,
            flops=2.0 * words * width,
            weights=words * width,
            elements=words + width,
        ),
    ]


def _row_table(plan: VisualPlan, device: torch.device) -> RowTable:
    table = row_table(plan.num_tokens, ((0, 0, plan.table),))
    sources, index, weight = (
        torch.from_numpy(array).to(device)
        for array in (table.source_rows, table.index, table.weight)
    )
    return RowTable(sources, index, weight, has_pooled=table.has_pooled)


def _pixels(height: int, width: int) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (height, width, 3), np.uint8))
