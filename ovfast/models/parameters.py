"""How the models ask for their parameters: by name, from whatever holds a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ovfast.ops import Ops, PackedLinear


class Weights(Protocol):
    """A source of named tensors; each is taken once."""

    @property
    def names(self) -> Sequence[str]: ...

    def take(self, name: str, *, dtype: torch.dtype | None, device: torch.device) -> Tensor: ...


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
        weight = self.tensor(f"{name}.weight")
        return self.ops.pack_linear(weight, self.tensor(f"{name}.bias") if bias else None)
