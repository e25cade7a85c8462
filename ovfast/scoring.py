"""Logits of a prompt's positions, and likelihoods of continuations over one shared prefill of it.

A continuation is tokenised as it follows the prompt, so the plain text that ends the prompt may
merge with its first token; then the shared prefix ends before that text.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ovfast.errors import CapacityError, PromptError
from ovfast.model_inputs import ModelInputs, common_length
from ovfast.models.qwen2 import Qwen2
from ovfast.outputs import ScoreOutput
from ovfast.processor import Processor
from ovfast.scheduler import Loaded, Scheduler

LOGIT_ROWS = 64  # rows through the head at a time: 39 MB of float32 at 152 000 ids


def continuation_ids(
    processor: Processor,
    inputs: ModelInputs,
    continuations: Sequence[str],
    *,
    include_terminator: bool,
    max_seq_len: int,
) -> list[list[int]]:
    """Ids of the prompt with each continuation.

    Args:
        processor: of the checkpoint.
        inputs: the prompt.
        continuations: candidate texts.
        include_terminator: append the end of a turn to each.
        max_seq_len: positions of a slot.

    Returns:
        All ids, one list a continuation.

    Raises:
        CapacityError: prompt and continuation are longer than a slot.
        PromptError: a continuation that adds nothing to be scored.
    """
    prompt_ids = inputs.input_ids.tolist()
    terminator = list(processor.terminator_ids) if include_terminator else []
    full = [processor.continue_ids(prompt_ids, text) + terminator for text in continuations]
    for text, ids in zip(continuations, full, strict=True):
        if len(ids) <= len(prompt_ids):
            raise PromptError(
                f"continuation {text!r:.100} adds no token to the prompt; expected at least one."
                " Leave it out, or pass include_terminator=True."
            )
        if len(ids) > max_seq_len:
            raise CapacityError(
                f"prompt and continuation have {len(ids)} tokens; the engine holds {max_seq_len} a"
                " request. Shorten them, or load with a larger max_seq_len."
            )
    return full


def score_continuations(
    scheduler: Scheduler, slot: int, inputs: ModelInputs, full: Sequence[list[int]]
) -> list[ScoreOutput]:
    """Scores continuations of one laid-out prompt, over one prefill of what they share.

    Args:
        scheduler: of the engine.
        slot: an empty slot, held during the call.
        inputs: the prompt.
        full: of `continuation_ids`.

    Returns:
        One ScoreOutput a continuation. Logits are not masked; log-softmax in float32.
    """
    prompt_ids, num_prompt = inputs.input_ids.tolist(), inputs.num_tokens
    shared = min([len(prompt_ids) - 1] + [common_length(prompt_ids, ids) for ids in full])
    start = scheduler.reuse(inputs, slot, shared)
    embeds = scheduler.embed(inputs, start)
    first, rest = embeds[: shared - start], embeds[shared - start :]
    cache = scheduler.loaded().cache
    if len(first):
        scheduler.prefill(first, cache, slot, start, lambda *_: None, positions_wanted=())

    def score(ids: list[int]) -> ScoreOutput:
        tail = scheduler.step(lambda loaded: _tail(loaded, rest, shared, prompt_ids, ids))
        own = ids[num_prompt:]

        def read(loaded: Loaded, hidden: torch.Tensor) -> ScoreOutput:
            pairs = list(enumerate(own))
            return score_output(own, likelihoods(loaded.model.language_model, hidden, pairs))

        wanted = range(num_prompt - 1 - shared, len(tail))
        return scheduler.prefill(tail, cache, slot, shared, read, wanted)

    return [score(ids) for ids in full]


def empty_logits(num_rows: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """An uninitialised float32 (num_rows, vocab_size).

    Raises:
        CapacityError: it cannot be reserved.
    """
    try:
        return torch.empty((num_rows, vocab_size), dtype=torch.float32, device=device)
    except (RuntimeError, MemoryError) as error:
        raise CapacityError(
            f"logits of {num_rows} positions need {4e-9 * num_rows * vocab_size:.1f} GB, which"
            f" {device} cannot reserve. Ask for fewer with positions=."
        ) from error


def fill_logits(
    scheduler: Scheduler,
    slot: int,
    inputs: ModelInputs,
    wanted: Sequence[int],
    logits: torch.Tensor,
) -> None:
    """Computes the logits of some positions of a prompt.

    Args:
        scheduler: of the engine.
        slot: an empty slot, held during the call.
        inputs: the prompt.
        wanted: positions, in any order and as often as they like.
        logits: (len(wanted), vocab_size), written.
    """
    distinct = sorted(set(wanted))
    row_of = {position: row for row, position in enumerate(distinct)}
    rows = torch.tensor([row_of[p] for p in wanted], dtype=torch.int64, device=logits.device)
    start = scheduler.reuse(inputs, slot, distinct[0] if distinct else 0)
    embeds = scheduler.embed(inputs, start)
    own = [position - start for position in distinct]

    def fill(loaded: Loaded, hidden: torch.Tensor) -> None:
        for first in range(0, len(wanted), LOGIT_ROWS):
            block = slice(first, first + LOGIT_ROWS)
            logits[block] = loaded.model.language_model.logits(hidden[rows[block]])

    scheduler.prefill(embeds, scheduler.loaded().cache, slot, start, fill, own)


def likelihoods(
    language_model: Qwen2, hidden: torch.Tensor, pairs: Sequence[tuple[int, int]]
) -> list[tuple[float, bool]]:
    """How likely tokens are.

    Args:
        language_model: of the engine.
        hidden: (rows, hidden_size), before the head.
        pairs: a row, and a token that may follow it.

    Returns:
        The token's log-probability, and whether it is the most likely one, for each pair.
    """
    found: dict[int, tuple[float, bool]] = {}
    for first in range(0, len(hidden), LOGIT_ROWS):
        logits = language_model.logits(hidden[first : first + LOGIT_ROWS])
        here = [i for i, (row, _) in enumerate(pairs) if first <= row < first + LOGIT_ROWS]
        own = torch.tensor([pairs[i] for i in here], dtype=torch.int64, device=logits.device)
        rows, tokens = own.view(-1, 2).unbind(1)
        rows = rows - first
        logprobs = logits.log_softmax(-1)[rows, tokens].tolist()
        best = (logits.argmax(-1)[rows] == tokens).tolist()
        found.update(zip(here, zip(logprobs, best, strict=True), strict=True))
    return [found[i] for i in range(len(pairs))]


def score_output(token_ids: Sequence[int], found: Sequence[tuple[float, bool]]) -> ScoreOutput:
    """The score of tokens, of what `likelihoods` found for each."""
    logprobs = tuple(logprob for logprob, _ in found)
    total = float(np.sum(logprobs, dtype=np.float64))
    greedy = all(is_best for _, is_best in found)
    return ScoreOutput(total, total / len(logprobs), tuple(token_ids), logprobs, greedy)


def _tail(
    loaded: Loaded,
    rest: torch.Tensor,
    shared: int,
    prompt_ids: list[int],
    ids: list[int],
) -> torch.Tensor:
    """Rows of a continuation from `shared` on, without its last; `rest` are the prompt's."""
    common = common_length(prompt_ids, ids)
    tokens = torch.tensor(ids[common:-1], dtype=torch.int64, device=rest.device)
    own = loaded.model.language_model.embed(tokens)
    return torch.cat((rest[: common - shared], own))
