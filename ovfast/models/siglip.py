"""The SigLIP vision tower: pixels to features, without its last norm and without a head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ovfast.config import VisionConfig
from ovfast.cuda_graphs import GraphCache
from ovfast.models.parameters import Loader
from ovfast.ops import Ops, PackedLinear
from ovfast.pixels import Pixels

# Above, the device takes far longer than the host's launches, and batches have many counts of views
# that would push each other's graphs out.
GRAPH_VIEWS = 16


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

    def __init__(
        self, config: VisionConfig, loader: Loader, graphs: GraphCache | None = None
    ) -> None:
        """Takes the tower's parameters.

        Args:
            config: of the tower.
            loader: gives the tensors `vision_tower.*`.
            graphs: replays the layers; None runs them one launch at a time.
        """
        self.config = config
        self._ops: Ops = loader.ops
        self._dtype, self._device = loader.dtype, loader.device
        self._graphs = graphs
        self._patch_weight, self._patch_offset = loader.patch("vision_tower")
        self._layers = [_load_layer(loader, index) for index in range(config.num_layers)]

    def embed(self, pixels: Pixels) -> Tensor:
        """Patch and position embeddings: (num_views · tokens_per_view, hidden_size)."""
        return self._ops.patch_embed(
            pixels.buffer,
            pixels.windows,
            self._patch_weight,
            self._patch_offset,
            self.config.image_size,
            self._dtype,
        )

    def encode(self, pixels: Pixels, poll: Callable[[], None] | None = None) -> Tensor:
        """Encodes views, as many at once as the back end likes.

        Args:
            pixels: the views, on the model's device.
            poll: called before each group of views; may raise to give up.

        Returns:
            (num_views · tokens_per_view, hidden_size): the residual stream after the last layer.
        """
        groups = list(pixels.groups(self._ops.views_a_step))
        if len(groups) == 1 and poll is None:
            return self._encode_group(groups[0])
        tokens = self.config.tokens_per_view
        shape = (pixels.num_views * tokens, self.config.hidden_size)
        features = torch.empty(shape, dtype=self._dtype, device=self._device)
        row = 0
        for group in groups:
            if poll is not None:
                poll()
            end = row + group.num_views * tokens
            features[row:end] = self._encode_group(group)
            row = end
        return features

    def _encode_group(self, pixels: Pixels) -> Tensor:
        hidden_states = self.embed(pixels)
        if self._graphs is not None and pixels.num_views <= GRAPH_VIEWS:
            self._graphs.run(pixels.num_views, self._run_layers, hidden_states)
        else:
            self._run_layers(hidden_states)
        return hidden_states

    def _run_layers(self, hidden_states: Tensor) -> None:
        """Overwrites (num_views · tokens_per_view, hidden_size) with what the last layer makes."""
        for layer in self._layers:
            self._run_layer(layer, hidden_states)

    def _run_layer(self, layer: _Layer, hidden_states: Tensor) -> None:
        ops, config = self._ops, self.config
        # Each is freed when used: beside fc1's output only its input is left, half of all of them.
        x = self._norm(layer.layer_norm1, hidden_states)
        qkv = ops.fused_linear(x, layer.qkv_proj)
        del x
        attended = ops.view_attention(qkv, config.num_heads, config.tokens_per_view)
        del qkv
        ops.fused_linear(attended, layer.out_proj, residual=hidden_states)
        del attended
        x = self._norm(layer.layer_norm2, hidden_states)
        x = ops.fused_linear(x, layer.fc1, activation="gelu_tanh")
        ops.fused_linear(x, layer.fc2, residual=hidden_states)

    def _norm(self, norm: _Norm, hidden_states: Tensor) -> Tensor:
        eps = self.config.layer_norm_eps
        return self._ops.layer_norm(hidden_states, norm.weight, norm.bias, eps)


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
