"""Choosing among answers: all options scored over one prefill of the prompt.

What all options begin with belongs to that prefill. The rest of them runs side by side, in one
pass over the weights instead of one an option; options whose tokens before the last are the same,
or the beginning of another's, share its rows.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ovfast.errors import BackendError, OptionError, PromptError
from ovfast.model_inputs import ModelInputs, common_length
from ovfast.outputs import ChoiceOutput, ScoreOutput
from ovfast.scheduler import Loaded, Scheduler
from ovfast.scoring import likelihoods, score_output

BRANCH_ROWS = 1024  # rows of options side by side in one step

Found = list[tuple[float, bool]]


class _Branch(NamedTuple):
    """Tokens behind the common ones, without the last, and the options that follow them."""

    tokens: list[int]
    options: list[int]


def check_options(num_prompt: int, full: Sequence[list[int]], texts: Sequence[str]) -> None:
    """Checks that the options' likelihoods can be compared.

    Args:
        num_prompt: tokens of the prompt.
        full: ids of the prompt with each option.
        texts: the options.

    Raises:
        OptionError: two options have the same tokens.
        PromptError: options change the end of the prompt, and not all alike.
    """
    seen: dict[tuple[int, ...], str] = {}
    for ids, text in zip(full, texts, strict=True):
        if ids[:num_prompt] != full[0][:num_prompt]:
            raise PromptError(
                f"options {texts[0]!r:.80} and {text!r:.80} merge with the end of the prompt in"
                " different ways, so that they answer different prompts; expected options that all"
                " begin alike. Leave out what they begin with, such as a newline."
            )
        other = seen.setdefault(tuple(ids), text)
        if other is not text:
            raise OptionError(
                f"options {other!r:.80} and {text!r:.80} have the same tokens; expected different"
                " ones. Leave one out."
            )


def score_options(
    scheduler: Scheduler, slot: int, inputs: ModelInputs, full: Sequence[list[int]]
) -> list[ScoreOutput]:
    """Scores options; a step for the prompt, and one for as many of them as go side by side.

    Args:
        scheduler: of the engine.
        slot: held during the call.
        inputs: the prompt.
        full: ids of the prompt with each option, which `check_options` let pass.

    Returns:
        One ScoreOutput an option.
    """
    num_prompt = inputs.num_tokens
    stem = min(min(common_length(full[0], ids), len(ids) - 1) for ids in full)
    start = scheduler.reuse(inputs, slot, num_prompt - 1)
    embeds = scheduler.embed(inputs, start)
    found = _score_stem(scheduler, slot, inputs, full, embeds, stem)
    for group in _groups(_branches([ids[stem:-1] for ids in full])):
        step = partial(_score_group, slot=slot, stem=stem, full=full, group=group)
        for option, rest in scheduler.step(step).items():
            found[option] += rest
    return [score_output(ids[num_prompt:], pairs) for ids, pairs in zip(full, found, strict=True)]


def choose_best(
    texts: Sequence[str], scores: Sequence[ScoreOutput], normalize: str
) -> ChoiceOutput:
    """The choice that scores make.

    Args:
        texts: the options.
        scores: one each.
        normalize: "sum" compares probabilities of whole options, "mean" those of a token on
            average.

    Raises:
        BackendError: a likelihood is not finite.
    """
    logits = [s.mean_logprob if normalize == "mean" else s.logprob for s in scores]
    if not all(map(math.isfinite, logits)):
        raise BackendError(
            f"the options' log-probabilities are {logits}; expected finite numbers. Try"
            " dtype='float32' or backend='reference'."
        )
    best = max(logits)
    weights = [math.exp(logit - best) for logit in logits]
    probabilities = tuple(weight / sum(weights) for weight in weights)
    index = logits.index(best)
    return ChoiceOutput(texts[index], index, probabilities, _label_mass(scores), tuple(scores))


def _label_mass(scores: Sequence[ScoreOutput]) -> float:
    """The probability of the shortest beginnings: what goes on from one of them is a part of it."""
    beginnings = {score.token_ids for score in scores}
    shortest = [
        score.logprob
        for score in scores
        if not any(score.token_ids[:n] in beginnings for n in range(1, len(score.token_ids)))
    ]
    return min(1.0, math.fsum(math.exp(logprob) for logprob in shortest))


def _score_stem(
    scheduler: Scheduler,
    slot: int,
    inputs: ModelInputs,
    full: Sequence[list[int]],
    embeds: torch.Tensor,
    stem: int,
) -> list[Found]:
    """Fills the slot with what all options have in common; scores that, and the token behind it."""
    num_prompt = inputs.num_tokens
    start = num_prompt - len(embeds)
    kept = common_length(inputs.input_ids, full[0])  # options may merge with the prompt's end
    rows = embeds[: kept - start]
    if kept < stem:
        more = torch.tensor(full[0][kept:stem], dtype=torch.int64, device=embeds.device)
        rows = scheduler.step(
            lambda loaded: torch.cat((rows, loaded.model.language_model.embed(more)))
        )

    def read(loaded: Loaded, hidden: torch.Tensor) -> list[Found]:
        common = list(enumerate(full[0][num_prompt:stem]))
        pairs = common + [(len(hidden) - 1, ids[stem]) for ids in full]
        found = likelihoods(loaded.model.language_model, hidden, pairs)
        return [[*found[: len(common)], own] for own in found[len(common) :]]

    wanted = range(num_prompt - 1 - start, stem - start)
    return scheduler.prefill(rows, scheduler.loaded().cache, slot, start, read, wanted)


def _score_group(
    loaded: Loaded, *, slot: int, stem: int, full: Sequence[list[int]], group: Sequence[_Branch]
) -> dict[int, Found]:
    """Scores what follows the first token behind the common ones."""
    language_model = loaded.model.language_model
    tokens = torch.tensor([t for b in group for t in b.tokens], device=loaded.model.device)
    embeds = torch.split(language_model.embed(tokens), [len(b.tokens) for b in group])
    hidden = language_model.branch_hidden(embeds, loaded.cache, slot)
    pairs, owners, first = list[tuple[int, int]](), list[int](), 0
    for branch in group:
        for option in branch.options:
            targets = full[option][stem + 1 :]
            pairs += [(first + row, token) for row, token in enumerate(targets)]
            owners += [option] * len(targets)
        first += len(branch.tokens)
    found: dict[int, Found] = {}
    for option, one in zip(owners, likelihoods(language_model, hidden, pairs), strict=True):
        found.setdefault(option, []).append(one)
    return found


def _branches(tails: Sequence[list[int]]) -> list[_Branch]:
    """The tails that are no beginning of another one; each option belongs to the first it fits."""
    branches: list[_Branch] = []
    for option in sorted(range(len(tails)), key=lambda option: -len(tails[option])):
        tail = tails[option]
        if not tail:
            break
        for branch in branches:
            if branch.tokens[: len(tail)] == tail:
                branch.options.append(option)
                break
        else:
            branches.append(_Branch(tail, [option]))
    return branches


def _groups(branches: Sequence[_Branch]) -> Iterator[list[_Branch]]:
    """Branches of one step: as many as BRANCH_ROWS hold, and at least one."""
    group: list[_Branch] = []
    for branch in branches:
        if group and sum(len(b.tokens) for b in [*group, branch]) > BRANCH_ROWS:
            yield group
            group = []
        group.append(branch)
    if group:
        yield group
