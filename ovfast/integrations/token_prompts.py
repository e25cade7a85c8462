"""Prompts that arrive as token ids: pictures and videos are placed where their placeholders stand.

The placeholder of a medium is repeated once a visual token, as transformers' processors write it;
`expand` makes that of prompts with a single placeholder a medium.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovfast.anyres import VisualOptions, VisualPlan
from ovfast.config import ModelConfig
from ovfast.errors import PromptError
from ovfast.model_inputs import ModelInputs, VisualSpan
from ovfast.reference_pixels import UInt8Array

__all__ = ["Kind", "Medium", "append_ids", "expand", "placeholder_ids", "with_views"]

Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")


class Medium(NamedTuple):
    """A picture or video whose views exist: (num_views, image_size, image_size, 3) uint8."""

    plan: VisualPlan
    views: UInt8Array


def placeholder_ids(config: ModelConfig) -> dict[Kind, int]:
    """The ids that stand for visual tokens; a checkpoint without one for videos has none."""
    ids: dict[Kind, int] = {"image": config.image_token_id}
    if config.video_token_id is not None and config.video_token_id != config.image_token_id:
        ids["video"] = config.video_token_id
    return ids


def expand(
    ids: Sequence[int], plans: Mapping[Kind, Sequence[VisualPlan]], config: ModelConfig
) -> tuple[NDArray[np.int64], tuple[VisualSpan, ...], tuple[VisualPlan, ...]]:
    """A prompt with one placeholder a medium, laid out.

    Args:
        ids: of the prompt.
        plans: of pictures and of videos, in the prompt's order.
        config: of the checkpoint.

    Returns:
        input_ids (num_tokens,), spans, plans in the order of the spans.

    Raises:
        PromptError: not as many placeholders as media.
    """
    kind_of = {token_id: kind for kind, token_id in placeholder_ids(config).items()}
    for kind in KINDS:
        given = len(plans.get(kind, ()))
        places = sum(kind_of.get(token_id) == kind for token_id in ids)
        if places != given:
            raise PromptError(
                f"the prompt's ids have {places} placeholders for {given} {kind}s; expected one a"
                f" {kind}. Write the {kind} token once for each."
            )
    rest = {kind: iter(plans.get(kind, ())) for kind in KINDS}
    expanded: list[int] = []
    spans: list[VisualSpan] = []
    ordered: list[VisualPlan] = []
    for token_id in ids:
        found = kind_of.get(token_id)
        if found is None:
            expanded.append(token_id)
            continue
        plan = next(rest[found])
        start = len(expanded)
        expanded += [token_id] * plan.num_tokens
        spans.append(VisualSpan(start, len(expanded), len(ordered), found))
        ordered.append(plan)
    return np.array(expanded, np.int64), tuple(spans), tuple(ordered)


def with_views(
    ids: NDArray[np.int64],
    media: Mapping[Kind, Iterator[Medium]],
    config: ModelConfig,
    visual: VisualOptions,
) -> ModelInputs:
    """A request whose placeholders are expanded and whose views exist.

    Args:
        ids: (num_tokens,) of the prompt.
        media: pictures and videos still to be placed; those of this prompt are taken.
        config: of the checkpoint.
        visual: the options the plans were made with.

    Raises:
        PromptError: placeholders that the media do not fill exactly.
    """
    spans: list[VisualSpan] = []
    placed: list[Medium] = []
    for start, end, kind in _runs(ids, placeholder_ids(config)):
        while start < end:
            medium = next(media[kind], None)
            if medium is None:
                raise PromptError(
                    f"{end - start} <{kind}> tokens at position {start} and no {kind} left to fill"
                    f" them; expected all pixel values of the {kind}s. Pass the processor's outputs"
                    " together."
                )
            stop = start + medium.plan.num_tokens
            if stop > end:
                raise PromptError(
                    f"{end - start} <{kind}> tokens at position {start} for a {kind} of"
                    f" {medium.plan.num_tokens} tokens; tokens and features do not match. Make both"
                    " with one processor of this checkpoint, without truncation."
                )
            spans.append(VisualSpan(start, stop, len(placed), kind))
            placed.append(medium)
            start = stop
    views = [np.concatenate([medium.views for medium in placed])] if placed else []
    plans = tuple(medium.plan for medium in placed)
    return ModelInputs(ids, tuple(spans), plans, (), visual, _views=views)


def append_ids(inputs: ModelInputs, ids: Sequence[int]) -> ModelInputs:
    """A request with text ids behind its prompt."""
    longer = np.concatenate([inputs.input_ids, np.array(ids, np.int64)])
    return replace(inputs, input_ids=longer)


def _runs(
    ids: NDArray[np.int64], placeholders: Mapping[Kind, int]
) -> Iterator[tuple[int, int, Kind]]:
    """Stretches start…end of one placeholder, in order."""
    edges = np.flatnonzero(np.diff(ids, prepend=-1, append=-1))
    kind_of = {token_id: kind for kind, token_id in placeholders.items()}
    for start, end in pairwise(edges):
        kind = kind_of.get(int(ids[start]))
        if kind is not None:
            yield int(start), int(end), kind
