"""The operations of the native CPU back end: tensors to arrays, and the one importer of
`ovfast._C`.

Activations, norms, biases and the cache are float32; the weights of linear layers, embedding and
head included, lie packed in the storage of the back end. Every operation runs on the back end's own
threads, and its bits depend on neither their number nor on the other rows of the call.
"""

import importlib
import os
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovfast import reference
from ovfast.cpu_threads import available_threads
from ovfast.errors import BackendError
from ovfast.reference import PackedLinear, RowTable
from ovfast.reference_pixels import UInt8Array
from ovfast.storage import BFLOAT16_MATMUL, DTYPES, NATIVE_STORAGES, weight_kind

__all__ = ["native_fields", "native_module", "native_pool"]


def native_module() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it is not built.
        BackendError: OVFAST_ISA names an instruction set that is not here.
    """
    native = importlib.import_module("ovfast._C")
    wanted = os.environ.get("OVFAST_ISA", "")
    if wanted and wanted not in native.isas():
        raise BackendError(
            f"OVFAST_ISA={wanted!r}; this CPU and this build have {', '.join(native.isas())}. Unset"
            " it to take the best."
        )
    return native


def native_pool(native: ModuleType, threads: int | None) -> Any:
    """Threads of operations, the caller's included; None: all processors of this process."""
    return native.ThreadPool(available_threads() if threads is None else threads)


def native_fields(native: ModuleType, pool: Any, storage: str) -> dict[str, Any]:
    """Fields of an `Ops`.

    Args:
        native: the compiled module.
        pool: of `native_pool`.
        storage: of the weights, one of NATIVE_STORAGES or BFLOAT16_MATMUL.
    """
    assert weight_kind(storage) in NATIVE_STORAGES
    own = _Native(native, pool, storage)
    names = (
        "pack_linear",
        "pack_patch",
        "pack_qkv",
        "pack_gate_up",
        "pack_embedding",
        "pack_output",
        "linear",
        "add_linear",
        "gate_up",
        "head",
        "embed",
        "fused_linear",
        "layer_norm",
        "rms_norm",
        "rope_and_store",
        "resample",
        "patch_embed",
        "view_attention",
        "causal_attention",
        "decode_attention",
        "project_and_pack",
        "pack_views",
    )
    fields: dict[str, Any] = {name: getattr(own, name) for name in names}
    fields["native"] = native
    fields["pool"] = pool
    fields["storage"] = storage
    fields["reads_pictures"] = True
    return fields


class _Native:
    """The operations over one pool of threads; names and shapes as in `Ops`."""

    def __init__(self, native: ModuleType, pool: Any, storage: str) -> None:
        self._native: Any = native
        self._pool, self._kind = pool, weight_kind(storage)
        self._rounds = storage == BFLOAT16_MATMUL
        self._quantizes = storage not in DTYPES
        self._linear = partial(native.linear, pool)

    def _pack(self, kind: str, weights: list[Tensor], *, interleaved: bool = False) -> Any:
        return self._native.pack(self._pool, kind, [_source(w) for w in weights], interleaved)

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        packed = self._pack(self._kind, [weight])
        return PackedLinear(packed, None if bias is None else bias.float())

    def pack_qkv(
        self, weight: Tensor, bias: Tensor, num_heads: int, num_kv_heads: int
    ) -> PackedLinear:
        return self.pack_linear(weight, bias)

    def pack_gate_up(self, weight: Tensor) -> PackedLinear:
        gate, up = weight.chunk(2)
        return PackedLinear(self._pack(self._kind, [gate, up], interleaved=True), None)

    def pack_embedding(self, weight: Tensor) -> PackedLinear:
        return self.pack_linear(weight)

    def pack_output(self, weight: Tensor) -> PackedLinear:
        return self.pack_linear(weight)

    def pack_patch(self, weight: Tensor) -> Any:
        # Small and read once a patch: never quantised.
        return self._pack(self._kind if self._kind in DTYPES else "float32", [weight])

    def _apply(
        self,
        x: Tensor,
        packed: PackedLinear,
        activation: str = "none",
        out: Tensor | None = None,
        *,
        columns: int | None = None,
        wide_inputs: bool = False,
    ) -> Tensor:
        """One layer; `out` is added to, a new tensor is written."""
        weights = packed.weight
        accumulates = out is not None
        if out is None:
            out = torch.empty(len(x), weights.rows if columns is None else columns)
        bias = None if packed.bias is None else packed.bias.numpy()
        # A padded half of an MLP is wider than its weights: the rest is zero.
        x = x[:, : weights.cols]
        arrays = (x.numpy(), weights, bias, activation, accumulates, out.numpy())
        # A step of decoding is bound by memory: there rounding would gain nothing.
        rounds = self._rounds and not wide_inputs
        self._linear(*arrays, wide_inputs=wide_inputs, bfloat16_inputs=rounds)
        return out

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        return self._apply(x, packed)

    def add_linear(self, x: Tensor, packed: PackedLinear, residual: Tensor) -> Tensor:
        return self._apply(x, packed, out=residual)

    def gate_up(self, x: Tensor, packed: PackedLinear) -> Tensor:
        return self._apply(x, packed, "silu_mul", columns=packed.weight.rows // 2)

    def head(self, x: Tensor, packed: PackedLinear) -> Tensor:
        return self._apply(x, packed, wide_inputs=True)

    def fused_linear(
        self,
        x: Tensor,
        packed: PackedLinear,
        *,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        return self._apply(x, packed, activation or "none", residual)

    def embed(
        self, embedding: PackedLinear, token_ids: Tensor, out: Tensor | None = None
    ) -> Tensor:
        weights = embedding.weight
        if out is None:
            out = torch.empty(len(token_ids), weights.cols)
        self._native.embed(self._pool, weights, token_ids.int().numpy(), out.numpy())
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        arrays = (x.numpy(), weight.numpy(), bias.numpy())
        self._native.layer_norm(self._pool, *arrays, eps, out.numpy())
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        self._native.rms_norm(self._pool, x.numpy(), weight.numpy(), eps, out.numpy())
        return out

    def rope_and_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        start: int,
        num_heads: int,
        num_kv_heads: int,
    ) -> Tensor:
        arrays = (tensor.numpy() for tensor in (qkv, cos, sin, k_cache, v_cache))
        self._native.rope_and_store(self._pool, *arrays, start, num_heads, num_kv_heads)
        return qkv.view(len(qkv), num_heads + 2 * num_kv_heads, -1)[:, :num_heads]

    def view_attention(self, qkv: Tensor, num_heads: int, tokens_per_view: int) -> Tensor:
        out = torch.empty(len(qkv), qkv.shape[1] // 3)
        self._native.view_attention(
            self._pool, qkv.numpy(), num_heads, tokens_per_view, out.numpy(), self._quantizes
        )
        return out

    def causal_attention(self, q: Tensor, k: Tensor, v: Tensor, positions: Sequence[int]) -> Tensor:
        return self._attend(q, k, v, positions, self._quantizes)

    def decode_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k, v, range(k.shape[1] - 1, k.shape[1]), quantized=False)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Sequence[int], quantized: bool
    ) -> Tensor:
        out = torch.empty(len(q), q.shape[1] * q.shape[2])
        if len(q) == 0:
            return out
        consecutive = isinstance(positions, range) and positions.step == 1
        where = positions[0] if consecutive else np.array(positions, np.int64)
        self._native.causal_attention(
            self._pool, q.numpy(), k.numpy(), v.numpy(), where, out.numpy(), quantized
        )
        return out

    def project_and_pack(
        self,
        features: Tensor,
        table: RowTable,
        linear_1: PackedLinear,
        linear_2: PackedLinear,
        newline: Tensor,
        token_ids: Tensor,
        embedding: PackedLinear,
        out: Tensor,
    ) -> Tensor:
        projected = reference.project_sources(
            features, table.source_rows, linear_1, linear_2, out, self.fused_linear
        )
        self._native.place(
            self._pool,
            projected.numpy(),
            table.index.numpy(),
            table.weight.numpy(),
            newline.numpy(),
            token_ids.numpy(),
            embedding.weight,
            out.numpy(),
        )
        return out

    def resample(
        self,
        source: Tensor,
        first: Tensor,
        coefficients: Tensor,
        axis: int,
        out: Tensor,
        *,
        offset: int = 0,
        fill: int = 0,
    ) -> Tensor:
        table = (first.numpy(), coefficients.numpy())
        pairs = [(source, out)] if source.ndim == 3 else zip(source, out, strict=True)
        for frame, target in pairs:
            self._native.resample(
                self._pool, frame.numpy(), *table, axis, target.numpy(), offset, fill
            )
        return out

    def patch_embed(
        self,
        pixels: Tensor,
        windows: Tensor,
        weight: Any,
        offset: Tensor,
        image_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        out = torch.empty(len(windows) * len(offset), offset.shape[1], dtype=dtype)
        self._native.patch_embed(
            self._pool,
            pixels.numpy(),
            windows.numpy(),
            weight,
            offset.numpy(),
            image_size,
            out.numpy(),
        )
        return out

    def pack_views(
        self,
        resized: UInt8Array,
        offset_hw: tuple[int, int],
        grid_hw: tuple[int, int],
        fill: int,
        out: UInt8Array,
    ) -> None:
        self._native.pack_views(resized, *offset_hw, *grid_hw, fill, out)


def _source(weight: Tensor) -> NDArray[Any]:
    """A weight as numpy has it: bfloat16 by its bits."""
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.uint16).numpy()
    return weight.numpy()
