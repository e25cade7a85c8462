"""Names, order and defaults of vLLM's classes, as in vllm/sampling_params.py, outputs.py,
logprobs.py and entrypoints/llm.py of releases 0.16 to 0.33.
"""

import inspect
from dataclasses import MISSING, fields
from typing import Any

import pytest

from ovfast import OptionError
from ovfast.integrations import vllm_api, vllm_arguments, vllm_params
from ovfast.integrations.vllm_api import LLM, SamplingParams

SAMPLING_DEFAULTS: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": [],  # of None, once constructed
    "stop_token_ids": [],
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "prompt_logprob_token_ids": None,
    "prompt_logprob_start": None,
    "logprob_token_ids": None,
    "flat_logprobs": False,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": vllm_api.RequestOutputKind.CUMULATIVE,
    "stream_interval": None,
    "skip_clone": False,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "extra_args": None,
    "bad_words": [],
    "skip_reading_prefix_cache": None,
    "thinking_token_budget": None,
    "repetition_detection": None,
    "routed_experts_prompt_start": 0,
    "trace_decode_token_ids": None,
}
COMPLETION = {
    "index": MISSING,
    "text": MISSING,
    "token_ids": MISSING,
    "cumulative_logprob": MISSING,
    "logprobs": MISSING,
    "routed_experts": None,
    "finish_reason": None,
    "stop_reason": None,
    "lora_request": None,
    "kv_transfer_params": None,
}
REQUEST = {
    "request_id": MISSING,
    "prompt": MISSING,
    "prompt_token_ids": MISSING,
    "prompt_logprobs": MISSING,
    "outputs": MISSING,
    "finished": MISSING,
    "metrics": None,
    "lora_request": None,
    "encoder_prompt": None,
    "encoder_prompt_token_ids": None,
    "num_cached_tokens": None,
    "kv_transfer_params": None,
}
LLM_ARGUMENTS = """
    model runner convert tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code
    allowed_local_media_path allowed_media_domains tensor_parallel_size dtype quantization
    revision tokenizer_revision seed gpu_memory_utilization swap_space cpu_offload_gb
    enforce_eager enable_return_routed_experts disable_custom_all_reduce hf_token hf_overrides
    mm_processor_kwargs pooler_config structured_outputs_config profiler_config attention_config
    kv_cache_memory_bytes compilation_config logits_processors
"""
GENERATE = {
    "prompts": inspect.Parameter.empty,
    "sampling_params": None,
    "use_tqdm": True,
    "lora_request": None,
    "priority": None,
    "tokenization_kwargs": None,
    "mm_processor_kwargs": None,
}
CHAT = {
    "messages": inspect.Parameter.empty,
    "sampling_params": None,
    "use_tqdm": True,
    "lora_request": None,
    "chat_template": None,
    "chat_template_content_format": "auto",
    "add_generation_prompt": True,
    "continue_final_message": False,
    "tools": None,
    "chat_template_kwargs": None,
    "tokenization_kwargs": None,
    "mm_processor_kwargs": None,
}
REFUSED = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "prompt_logprobs": 1,
    "prompt_logprob_token_ids": [1],
    "prompt_logprob_start": 1,
    "logprob_token_ids": [1],
    "flat_logprobs": True,
    "skip_special_tokens": False,
    "structured_outputs": {"regex": "a"},
    "logit_bias": {1: 2.0},
    "allowed_token_ids": [1],
    "extra_args": {"x": 1},
    "bad_words": ["x"],
    "thinking_token_budget": 3,
    "repetition_detection": object(),
    "trace_decode_token_ids": [1],
}


def test_sampling_params() -> None:
    assert vars(SamplingParams()) == SAMPLING_DEFAULTS
    assert list(SAMPLING_DEFAULTS) == [each.name for each in fields(SamplingParams)]
    tables = (vllm_params.HONOURED, vllm_params.NO_EFFECT, tuple(REFUSED))
    named = [name for table in tables for name in table]
    assert sorted(named) == sorted(SAMPLING_DEFAULTS)  # each in one table


@pytest.mark.parametrize("name", REFUSED)
def test_refused_sampling_params(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        SamplingParams(**{name: REFUSED[name]})
    params = SamplingParams()
    setattr(params, name, REFUSED[name])  # fields may be set later too
    with pytest.raises(OptionError, match=name):
        params.check()


@pytest.mark.parametrize(
    "values",
    [
        {"n": 0},
        {"n": 2, "temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": "hot"},
        {"temperature": None},
        {"top_p": 0.0},
        {"temperature": 0.0, "min_p": 2.0},
        {"top_k": -2},
        {"max_tokens": 0},
        {"min_tokens": 20},
        {"logprobs": -2},
        {"stop": [""]},
        {"stop": 5},
        {"stop_token_ids": 5},
        {"stop": "x", "detokenize": False},
    ],
)
def test_wrong_values(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        SamplingParams(**values)
    with pytest.raises(TypeError):
        SamplingParams(best_of=3)  # type: ignore[call-arg]


def test_optional_values_and_copies() -> None:
    params = SamplingParams.from_optional(n=None, temperature=None, top_p=0.5, max_tokens=None)
    assert params == SamplingParams(top_p=0.5, max_tokens=None)
    copy = params.clone()
    assert isinstance(copy.stop, list)
    copy.stop.append("x")
    assert params.stop == []
    assert SamplingParams(stop="a", seed=-1) == SamplingParams(stop=["a"])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(vllm_api.CompletionOutput, COMPLETION), (vllm_api.RequestOutput, REQUEST)],
)
def test_output_classes(kind: Any, expected: dict[str, Any]) -> None:
    found = {each.name: each.default for each in fields(kind)}
    assert list(found) == list(expected)
    assert found == expected


def test_logprob() -> None:
    found = {each.name: each.default for each in fields(vllm_api.Logprob)}
    assert found == {"logprob": MISSING, "rank": None, "decoded_token": None}


@pytest.mark.parametrize(("name", "expected"), [("generate", GENERATE), ("chat", CHAT)])
def test_signatures(name: str, expected: dict[str, Any]) -> None:
    parameters = dict(inspect.signature(getattr(LLM, name)).parameters)
    del parameters["self"]
    assert {key: each.default for key, each in parameters.items()} == expected


def test_every_argument_of_llm_is_in_one_table() -> None:
    own = set(inspect.signature(LLM.__init__).parameters) - {"self", "kwargs"}
    tables = (own, vllm_arguments.HONOURED, vllm_arguments.NO_EFFECT, vllm_arguments.ONLY)
    for name in LLM_ARGUMENTS.split():
        assert sum(name in table for table in tables) == 1, name
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
