"""What `from_pretrained` takes: devices, options of `ovfast.load`, arguments without effect."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovfast.checkpoint import resolve_checkpoint
from ovfast.engine import Engine
from ovfast.errors import BackendError, OptionError
from ovfast.integrations.arguments import refuse_unknown
from ovfast.loading import load

__all__ = ["LOAD_OPTIONS", "NO_EFFECT_LOADING", "import_transformers", "load_pretrained"]

# Arguments of from_pretrained that go to ovfast.load by the same name.
LOAD_OPTIONS = (
    "backend",
    "quantization",
    "matmul_precision",
    "threads",
    "max_seq_len",
    "max_batch_size",
    "attention",
    "cuda_graphs",
    "graph_memory_bytes",
    "revision",
    "token",
    "cache_dir",
)
# Arguments of from_pretrained that are accepted without effect: they choose between ways of loading
# or computing that ovfast does not have.
NO_EFFECT_LOADING = (
    "attn_implementation",
    "low_cpu_mem_usage",
    "trust_remote_code",
    "use_safetensors",
)


def load_pretrained(
    model: Any, dtype: Any, device_map: Any, options: Mapping[str, Any]
) -> tuple[Engine, Path]:
    """Loads a checkpoint; returns the engine and the checkpoint's directory.

    Args:
        model: as `ovfast.load` takes it.
        dtype: as `ovfast.load` takes it, or None for "auto".
        device_map: a device, "auto", {"": device} or None for "auto".
        options: of LOAD_OPTIONS and NO_EFFECT_LOADING.

    Raises:
        OVFastError: as `ovfast.load`; OptionError for an argument that has no meaning here.
    """
    refuse_unknown(options, LOAD_OPTIONS + NO_EFFECT_LOADING, "from_pretrained")
    given = {name: options[name] for name in LOAD_OPTIONS if options.get(name) is not None}
    hub = {name: given.pop(name, None) for name in ("revision", "token", "cache_dir")}
    path = resolve_checkpoint(model, **hub)
    dtype = "auto" if dtype is None else dtype
    return load(path, device=_device(device_map), dtype=dtype, **given), path


def import_transformers() -> Any:
    """The host.

    Raises:
        BackendError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise BackendError(
            f"transformers cannot be imported ({error}); its generation configs are needed here."
            " Install it with: pip install 'transformers>=5.10'"
        ) from error


def _device(device_map: Any) -> Any:
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise OptionError(
                f"device_map={device_map!r:.100}; ovfast keeps a model on one device. Pass it"
                ' alone, or as {"": device}.'
            )
        device_map = device_map[""]
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return f"cuda:{device_map}"
    return "auto" if device_map is None else device_map
