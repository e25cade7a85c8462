"""The Qwen2 language model: prefill and decode of one request over a slot of the cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ovfast.config import TextConfig
from ovfast.kv_cache import KVCache
from ovfast.models.parameters import Loader
from ovfast.models.rope import rope_table
from ovfast.ops import Ops, PackedLinear
from ovfast.staging import to_device


@dataclass(frozen=True, slots=True)
class _Layer:
    input_layernorm: Tensor
    qkv_proj: PackedLinear
    o_proj: PackedLinear
    post_attention_layernorm: Tensor
    gate_up_proj: PackedLinear
    down_proj: PackedLinear


class Qwen2:
    """One request a call: its bits do not depend on what else the engine holds."""

    def __init__(self, config: TextConfig, loader: Loader) -> None:
        """Takes `language_model.*` and, if the head is not tied, `lm_head.weight`."""
        self.config = config
        self._ops: Ops = loader.ops
        self.dtype, self.device = loader.dtype, loader.device
        self.embedding = loader.embedding("language_model.embed_tokens")
        self.layers = [_load_layer(config, loader, index) for index in range(config.num_layers)]
        self.norm = loader.tensor("language_model.norm.weight")
        if "lm_head.weight" in loader.weights.names:
            self.lm_head = loader.output("lm_head")
        else:
            tie_head = loader.ops.tie_head
            self.lm_head = tie_head(self.embedding) if tie_head else self.embedding

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; config.json may name another number."""
        return int(self.embedding.weight.shape[0])

    def embed(self, input_ids: Tensor, out: Tensor | None = None) -> Tensor:
        """Text embeddings.

        Args:
            input_ids: (num_tokens,) int32 or int64 on the model's device.
            out: (num_tokens, hidden_size), written in place if given.
        """
        return self._ops.embed(self.embedding, input_ids, out)

    def chunks(self, start: int, num_tokens: int) -> list[range]:
        """Rows of inputs_embeds that are prefilled together, so that memory is bounded.

        A cut is at a multiple of `prefill_chunk`, wherever the prompt begins to be new, unless it
        would leave few rows on a side: they would read all weights for themselves, and a single one
        would be attended as a token that is decoded, which int8 weights make another arithmetic.

        Args:
            start: position of the first row.
            num_tokens: rows, at least one.
        """
        size = self._ops.prefill_chunk
        cuts = range(size - start % size, num_tokens, size)
        few = size // 8
        kept = [cut for cut in cuts if few <= cut <= num_tokens - few]
        return [range(*edges) for edges in pairwise([0, *kept, num_tokens])]

    def prefill(
        self,
        inputs_embeds: Tensor,
        cache: KVCache,
        slot: int,
        start: int = 0,
        positions_wanted: Sequence[int] | Tensor | None = None,
        poll: Callable[[], None] | None = None,
    ) -> Tensor:
        """Fills the cache with tokens and returns the logits of some of them.

        Args:
            inputs_embeds: (num_tokens, hidden_size).
            cache: written from `start` on.
            slot: of the cache; holds exactly `start` tokens.
            start: position of the first row.
            positions_wanted: rows of inputs_embeds, ascending; None means the last one.
            poll: called before each layer; may raise to give up, the slot then keeps its length.

        Returns:
            (rows wanted, vocab_size) float32.

        Raises:
            CapacityError: the slot is too short.
        """
        rows = self.prefill_hidden(inputs_embeds, cache, slot, start, positions_wanted, poll)
        return self.logits(rows)

    def prefill_hidden(
        self,
        inputs_embeds: Tensor,
        cache: KVCache,
        slot: int,
        start: int = 0,
        positions_wanted: Sequence[int] | Tensor | None = None,
        poll: Callable[[], None] | None = None,
    ) -> Tensor:
        """As `prefill`, but returns the rows for `logits`: (rows wanted, hidden_size)."""
        num_tokens = inputs_embeds.shape[0]
        wanted = _wanted_rows(positions_wanted, num_tokens)
        assert start == cache.lengths[slot]
        cache.check_room(slot, num_tokens)
        hidden_states = inputs_embeds.clone()
        rope = self._rope_table(start, start + num_tokens)
        for index in range(len(self.layers)):
            if poll is not None:
                poll()
            is_last = index == len(self.layers) - 1
            rows = wanted if is_last else range(num_tokens)
            hidden_states = self._run_layer(index, hidden_states, rope, cache, slot, rows)
        cache.lengths[slot] = start + num_tokens
        return hidden_states

    def branch_hidden(
        self,
        branches: Sequence[Tensor],
        cache: KVCache,
        slot: int,
    ) -> Tensor:
        """Runs several continuations of a slot side by side; each sees the slot and itself.

        They share one pass over the weights. In a layer each takes the positions behind the slot's
        in turn: no other layer needs them afterwards.

        Args:
            branches: embeddings (num_tokens, hidden_size) of each.
            cache: positions behind the slot's are overwritten; the slot keeps its length.
            slot: of the cache.

        Returns:
            Rows for `logits` of all branches, one after another: (rows, hidden_size).

        Raises:
            CapacityError: the slot is too short.
        """
        start, sizes = cache.lengths[slot], [len(branch) for branch in branches]
        cache.check_room(slot, max(sizes))
        hidden_states = torch.cat(list(branches))
        rope = self._rope_table(start, start + max(sizes))
        rows = range(len(hidden_states))
        for index in range(len(self.layers)):
            hidden_states = self._run_layer(index, hidden_states, rope, cache, slot, rows, sizes)
        return hidden_states

    def decode(self, token_id: int, cache: KVCache, slot: int) -> Tensor:
        """Appends one token to a slot and returns what may follow it.

        Args:
            token_id: the token, not yet in the cache.
            cache: extended by one position.
            slot: of the cache.

        Returns:
            (vocab_size,) float32 logits.

        Raises:
            CapacityError: the slot is full.
        """
        cache.check_room(slot, 1)
        position = cache.lengths[slot]
        hidden_states = self.embed(torch.tensor([token_id], dtype=torch.int32, device=self.device))
        rope = self._rope_table(position, position + 1)
        for index in range(len(self.layers)):
            hidden_states = self._run_layer(index, hidden_states, rope, cache, slot, range(1))
        cache.lengths[slot] = position + 1
        return self.logits(hidden_states)[0]

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Final norm and head: (rows, hidden_size) → (rows, vocab_size) float32."""
        x = self._ops.rms_norm(hidden_states, self.norm, self.config.rms_norm_eps)
        return self._ops.head(x, self.lm_head).float()

    def _rope_table(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        config = self.config
        return rope_table(start, stop, config.head_dim, config.rope_theta, self.dtype, self.device)

    def _run_layer(
        self,
        index: int,
        hidden_states: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache,
        slot: int,
        rows: Sequence[int],
        branches: Sequence[int] = (),
    ) -> Tensor:
        """One layer; writes keys and values of all rows, computes the rest for `rows` only.

        `branches`: sizes of continuations that stand one after another in hidden_states; then all
        rows are wanted.

        Returns the residual stream of `rows`; hidden_states is overwritten.
        """
        ops, layer, eps = self._ops, self.layers[index], self.config.rms_norm_eps
        x = ops.rms_norm(hidden_states, layer.input_layernorm, eps)
        qkv = ops.linear(x, layer.qkv_proj)
        start, layer_cache = cache.lengths[slot], cache.layer(index, slot)
        if branches:
            parts = torch.split(qkv, list(branches))
            attended = torch.cat(
                [self._attend(p, rope, layer_cache, start, range(len(p))) for p in parts]
            )
        else:
            attended = self._attend(qkv, rope, layer_cache, start, rows)
        if not rows:
            return hidden_states[:0].clone()  # a view would keep all rows
        if len(rows) < len(hidden_states):
            hidden_states = _take_rows(hidden_states, rows)
        ops.add_linear(attended, layer.o_proj, hidden_states)
        for first in range(0, len(rows), ops.mlp_rows):
            block = hidden_states[first : first + ops.mlp_rows]
            x = ops.rms_norm(block, layer.post_attention_layernorm, eps)
            ops.add_linear(ops.gate_up(x, layer.gate_up_proj), layer.down_proj, block)
        return hidden_states

    def _attend(
        self,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor],
        layer_cache: tuple[Tensor, Tensor],
        start: int,
        rows: Sequence[int],
    ) -> Tensor:
        ops, config, (k_cache, v_cache) = self._ops, self.config, layer_cache
        num_heads, num_kv_heads, num_tokens = config.num_heads, config.num_kv_heads, len(qkv)
        cos, sin = (table[:num_tokens] for table in rope)
        q = ops.rope_and_store(qkv, cos, sin, k_cache, v_cache, start, num_heads, num_kv_heads)
        if not rows:
            return q[:0].flatten(1)
        stop = start + num_tokens
        k, v = k_cache[:, :stop], v_cache[:, :stop]
        if len(rows) == 1 and rows[0] == num_tokens - 1:
            return ops.decode_attention(q[-1:], k, v)
        if len(rows) < num_tokens:
            return ops.causal_attention(q[list(rows)], k, v, [start + row for row in rows])
        return ops.causal_attention(q, k, v, range(start, stop))


def _take_rows(hidden_states: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of some rows: they are written to."""
    if isinstance(rows, range):
        return hidden_states[rows.start : rows.stop].clone()
    # A list as an index would be copied to the device as it is, which waits for all layers.
    index = torch.tensor(rows, dtype=torch.int64)
    return hidden_states.index_select(0, to_device(index, hidden_states.device))


def _wanted_rows(wanted: Sequence[int] | Tensor | None, num_tokens: int) -> Sequence[int]:
    if wanted is None:
        return range(num_tokens - 1, num_tokens)
    rows = [int(row) for row in (wanted.tolist() if isinstance(wanted, Tensor) else wanted)]
    assert all(0 <= row < num_tokens for row in rows)
    assert rows == sorted(set(rows))
    is_range = bool(rows) and rows[-1] - rows[0] == len(rows) - 1
    return range(rows[0], rows[-1] + 1) if is_range else rows


def _load_layer(config: TextConfig, loader: Loader, index: int) -> _Layer:
    prefix = f"language_model.layers.{index}"
    return _Layer(
        input_layernorm=loader.tensor(f"{prefix}.input_layernorm.weight"),
        qkv_proj=loader.qkv(f"{prefix}.qkv_proj", config.num_heads, config.num_kv_heads),
        o_proj=loader.output(f"{prefix}.o_proj"),
        post_attention_layernorm=loader.tensor(f"{prefix}.post_attention_layernorm.weight"),
        gate_up_proj=loader.gate_up(f"{prefix}.gate_up_proj"),
        down_proj=loader.output(f"{prefix}.down_proj"),
    )
