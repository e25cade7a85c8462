"""LLaVA-OneVision: tower, projector and language model over one request's inputs.

Owns the order of stages and the input buffer; each stage is a method of its own, so that a caller
can time it, stop between two, or run stages of several requests in turn. Knows no prompts, no
sampling and no requests beyond the one of a call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovfast.anyres import VisualPlan
from ovfast.config import ModelConfig
from ovfast.cuda_graphs import GraphCache
from ovfast.kv_cache import KVCache
from ovfast.models.parameters import Loader, Weights
from ovfast.models.projector import Projector
from ovfast.models.qwen2 import Qwen2
from ovfast.models.siglip import SiglipTower
from ovfast.models.visual_rows import row_table
from ovfast.ops import Ops
from ovfast.pixels import PixelLoader, Pixels, view_pixels
from ovfast.staging import to_device


class Span(Protocol):
    """Positions start…end of input_ids that hold the tokens of one picture or video."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def plan_index(self) -> int: ...


class Inputs(Protocol):
    """What the model reads of a prepared request; spans, plans, media and views in one order.

    Without media the views were given ready-made, and are read on every back end.
    """

    @property
    def input_ids(self) -> NDArray[np.int64]: ...
    @property
    def spans(self) -> Sequence[Span]: ...
    @property
    def plans(self) -> Sequence[VisualPlan]: ...
    @property
    def media(self) -> Sequence[NDArray[np.uint8]]: ...
    @property
    def views(self) -> NDArray[np.uint8]: ...


@dataclass(frozen=True, slots=True)
class Part:
    """Rows start…stop of inputs_embeds, and the pictures among them: what is encoded together."""

    spans: tuple[Span, ...]
    start: int
    stop: int


class LlavaOnevision:
    """The whole model on one device."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
        graphs: GraphCache | None = None,
    ) -> None:
        """Takes all parameters.

        Args:
            config: of the checkpoint.
            weights: gives each tensor once, by its canonical name.
            ops: of the device.
            dtype: of weights, activations and keys.
            device: of the model.
            graphs: replays the tower's layers; None launches them one by one.
        """
        self.config, self.dtype, self.device = config, dtype, device
        self._ops, self._graphs = ops, graphs
        self._pixel_loader = PixelLoader(ops, device)
        loader = Loader(weights, ops, dtype, device)
        self.vision_tower = SiglipTower(config.vision, loader, graphs)
        self.multi_modal_projector = Projector(loader)
        self.language_model = Qwen2(config.text, loader)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.language_model.vocab_size

    @property
    def views_a_step(self) -> int:
        """Views that the tower encodes at once."""
        return self._ops.views_a_step

    def new_cache(self, *, num_slots: int, max_positions: int) -> KVCache:
        """A cache for this model."""
        return KVCache(
            self.config.text,
            num_slots=num_slots,
            max_positions=max_positions,
            dtype=self.dtype,
            device=self.device,
        )

    def parts(self, inputs: Inputs) -> list[Part]:
        """What of a request is encoded together, in order: every row belongs to one part.

        Text stands with the picture that follows it, the last text with the last picture.
        """
        parts: list[Part] = []
        spans: list[Span] = []
        num_views, start = 0, 0
        for span in inputs.spans:
            views = inputs.plans[span.plan_index].num_views
            if spans and num_views + views > self._ops.views_a_step:
                parts.append(Part(tuple(spans), start, spans[-1].end))
                start, spans, num_views = spans[-1].end, [], 0
            spans.append(span)
            num_views += views
        parts.append(Part(tuple(spans), start, len(inputs.input_ids)))
        return parts

    def new_inputs_embeds(self, inputs: Inputs) -> Tensor:
        """(num_tokens, hidden_size), not initialised: `encode` fills it part by part."""
        shape = (len(inputs.input_ids), self.config.text.hidden_size)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def encode(
        self,
        inputs: Inputs,
        part: Part,
        inputs_embeds: Tensor,
        poll: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """Fills the rows of one part.

        Args:
            inputs: a prepared request.
            part: one of `parts`.
            inputs_embeds: of `new_inputs_embeds`; rows of the part are written.
            poll: called before each group of views; may raise to give up.

        Returns:
            The tower's features (num_views · tokens_per_view, vision_hidden_size) of the part's
            pictures; None for text alone.
        """
        token_ids, rows = self._token_ids(inputs, part), inputs_embeds[part.start : part.stop]
        if not part.spans:
            self.language_model.embed(token_ids, out=rows)
            return None
        features = self.vision_tower.encode(self._pixels([(inputs, part)]), poll)
        self._project(inputs, part, token_ids, features, rows)
        return features

    def build_together(self, several: Sequence[Inputs]) -> list[Tensor]:
        """As `build_inputs_embeds`, of requests with pictures; their views are encoded together."""
        wholes = [
            (inputs, Part(tuple(inputs.spans), 0, len(inputs.input_ids))) for inputs in several
        ]
        token_ids = [self._token_ids(*whole) for whole in wholes]
        features = self.vision_tower.encode(self._pixels(wholes))
        tokens = self.config.vision.tokens_per_view
        sizes = [tokens * sum(plan.num_views for plan in inputs.plans) for inputs in several]
        built = [self.new_inputs_embeds(inputs) for inputs in several]
        for whole, ids, own, rows in zip(
            wholes, token_ids, torch.split(features, sizes), built, strict=True
        ):
            self._project(*whole, ids, own, rows)
        return built

    def place(self, input_ids: NDArray[np.int64], features: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Rows of text, with visual rows that were encoded before among them.

        Args:
            input_ids: (num_tokens,).
            features: a position, and the rows (num_rows, hidden_size) from there on.

        Returns:
            (num_tokens, hidden_size).
        """
        token_ids = to_device(torch.from_numpy(input_ids.astype(np.int32)), self.device)
        rows = self.language_model.embed(token_ids)
        for first, own in features:
            rows[first : first + len(own)] = own
        return rows

    def _token_ids(self, inputs: Inputs, part: Part) -> Tensor:
        ids = inputs.input_ids[part.start : part.stop].astype(np.int32)
        return to_device(torch.from_numpy(ids), self.device)

    def _project(
        self, inputs: Inputs, part: Part, token_ids: Tensor, features: Tensor, rows: Tensor
    ) -> None:
        """Fills the rows of a part whose views have been encoded."""
        tokens = self.config.vision.tokens_per_view
        placed, first_feature = [], 0
        for span in part.spans:
            plan = inputs.plans[span.plan_index]
            placed.append((span.start - part.start, first_feature, plan.table))
            first_feature += plan.num_views * tokens
        self.multi_modal_projector.project_and_pack(
            features,
            row_table(len(rows), tuple(placed)),
            token_ids,
            self.language_model.embedding,
            rows,
        )

    def _pixels(self, parts: Sequence[tuple[Inputs, Part]]) -> Pixels:
        """The views of parts' pictures; those of a part have their plans side by side."""
        media, plans, views = list[NDArray[np.uint8]](), list[VisualPlan](), []
        on_device = self._ops.reads_pictures and all(inputs.media for inputs, _ in parts)
        for inputs, part in parts:
            own = slice(part.spans[0].plan_index, part.spans[-1].plan_index + 1)
            if on_device:
                media += inputs.media[own]
                plans += inputs.plans[own]
            else:
                counts = [plan.num_views for plan in inputs.plans]
                views.append(inputs.views[sum(counts[: own.start]) : sum(counts[: own.stop])])
        if on_device:
            return self._pixel_loader.load(media, plans)
        return view_pixels(views[0] if len(views) == 1 else np.concatenate(views), self.device)

    def build_inputs_embeds(self, inputs: Inputs, poll: Callable[[], None] | None = None) -> Tensor:
        """Text and visual rows of a request: (num_tokens, hidden_size).

        Args:
            inputs: a prepared request.
            poll: called before each group of views; may raise to give up.
        """
        inputs_embeds = self.new_inputs_embeds(inputs)
        for part in self.parts(inputs):
            self.encode(inputs, part, inputs_embeds, poll)
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
