"""How the models ask for their parameters: by name, from whatever holds a checkpoint.

Linear layers come packed for the back end: packed here from the checkpoint's tensors, or taken as
they lie in a packed directory, where they were made by the same methods.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ovfast.ops import Ops, PackedLinear
from ovfast.reference_pixels import patch_offset
from ovfast.storage import DTYPES, weight_kind


class Weights(Protocol):
    """A source of named tensors; each is taken once."""

    @property
    def names(self) -> Sequence[str]: ...

    def take(self, name: str, *, dtype: torch.dtype | None, device: torch.device) -> Tensor: ...

    def take_packed(self, name: str) -> Any:
        """Weights that the source holds as the back end packs them; None: pack the tensor."""


@dataclass(frozen=True, slots=True)
class Loader:
    """Takes tensors in one dtype to one device and packs linear layers for one back end."""

    weights: Weights
    ops: Ops
    dtype: torch.dtype
    device: torch.device

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor `name`, in `dtype` or the loader's."""
        return self.weights.take(name, dtype=dtype or self.dtype, device=self.device)

    def linear(self, name: str, *, bias: bool) -> PackedLinear:
        """The packed layer of `name`.weight and, if asked for, `name`.bias."""
        added = self.tensor(f"{name}.bias") if bias else None
        return self._layer(name, added, lambda weight: self.ops.pack_linear(weight, added))

    def qkv(self, name: str, num_heads: int, num_kv_heads: int) -> PackedLinear:
        """Queries, keys and values of a layer of the language model, with their bias."""
        bias = self.tensor(f"{name}.bias")
        return self._layer(
            name, bias, lambda weight: self.ops.pack_qkv(weight, bias, num_heads, num_kv_heads)
        )

    def gate_up(self, name: str) -> PackedLinear:
        """The first half of an MLP of the language model."""
        return self._layer(name, None, self.ops.pack_gate_up)

    def output(self, name: str) -> PackedLinear:
        """A layer of the language model that adds to the residual stream, or its head."""
        return self._layer(name, None, self.ops.pack_output)

    def embedding(self, name: str) -> PackedLinear:
        """The embedding, which may serve as the head too: `ops.tie_head`."""
        return self._layer(name, None, self.ops.pack_embedding)

    def patch(self, name: str) -> tuple[Any, Tensor]:
        """Of the tower `name`: the weights of `patch_embed`, and what it adds."""
        packed = self.weights.take_packed(f"{name}.patch_embedding.weight")
        if packed is not None:
            return packed, self.tensor(f"{name}.patch_embedding.offset", torch.float32)
        # The sum of the weights is part of the offset, so they are rounded before.
        dtype = DTYPES.get(weight_kind(self.ops.storage), self.dtype)
        weight = self.tensor(f"{name}.patch_embedding.weight", dtype)
        bias = self.tensor(f"{name}.patch_embedding.bias", torch.float32)
        position_embedding = self.tensor(f"{name}.position_embedding", torch.float32)
        offset = patch_offset(weight, bias, position_embedding)
        return self.ops.pack_patch(weight), offset

    def _layer(
        self, name: str, bias: Tensor | None, pack: Callable[[Tensor], PackedLinear]
    ) -> PackedLinear:
        packed = self.weights.take_packed(f"{name}.weight")
        if packed is not None:
            return PackedLinear(packed, bias)
        # A back end with a storage of its own reads the checkpoint's dtype: no copy is wider.
        dtype = None if self.ops.storage else self.dtype
        return pack(self.weights.take(f"{name}.weight", dtype=dtype, device=self.device))
