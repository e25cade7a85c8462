"""The sampler of `sampling` for several rows at once, without reading the device.

Same rules, same random numbers, same ties; every value a tensor, so that a step can be captured and
the host learns the tokens later. Sums run in float64 where `sampling` compares float32 sums, so a
token at the very edge of top_p may fall to the other side.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ovfast.sampling import SamplingParams

__all__ = [
    "ERROR_TOKEN",
    "RowParams",
    "SamplerKind",
    "kept_rows",
    "philox_uniform_rows",
    "sample_rows",
]

ERROR_TOKEN = -2  # in place of a token: logits that are not finite, or nothing left to choose from
_MIN_TEMPERATURE = 1e-30
_MAX_FLOAT32 = torch.finfo(torch.float32).max
_MAX_INT = 2**62
_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class SamplerKind:
    """Which rules some row of a step needs: what is left out costs nothing.

    Attributes:
        masks: repetition penalty or min_new_tokens.
        random: temperature above 0.
        sorts: top_k or top_p.
    """

    masks: bool = False
    random: bool = False
    sorts: bool = False

    @staticmethod
    def of(params: SamplingParams) -> "SamplerKind":
        """What one request needs."""
        random = params.temperature > 0
        return SamplerKind(
            masks=params.repetition_penalty != 1.0 or params.min_new_tokens > 0,
            random=random,
            sorts=random and (params.top_k is not None or params.top_p < 1.0),
        )

    def __or__(self, other: "SamplerKind") -> "SamplerKind":
        return SamplerKind(
            self.masks or other.masks, self.random or other.random, self.sorts or other.sorts
        )


@dataclass(frozen=True, slots=True)
class RowParams:
    """SamplingParams of rows, on the device.

    Attributes:
        temperature, top_p, min_p, penalty: (num_rows,) float32.
        top_k: (num_rows,) int64, the vocabulary's size where there is none.
        min_new_tokens: (num_rows,) int64.
        seed: (num_rows, 2) int64, low and high 32 bits.
        seen: (num_rows, vocab_size) bool, ids the repetition penalty touches.
        is_stop: (num_rows, vocab_size) bool, ids that end the answer.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor
    top_k: Tensor
    min_new_tokens: Tensor
    seed: Tensor
    seen: Tensor
    is_stop: Tensor

    @staticmethod
    def empty(num_rows: int, vocab_size: int, device: torch.device) -> "RowParams":
        """Greedy rows without stops."""

        def floats(value: float) -> Tensor:
            return torch.full((num_rows,), value, dtype=torch.float32, device=device)

        def flags() -> Tensor:
            return torch.zeros((num_rows, vocab_size), dtype=torch.bool, device=device)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return RowParams(
            temperature=floats(0.0),
            top_p=floats(1.0),
            min_p=floats(0.0),
            penalty=floats(1.0),
            top_k=integers(num_rows) + vocab_size,
            min_new_tokens=integers(num_rows),
            seed=integers(num_rows, 2),
            seen=flags(),
            is_stop=flags(),
        )

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        stop_ids: Tensor,
        seen: Tensor | None,
    ) -> None:
        """Writes one row, in stream order.

        Args:
            row: which.
            params: of the request.
            seed: 64 bits.
            stop_ids: (num,) int64 on the device.
            seen: (vocab_size,) bool, or None without a repetition penalty.
        """
        vocab_size = self.seen.shape[1]
        # Filled: assigning a number to one element would wait for the device.
        self.temperature[row : row + 1].fill_(min(params.temperature, _MAX_FLOAT32))
        self.top_p[row : row + 1].fill_(params.top_p)
        self.min_p[row : row + 1].fill_(params.min_p)
        self.penalty[row : row + 1].fill_(min(params.repetition_penalty, _MAX_FLOAT32))
        self.top_k[row : row + 1].fill_(min(params.top_k or vocab_size, vocab_size))
        self.min_new_tokens[row : row + 1].fill_(min(params.min_new_tokens, _MAX_INT))
        self.seed[row, :1].fill_(seed & _MASK32)
        self.seed[row, 1:].fill_(seed >> 32 & _MASK32)
        self.is_stop[row].fill_(False)
        self.is_stop[row].index_fill_(0, stop_ids, True)
        if seen is not None:
            self.seen[row] = seen

    def rows(self, first: int, last: int) -> "RowParams":
        """Views of some rows."""
        return RowParams(*(getattr(self, name)[first:last] for name in self.__slots__))


def sample_rows(
    logits: Tensor, params: RowParams, index: Tensor, forbidden: Tensor, kind: SamplerKind
) -> Tensor:
    """One token for each row, as `sampling.sample`.

    Args:
        logits: (num_rows, vocab_size) float32; not changed.
        params: of the rows.
        index: (num_rows,) int64, number of the token in each output, from 0.
        forbidden: (vocab_size,) bool, ids never generated.
        kind: rules that any of the rows needs.

    Returns:
        (num_rows,) int64 ids, ERROR_TOKEN where no token can be chosen.
    """
    scores = _allowed_scores(logits, params, index, forbidden, masks=kind.masks)
    top, tokens = scores.max(dim=1)
    if kind.random:
        weights, kept = _weights(_scaled(scores, top, params), params, sorts=kind.sorts)
        kept &= weights >= params.min_p[:, None]
        drawn = _draw(weights.masked_fill(~kept, 0.0), params, index)
        tokens = torch.where(params.temperature > 0, drawn, tokens)
    return torch.where(top.isfinite(), tokens, ERROR_TOKEN)


def kept_rows(
    logits: Tensor, params: RowParams, index: Tensor, forbidden: Tensor, *, masks: bool
) -> Tensor:
    """Ids that top_k and top_p leave to draw from.

    Args:
        logits: (num_rows, vocab_size) float32; not changed.
        params: of the rows.
        index: (num_rows,) int64, number of the token in each output, from 0.
        forbidden: (vocab_size,) bool, ids never generated.
        masks: whether any of the rows needs a repetition penalty or min_new_tokens.

    Returns:
        (num_rows, vocab_size) bool.
    """
    scores = _allowed_scores(logits, params, index, forbidden, masks=masks)
    return _weights(_scaled(scores, scores.amax(dim=1), params), params, sorts=True)[1]


def _allowed_scores(
    logits: Tensor, params: RowParams, index: Tensor, forbidden: Tensor, *, masks: bool
) -> Tensor:
    scores = logits.float().masked_fill(forbidden, -math.inf)
    if masks:
        penalty = params.penalty[:, None]
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(params.seen & (penalty != 1.0), penalised, scores)
        early = (index < params.min_new_tokens)[:, None]
        scores = scores.masked_fill(params.is_stop & early, -math.inf)
    return scores


def _scaled(scores: Tensor, top: Tensor, params: RowParams) -> Tensor:
    """By the temperature; the maximum, top, is 0."""
    return (scores - top[:, None]) / params.temperature.clamp(min=_MIN_TEMPERATURE)[:, None]


def _weights(scores: Tensor, params: RowParams, *, sorts: bool) -> tuple[Tensor, Tensor]:
    """Weights of scores with the maximum 0, and which of them top_k and top_p keep."""
    kept = scores >= torch.finfo(scores.dtype).min
    if sorts:
        falling = scores.sort(dim=1, descending=True).values
        kept &= scores >= falling.gather(1, params.top_k[:, None] - 1)
    weights = scores.exp().masked_fill(~kept, 0.0)
    if sorts:
        kept &= _nucleus(weights, params.top_p)
    return weights, kept


def _draw(weights: Tensor, params: RowParams, index: Tensor) -> Tensor:
    """Tokens by inverting the distribution in the order of ids."""
    cumulative = weights.double().cumsum(dim=1)
    uniform = philox_uniform_rows(params.seed, index)
    target = cumulative[:, -1:] * uniform[:, None]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return drawn.clamp(max=weights.shape[1] - 1)


def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """(num_rows, vocab_size) bool: the least likely whose sum is at most 1 − top_p are dropped."""
    probabilities = weights / weights.sum(dim=1, keepdim=True)
    # Stable, so that which of several equals is kept does not hang on the sort.
    ordered, order = probabilities.sort(dim=1, stable=True)
    remove = ordered.double().cumsum(dim=1) <= 1.0 - top_p.double()[:, None]
    remove[:, -1] = False
    remove &= (top_p < 1.0)[:, None]
    return ~torch.zeros_like(remove).scatter(1, order, remove)


def philox_uniform_rows(seed: Tensor, index: Tensor) -> Tensor:
    """As `sampling.philox_uniform` for rows: (num_rows,) float64 in [0, 1).

    Args:
        seed: (num_rows, 2) int64, low and high 32 bits.
        index: (num_rows,) int64, non-negative.
    """
    c0, c1 = index & _MASK32, index >> 32
    c2, c3 = torch.zeros_like(index), torch.zeros_like(index)
    k0, k1 = seed[:, 0], seed[:, 1]
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return (c0 >> 8).double() * 2.0**-24


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words, in int64, which cannot hold it whole."""
    lower = word * (factor & 0xFFFF)
    upper = word * (factor >> 16) + (lower >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | lower & 0xFFFF
