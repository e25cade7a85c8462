"""The operations of an engine: one frozen object, each operation from the back end that has it.

The only module that knows which device runs what, and the only importer of `ovfast.kernels` and
`ovfast._C`. What a back end lacks is taken from `ovfast.reference`; `Ops.where` says which.
"""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from types import MappingProxyType, ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from ovfast import cpu_linear, reference
from ovfast.errors import BackendError, OptionError
from ovfast.reference import PackedLinear, Pool, UInt8Array

__all__ = ["BACKENDS", "OPERATIONS", "Ops", "PackedLinear", "make_ops"]

BACKENDS = ("auto", "triton", "native", "reference")

logger = logging.getLogger(__name__)


class Gelu(Protocol):
    """The two GELUs by the name torch gives them."""

    def __call__(self, x: Tensor, *, approximate: str) -> Tensor: ...


def _pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Packs (out, in) parameters for `linear`; a tied embedding keeps sharing its memory."""
    return PackedLinear(weight, bias)


def _cpu_linear(x: Tensor, packed: PackedLinear) -> Tensor:
    return cpu_linear.linear(x, packed.weight, packed.bias)


@dataclass(frozen=True, slots=True)
class Ops:
    """Callables of one device; shapes and rules as the functions of the same name in reference.

    Attributes:
        backend: "triton", "native" or "reference".
        where: operation → the back end that runs it.
    """

    backend: str = "reference"
    pack_linear: Callable[[Tensor, Tensor | None], PackedLinear] = _pack_linear
    linear: Callable[[Tensor, PackedLinear], Tensor] = reference.packed_linear
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = reference.layer_norm
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    gelu: Gelu = reference.gelu
    silu_mul: Callable[[Tensor], Tensor] = reference.silu_mul
    rope: Callable[[Tensor, Tensor, Tensor], Tensor] = reference.rope
    patch_embed: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor] = reference.patch_embed
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = reference.attention
    causal_attention: Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor] = (
        reference.causal_attention
    )
    decode_attention: Callable[[Tensor, Tensor, Tensor], Tensor] = reference.decode_attention
    pool_and_pack: Pool = reference.pool_and_pack
    project_and_pack: Callable[..., Tensor] = reference.project_and_pack
    pack_views: Callable[[UInt8Array, tuple[int, int], tuple[int, int], int, UInt8Array], None] = (
        reference.pack_views
    )
    where: Mapping[str, str] = field(default_factory=dict)


OPERATIONS = tuple(f.name for f in fields(Ops) if f.name not in ("backend", "where"))


def make_ops(device: torch.device, backend: str = "auto") -> Ops:
    """Chooses where each operation runs.

    Args:
        device: of the model.
        backend: "auto" takes Triton on CUDA and the native module on a CPU where they are
            installed, else reference; a name forces that back end.

    Returns:
        The operations; what the back end lacks comes from reference.

    Raises:
        OptionError: unknown back end.
        BackendError: a forced back end is not installed or not for this device.
    """
    if backend not in BACKENDS:
        allowed = ", ".join(repr(name) for name in BACKENDS)
        raise OptionError(f"backend={backend!r}; expected one of {allowed}")
    ops = plain = _plain_ops(device)
    if backend == "native" or (backend == "auto" and device.type == "cpu"):
        ops = _with_native(ops, device, required=backend == "native")
    elif backend == "triton" or (backend == "auto" and device.type == "cuda"):
        ops = _with_triton(ops, device, required=backend == "triton")
    own = {name for name in OPERATIONS if getattr(ops, name) is not getattr(plain, name)}
    where = {name: ops.backend if name in own else "reference" for name in OPERATIONS}
    if own:
        rest = ", ".join(name for name in OPERATIONS if name not in own)
        logger.info("back end %s on %s; from reference: %s", ops.backend, device, rest)
    return replace(ops, where=MappingProxyType(where))


def _plain_ops(device: torch.device) -> Ops:
    """The reference; on a CPU with the faster of torch's own matrix products."""
    if device.type != "cpu":
        return Ops()
    project = partial(reference.project_and_pack, apply_linear=_cpu_linear)
    return Ops(linear=_cpu_linear, project_and_pack=project)


def _with_native(ops: Ops, device: torch.device, *, required: bool) -> Ops:
    if device.type != "cpu":
        raise BackendError(
            f"backend='native' on device {str(device)!r}; it runs on the CPU only. Use"
            " device='cpu', or backend='auto'."
        )
    try:
        native = importlib.import_module("ovfast._C")
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
    return replace(ops, backend="native", pack_views=_native_pack_views(native))


def _native_pack_views(native: ModuleType) -> Callable[..., None]:
    function: Any = native.pack_views

    def pack_views(
        resized: UInt8Array,
        offset_hw: tuple[int, int],
        grid_hw: tuple[int, int],
        fill: int,
        out: UInt8Array,
    ) -> None:
        function(resized, *offset_hw, *grid_hw, fill, out)

    return pack_views


def _with_triton(ops: Ops, device: torch.device, *, required: bool) -> Ops:
    try:
        pool: Any = importlib.import_module("ovfast.kernels.pool")
        interpreting = bool(importlib.import_module("triton").knobs.runtime.interpret)
    except ImportError as error:
        if required:
            raise BackendError(
                f"backend='triton' needs Triton ({error}). Install the `triton` package, or use"
                " backend='auto'."
            ) from error
        _warn_without("Triton is not installed: every operation runs in plain torch")
        return ops
    if device.type != "cuda" and not interpreting:
        raise BackendError(
            f"backend='triton' on device {str(device)!r}; it needs a CUDA device (or Triton's"
            " interpreter, for tests). Use backend='auto'."
        )
    return replace(
        ops,
        backend="triton",
        pool_and_pack=pool.pool_and_pack,
        project_and_pack=partial(
            reference.project_and_pack, apply_linear=ops.linear, pool=pool.pool_and_pack
        ),
    )


@cache  # once in a process, not once an engine
def _warn_without(message: str) -> None:
    logger.warning("%s", message)
