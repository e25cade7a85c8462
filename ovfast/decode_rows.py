"""State of up to 16 requests that decode side by side, all of it on the device.

A row holds one request: which slot of the cache, at which position, with which sampling. A step
decodes every row's last token, samples the next one and advances, and the host reads the results
later: nothing here reads the device. A row that is over frees itself, so that steps already under
way when the host learns of it do nothing.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ovfast.decode_kernels import DecodeKernels
from ovfast.device_sampling import ERROR_TOKEN, RowParams, SamplerKind, kept_rows, sample_rows
from ovfast.sampling import SamplingParams

__all__ = ["FINISHED", "ROWS", "RowDecoder", "RowState", "StepOutput", "StepPlan"]

ROWS = 16  # what one padded product holds
NO_SLOT = -1  # of a row that holds no request
# Codes in StepOutput.tokens.
RUNNING, STOP, LENGTH, ERROR = range(4)
FINISHED = {STOP: "stop", LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What decides which kernels a step launches, so the key of its graph.

    Attributes:
        num_rows: rows looked at, from the first.
        num_splits: parts of the context that attention looks at.
        kind: rules of sampling.
        num_top: likely alternatives reported; None for no log-probabilities.
    """

    num_rows: int
    num_splits: int
    kind: SamplerKind
    num_top: int | None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step tells the host, overwritten by the next.

    Attributes:
        tokens: (16, 2) int32: the token, -1 for a row without a request; and how it ended.
        logprobs: (16, 1 + num_top) float32: of the token and of the most likely ones.
        top_ids: (16, num_top) int32, of the most likely ones.
    """

    tokens: Tensor
    logprobs: Tensor
    top_ids: Tensor


class RowState:
    """Rows of one group; every tensor stays where it is.

    Attributes:
        slots: (16,) int32, of the cache; -1 for a row without a request.
        positions: (16,) int32, of the token that is decoded next.
        tokens: (16,) int32, that token.
        counts: (16,) int64, tokens generated.
        max_new_tokens: (16,) int64, where the row ends.
        logits: (16, vocab_size) float32, of the decoder.
        block_max, block_argmax: (16, blocks of ids) float32 and int32: the largest logit of a block
            that is not forbidden, and its id, of a decoder of kernels; else no blocks.
        forbidden: (vocab_size,) bool, ids never generated; forbidden_bytes: the same as int8.
        params: rules of sampling.
        output: of the last step.

    Args:
        vocab_size: of the model.
        forbidden: (vocab_size,) bool, ids never generated.
        num_top: most alternatives that can be reported.
        kernels: of the decoder, to choose by; None chooses by plain torch.
    """

    def __init__(
        self,
        vocab_size: int,
        forbidden: Tensor,
        num_top: int = 0,
        kernels: DecodeKernels | None = None,
    ) -> None:
        device = forbidden.device
        self._kernels = kernels
        self.forbidden = forbidden
        self.forbidden_bytes = forbidden.to(torch.int8)
        self.slots = torch.full((ROWS,), NO_SLOT, dtype=torch.int32, device=device)
        self.positions = torch.zeros(ROWS, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(ROWS, dtype=torch.int32, device=device)
        self.counts = torch.zeros(ROWS, dtype=torch.int64, device=device)
        self.max_new_tokens = torch.zeros(ROWS, dtype=torch.int64, device=device)
        self.logits = torch.zeros((ROWS, vocab_size), dtype=torch.float32, device=device)
        self.params = RowParams.empty(ROWS, vocab_size, device)
        num_blocks = 0 if kernels is None else kernels.head_blocks(vocab_size)
        self.block_max = torch.zeros((ROWS, num_blocks), dtype=torch.float32, device=device)
        self.block_argmax = torch.zeros((ROWS, num_blocks), dtype=torch.int32, device=device)
        num_sums = 0 if kernels is None else kernels.sample_blocks(vocab_size)
        self._weight_sums = torch.zeros((ROWS, num_sums), dtype=torch.float64, device=device)
        self._drawn = torch.zeros(ROWS, dtype=torch.int32, device=device)
        self.output = StepOutput(
            torch.zeros((ROWS, 2), dtype=torch.int32, device=device),
            torch.zeros((ROWS, 1 + num_top), dtype=torch.float32, device=device),
            torch.zeros((ROWS, num_top), dtype=torch.int32, device=device),
        )

    def admit(
        self,
        row: int,
        slot: int,
        position: int,
        logits: Tensor,
        params: SamplingParams,
        *,
        seed: int,
        stop_ids: Tensor,
        max_new_tokens: int,
        seen: Tensor | None,
    ) -> None:
        """Puts a request into a free row.

        Args:
            row: which.
            slot: of the cache, holding the prompt.
            position: tokens of the prompt.
            logits: (vocab_size,) at the prompt's last position.
            params: how to sample.
            seed: of the random numbers.
            stop_ids: (num,) int64 on the device.
            max_new_tokens: tokens to generate at most.
            seen: (vocab_size,) bool, or None without a repetition penalty.
        """
        # Filled: assigning a number to one element would wait for the device.
        self.slots[row : row + 1].fill_(slot)
        self.positions[row : row + 1].fill_(position - 1)  # the first choice advances it
        self.counts[row : row + 1].fill_(0)
        self.max_new_tokens[row : row + 1].fill_(max_new_tokens)
        self.logits[row] = logits
        self.params.set_row(row, params, seed, stop_ids, seen)

    def release(self, row: int) -> None:
        """Empties a row; steps given to the device after this call do nothing for it."""
        self.slots[row : row + 1].fill_(NO_SLOT)

    def choose(
        self,
        first: int,
        last: int,
        kind: SamplerKind,
        num_top: int | None,
        *,
        decoded: bool = False,
    ) -> None:
        """Samples rows first…last from their logits, reports and advances them.

        Args:
            first: row.
            last: one past the last row.
            kind: rules of sampling that any of the rows needs.
            num_top: alternatives to report; None for no log-probabilities.
            decoded: whether the decoder has just left the logits of rows 0…last, and block_max.
        """
        if self._kernels is None:
            self._choose_plain(first, last, kind)
        else:
            self._choose(self._kernels, first, last, kind, decoded=decoded)
        if num_top is not None:
            self._report(slice(first, last), num_top)

    def _choose(
        self, kernels: DecodeKernels, first: int, last: int, kind: SamplerKind, *, decoded: bool
    ) -> None:
        """By kernels: one, one more for masks or what no decoder left, two more to draw.

        The sorts of top_k and top_p are torch's.
        """
        params, scores = self.params, (self.logits, self.forbidden_bytes, self.block_max)
        masks = (params.penalty, params.seen, params.is_stop, self.counts, params.min_new_tokens)
        options: dict[str, Any] = {
            "masks": masks if kind.masks else None,
            "first_row": first,
            "num_rows": last - first,
        }
        if kind.masks or not decoded:
            kernels.sample_best(*scores, self.block_argmax, **options)
        if kind.random:
            options["kept"] = self._kept(first, last, kind) if kind.sorts else None
            weights = (*scores, params.temperature, params.min_p, self._weight_sums)
            kernels.sample_weights(*weights, **options)
            kernels.sample_draw(*weights, params.seed, self.counts, self._drawn, **options)
        kernels.decode_finish(
            self.block_max,
            self.block_argmax,
            params.is_stop,
            self.max_new_tokens,
            self.slots,
            self.positions,
            self.counts,
            self.tokens,
            self.output.tokens,
            drawn=self._drawn if kind.random else None,
            temperature=params.temperature if kind.random else None,
            seen=params.seen if kind.masks else None,
            first_row=first,
            num_rows=last - first,
        )

    def _kept(self, first: int, last: int, kind: SamplerKind) -> Tensor:
        logits, counts = self.logits[first:last], self.counts[first:last]
        params = self.params.rows(first, last)
        return kept_rows(logits, params, counts, self.forbidden, masks=kind.masks)

    def _choose_plain(self, first: int, last: int, kind: SamplerKind) -> None:
        rows = slice(first, last)
        logits, params = self.logits[rows], self.params.rows(first, last)
        slots, counts, tokens = self.slots[rows], self.counts[rows], self.tokens[rows]
        chosen = sample_rows(logits, params, counts, self.forbidden, kind)
        used = slots >= 0
        index = chosen.clamp(min=0)[:, None]
        counts += used
        self.positions[rows] += used
        ended = torch.where(counts >= self.max_new_tokens[rows], LENGTH, RUNNING)
        ended = torch.where(params.is_stop.gather(1, index)[:, 0], STOP, ended)
        ended = torch.where(chosen == ERROR_TOKEN, ERROR, ended)
        self.output.tokens[rows, 0] = torch.where(used, chosen, -1).int()
        self.output.tokens[rows, 1] = torch.where(used, ended, RUNNING).int()
        if kind.masks:
            params.seen.scatter_(1, index, True)
        tokens.copy_(index[:, 0])
        slots.masked_fill_(ended != RUNNING, NO_SLOT)

    def _report(self, rows: slice, num_top: int) -> None:
        """The log-probabilities of the tokens just chosen, and of the most likely ones."""
        logprobs, index = self.logits[rows].log_softmax(dim=1), self.tokens[rows, None].long()
        self.output.logprobs[rows, 0] = logprobs.gather(1, index)[:, 0]
        if num_top:
            # A stable sort, not topk: equals stand by rising id.
            falling, ids = logprobs.sort(dim=1, descending=True, stable=True)
            self.output.logprobs[rows, 1 : 1 + num_top] = falling[:, :num_top]
            self.output.top_ids[rows, :num_top] = ids[:, :num_top].int()


class RowDecoder(Protocol):
    """Computes one step of the language model for rows."""

    def decode(self, rows: RowState, num_rows: int, num_splits: int) -> None:
        """Appends each row's token to its slot and writes the row's logits.

        With kernels, also the best ids of blocks.

        Args:
            rows: the group; rows without a slot are left alone.
            num_rows: rows to look at.
            num_splits: parts of the context that the longest row can have.
        """


def run_step(rows: RowState, decoder: RowDecoder, plan: StepPlan) -> None:
    """Decodes the last tokens of all rows and chooses the next."""
    decoder.decode(rows, plan.num_rows, plan.num_splits)
    rows.choose(0, plan.num_rows, plan.kind, plan.num_top, decoded=True)
