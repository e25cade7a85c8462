"""The projector: features of one picture or video to rows of the language model's input."""

import torch
from torch import Tensor

from ovfast.models.parameters import Loader
from ovfast.pack_table import PackTable


class Projector:
    """Linear, exact GELU, linear; then unpadding, pooling and newlines by a gather table."""

    def __init__(self, loader: Loader) -> None:
        """Takes `multi_modal_projector.*` and `image_newline`."""
        self._ops = loader.ops
        self._linear_1 = loader.linear("multi_modal_projector.linear_1", bias=True)
        self._linear_2 = loader.linear("multi_modal_projector.linear_2", bias=True)
        self.image_newline = loader.tensor("image_newline")

    def project(self, features: Tensor) -> Tensor:
        """Projects rows without packing them, for stage comparisons.

        Args:
            features: (rows, vision_hidden_size).

        Returns:
            (rows, hidden_size).
        """
        hidden = self._ops.gelu(self._ops.linear(features, self._linear_1), approximate="none")
        return self._ops.linear(hidden, self._linear_2)

    def project_and_pack(self, features: Tensor, table: PackTable, out: Tensor) -> Tensor:
        """Writes the visual tokens of one picture or video.

        Args:
            features: (num_views, tokens_per_view, vision_hidden_size).
            table: of the picture's plan.
            out: (num_tokens, hidden_size), rows of inputs_embeds; written in place.

        Returns:
            out.
        """
        device = features.device
        return self._ops.project_and_pack(
            features.flatten(0, 1),
            torch.from_numpy(table.source_rows).to(device),
            torch.from_numpy(table.index_compact).to(device),
            torch.from_numpy(table.weight).to(device),
            self._linear_1,
            self._linear_2,
            self.image_newline,
            out,
        )
