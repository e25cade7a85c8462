"""The operations of an engine: one frozen object, each operation from the back end that has it.

The only module that knows which device runs what; `ops_triton` and `ops_native` hold the
operations of the two back ends. What a back end lacks is taken from `ovfast.reference`; `Ops.where`
says which.
"""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ovfast import cpu_linear, ops_native, reference, reference_pixels
from ovfast.decode_kernels import DecodeKernels
from ovfast.errors import BackendError, OptionError, QuantizationError
from ovfast.reference import PackedLinear, RowTable
from ovfast.reference_pixels import UInt8Array

__all__ = [
    "ATTENTION",
    "BACKENDS",
    "OPERATIONS",
    "DecodeKernels",
    "Ops",
    "PackedLinear",
    "RowTable",
    "has_native",
    "make_ops",
    "multiplies_bfloat16",
    "native_isa",
    "with_storage",
]

BACKENDS = ("auto", "triton", "native", "reference")
ATTENTION = ("auto", "sdpa", "triton", "flash")

# Rows of a prefill that an MLP takes at once. A CPU's products are as fast with few, and need 40 MB
# of float32 at 0.5B. Of a GPU's, 1024 rows fill a quarter at 0.5B; 8192 need 0.2 GB, 0.9 GB at 7B.
CPU_MLP_ROWS, CUDA_MLP_ROWS = 1024, 8192
# Positions of a prompt that one step prefills. Others wait for a step, for 2048 at 0.5B in int8 on
# two cores 3.5 s. Weights are read more often: 512 cost 2 % there, 2048 nothing that was measured.
CPU_CHUNK, CUDA_CHUNK = 2048, 8192

logger = logging.getLogger(__name__)


def _pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Packs (out, in) parameters for `linear`; a tied embedding keeps sharing its memory."""
    return PackedLinear(weight, bias)


def _pack_qkv(weight: Tensor, bias: Tensor, num_heads: int, num_kv_heads: int) -> PackedLinear:
    """Packs queries, keys and values of one layer for `linear` and `rope_and_store`."""
    return PackedLinear(weight, bias)


def _pack_embedding(weight: Tensor) -> PackedLinear:
    """Packs (vocab_size, hidden_size) for `embed`, and for `head` where the two are tied."""
    return PackedLinear(weight, None)


def _pack_patch(weight: Tensor) -> Tensor:
    """Packs (hidden_size, 3 · patch²) weights for `patch_embed`, which computes in float32."""
    return weight.float()


def _cpu_linear(x: Tensor, packed: PackedLinear) -> Tensor:
    return cpu_linear.linear(x, packed.weight, packed.bias)


@dataclass(frozen=True, slots=True)
class Ops:
    """Callables of one device; shapes and rules as the functions of the same name in reference.

    Attributes:
        backend: "triton", "native" or "reference".
        where: operation → the back end that runs it.
        reads_pictures: whether pictures are resized on the device, by `resample`; else views are
            built on the host.
        views_a_step: views that the tower encodes at once.
        mlp_rows: rows of a prefill that an MLP takes at once.
        prefill_chunk: positions that a longer prompt is prefilled by, a step each.
        tie_head: packs an embedding once more as the head tied to it; None: one copy is both.
        decode: kernels of a decode step for rows of requests; None decodes request by request.
        native: `ovfast._C`, of the native back end, which decodes by one call a step.
        pool: its threads.
        storage: how it keeps the weights of linear layers; "" where they have the model's dtype.
        quantization: "fp8" where the language model's linear layers are float8; "" elsewhere.
    """

    backend: str = "reference"
    pack_linear: Callable[[Tensor, Tensor | None], PackedLinear] = _pack_linear
    pack_patch: Callable[[Tensor], Tensor] = _pack_patch
    pack_qkv: Callable[[Tensor, Tensor, int, int], PackedLinear] = _pack_qkv
    pack_gate_up: Callable[[Tensor], PackedLinear] = _pack_linear
    pack_embedding: Callable[[Tensor], PackedLinear] = _pack_embedding
    pack_output: Callable[[Tensor], PackedLinear] = _pack_linear
    linear: Callable[[Tensor, PackedLinear], Tensor] = reference.packed_linear
    add_linear: Callable[[Tensor, PackedLinear, Tensor], Tensor] = reference.add_linear
    gate_up: Callable[[Tensor, PackedLinear], Tensor] = reference.gate_up
    head: Callable[[Tensor, PackedLinear], Tensor] = reference.packed_linear
    embed: Callable[[PackedLinear, Tensor, Tensor | None], Tensor] = reference.embed
    fused_linear: Callable[..., Tensor] = reference.fused_linear
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = reference.layer_norm
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    rope_and_store: Callable[..., Tensor] = reference.rope_and_store
    resample: Callable[..., Tensor] = reference_pixels.resample
    patch_embed: Callable[[Tensor, Tensor, Tensor, Tensor, int, torch.dtype], Tensor] = (
        reference_pixels.patch_embed
    )
    view_attention: Callable[[Tensor, int, int], Tensor] = reference.view_attention
    causal_attention: Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor] = (
        reference.causal_attention
    )
    decode_attention: Callable[[Tensor, Tensor, Tensor], Tensor] = reference.decode_attention
    project_and_pack: Callable[..., Tensor] = reference.project_and_pack
    pack_views: Callable[[UInt8Array, tuple[int, int], tuple[int, int], int, UInt8Array], None] = (
        reference_pixels.pack_views
    )
    where: Mapping[str, str] = field(default_factory=dict)
    reads_pictures: bool = False
    views_a_step: int = 1
    mlp_rows: int = CPU_MLP_ROWS
    prefill_chunk: int = CPU_CHUNK
    tie_head: Callable[[PackedLinear], PackedLinear] | None = None
    decode: DecodeKernels | None = None
    native: Any = None
    pool: Any = None
    storage: str = ""
    quantization: str = ""


OPERATIONS = tuple(f.name for f in fields(Ops) if callable(f.default))


def make_ops(
    device: torch.device,
    backend: str = "auto",
    attention: str = "auto",
    *,
    threads: int | None = None,
    storage: str = "float32",
    quantization: str = "",
) -> Ops:
    """Chooses where each operation runs.

    Args:
        device: of the model.
        backend: "auto" takes Triton on CUDA and the native module on a CPU where they are
            installed, else reference; a name forces that back end.
        attention: of a prefill on CUDA: "sdpa" (torch), "triton" (ours), "flash" (the package
            flash-attn); "auto" takes what was measured fastest on the device, else "sdpa".
        threads: of the native back end; None takes all processors that the process may use.
        storage: how the native back end keeps the weights of linear layers: "float32", "float16",
            "bfloat16", "bfloat16-matmul", "int8" or "int4".
        quantization: "fp8" for the linear layers of the language model on the Triton back end.

    Returns:
        The operations; what the back end lacks comes from reference.

    Raises:
        OptionError: unknown back end.
        BackendError: a forced back end is not installed or not for this device.
        QuantizationError: the back end or the device has no float8.
    """
    if backend not in BACKENDS:
        allowed = ", ".join(repr(name) for name in BACKENDS)
        raise OptionError(f"backend={backend!r}; expected one of {allowed}")
    if attention not in ATTENTION:
        allowed = ", ".join(repr(name) for name in ATTENTION)
        raise OptionError(f"attention={attention!r}; expected one of {allowed}")
    ops = plain = _plain_ops(device)
    if backend == "native" or (backend == "auto" and device.type == "cpu"):
        ops = _with_native(ops, device, threads, storage, required=backend == "native")
    elif backend == "triton" or (backend == "auto" and device.type == "cuda"):
        ops = _with_triton(ops, device, attention, quantization, required=backend == "triton")
    if quantization and ops.backend != "triton":
        raise QuantizationError(
            f"quantization={quantization!r} with back end {ops.backend!r} on {device}; it needs"
            " Triton on a CUDA device. Use 'int8' or 'int4' on a CPU, or quantization=None."
        )
    if attention in ("triton", "flash") and ops.backend != "triton":
        raise BackendError(
            f"attention={attention!r} with back end {ops.backend!r}; it needs CUDA and Triton. Use"
            " attention='auto'."
        )
    own = {name for name in OPERATIONS if getattr(ops, name) is not getattr(plain, name)}
    where = {name: ops.backend if name in own else "reference" for name in OPERATIONS}
    if own:
        rest = ", ".join(name for name in OPERATIONS if name not in own) or "nothing"
        logger.info("back end %s on %s; from reference: %s", ops.backend, device, rest)
    return replace(ops, where=MappingProxyType(where))


def has_native() -> bool:
    """Whether the native back end is built."""
    try:
        ops_native.native_module()
    except ImportError:
        return False
    return True


def native_isa() -> str | None:
    """The instruction set of the native back end; None where it is not built."""
    return str(ops_native.native_module().isa()) if has_native() else None


def multiplies_bfloat16() -> bool:
    """Whether the native back end multiplies bfloat16 with bfloat16 on this CPU."""
    return has_native() and bool(ops_native.native_module().bfloat16_products())


def with_storage(ops: Ops, storage: str) -> Ops:
    """The operations of a native back end that keeps weights in `storage`."""
    if storage == ops.storage:
        return ops
    return replace(ops, **ops_native.native_fields(ops.native, ops.pool, storage))


def _plain_ops(device: torch.device) -> Ops:
    """The reference; on a CPU with the faster of torch's own matrix products."""
    if device.type != "cpu":
        return Ops(mlp_rows=CUDA_MLP_ROWS, prefill_chunk=CUDA_CHUNK)
    return Ops(
        linear=_cpu_linear,
        add_linear=partial(reference.add_linear, apply_linear=_cpu_linear),
        gate_up=partial(reference.gate_up, apply_linear=_cpu_linear),
        head=_cpu_linear,
        fused_linear=partial(reference.fused_linear, apply_linear=_cpu_linear),
        project_and_pack=partial(reference.project_and_pack, apply_linear=_cpu_linear),
    )


def _with_native(
    ops: Ops, device: torch.device, threads: int | None, storage: str, *, required: bool
) -> Ops:
    if device.type != "cpu":
        raise BackendError(
            f"backend='native' on device {str(device)!r}; it runs on the CPU only. Use"
            " device='cpu', or backend='auto'."
        )
    try:
        native = ops_native.native_module()
    except ImportError as error:
        if required:
            raise BackendError(
                f"backend='native' needs the compiled module ovfast._C ({error}). Build it with"
                " a C++17 compiler (`pip install .`), or use backend='reference'."
            ) from error
        _warn_without(
            "the native module ovfast._C is not built: every operation runs in plain torch, much"
            " slower than it could. Install a C++17 compiler and reinstall ovfast"
        )
        return ops
    own = ops_native.native_fields(native, ops_native.native_pool(native, threads), storage)
    return replace(ops, backend="native", **own)


def _with_triton(
    ops: Ops, device: torch.device, attention: str, quantization: str, *, required: bool
) -> Ops:
    try:
        triton = importlib.import_module("triton")
        own = importlib.import_module("ovfast.ops_triton")
    except ImportError as error:
        if required:
            raise BackendError(
                f"backend='triton' needs Triton ({error}). Install the `triton` package, or use"
                " backend='auto'."
            ) from error
        _warn_without("Triton is not installed: every operation runs in plain torch")
        return ops
    interpreting = bool(triton.knobs.runtime.interpret)
    if device.type != "cuda" and not interpreting:
        raise BackendError(
            f"backend='triton' on device {str(device)!r}; it needs a CUDA device (or Triton's"
            " interpreter, for tests). Use backend='auto'."
        )
    fields_of_triton = own.triton_fields(device, attention, interpreting=interpreting)
    if quantization:
        fields_of_triton |= own.float8_fields(device, interpreting=interpreting)
    return replace(ops, backend="triton", **fields_of_triton)


@cache  # once in a process, not once an engine
def _warn_without(message: str) -> None:
    logger.warning("%s", message)
