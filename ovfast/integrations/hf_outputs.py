"""What `generate` returns: padded sequences, and the logits and scores of each step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ovfast.engine import Engine
from ovfast.errors import OptionError
from ovfast.integrations.hf_options import Generation
from ovfast.integrations.token_prompts import append_ids
from ovfast.model_inputs import ModelInputs

__all__ = ["greedy_scores", "joined", "prompt_logits", "step_logits"]


def joined(input_ids: Tensor, new_ids: Sequence[list[int]], pad: int | None) -> Tensor:
    """Prompts and new ids side by side.

    Args:
        input_ids: (batch, length).
        new_ids: of each row.
        pad: what fills rows that end early.

    Returns:
        (batch, length + longest) int64.

    Raises:
        OptionError: something has to be filled up and there is no `pad`.
    """
    longest = max(len(ids) for ids in new_ids)
    if pad is None and any(len(ids) < longest for ids in new_ids):
        raise OptionError(
            "rows of different lengths and neither pad_token_id nor eos_token_id to fill them up;"
            " pass pad_token_id."
        )
    rows = [ids + [pad or 0] * (longest - len(ids)) for ids in new_ids]
    return torch.cat([input_ids, torch.tensor(rows, device=input_ids.device)], dim=1)


def step_logits(
    engine: Engine, prompts: Sequence[ModelInputs], new_ids: Sequence[list[int]]
) -> tuple[Tensor, ...]:
    """(batch, vocab_size) float32 for each step, all computed again; NaN where a row has ended."""
    rows = []
    for prompt, ids in zip(prompts, new_ids, strict=True):
        first = prompt.num_tokens - 1
        whole = append_ids(prompt, ids[:-1])
        rows.append(engine.forward(whole, positions=range(first, first + len(ids))))
    return tuple(torch.nn.utils.rnn.pad_sequence(rows, padding_value=torch.nan).unbind())


def prompt_logits(
    engine: Engine,
    prompts: Sequence[ModelInputs],
    firsts: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """Logits of positions of a padded batch.

    Args:
        engine: of the checkpoint.
        prompts: one a row.
        firsts: where each begins in its padded row.
        positions: of the padded rows.

    Returns:
        (batch, len(positions), vocab_size) float32; 0 at padding.
    """
    size = len(prompts), len(positions), engine.config.text.vocab_size
    logits = torch.zeros(size, dtype=torch.float32, device=engine.device)
    for row, prompt, first in zip(logits, prompts, firsts, strict=True):
        own = [at for at, p in enumerate(positions) if 0 <= p - first < prompt.num_tokens]
        if own:
            row[own] = engine.forward(prompt, positions=[positions[at] - first for at in own])
    return logits


def greedy_scores(engine: Engine, logits: Sequence[Tensor], plan: Generation) -> tuple[Tensor, ...]:
    """What greedy decoding chose from: never-generated ids masked, stop ids until allowed."""
    forbidden = torch.from_numpy(engine._processor.forbidden_ids)
    masked = []
    for step, row in enumerate(logits):
        row = row.clone()
        row[:, forbidden] = -torch.inf
        if step < plan.options["min_new_tokens"]:
            row[:, list(plan.eos_token_ids)] = -torch.inf
        masked.append(row)
    return tuple(masked)
