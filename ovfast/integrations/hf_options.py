"""What transformers' `generate` takes, turned into what an engine does; the rest is refused.

Defaults come from where transformers takes them: arguments first, then a generation config given,
then the model's own, then its global ones (20 new tokens; top_k of 50 when sampling).
"""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ovfast.errors import OptionError
from ovfast.sampling import SamplingParams

__all__ = ["FORWARD_INPUTS", "HONOURED", "NO_EFFECT", "Generation", "plan_generation"]

HONOURED = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "eos_token_id",
    "pad_token_id",
    "stop_strings",
    "max_time",
    "num_return_sequences",
    "suppress_tokens",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
)
# Fields of a generation config that say how to compute, or that belong to ways of decoding which
# are refused by themselves: no answer depends on them here.
NO_EFFECT = (
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "prefill_chunk_size",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "bos_token_id",
    "decoder_start_token_id",
    "early_stopping",
    "length_penalty",
    "low_memory",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "transformers_version",
)
# Values under which a refused field changes nothing; None and False always do.
NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "guidance_scale": 1.0,
}
GLOBAL_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
DEFAULT_NEW_TOKENS = 20
# What the model's forward takes besides; image_sizes_videos is read by neither side.
FORWARD_INPUTS = (
    "input_ids",
    "pixel_values",
    "image_sizes",
    "pixel_values_videos",
    "image_sizes_videos",
    "attention_mask",
    "batch_num_images",
)

Criterion = Callable[..., Any]


@dataclass(frozen=True)
class Generation:
    """One call of `generate`, checked.

    Attributes:
        options: of SamplingParams, the seed apart.
        eos_token_ids: ids that end a row.
        pad_token_id: what fills rows that end early; None where there is none.
        num_return_sequences: answers a prompt.
        criteria: stopping criteria, asked after each token.
        return_dict, output_scores, output_logits: what is returned.
    """

    options: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    num_return_sequences: int
    criteria: tuple[Criterion, ...]
    return_dict: bool
    output_scores: bool
    output_logits: bool

    @property
    def is_greedy(self) -> bool:
        return "temperature" not in self.options

    def sampling(self) -> SamplingParams:
        """Parameters of one request; seeds come from torch, so `torch.manual_seed` fixes them."""
        seed = None if self.is_greedy else int(torch.randint(0, 2**63 - 1, ()))
        return SamplingParams(**self.options, seed=seed)


def plan_generation(
    transformers: Any,
    sources: Sequence[Mapping[str, Any]],
    *,
    prompt_length: int,
    tokenizer: Any = None,
    stopping_criteria: Any = None,
    never_generated: Collection[int] = (),
) -> Generation:
    """Checks the options of a call.

    Args:
        transformers: the module.
        sources: options, the strongest first: arguments (None counts), then fields of generation
            configs (None does not).
        prompt_length: of the padded prompts.
        tokenizer: for stop_strings.
        stopping_criteria: None, a criterion, or a list of them.
        never_generated: ids that the engine suppresses by itself.

    Raises:
        OptionError: an option that is wrong, or that ovfast does not compute.
    """
    merged = _merge(sources)
    _refuse_unsupported(merged)
    _check_suppressed(merged.get("suppress_tokens"), never_generated)
    eos = _ids("eos_token_id", merged.get("eos_token_id"))
    pad = _integer(merged, "pad_token_id", 0, eos[0] if eos else None)
    sampled = bool(merged.get("do_sample"))
    count = _integer(merged, "num_return_sequences", 1, 1)
    if not sampled and count != 1:
        raise OptionError(
            f"num_return_sequences={count} without do_sample; greedy answers would all be the same."
            " Pass do_sample=True."
        )
    new_tokens = _new_tokens(merged, prompt_length)
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": min(_min_tokens(merged, prompt_length), new_tokens),
        "ignore_eos": True,  # the ids to stop at are the call's, not the checkpoint's
        "stop_token_ids": eos,
    }
    if (penalty := merged.get("repetition_penalty")) is not None:
        options["repetition_penalty"] = penalty
    if sampled:
        options |= _sampled(merged)
    generation = Generation(
        options,
        eos,
        pad,
        count,
        _criteria(transformers, merged, tokenizer, stopping_criteria),
        bool(merged.get("return_dict_in_generate")),
        bool(merged.get("output_scores")),
        bool(merged.get("output_logits")),
    )
    _check_outputs(generation)
    return generation


def _merge(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    arguments, *configs = sources
    merged = dict(GLOBAL_DEFAULTS)
    for config in reversed(configs):
        merged |= {name: value for name, value in config.items() if value is not None}
    return merged | dict(arguments)


def _refuse_unsupported(merged: Mapping[str, Any]) -> None:
    for name, value in merged.items():
        if name in HONOURED or name in NO_EFFECT or name.startswith("_"):
            continue
        if value is None or value is False or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        raise OptionError(
            f"{name}={value!r:.100}; ovfast decodes greedily or samples with temperature, top_k,"
            f" top_p, min_p and repetition_penalty, and does not compute {name}. Leave it out, or"
            " pass None where a generation config sets it."
        )


def _check_suppressed(tokens: Any, never_generated: Collection[int]) -> None:
    wanted = set(_ids("suppress_tokens", tokens)) - set(never_generated)
    if wanted:
        raise OptionError(
            f"suppress_tokens with {sorted(wanted)[:5]}; ovfast suppresses only what it never"
            " generates: media placeholders and ids without a token. Leave suppress_tokens out."
        )


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    values = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(each, int) and each >= 0 for each in values):
        raise OptionError(f"{name}={value!r:.100}; expected a token id or a list of token ids.")
    return tuple(dict.fromkeys(values))


def _integer(merged: Mapping[str, Any], name: str, low: int, default: int | None) -> Any:
    value = merged.get(name)
    if value is None:
        return default
    try:
        number = operator.index(value)  # of NumPy and torch too
    except TypeError:
        number = low - 1
    if number < low:
        raise OptionError(f"{name}={value!r:.100}; expected an integer of at least {low}.")
    return number


def _new_tokens(merged: Mapping[str, Any], prompt_length: int) -> int:
    if merged.get("max_new_tokens") is None and merged.get("max_length") is not None:
        return int(_integer(merged, "max_length", prompt_length + 1, 0)) - prompt_length
    return int(_integer(merged, "max_new_tokens", 1, DEFAULT_NEW_TOKENS))


def _min_tokens(merged: Mapping[str, Any], prompt_length: int) -> int:
    least = max(0, _integer(merged, "min_length", 0, 0) - prompt_length)
    return int(_integer(merged, "min_new_tokens", 0, least))


def _sampled(merged: Mapping[str, Any]) -> dict[str, Any]:
    temperature = merged.get("temperature")
    if temperature == 0:
        raise OptionError(
            f"temperature={temperature!r} with do_sample=True; expected a number above 0. For the"
            " most likely tokens pass do_sample=False."
        )
    options = {"temperature": 1.0 if temperature is None else temperature}
    options["top_k"] = merged.get("top_k") or None
    for name in ("top_p", "min_p"):
        if merged.get(name) is not None:
            options[name] = merged[name]
    return options


def _criteria(
    transformers: Any, merged: Mapping[str, Any], tokenizer: Any, given: Any
) -> tuple[Criterion, ...]:
    criteria = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    if not all(map(callable, criteria)):
        raise OptionError(f"stopping_criteria={given!r:.100}; expected a callable or several.")
    max_time = merged.get("max_time")
    if max_time is not None:
        if not isinstance(max_time, int | float):
            raise OptionError(f"max_time={max_time!r}; expected seconds, a number.")
        criteria.append(transformers.MaxTimeCriteria(max_time=max_time))
    if merged.get("stop_strings") is not None:
        if tokenizer is None:
            raise OptionError("stop_strings without tokenizer; pass tokenizer=processor.tokenizer.")
        criteria.append(
            transformers.StopStringCriteria(
                stop_strings=merged["stop_strings"], tokenizer=tokenizer
            )
        )
    return tuple(criteria)


def _check_outputs(generation: Generation) -> None:
    if not (generation.return_dict and generation.output_scores):
        return
    if not generation.is_greedy or generation.options.get("repetition_penalty", 1.0) != 1.0:
        raise OptionError(
            "output_scores with sampling or a repetition penalty; ovfast keeps no processed scores."
            " Pass output_logits=True for the model's own logits."
        )
