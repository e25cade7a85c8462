"""The arguments of vLLM's LLM: what is honoured, what has no effect, what is refused."""

from typing import Any

from ovfast.errors import OptionError
from ovfast.integrations.arguments import refuse_unknown

__all__ = ["HONOURED", "NO_EFFECT", "ONLY", "load_options", "media_limits"]

MOST_ROWS = 16  # requests that a step decodes side by side; max_num_seqs is cut to it
# Arguments of LLM that go to ovfast.load, by their names there.
HONOURED = {
    "dtype": "dtype",
    "quantization": "quantization",
    "hf_token": "token",
    "revision": "revision",
    "download_dir": "cache_dir",
    "max_model_len": "max_seq_len",
    "max_num_seqs": "max_batch_size",
    # ovfast's own
    "device": "device",
    "backend": "backend",
    "matmul_precision": "matmul_precision",
    "threads": "threads",
    "attention": "attention",
    "visual": "visual",
    "media_limits": "media_limits",
    "graph_memory_bytes": "graph_memory_bytes",
}
# Accepted without effect: memory, scheduling, caching and compilation that ovfast arranges by
# itself, domains of URLs that are never fetched, and code of a checkpoint that is never run.
NO_EFFECT = (
    "trust_remote_code",
    "allowed_media_domains",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "swap_space",
    "disable_custom_all_reduce",
    "disable_log_stats",
    "disable_async_output_proc",
    "distributed_executor_backend",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "max_num_batched_tokens",
    "max_seq_len_to_capture",
    "block_size",
    "async_scheduling",
    "compilation_config",
    "attention_config",
    "attention_backend",
    "profiler_config",
    "mm_processor_cache_gb",
    "disable_mm_preprocessor_cache",
    "mm_encoder_tp_mode",
    "use_tqdm_on_load",
)
# Accepted with these values alone: what they ask for is what ovfast does.
ONLY: dict[str, tuple[Any, ...]] = {
    "runner": ("auto", "generate"),
    "task": ("auto", "generate"),
    "convert": ("auto", "none"),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (None,),
    "skip_tokenizer_init": (False,),
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "cpu_offload_gb": (0,),
    "load_format": ("auto", "safetensors"),
    "config_format": ("auto", "hf"),
    "kv_cache_dtype": ("auto",),
    "enable_lora": (False,),
    "enable_return_routed_experts": (False,),
    "enable_prompt_embeds": (False,),
    "hf_overrides": (None, {}),
    "logits_processors": (None, []),
    "pooler_config": (None,),
    "structured_outputs_config": (None,),
    "speculative_config": (None,),
}


def load_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options of `ovfast.load`.

    Args:
        given: arguments of HONOURED, NO_EFFECT and ONLY.

    Raises:
        OptionError: another argument, or another value than ONLY lists.
    """
    refuse_unknown(given, (*HONOURED, *NO_EFFECT, *ONLY), "LLM")
    for name, value in given.items():
        if name in ONLY and value not in ONLY[name]:
            allowed = " or ".join(map(repr, ONLY[name]))
            raise OptionError(f"LLM({name}={value!r:.100}); expected {allowed}. Leave it out.")
    options = {HONOURED[k]: v for k, v in given.items() if k in HONOURED and v is not None}
    if isinstance(rows := options.get("max_batch_size"), int):
        options["max_batch_size"] = min(rows, MOST_ROWS)
    return options


def media_limits(given: Any) -> dict[str, int]:
    """limit_mm_per_prompt as counts by kind; vLLM also takes {"count": n, …} for a kind.

    Raises:
        OptionError: something else.
    """
    given = {} if given is None else given
    counts: dict[str, Any] = {}
    if isinstance(given, dict):
        counts = {k: v.get("count") if isinstance(v, dict) else v for k, v in given.items()}
    if not isinstance(given, dict) or not all(isinstance(n, int) for n in counts.values()):
        raise OptionError(f"limit_mm_per_prompt={given!r:.100}; expected a dict of counts by kind.")
    return counts
