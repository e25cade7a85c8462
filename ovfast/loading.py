"""From a checkpoint to an engine: devices, dtypes, capacity, and every argument of ``ovfast.load``
checked first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ovfast.anyres import VisualOptions
from ovfast.checkpoint import CheckpointWeights, resolve_checkpoint, terminal_progress
from ovfast.config import ModelConfig
from ovfast.cuda_graphs import DEFAULT_GRAPH_BYTES, CudaCapture, GraphCache
from ovfast.encoded_media import DEFAULT_ENCODED_BYTES
from ovfast.engine import Engine
from ovfast.errors import BackendError, CapacityError, OptionError, QuantizationError
from ovfast.forks import keep_torch_single_threaded
from ovfast.home_stream import use_device
from ovfast.kv_cache import kv_bytes_per_token
from ovfast.media import MediaLimits
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.ops import (
    Ops,
    has_native,
    make_ops,
    multiplies_bfloat16,
    native_isa,
    with_storage,
)
from ovfast.out_of_memory import free_frames, is_out_of_memory
from ovfast.packed_file import PACKED_FILE, PackedFile
from ovfast.packed_weights import PackedCheckpoint, is_packed
from ovfast.processor import Processor
from ovfast.roofline import parameter_bytes
from ovfast.storage import (
    BFLOAT16_MATMUL,
    DTYPES,
    GROUPS,
    QUANTIZATIONS,
    bytes_per_param,
    dtype_name,
    wanted_storage,
    weight_kind,
)

MOST_THREADS = 1024  # of a native pool
QUANTIZE_HINT = "quantization='int8' or 'int4' (native back end)"

logger = logging.getLogger(__name__)


def load(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    quantization: str | None = None,
    matmul_precision: str = "float32",
    threads: int | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int = 1,
    attention: str = "auto",
    cuda_graphs: bool = True,
    graph_memory_bytes: int | None = None,
    encoded_memory_bytes: int | None = None,
    visual: VisualOptions | None = None,
    media_limits: MediaLimits | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Engine:
    """Loads a checkpoint into an engine.

    Args:
        model: a directory (lmms-lab or Hugging Face layout, safetensors), a Hub id, or ``"demo"``.
        device: "auto" (CUDA where there is one, else CPU; of a packed directory CPU), "cpu", "cuda"
            (the current device of this thread, for good) or "cuda:N".
        dtype: "float32", "bfloat16", "float16": of weights, activations and cache; on the native
            back end of the weights of linear layers alone, the rest is float32. "auto" is bfloat16
            on CUDA, the checkpoint's own on the native back end, float32 in plain torch on a CPU.
        backend: "auto", "triton", "native" or "reference"; ``ovfast doctor`` lists what runs where.
        quantization: "int8" or "int4" for the weights of linear layers, on the native back end;
            "fp8" for those of the language model, on CUDA from compute capability 8.9 on, the rest
            in `dtype`; None keeps all in `dtype`. A directory that ``ovfast convert`` wrote says it
            itself.
        matmul_precision: of the products of tower and prefill on the native back end: "float32",
            or "bfloat16", which rounds what is multiplied to bfloat16 and sums in float32, twice as
            fast on a CPU with AVX512-BF16; weights are then bfloat16. Decode steps stay as exact as
            with "float32". On CUDA `dtype` decides.
        threads: of the native back end, for this engine; None takes all processors that the process
            may use. Of plain torch on a CPU, for the whole process; None leaves torch's setting,
            which is one thread in a process forked after a load: more would hang there.
        max_seq_len: positions a request may have, prompt and answer; None takes the checkpoint's.
        max_batch_size: requests decoded at a time; more run in waves.
        attention: of a prefill on CUDA: "sdpa" (torch), "triton" (ours), "flash" (flash-attn);
            "auto" takes what was measured fastest on the device.
        cuda_graphs: on CUDA, capture what comes a second time in the same shape: the tower by
            number of views, decode steps by rows and length.
        graph_memory_bytes: ceiling of captured graphs, the least recently used go first; None is
            1 GiB.
        encoded_memory_bytes: ceiling of what handles of `Engine.encode` hold together; None is
            2 GiB.
        visual: how pictures become tokens by default.
        media_limits: sizes that are refused before decoding.
        revision: of a Hub id.
        token: for a gated Hub id.
        cache_dir: of the Hub's files; None takes the Hub library's.

    Returns:
        An Engine; close it, or use it in a ``with``.

    Raises:
        OptionError, BackendError, QuantizationError: an argument that is wrong or not available
        here. CheckpointError, ConfigError: the checkpoint cannot be used.
        CapacityError: weights and cache do not fit in memory.
    """
    keep_torch_single_threaded()
    wanted = wanted_storage(dtype, quantization, matmul_precision)
    _check_counts(threads=threads, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    target = device_for(model, device)
    for name, value, kind in (
        ("visual", visual, VisualOptions),
        ("media_limits", media_limits, MediaLimits),
    ):
        if value is not None and not isinstance(value, kind):
            raise OptionError(f"{name}={value!r}; expected {kind.__name__} or None.")
    if not isinstance(cuda_graphs, bool):
        raise OptionError(f"cuda_graphs={cuda_graphs!r}; expected True or False.")
    graph_bytes = _byte_count(
        "graph_memory_bytes", graph_memory_bytes, DEFAULT_GRAPH_BYTES, "cuda_graphs=False for none"
    )
    encoded_bytes = _byte_count(
        "encoded_memory_bytes", encoded_memory_bytes, DEFAULT_ENCODED_BYTES, "0 for no handles"
    )
    # Before anything is downloaded: is what was asked for here?
    _check_quantization(quantization, target, backend)
    if wanted == BFLOAT16_MATMUL:
        _check_bfloat16_products(target, backend)
    ops = make_ops(
        target,
        backend,
        attention,
        threads=threads,
        storage=wanted or "float32",
        quantization="fp8" if quantization == "fp8" else "",
    )
    _check_attention(attention, wanted or _default_dtype(target))
    path = resolve_checkpoint(model, revision=revision, token=token, cache_dir=cache_dir)
    config = ModelConfig.from_checkpoint(path)
    positions = _resolve_positions(max_seq_len, config)
    if threads is not None and not ops.storage:
        torch.set_num_threads(threads)
    if config.ignored_generation_fields:
        logger.info(
            "of generation_config.json only stop ids are read; ignored: %s",
            config.ignored_generation_fields,
        )
    weights, ops = _open_weights(path, config, ops, wanted)
    # The embedding's real rows rule: config.json may name another number.
    config = replace(config, text=replace(config.text, vocab_size=weights.vocab_size))
    processor = Processor(path, config)
    compute = torch.float32 if ops.storage else DTYPES[wanted or _default_dtype(target)]
    kept = bytes_per_param(ops.storage or ops.quantization or dtype_name(compute))
    weight_bytes = parameter_bytes(config, kept, compute.itemsize if ops.quantization else None)
    cache_bytes = positions * max_batch_size * kv_bytes_per_token(config.text, compute)
    _check_memory(weight_bytes, cache_bytes, target)
    graphs = _make_graphs(ops, target, cuda_graphs, graph_bytes)

    def build() -> Engine:
        built = LlavaOnevision(config, weights, ops, compute, target, graphs)
        weights.finish()
        return Engine(
            built,
            processor,
            ops,
            max_seq_len=positions,
            max_batch_size=max_batch_size,
            visual=visual or VisualOptions(),
            media_limits=media_limits or MediaLimits(),
            encoded_memory_bytes=encoded_bytes,
            graphs=graphs,
        )

    return _build(build, weight_bytes, cache_bytes, target)


def _open_weights(
    path: Path, config: ModelConfig, ops: Ops, wanted: str | None
) -> tuple[CheckpointWeights | PackedCheckpoint, Ops]:
    """The weights of a directory, and the operations with the storage that these weights have."""
    if not is_packed(path):
        weights = CheckpointWeights(path, config, progress=terminal_progress())
        if ops.storage and wanted is None:
            ops = with_storage(ops, dtype_name(weights.storage_dtype))
        return weights, ops
    if not ops.storage:
        raise BackendError(
            f"{path} holds weights packed for the native CPU back end, but back end"
            f" {ops.backend!r} was chosen. Use device='cpu' and backend='auto' with ovfast._C"
            " built, or load the original checkpoint."
        )
    file = PackedFile(path / PACKED_FILE)
    if wanted is not None and weight_kind(wanted) != file.storage:
        option = "quantization" if wanted in QUANTIZATIONS else "dtype"
        kind = QuantizationError if option == "quantization" else OptionError
        raise kind(
            f"{option}={wanted!r}, but {path} holds weights packed as {file.storage}. Leave"
            f" {option} out, or load or convert the original checkpoint."
        )
    return PackedCheckpoint(file, path, config, ops.native.PackedWeights), with_storage(
        ops, wanted or file.storage
    )


def device_for(model: object, device: str | torch.device) -> torch.device:
    """As `resolve_device`; "auto" is a CPU for a directory that is packed, so runs nowhere else."""
    if device == "auto" and isinstance(model, str | os.PathLike):
        device = "cpu" if is_packed(Path(model).expanduser()) else device
    return resolve_device(device)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name; of a CUDA device with its index, as threads differ in which is current.

    Raises:
        OptionError: not a device name.
        BackendError: no such device here, or a kind of device that ovfast has no operations for.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(
            f"device={device!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'."
        ) from error
    if target.type not in ("cpu", "cuda"):
        raise BackendError(f"device={device!r}; ovfast runs on 'cpu' and 'cuda'.")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise BackendError(
            f"device={device!r}, but {found} CUDA devices were found. Use"
            " device='cpu', or check the driver."
        )
    if target.type == "cuda" and target.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return target


def _default_dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


def _resolve_positions(max_seq_len: int | None, config: ModelConfig) -> int:
    limit = config.text.max_position_embeddings
    if max_seq_len is not None and max_seq_len > limit:
        raise OptionError(
            f"max_seq_len={max_seq_len}; the checkpoint was made for at most {limit} positions."
        )
    return limit if max_seq_len is None else max_seq_len


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is None and name != "max_batch_size":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"{name}={value!r}; expected an integer of at least 1.")
        if name == "threads" and value > MOST_THREADS:
            raise OptionError(f"{name}={value!r}; expected an integer of at most {MOST_THREADS}.")


def _byte_count(name: str, value: int | None, default: int, otherwise: str) -> int:
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise OptionError(
            f"{name}={value!r}; expected a number of bytes, or None for {default}. Use {otherwise}."
        )
    return value


def _make_graphs(ops: Ops, device: torch.device, wanted: bool, max_bytes: int) -> GraphCache | None:
    """Where launches can be captured: kernels on a CUDA device, not plain torch or a CPU."""
    if not wanted or device.type != "cuda" or ops.backend != "triton":
        return None
    return GraphCache(CudaCapture(device), max_bytes)


def _check_quantization(quantization: str | None, device: torch.device, backend: str) -> None:
    """Refuses int8 and int4 where nothing computes with them; fp8 is for `make_ops` to refuse."""
    if quantization not in GROUPS:
        return
    where = f"device={str(device)!r}" if device.type != "cpu" else f"backend={backend!r}"
    if device.type == "cpu" and backend in ("auto", "native"):
        if has_native():
            return
        where = "ovfast._C not built"
    raise QuantizationError(
        f"quantization={quantization!r} with {where}; only the native CPU back end computes with"
        " quantised weights. Use device='cpu', backend='auto' and the compiled module, or"
        " quantization=None."
    )


def _check_bfloat16_products(device: torch.device, backend: str) -> None:
    """Refuses products of bfloat16 where float32 is as fast, or is not what is multiplied."""
    if device.type != "cpu" or backend not in ("auto", "native"):
        where = f"device={str(device)!r}, backend={backend!r}"
        hint = "Elsewhere dtype='bfloat16' decides; leave matmul_precision out."
    elif not multiplies_bfloat16():
        where = f"the instruction set {native_isa()!r}" if has_native() else "ovfast._C not built"
        hint = "Leave it out, or use quantization='int8'."
    else:
        return
    raise BackendError(
        f"matmul_precision='bfloat16' with {where}; it is for the native CPU back end on a CPU"
        f" with AVX512-BF16. {hint}"
    )


def _check_attention(attention: str, dtype: str) -> None:
    """Refuses flash-attn where it has no kernels: itself it does so in the first prefill."""
    if attention == "flash" and dtype not in ("float16", "bfloat16"):
        raise OptionError(
            f"attention='flash' with dtype={dtype!r}; flash-attn computes in 'bfloat16' and"
            " 'float16' alone. Use one of them, or attention='auto'."
        )


def _check_memory(weight_bytes: int, cache_bytes: int, device: torch.device) -> None:
    """Refuses what cannot fit. A CPU's cache is touched only as it fills, so there only the weights
    count.
    """
    is_cuda = device.type == "cuda"
    free = _free_device_bytes(device) if is_cuda else _available_bytes()
    need = weight_bytes + (cache_bytes if is_cuda else 0)
    if free is not None and need > free:
        raise _too_large(
            weight_bytes, cache_bytes, device, f"in the {free / 1e9:.2f} GB free on {device}"
        )


def _build(
    build: Callable[[], Engine], weight_bytes: int, cache_bytes: int, device: torch.device
) -> Engine:
    """Calls `build` with its device current; where it fails, what it had built is freed, also while
    the error is kept.
    """
    try:
        with use_device(device):
            return build()
    except Exception as error:
        free_frames(error)
        if is_out_of_memory(error):
            raise _too_large(weight_bytes, cache_bytes, device, f"on {device} ({error})") from error
        raise


def _too_large(
    weight_bytes: int, cache_bytes: int, device: torch.device, where: str
) -> CapacityError:
    if device.type == "cuda":
        hint = "a smaller max_seq_len or max_batch_size, quantization='fp8'"
    else:
        hint = QUANTIZE_HINT
    return CapacityError(
        f"weights of {weight_bytes / 1e9:.2f} GB and a cache of {cache_bytes / 1e9:.2f} GB do not"
        f" fit {where}. Use {hint}, or dtype='bfloat16'."
    )


def _free_device_bytes(device: torch.device) -> int:
    """What the driver has free, and what torch keeps of it unused, as after closing an engine."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _available_bytes() -> int | None:
    """Memory a process may still take, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
