"""One decode step of Qwen2 for up to 16 rows by fused kernels: five launches a layer.

The activations live in buffers made once, so that a step can be captured. The residual stream is
float32 and passes between two buffers: the launch that reads one adds the partial sums of the last
projection and writes the other. Sums have one order, so a row's bits do not depend on its
neighbours. The kernels are `ops.decode`; what a step means is `decode_rows`.
"""

import torch
from torch import Tensor

from ovfast.decode_kernels import DecodeKernels
from ovfast.decode_rows import ROWS, RowState
from ovfast.kv_cache import KVCache
from ovfast.models.qwen2 import Qwen2
from ovfast.models.rope import rope_table

__all__ = ["Qwen2Rows"]


class Qwen2Rows:
    """A `RowDecoder` over the language model's own weights.

    Args:
        model: whose weights were packed by the operations that gave `kernels`.
        cache: whose slots the rows name.
        kernels: of the device.
    """

    def __init__(self, model: Qwen2, cache: KVCache, kernels: DecodeKernels) -> None:
        config, device = model.config, model.device
        self._model, self._cache, self._kernels = model, cache, kernels
        hidden, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim
        self._cos, self._sin = rope_table(
            0, cache.max_positions, head_dim, config.rope_theta, model.dtype, device
        )

        def wide(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        def narrow(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=model.dtype, device=device)

        max_splits = -(-cache.max_positions // kernels.split)
        self._max_splits = max_splits
        self._residuals = (wide(ROWS, hidden), wide(ROWS, hidden))
        self._q = narrow(ROWS, heads * head_dim)
        self._acc = wide(ROWS, heads, max_splits, head_dim)
        self._m, self._l = wide(ROWS, heads, max_splits), wide(ROWS, heads, max_splits)
        self._mlp = narrow(ROWS, config.intermediate_size)
        out_splits = kernels.out_splits(hidden, heads * head_dim)
        down_splits = kernels.down_splits(hidden, config.intermediate_size)
        self._out_partials = wide(out_splits, ROWS, hidden)
        self._down_partials = wide(down_splits, ROWS, hidden)

    def decode(self, rows: RowState, num_rows: int, num_splits: int) -> None:
        model, kernels, config = self._model, self._kernels, self._model.config
        num_splits = min(num_splits, self._max_splits)
        x, other = self._residuals
        partials: Tensor | None = None
        kernels.embed_rows(rows.tokens, model.embedding.weight, x)
        for index, layer in enumerate(model.layers):
            qkv, eps = layer.qkv_proj, config.rms_norm_eps
            k_cache, v_cache = self._cache.k_cache[index], self._cache.v_cache[index]
            kernels.decode_qkv(
                x,
                partials,
                other,
                layer.input_layernorm,
                eps,
                qkv.weight,
                qkv.bias,
                self._cos,
                self._sin,
                rows.slots,
                rows.positions,
                self._q,
                k_cache,
                v_cache,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                scales=qkv.scales,
                num_rows=num_rows,
            )
            x, other = other, x
            kernels.decode_attention(
                self._q.view(ROWS, config.num_heads, config.head_dim),
                k_cache,
                v_cache,
                rows.slots,
                rows.positions,
                self._acc,
                self._m,
                self._l,
                num_splits=num_splits,
                num_rows=num_rows,
            )
            kernels.decode_out(
                self._acc,
                self._m,
                self._l,
                rows.slots,
                rows.positions,
                layer.o_proj.weight,
                self._out_partials,
                scales=layer.o_proj.scales,
                dtype=model.dtype,
                num_rows=num_rows,
            )
            kernels.decode_gate_up(
                x,
                self._out_partials,
                other,
                layer.post_attention_layernorm,
                eps,
                layer.gate_up_proj.weight,
                self._mlp,
                scales=layer.gate_up_proj.scales,
                num_rows=num_rows,
            )
            x, other = other, x
            kernels.decode_down(
                self._mlp,
                layer.down_proj.weight,
                self._down_partials,
                scales=layer.down_proj.scales,
                num_rows=num_rows,
            )
            partials = self._down_partials
        kernels.decode_head(
            x,
            partials,
            model.norm,
            config.rms_norm_eps,
            model.lm_head.weight,
            rows.logits,
            rows.forbidden_bytes,
            rows.block_max,
            rows.block_argmax,
            scales=model.lm_head.scales,
            num_rows=num_rows,
        )
