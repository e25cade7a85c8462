"""Parameters of OpenAI's chat completions, and those that clients of other servers add."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ovfast.errors import OptionError
from ovfast.sampling import SamplingParams

__all__ = ["HONOURED", "NO_EFFECT", "Completion", "parse_options", "unsupported"]

# Parameters that are honoured, with the field of SamplingParams where there is one.
HONOURED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "n": None,
    "logprobs": None,
    "top_logprobs": None,
    "mm_processor_kwargs": None,
    "continue_final_message": None,
    "add_generation_prompt": None,
}
# Accepted without effect: who asks, how answers travel, and what a scheduler or a cache may do.
NO_EFFECT = (
    "user",
    "stream",
    "stream_options",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "extra_headers",
    "cache_salt",
    "priority",
    "request_id",
)
# Refused, but for the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "echo": (False,),
}


@dataclass(frozen=True, slots=True)
class Completion:
    """What a request asks for.

    Attributes:
        sampling: parameters of its answers; greedy where no temperature is given.
        n: answers.
        continue_final: go on with the last message.
        visual: mm_processor_kwargs as given.
    """

    sampling: SamplingParams
    n: int
    continue_final: bool
    visual: Any

    def seeded(self, seed: int) -> list[SamplingParams]:
        """Parameters of each answer: seeds that follow each other, from `seed` if none was given.

        One answer without a seed keeps none.
        """
        if self.n == 1:
            return [self.sampling]
        first = seed if self.sampling.seed is None else self.sampling.seed
        return [replace(self.sampling, seed=(first + index) % 2**64) for index in range(self.n)]


def unsupported(params: Mapping[str, Any]) -> list[str]:
    """Names of parameters that ask for what ovfast does not do."""
    return [
        name
        for name, value in params.items()
        if name not in HONOURED
        and name not in NO_EFFECT
        and value is not None
        and not any(value == neutral for neutral in NEUTRAL.get(name, ()))
    ]


def parse_options(params: Mapping[str, Any]) -> Completion:
    """Checks parameters; those of `unsupported` have been taken out or refused.

    Raises:
        OptionError: a wrong value.
    """
    given = {name: value for name, value in params.items() if value is not None}
    fields = {HONOURED[name]: given[name] for name in HONOURED if name in given and HONOURED[name]}
    if fields.get("top_k") in (0, -1):
        del fields["top_k"]
    count, top = given.get("n", 1), given.get("top_logprobs", 0)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise OptionError(f"n={count!r}; expected an integer of at least 1.")
    if not isinstance(given.get("logprobs", False), bool):
        raise OptionError(
            f"logprobs={given['logprobs']!r}; expected True or False. Pass the number of"
            " alternatives as top_logprobs."
        )
    continues = bool(given.get("continue_final_message", False))
    if given.get("add_generation_prompt", not continues) == continues:
        raise OptionError(
            f"continue_final_message={continues} with add_generation_prompt="
            f"{given['add_generation_prompt']}; expected one of them."
        )
    if given.get("logprobs", False):
        fields["logprobs"] = top
    elif top:
        raise OptionError(f"top_logprobs={top} without logprobs; pass logprobs=True.")
    names = {str(name): value for name, value in fields.items()}
    return Completion(SamplingParams(**names), count, continues, given.get("mm_processor_kwargs"))
