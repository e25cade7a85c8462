"""The projector: features of pictures and videos to rows of the language model's input."""

from functools import lru_cache, partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ovfast.models.parameters import Loader
from ovfast.models.visual_rows import HostRowTable
from ovfast.ops import PackedLinear, RowTable

TABLES_KEPT = 32  # on the device: 36 bytes a row, 0.3 MB for the largest picture


class Projector:
    """Linear, exact GELU, linear; then unpadding, pooling and newlines by a gather table."""

    def __init__(self, loader: Loader) -> None:
        """Takes `multi_modal_projector.*` and `image_newline`."""
        self._ops = loader.ops
        self._linear_1 = loader.linear("multi_modal_projector.linear_1", bias=True)
        self._linear_2 = loader.linear("multi_modal_projector.linear_2", bias=True)
        self.image_newline = loader.tensor("image_newline")
        self._device_table = lru_cache(maxsize=TABLES_KEPT)(partial(_copy_table, loader.device))

    def project(self, features: Tensor) -> Tensor:
        """Projects rows without packing them, for stage comparisons.

        Args:
            features: (rows, vision_hidden_size).

        Returns:
            (rows, hidden_size).
        """
        hidden = self._ops.fused_linear(features, self._linear_1, activation="gelu_erf")
        return self._ops.fused_linear(hidden, self._linear_2)

    def project_and_pack(
        self,
        features: Tensor,
        table: HostRowTable,
        token_ids: Tensor,
        embedding: PackedLinear,
        out: Tensor,
    ) -> Tensor:
        """Writes consecutive rows of inputs_embeds: visual tokens and the text around them.

        Args:
            features: (num_views · tokens_per_view, vision_hidden_size).
            table: of the rows.
            token_ids: (num_rows,) int32, read where the table says text.
            embedding: (vocab_size, hidden_size), of `pack_embedding`.
            out: (num_rows, hidden_size), rows of inputs_embeds; written in place.

        Returns:
            out.
        """
        return self._ops.project_and_pack(
            features,
            self._device_table(table),
            self._linear_1,
            self._linear_2,
            self.image_newline,
            token_ids,
            embedding,
            out,
        )


# Not a method: a cache of one would keep the weights alive after `close`.
def _copy_table(device: torch.device, table: HostRowTable) -> RowTable:
    def copy(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    arrays = (copy(table.source_rows), copy(table.index), copy(table.weight))
    return RowTable(*arrays, has_pooled=table.has_pooled)
