"""The projector: features of pictures and videos to rows of the language model's input."""

from functools import lru_cache, partial

from torch import Tensor

from ovfast.models.parameters import Loader
from ovfast.models.visual_rows import HostRowTable
from ovfast.ops import PackedLinear, RowTable
from ovfast.staging import Staging

TABLES_KEPT = 32  # on the device: 36 bytes a row, 0.3 MB for the largest picture


class Projector:
    """Linear, exact GELU, linear; then unpadding, pooling and newlines by a gather table."""

    def __init__(self, loader: Loader) -> None:
        """Takes `multi_modal_projector.*` and `image_newline`."""
        self._ops = loader.ops
        self._linear_1 = loader.linear("multi_modal_projector.linear_1", bias=True)
        self._linear_2 = loader.linear("multi_modal_projector.linear_2", bias=True)
        self.image_newline = loader.tensor("image_newline")
        copy_table = partial(_copy_table, Staging(loader.device))
        self._device_table = lru_cache(maxsize=TABLES_KEPT)(copy_table)

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
def _copy_table(staging: Staging, table: HostRowTable) -> RowTable:
    # Beside the tower, which has been enqueued: in its own stream they would come after it.
    source_rows, index, weight = map(staging.upload, (table.source_rows, table.index, table.weight))
    return RowTable(source_rows, index, weight, has_pooled=table.has_pooled)
