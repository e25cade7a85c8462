"""Intermediate results of one request, ours and a reference's, and how far they lie apart."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ovfast.engine import Engine
from ovfast.model_inputs import ModelInputs
from ovfast.verify.cases import NUM_NEW_TOKENS
from ovfast.verify.report import VerifyRow

__all__ = ["LOGITS_BOUND", "TOKENS_BOUND", "Head", "Stages", "compare", "keep_head", "run_engine"]

Head = Callable[[Tensor], Tensor]  # rows of `hidden` → (rows, vocab_size) float32

LOGIT_ROWS = 64  # rows through the heads at a time: 39 MB of float32 a head at 152 000 ids
# Worst element, relative to the largest magnitude, in float32: the rounding of the whole model is
# near 1e-6 of it, a wrong epsilon or a missing cast starts near 1e-3. What feeds the language
# model gets half of what its logits may have.
LOGITS_BOUND, FEATURES_BOUND = 2e-4, 1e-4
# In 16 bits both sides round as often to the same format, so their RMS distances from float32
# should be alike; rounding twice as often would be a ratio of 1.41.
RATIO_BOUND = 1.25
# Two logits may each move by the bound, so tokens so close are a tie.
TOKENS_BOUND = 2 * LOGITS_BOUND


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """What one model made of one request, on the CPU.

    Attributes:
        features: (views, tokens_per_view, vision_hidden_size), those of pictures before those of
            videos; None without media.
        rows: (visual tokens, hidden_size) of inputs_embeds, in the order of the prompt.
        hidden: (num_tokens, hidden_size), what the model's head reads.
        token_ids: the greedy continuation.
        token_logits: (tokens, vocab_size) float32 from which a reference chose them, what is never
            generated at -inf; None for ours.
    """

    features: Tensor | None
    rows: Tensor
    hidden: Tensor
    token_ids: tuple[int, ...]
    token_logits: Tensor | None = None


@torch.inference_mode()
def run_engine(engine: Engine, inputs: ModelInputs) -> Stages:
    """Runs one request stage by stage, then as a user would.

    Args:
        engine: that laid it out.
        inputs: of its `prepare`.

    Returns:
        Stages without token_logits.
    """
    model = engine._model
    inputs_embeds = model.new_inputs_embeds(inputs)
    features: dict[str, list[Tensor]] = {"image": [], "video": []}
    for part in model.parts(inputs):
        encoded = model.encode(inputs, part, inputs_embeds)
        if encoded is None:
            continue
        views = encoded.cpu().view(-1, model.config.vision.tokens_per_view, encoded.shape[1])
        first = 0
        for span in part.spans:
            last = first + inputs.plans[span.plan_index].num_views
            features[inputs.spans[span.plan_index].kind].append(views[first:last])
            first = last
    rows = [inputs_embeds[:0], *(inputs_embeds[span.start : span.end] for span in inputs.spans)]
    parts = features["image"] + features["video"]
    cache = model.new_cache(num_slots=1, max_positions=inputs.num_tokens)
    every = range(inputs.num_tokens)
    hidden = model.language_model.prefill_hidden(inputs_embeds, cache, cache.allocate(), 0, every)
    output = engine.generate(inputs, max_new_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    return Stages(
        features=torch.cat(parts) if parts else None,
        rows=torch.cat(rows).cpu(),
        hidden=hidden.cpu(),
        token_ids=output.token_ids,
    )


def keep_head(engine: Engine) -> Head:
    """Closes an engine and returns its head; all other weights but the embedding are freed."""
    language_model, device = engine._model.language_model, engine.device
    engine.close()
    language_model.layers.clear()
    return lambda hidden: language_model.logits(hidden.to(device)).cpu()


def compare(
    case: str, ours: Stages, theirs: Stages, truth: Stages | None, heads: tuple[Head, ...]
) -> list[VerifyRow]:
    """Rows of one case.

    Args:
        case: its name.
        ours: of the engine.
        theirs: of the reference in the same dtype.
        truth: of the reference in float32, where the dtype is narrower; None in float32.
        heads: of ours, theirs and, where there is one, truth.

    Returns:
        One row for each of tower, rows, logits and tokens that the case has.
    """
    result = []
    everyone = (ours, theirs) if truth is None else (ours, theirs, truth)
    bound = FEATURES_BOUND if truth is None else RATIO_BOUND
    if ours.features is not None:
        for stage, attribute in (("tower", "features"), ("rows", "rows")):
            distance = _Distance()
            distance.add(*(getattr(stages, attribute) for stages in everyone))
            result.append(VerifyRow(case, stage, distance.error, bound, distance.note))
    distance = _Distance()
    for first in range(0, len(ours.hidden), LOGIT_ROWS):
        blocks = [stages.hidden[first : first + LOGIT_ROWS] for stages in everyone]
        distance.add(*(head(block) for head, block in zip(heads, blocks, strict=True)))
    bound = LOGITS_BOUND if truth is None else RATIO_BOUND
    result.append(VerifyRow(case, "logits", distance.error, bound, distance.note))
    # In 16 bits upstream's own worst error, once for each of two logits of each of two models.
    tie = TOKENS_BOUND if truth is None else 4 * distance.noise
    result.append(_compare_tokens(case, ours.token_ids, theirs, tie))
    return result


def _compare_tokens(
    case: str, token_ids: tuple[int, ...], theirs: Stages, bound: float
) -> VerifyRow:
    """How far apart the reference held its token and ours where they first differ.

    Tokens after a tie are answers to different texts, so they are not compared.
    """
    assert theirs.token_logits is not None
    for index, (mine, their) in enumerate(zip(token_ids, theirs.token_ids, strict=True)):
        if mine != their:
            logits = theirs.token_logits[index]
            largest = float(logits[logits.isfinite()].abs().max())
            gap = float(logits[their] - logits[mine]) / largest
            note = f"token {index} is {mine} instead of {their}"
            return VerifyRow(case, "tokens", gap, bound, note)
    return VerifyRow(case, "tokens", 0.0, bound, f"{len(token_ids)} equal")


@dataclass(slots=True)
class _Distance:
    """Distance of ours from a reference, gathered block by block.

    Without truth the worst element relative to the reference's largest; with truth the RMS
    distance from it relative to the reference's own.
    """

    worst: float = 0.0
    largest: float = 0.0
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    worst_noise: float = 0.0
    has_truth: bool = False
    note: str = ""

    def add(self, ours: Tensor, theirs: Tensor, truth: Tensor | None = None) -> None:
        if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
            self.worst = self.squares[0] = math.inf
            shapes = f"{tuple(ours.shape)} instead of {tuple(theirs.shape)}"
            self.note = shapes if ours.shape != theirs.shape else "not finite"
            return
        ours, theirs = ours.float(), theirs.float()
        self.worst = max(self.worst, float((ours - theirs).abs().max()))
        self.largest = max(self.largest, float(theirs.abs().max()))
        if truth is not None:
            self.has_truth = True
            self.squares[0] += float((ours - truth).square().sum())
            self.squares[1] += float((theirs - truth).square().sum())
            self.worst_noise = max(self.worst_noise, float((theirs - truth).abs().max()))

    @property
    def error(self) -> float:
        if self.has_truth:
            return math.sqrt(_ratio(*self.squares))
        return _ratio(self.worst, self.largest)

    @property
    def noise(self) -> float:
        """The reference's own worst distance from truth, relative to its largest value."""
        return _ratio(self.worst_noise, self.largest)


def _ratio(value: float, unit: float) -> float:
    if unit > 0:
        return value / unit
    return math.inf if value > 0 else 0.0
