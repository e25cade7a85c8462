"""LLaVA-OneVision: tower, projector and language model over one request's inputs.

Owns the order of stages and the input buffer; each stage is a method of its own, so that a caller
can time it, stop between two, or run stages of several requests in turn. Knows no prompts, no
sampling and no requests beyond the one of a call.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovfast.anyres import VisualPlan
from ovfast.config import ModelConfig
from ovfast.kv_cache import KVCache
from ovfast.models.parameters import Loader, Weights
from ovfast.models.projector import Projector
from ovfast.models.qwen2 import Qwen2
from ovfast.models.siglip import SiglipTower
from ovfast.ops import Ops


class Span(Protocol):
    """Positions start…end of input_ids that hold the tokens of one picture or video."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def plan_index(self) -> int: ...


class Inputs(Protocol):
    """What the model reads of a prepared request; views stand in the order of the plans."""

    @property
    def input_ids(self) -> NDArray[np.int64]: ...
    @property
    def spans(self) -> Sequence[Span]: ...
    @property
    def plans(self) -> Sequence[VisualPlan]: ...
    @property
    def views(self) -> NDArray[np.uint8]: ...


class LlavaOnevision:
    """The whole model on one device."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Takes all parameters.

        Args:
            config: of the checkpoint.
            weights: gives each tensor once, by its canonical name.
            ops: of the device.
            dtype: of weights, activations and keys.
            device: of the model.
        """
        self.config, self.dtype, self.device = config, dtype, device
        loader = Loader(weights, ops, dtype, device)
        self.vision_tower = SiglipTower(config.vision, loader)
        self.multi_modal_projector = Projector(loader)
        self.language_model = Qwen2(config.text, loader)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.language_model.vocab_size

    def new_cache(self, *, num_slots: int, max_positions: int) -> KVCache:
        """A cache for this model."""
        return KVCache(
            self.config.text,
            num_slots=num_slots,
            max_positions=max_positions,
            dtype=self.dtype,
            device=self.device,
        )

    def embed_text(self, inputs: Inputs) -> Tensor:
        """The input buffer with the text rows filled in.

        Args:
            inputs: a prepared request.

        Returns:
            inputs_embeds (num_tokens, hidden_size); the rows of its spans are not initialised.
        """
        input_ids = torch.from_numpy(inputs.input_ids).to(self.device)
        shape = (len(input_ids), self.config.text.hidden_size)
        inputs_embeds = torch.empty(shape, dtype=self.dtype, device=self.device)
        position = 0
        for span in sorted(inputs.spans, key=lambda span: span.start):
            self._embed_rows(input_ids, inputs_embeds, position, span.start)
            position = span.end
        self._embed_rows(input_ids, inputs_embeds, position, len(input_ids))
        return inputs_embeds

    def _embed_rows(self, input_ids: Tensor, inputs_embeds: Tensor, start: int, stop: int) -> None:
        if start < stop:
            self.language_model.embed(input_ids[start:stop], out=inputs_embeds[start:stop])

    def encode_visual(
        self,
        inputs: Inputs,
        span: Span,
        inputs_embeds: Tensor,
        poll: Callable[[], None] | None = None,
    ) -> None:
        """Encodes one picture or video into its rows of the input buffer.

        Args:
            inputs: a prepared request.
            span: one of inputs.spans.
            inputs_embeds: (num_tokens, hidden_size), of `embed_text`; written in place.
            poll: called before each view; may raise to give up.
        """
        plan = inputs.plans[span.plan_index]
        first = sum(before.num_views for before in inputs.plans[: span.plan_index])
        views = torch.from_numpy(inputs.views[first : first + plan.num_views])
        features = self.vision_tower.encode(views, poll)
        rows = inputs_embeds[span.start : span.end]
        self.multi_modal_projector.project_and_pack(features, plan.table, rows)

    def build_inputs_embeds(self, inputs: Inputs, poll: Callable[[], None] | None = None) -> Tensor:
        """Text and visual rows of a request: (num_tokens, hidden_size).

        Args:
            inputs: a prepared request.
            poll: called before each view; may raise to give up.
        """
        inputs_embeds = self.embed_text(inputs)
        for span in inputs.spans:
            self.encode_visual(inputs, span, inputs_embeds, poll)
        return inputs_embeds

    def prefill(
        self,
        inputs: Inputs,
        cache: KVCache,
        slot: int,
        positions_wanted: Sequence[int] | Tensor | None = None,
        poll: Callable[[], None] | None = None,
    ) -> Tensor:
        """Encodes a request and fills an empty slot with it.

        Args:
            inputs: a prepared request.
            cache: of `new_cache`.
            slot: an empty slot.
            positions_wanted: positions whose logits are returned, ascending; None for the last.
            poll: called between views and layers; may raise to give up.

        Returns:
            (positions wanted, vocab_size) float32 logits.

        Raises:
            CapacityError: the slot is too short.
        """
        cache.check_room(slot, len(inputs.input_ids))
        inputs_embeds = self.build_inputs_embeds(inputs, poll)
        return self.language_model.prefill(inputs_embeds, cache, slot, 0, positions_wanted, poll)

    def decode(self, token_id: int, cache: KVCache, slot: int) -> Tensor:
        """Appends one token to a slot; (vocab_size,) float32 logits of what may follow."""
        return self.language_model.decode(token_id, cache, slot)
