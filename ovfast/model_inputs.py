"""What the processor hands to the model: one laid-out request."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ovfast.anyres import VisualOptions, VisualPlan
from ovfast.encoded_media import EncodedMedia
from ovfast.image import build_media_views
from ovfast.reference_pixels import UInt8Array

__all__ = ["ModelInputs", "VisualSpan", "common_length"]


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """Positions start…end of input_ids that hold the tokens of one picture or video."""

    start: int
    end: int
    plan_index: int
    kind: Literal["image", "video"]


@dataclass(frozen=True, eq=False, slots=True)
class ModelInputs:
    """One laid-out request.

    Attributes:
        input_ids: (num_tokens,) int64; the placeholder id at visual positions.
        spans: where each picture and video stands, in order.
        plans: one for each span, in the same order.
        media: for each plan the decoded picture (height, width, 3) or frames (frames, height,
            width, 3), uint8; empty where the request came with its views ready-made, or is encoded
            already.
        visual: the options it was laid out with.
        media_ms, preprocess_ms: time for decoding, and for everything after it.
        encoded: holds the visual rows; None if they are to be encoded.
    """

    input_ids: NDArray[np.int64]
    spans: tuple[VisualSpan, ...]
    plans: tuple[VisualPlan, ...]
    media: tuple[UInt8Array, ...]
    visual: VisualOptions
    media_ms: float = 0.0
    preprocess_ms: float = 0.0
    encoded: EncodedMedia | None = None
    _views: list[UInt8Array] = field(default_factory=list, repr=False)  # none or one: built once

    @property
    def views(self) -> UInt8Array:
        """(num_views, image_size, image_size, 3) uint8, those of the first plan first; none where
        they are encoded already.

        Built when first asked for: a back end that resizes on the device does without.
        """
        if not self._views:
            self._views.append(
                build_media_views(self.media, self.plans)
                if self.plans
                else np.empty((0, 0, 0, 3), np.uint8)
            )
        return self._views[0]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_visual_tokens(self) -> int:
        return sum(span.end - span.start for span in self.spans)

    @property
    def num_views(self) -> int:
        """Inputs of the vision tower; 0 where they are encoded already."""
        return 0 if self.encoded is not None else sum(plan.num_views for plan in self.plans)

    @property
    def feature_rows(self) -> list[tuple[VisualSpan, int]]:
        """Each span with its first row where all pictures' rows, then all videos' rows, stand in
        one table: the order of a handle, whatever the order in the prompt.
        """
        rows, first = [], 0
        for span in sorted(self.spans, key=lambda span: span.kind):
            rows.append((span, first))
            first += span.end - span.start
        return rows

    def held_rows(self, start: int) -> list[tuple[int, Tensor]]:
        """Visual rows of the handle from position `start` on: where behind it, and which."""
        assert self.encoded is not None
        features, placed = self.encoded.held().features, []
        for span, first in self.feature_rows:
            if span.end > start:
                behind = max(start - span.start, 0)
                rows = features[first + behind : first + span.end - span.start]
                placed.append((span.start + behind - start, rows))
        return placed

    @property
    def sources(self) -> NDArray[np.int64]:
        """(num_tokens,): the id of a position of text, −1 − its row in that table of a visual one.

        Where two requests over the same media have the same sources from the start, they have the
        same keys and values.
        """
        sources = self.input_ids.copy()
        for span, first in self.feature_rows:
            sources[span.start : span.end] = -1 - np.arange(first, first + span.end - span.start)
        return sources


def common_length(
    left: Sequence[int] | NDArray[np.int64], right: Sequence[int] | NDArray[np.int64]
) -> int:
    """Length of the longest common prefix."""
    size = min(len(left), len(right))
    differs = np.flatnonzero(np.asarray(left[:size]) != np.asarray(right[:size]))
    return int(differs[0]) if len(differs) else size
