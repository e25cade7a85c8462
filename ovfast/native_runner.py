"""The decode runner of the CPU: one native call a step for all requests side by side.

The rules of sampling, stopping and failing are `EagerRunner`'s, which also makes a step that an
interrupt cut repeatable; only where logits come from differs. A request's bits do not depend on its
neighbours: the kernels promise that.
"""

import logging
from typing import Any

import numpy as np
import torch

from ovfast.kv_cache import KVCache
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.models.qwen2 import Qwen2
from ovfast.models.rope import rope_table
from ovfast.ops import Ops
from ovfast.runner import EagerRunner, SlotState
from ovfast.sampling import philox_uniform

__all__ = ["NativeRunner", "make_decoder"]

logger = logging.getLogger(__name__)
MAX_FLOAT32 = torch.finfo(torch.float32).max


def make_decoder(model: Qwen2, cache: KVCache, ops: Ops) -> Any:
    """The language model as `ovfast._C` decodes it: it holds the weights, not the cache.

    Args:
        model: packed by the native back end.
        cache: gives the number of positions.
        ops: of the native back end.
    """
    config = model.config
    cos, sin = rope_table(
        0,
        cache.max_positions,
        config.head_dim,
        config.rope_theta,
        torch.float32,
        torch.device("cpu"),
    )
    decoder = ops.native.Decoder(
        ops.pool,
        embedding=model.embedding.weight,
        norm=model.norm.numpy(),
        head=model.lm_head.weight,
        eps=config.rms_norm_eps,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        cos=cos.numpy(),
        sin=sin.numpy(),
    )
    for layer in model.layers:
        assert layer.qkv_proj.bias is not None
        decoder.add_layer(
            input_norm=layer.input_layernorm.numpy(),
            qkv=layer.qkv_proj.weight,
            qkv_bias=layer.qkv_proj.bias.numpy(),
            o=layer.o_proj.weight,
            post_norm=layer.post_attention_layernorm.numpy(),
            gate_up=layer.gate_up_proj.weight,
            down=layer.down_proj.weight,
        )
    return decoder


class NativeRunner(EagerRunner):
    """Decodes all admitted slots by one native call a step.

    Args:
        model: packed by the native back end.
        cache: whose slots are decoded.
        forbidden: (vocab_size,) bool, ids never generated.
        ops: of the native back end.
    """

    def __init__(
        self, model: LlavaOnevision, cache: KVCache, forbidden: torch.Tensor, ops: Ops
    ) -> None:
        super().__init__(model, cache, forbidden)
        self._native = ops.native
        self._decoder = make_decoder(model.language_model, cache, ops)
        self._k_cache, self._v_cache = cache.k_cache.numpy(), cache.v_cache.numpy()
        self._logits = torch.empty(cache.num_slots, model.vocab_size)
        self._forbidden_bytes = forbidden.numpy().view(np.uint8)
        self._greedy: dict[int, int] = {}

    def admit(self, slot: int, state: SlotState) -> None:
        self._greedy.pop(slot, None)
        super().admit(slot, state)

    def launch(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self._decode_together()
            self._step_all()

    def _decode_together(self) -> None:
        """Fills the logits of all slots that await them; can be repeated."""
        slots = []
        for slot, state in self._active.items():
            if state.is_over:
                continue
            if state.logits is not None:
                if slot in self._greedy:  # of a step that was cut: the next writes where they lie
                    state.logits = state.logits.clone()
                continue
            if state.num_prompt + state.num_tokens > self._cache.max_positions:
                continue  # `_step` reports that the slot is full
            slots.append(slot)
        if not slots:
            return
        states = [self._active[slot] for slot in slots]
        positions = [state.num_prompt + state.num_tokens - 1 for state in states]
        greedy = np.empty(len(slots), np.int32)
        try:
            self._decoder.step(
                self._k_cache,
                self._v_cache,
                np.array([state.last_token for state in states], np.int32),
                np.array(slots, np.int32),
                np.array(positions, np.int32),
                self._forbidden_bytes,
                self._logits.numpy(),
                greedy,
            )
        except Exception:
            # `_step` decodes each alone then: a request's failure is not its neighbours'.
            logger.warning("a joint decode step failed; going on one by one", exc_info=True)
            return
        for row, (slot, state, position, token) in enumerate(
            zip(slots, states, positions, greedy.tolist(), strict=True)
        ):
            self._cache.lengths[slot] = position + 1
            if state.seen is not None:
                state.seen[state.last_token] = True
            self._greedy[slot] = token
            state.logits = self._logits[row]

    def _sample(self, slot: int, state: SlotState, logits: torch.Tensor) -> int:
        token = self._greedy.pop(slot, -1)
        params = state.params
        is_early = state.num_tokens < params.min_new_tokens
        plain = params.is_greedy and params.repetition_penalty == 1.0
        if not plain or token < 0 or (is_early and token in state.stop_ids):
            token = self._sample_native(state, logits, is_early=is_early)
        # -1: not finite, or nothing allowed; the sampler says which.
        return token if token >= 0 else super()._sample(slot, state, logits)

    def _sample_native(self, state: SlotState, logits: torch.Tensor, *, is_early: bool) -> int:
        params = state.params
        token: int = self._native.sample(
            logits.numpy(),
            self._forbidden_bytes,
            None if state.seen is None else state.seen.numpy().view(np.uint8),
            np.array(sorted(state.stop_ids) if is_early else [], np.int32),
            min(params.repetition_penalty, MAX_FLOAT32),
            min(params.temperature, MAX_FLOAT32),
            min(params.top_k or len(logits), len(logits)),
            params.top_p,
            params.min_p,
            0.0 if params.is_greedy else philox_uniform(state.seed, state.num_tokens),
        )
        return token
