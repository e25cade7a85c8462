"""SamplingParams, the sampler, its random numbers, log-probabilities and stop strings.

Owns the choice of one token from one row of logits. Does not own the loop, the stop ids' meaning
or the text: the engine asks for a token, then feeds the decoded text to `StopStrings`.
"""

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from ovfast.errors import BackendError, OptionError

_MASK32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10
# Below it a division could overflow to inf or, flushed to zero, give 0 / 0.
_MIN_TEMPERATURE = 1e-30
_MAX_FLOAT = sys.float_info.max


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one answer are chosen and when it ends.

    Applied in this order: repetition penalty, temperature, top_k, top_p, min_p.

    Args:
        max_new_tokens: at most so many, or None until a stop id or the end of the context.
        temperature: 0 takes the most likely token (the lowest id of equals).
        top_k: keep the k most likely (and those equal to the last of them), or None for all.
        top_p: keep the most likely tokens that together reach this probability; 1 keeps all.
        min_p: drop tokens less likely than this share of the most likely one; 0 drops none.
        repetition_penalty: over prompt and output, as in transformers; 1 is none.
        seed: of the random numbers, or None to draw one, which the output reports.
        stop: a string or several; the answer ends before the first that appears.
        stop_token_ids: ids that end the answer, besides the checkpoint's.
        ignore_eos: do not end at the checkpoint's stop ids.
        min_new_tokens: no stop id before so many tokens, and no stop string that is complete within
            them; one that begins there and is complete later ends the answer.
        logprobs: how many likely alternatives to report for each token (0: the token's own
            log-probability alone), or None for no log-probabilities.

    Raises:
        OptionError: a value of the wrong type or out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        optional = {"max_new_tokens": 1, "top_k": 1, "seed": 0, "logprobs": 0}
        for name, low in optional.items():
            if getattr(self, name) is not None:
                self._set(name, _integer(name, getattr(self, name), low, "or None"))
        self._set("min_new_tokens", _integer("min_new_tokens", self.min_new_tokens, 0))
        self._set("temperature", _number("temperature", self.temperature, 0.0, math.inf))
        self._set("top_p", _number("top_p", self.top_p, 0.0, 1.0, above=True))
        self._set("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        penalty = _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        self._set("repetition_penalty", penalty)
        if self.seed is not None and self.seed >= 2**64:
            raise OptionError(f"seed={self.seed}; expected less than 2**64. Take it modulo 2**64.")
        if not isinstance(self.ignore_eos, bool):
            raise OptionError(
                f"ignore_eos={self.ignore_eos!r}; expected True or False. Pass a bool."
            )
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise OptionError(
                f"min_new_tokens={self.min_new_tokens} with max_new_tokens={self.max_new_tokens}; "
                "expected at most as many. Raise max_new_tokens."
            )
        self._set("stop", _strings(self.stop))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def is_greedy(self) -> bool:
        """Whether no random number is used."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token and of the most likely ones, before any masking.

    Args:
        token_id: the token.
        logprob: of that token.
        top: (token id, log-probability) of the most likely tokens, falling; equals by rising id.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def sample(
    logits: torch.Tensor,
    params: SamplingParams,
    *,
    forbidden: torch.Tensor,
    seen: torch.Tensor | None = None,
    seed: int = 0,
    index: int = 0,
    suppress_stop: Sequence[int] = (),
) -> int:
    """Choose the next token.

    As transformers' processors and warpers in the order of SamplingParams; then the kept tokens, in
    the order of their ids, share [0, 1) by probability (summed in float64), and the token at
    `philox_uniform(seed, index)` is taken. Nothing depends on the batch or on the device.

    Args:
        logits: (vocab_size,) of any float dtype; computed in float32, not changed.
        params: which rules to apply.
        forbidden: (vocab_size,) bool, tokens never generated.
        seen: (vocab_size,) bool, tokens of prompt and output; needed for repetition_penalty.
        seed: of the request.
        index: number of the token in the output, from 0.
        suppress_stop: ids not allowed yet because of min_new_tokens.

    Returns:
        The token's id.

    Raises:
        BackendError: logits that are not finite, or nothing left to choose from.
    """
    if params.is_greedy and params.repetition_penalty == 1.0:
        # Mostly the best token of all is allowed, and one pass is enough.
        token_id = int(logits.argmax())
        allowed = token_id not in suppress_stop and not forbidden[token_id]
        if allowed and math.isfinite(logits[token_id]):
            return token_id
    scores = _masked(logits, params, forbidden, seen, suppress_stop)
    best = int(scores.argmax())
    top = float(scores[best])
    if not math.isfinite(top):
        given = "every token is forbidden" if top == -math.inf else f"the largest logit is {top}"
        raise BackendError(
            f"{given}; expected finite logits and at least one allowed token. Try dtype='float32' "
            "or backend='reference', and check min_new_tokens and the checkpoint."
        )
    if params.is_greedy:
        return best
    ids, weights = _candidates((scores - top) / max(params.temperature, _MIN_TEMPERATURE), params)
    cumulative = weights.double().cumsum(0)
    target = cumulative[-1] * philox_uniform(seed, index)
    # The first whose sum exceeds the target, so tokens of weight zero are never taken.
    return int(ids[torch.searchsorted(cumulative, target, right=True)])


def token_logprob(logits: torch.Tensor, token_id: int, num_top: int = 0) -> TokenLogprob:
    """Report the log-probability of a token under the raw model.

    Args:
        logits: (vocab_size,) of any float dtype, unmasked.
        token_id: the token.
        num_top: how many of the most likely tokens to add.

    Returns:
        Log-softmax in float32.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        least = logprobs.topk(min(num_top, len(logprobs))).values[-1]
        # Not topk's own indices: which of several equals it names is unspecified.
        ids = (logprobs >= least).nonzero()[:, 0]
        values, order = logprobs[ids].sort(descending=True, stable=True)
        chosen = zip(ids[order].tolist(), values.tolist(), strict=True)
        top = tuple(chosen)[:num_top]
    return TokenLogprob(token_id, float(logprobs[token_id]), top)


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10, the counter-based generator of Random123 (Salmon et al., 2011).

    Args:
        counter: four 32-bit words.
        key: two 32-bit words.

    Returns:
        Four random 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        product0, product1 = _PHILOX_MULTIPLIERS[0] * c0, _PHILOX_MULTIPLIERS[1] * c2
        c0, c1 = (product1 >> 32) ^ c1 ^ k0, product1 & _MASK32
        c2, c3 = (product0 >> 32) ^ c3 ^ k1, product0 & _MASK32
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK32, (k1 + _PHILOX_WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def philox_uniform(seed: int, index: int) -> float:
    """The random number of one token: the same on every back end and in every batch.

    Args:
        seed: 64 bits, the key (low word first).
        index: of the token, 64 bits, the low half of the counter (low word first).

    Returns:
        In [0, 1): the upper 24 bits of the first word · 2⁻²⁴, so float32 holds it exactly.
    """
    counter = (index & _MASK32, index >> 32 & _MASK32, 0, 0)
    words = philox4x32(counter, (seed & _MASK32, seed >> 32 & _MASK32))
    return (words[0] >> 8) * 2.0**-24


class StopStrings:
    """Finds stop strings in text that arrives in pieces, whatever the pieces.

    The text ends before the stop string that is complete first; where several are complete at the
    same character, before the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str, *, counts: bool = True) -> tuple[str, bool]:
        """Take the next piece.

        Args:
            text: what follows all that was pushed before.
            counts: whether a stop string that is complete in this piece ends the text.

        Returns:
            (text that cannot belong to a stop string any more, whether a stop string was found).
            After a stop string everything is swallowed.
        """
        if self._stopped:
            return "", True
        num_held, text = len(self._held), self._held + text
        # Not what is complete in the held text: it did not count.
        firsts = [(stop, max(0, num_held + 1 - len(stop))) for stop in self._stops]
        found = [(text.find(stop, first), len(stop)) for stop, first in firsts]
        complete = [(start + length, start) for start, length in found if start >= 0]
        if complete and counts:
            self._stopped, self._held = True, ""
            return text[: min(complete)[1]], True
        # Held back: the longest end of the text that a stop string begins with.
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        ends = (text[len(text) - length :] for length in range(longest, 0, -1))
        held = next((e for e in ends if any(s != e and s.startswith(e) for s in self._stops)), "")
        self._held = held
        return text[: len(text) - len(held)], False

    def flush(self) -> str:
        """End the text.

        Returns:
            What was held back as a possible beginning of a stop string.
        """
        held, self._held = self._held, ""
        return held


def _masked(
    logits: torch.Tensor,
    params: SamplingParams,
    forbidden: torch.Tensor,
    seen: torch.Tensor | None,
    suppress_stop: Sequence[int],
) -> torch.Tensor:
    scores = logits.float()
    if params.repetition_penalty != 1.0:
        assert seen is not None
        penalty = params.repetition_penalty
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen, penalised, scores)
    scores = scores.masked_fill(forbidden, -math.inf)
    if suppress_stop:
        scores[list(suppress_stop)] = -math.inf
    return scores


def _candidates(scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept ids, rising, and their weights; scores are logits / temperature with maximum 0."""
    least = torch.finfo(scores.dtype).min
    if params.top_k is not None and params.top_k < len(scores):
        # Equals of the k-th stay, so that the choice does not hang on the order of a sort.
        least = max(least, float(scores.topk(params.top_k, sorted=False).values.min()))
    ids = (scores >= least).nonzero()[:, 0]
    weights = scores[ids].exp()
    if params.top_p < 1.0:
        kept = _nucleus(weights / weights.sum(), params.top_p)
        ids, weights = ids[kept], weights[kept]
    if params.min_p > 0.0:
        kept = weights >= params.min_p  # the largest weight is exp(0)
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """(num,) bool: less likely tokens whose sum is at most 1 − top_p are dropped."""
    # All tokens under this bound together are dropped whatever their order: no need to sort them.
    kept = probabilities > (1.0 - top_p) / len(probabilities)
    kept |= probabilities == probabilities.max()
    dropped = probabilities.masked_fill(kept, 0.0).sum()
    ids = kept.nonzero()[:, 0]
    # Stable, so that which of several equals is kept does not hang on the sort.
    ordered, order = probabilities[ids].sort(stable=True)
    remove = ordered.cumsum(0) + dropped <= 1.0 - top_p
    remove[-1:] = False
    kept[ids[order[remove]]] = False
    return kept


def _integer(name: str, value: Any, low: int, other: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low:
        allowed = f"an integer of at least {low}" + (f" {other}" if other else "")
        raise OptionError(f"{name}={value!r}; expected {allowed}. {_hint(name, value)}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, Real):
        with suppress(OverflowError):  # an integer of hundreds of digits
            number = float(value)
    if not (low < number if above else low <= number) or not number <= min(high, _MAX_FLOAT):
        allowed = f"a finite number {'above' if above else 'of at least'} {low:g}"
        allowed += f" and at most {high:g}" if high < math.inf else ""
        raise OptionError(f"{name}={value!r}; expected {allowed}. {_hint(name, value)}")
    return number


def _hint(name: str, value: Any) -> str:
    if isinstance(value, str):
        return "Convert the string to a number."
    hints = {
        "max_new_tokens": "None generates until a stop id.",
        "temperature": "0 is greedy, 1 the model's own distribution.",
        "top_k": "None keeps all tokens.",
        "top_p": "1.0 keeps all tokens; for the most likely one use temperature=0.",
        "min_p": "0.0 keeps all tokens.",
        "repetition_penalty": "1.0 is no penalty.",
        "seed": "None draws one and reports it.",
        "logprobs": "0 reports the chosen token's alone, None nothing.",
    }
    return hints.get(name, "Leave it out for the default.")


def _strings(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, (list, tuple)) or not all(
        isinstance(each, str) and each for each in stops
    ):
        raise OptionError(
            f"stop={stop!r}; expected a string or a list of strings, none empty. "
            "Leave stop out to use stop ids only."
        )
    return tuple(dict.fromkeys(stops))


def _token_ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, (list, tuple)):
        raise OptionError(
            f"stop_token_ids={ids!r}; expected a list of token ids. Put a single id in a list."
        )
    return tuple(_integer("stop_token_ids", each, 0) for each in ids)
