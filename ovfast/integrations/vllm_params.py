"""vLLM's SamplingParams, and what of it an engine does; the rest is refused, never ignored."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Self

from ovfast import sampling
from ovfast.errors import OptionError

__all__ = ["HONOURED", "NO_EFFECT", "RequestOutputKind", "SamplingParams", "engine_params"]

GREEDY_BELOW = 1e-5  # vLLM takes lower temperatures for zero
ALL_LOGPROBS = -1

HONOURED = (
    "n",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "detokenize",
    "include_stop_str_in_output",
)
# Accepted without effect: how outputs travel, what caches may be read, and spaces between special
# tokens, which are never part of a text here.
NO_EFFECT = (
    "spaces_between_special_tokens",
    "output_kind",
    "stream_interval",
    "skip_clone",
    "skip_reading_prefix_cache",
    "routed_experts_prompt_start",
)


class RequestOutputKind(Enum):
    """What a stream of outputs repeats; LLM has no stream."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    """vLLM's fields with vLLM's defaults; fields beyond HONOURED and NO_EFFECT raise once set.

    As in vLLM, max_tokens is 16 by default, and temperature 1.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: list[int] | None = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    skip_clone: bool = False
    structured_outputs: Any = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    bad_words: list[str] | None = field(default_factory=list)
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: Any = None
    routed_experts_prompt_start: int = 0
    trace_decode_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        if self.seed == -1:
            self.seed = None
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        self.stop_token_ids = self.stop_token_ids or []
        self.bad_words = self.bad_words or []
        self.logprobs = 1 if self.logprobs is True else self.logprobs
        self.check()

    @classmethod
    def from_optional(cls, **values: Any) -> Self:
        """Parameters of values of which None takes the default; max_tokens may be None."""
        return cls(**{k: v for k, v in values.items() if v is not None or k == "max_tokens"})

    def clone(self) -> Self:
        """A copy."""
        return deepcopy(self)

    def check(self) -> None:
        """Refuses what ovfast does not do; also asked when a request begins, as fields may change.

        Raises:
            OptionError: a field that is not supported, or a wrong value.
        """
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in HONOURED or each.name in NO_EFFECT or value == _neutral(each):
                continue
            raise OptionError(
                f"SamplingParams({each.name}={value!r:.100}); ovfast supports"
                f" {', '.join(HONOURED)}. Leave {each.name} out."
            )
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise OptionError(f"n={self.n!r}; expected an integer of at least 1.")
        engine_params(self, vocab_size=1, room=1 << 62)
        if self.temperature < GREEDY_BELOW and self.n > 1:
            raise OptionError(
                f"n={self.n} with temperature={self.temperature}; greedy answers would all be the"
                " same. Raise the temperature, or leave n at 1."
            )
        if self.stop and not self.detokenize:
            raise OptionError("stop strings with detokenize=False; expected one of them.")


def engine_params(
    params: SamplingParams, *, vocab_size: int, room: int, seed: int | None = None
) -> sampling.SamplingParams:
    """Parameters of an engine.

    Args:
        params: checked.
        vocab_size: of the model, for logprobs=-1.
        room: tokens that fit behind the prompt; max_tokens is cut to them, as vLLM does.
        seed: where params has none.

    Raises:
        OptionError: a wrong value.
    """
    temperature = params.temperature
    if isinstance(temperature, int | float) and 0 <= temperature < GREEDY_BELOW:
        temperature = 0.0
    max_tokens, min_tokens = params.max_tokens, params.min_tokens
    if isinstance(max_tokens, int) and max_tokens > room:
        max_tokens = max(1, room)
        min_tokens = min(min_tokens, max_tokens)
    stop: Sequence[str] = params.stop or ()
    return sampling.SamplingParams(
        temperature=temperature,
        top_p=params.top_p,
        top_k=None if params.top_k in (0, -1) else params.top_k,
        min_p=params.min_p,
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        repetition_penalty=params.repetition_penalty,
        seed=seed if params.seed is None else params.seed,
        stop=stop,
        stop_token_ids=params.stop_token_ids or (),
        ignore_eos=params.ignore_eos,
        logprobs=vocab_size if params.logprobs == ALL_LOGPROBS else params.logprobs,
    )


def _neutral(each: Any) -> Any:
    """The default of a field that is refused once it has another value."""
    return [] if each.name == "bad_words" else each.default
