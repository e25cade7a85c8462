"""The SigLIP vision tower: uint8 views to features, without its last norm and without a head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ovfast.config import VisionConfig
from ovfast.models.parameters import Loader
from ovfast.ops import Ops, PackedLinear
from ovfast.reference import patch_offset


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    layer_norm1: _Norm
    qkv_proj: PackedLinear
    out_proj: PackedLinear
    layer_norm2: _Norm
    fc1: PackedLinear
    fc2: PackedLinear


class SiglipTower:
    """Encodes views; a view's bits do not depend on the views beside it."""

    def __init__(self, config: VisionConfig, loader: Loader) -> None:
        """Takes the tower's parameters.

        Args:
            config: of the tower.
            loader: gives the tensors `vision_tower.*`.
        """
        self.config = config
        self._ops: Ops = loader.ops
        self._dtype, self._device = loader.dtype, loader.device
        # 0.7 M parameters; float32 because Σ w·u and Σ w cancel for gray patches.
        prefix, wide = "vision_tower.patch_embedding", torch.float32
        self._patch_weight = loader.tensor(f"{prefix}.weight", wide)
        bias = loader.tensor(f"{prefix}.bias", wide)
        position_embedding = loader.tensor("vision_tower.position_embedding", wide)
        self._patch_offset = patch_offset(self._patch_weight, bias, position_embedding)
        self._layers = [_load_layer(loader, index) for index in range(config.num_layers)]

    def embed(self, view: Tensor) -> Tensor:
        """Patch and position embedding of one view.

        Args:
            view: (image_size, image_size, 3) uint8 on the model's device.

        Returns:
            (tokens_per_view, hidden_size).
        """
        return self._ops.patch_embed(view, self._patch_weight, self._patch_offset, self._dtype)

    def encode(self, views: Tensor, poll: Callable[[], None] | None = None) -> Tensor:
        """Encodes views, one at a time.

        Args:
            views: (num_views, image_size, image_size, 3) uint8, on any device.
            poll: called before each view; may raise to give up.

        Returns:
            (num_views, tokens_per_view, hidden_size): the residual stream after the last layer.
        """
        config = self.config
        shape = (len(views), config.tokens_per_view, config.hidden_size)
        features = torch.empty(shape, dtype=self._dtype, device=self._device)
        for index, view in enumerate(views.to(self._device)):
            if poll is not None:
                poll()
            hidden_states = self.embed(view)
            for layer in self._layers:
                self._run_layer(layer, hidden_states)
            features[index] = hidden_states
        return features

    def _run_layer(self, layer: _Layer, hidden_states: Tensor) -> None:
        ops, config = self._ops, self.config
        norm = layer.layer_norm1
        x = ops.layer_norm(hidden_states, norm.weight, norm.bias, config.layer_norm_eps)
        qkv = ops.linear(x, layer.qkv_proj).view(-1, 3, config.num_heads, config.head_dim)
        attended = ops.attention(qkv[:, 0], qkv[:, 1], qkv[:, 2])
        hidden_states += ops.linear(attended, layer.out_proj)
        norm = layer.layer_norm2
        x = ops.layer_norm(hidden_states, norm.weight, norm.bias, config.layer_norm_eps)
        x = ops.gelu(ops.linear(x, layer.fc1), approximate="tanh")
        hidden_states += ops.linear(x, layer.fc2)


def _load_layer(loader: Loader, index: int) -> _Layer:
    prefix = f"vision_tower.layers.{index}"

    def norm(name: str) -> _Norm:
        return _Norm(
            loader.tensor(f"{prefix}.{name}.weight"), loader.tensor(f"{prefix}.{name}.bias")
        )

    return _Layer(
        layer_norm1=norm("layer_norm1"),
        qkv_proj=loader.linear(f"{prefix}.qkv_proj", bias=True),
        out_proj=loader.linear(f"{prefix}.out_proj", bias=True),
        layer_norm2=norm("layer_norm2"),
        fc1=loader.linear(f"{prefix}.fc1", bias=True),
        fc2=loader.linear(f"{prefix}.fc2", bias=True),
    )
