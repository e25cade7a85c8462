"""What the rows of inputs_embeds are made of: text, newlines, features by each picture's table."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ovfast.pack_table import NEWLINE, PackTable
from ovfast.reference import TEXT_ROW

__all__ = ["HostRowTable", "row_table"]


@dataclass(frozen=True, slots=True, eq=False)
class HostRowTable:
    """The arrays of a `reference.RowTable`; shared between requests, so never write to it."""

    source_rows: NDArray[np.int32]
    index: NDArray[np.int32]
    weight: NDArray[np.float32]

    @property
    def has_pooled(self) -> bool:
        return bool((self.weight[:, 1:] != 0).any())


@lru_cache(maxsize=32)
def row_table(num_rows: int, placed: tuple[tuple[int, int, PackTable], ...]) -> HostRowTable:
    """Joins the tables of pictures that are encoded together.

    Args:
        num_rows: rows of inputs_embeds.
        placed: for each picture or video its first row, its first feature row, and its table.

    Returns:
        The joined table; rows of no picture are text.
    """
    index = np.full((num_rows, 4), TEXT_ROW, np.int32)
    weight = np.zeros((num_rows, 4), np.float32)
    sources: list[NDArray[np.int32]] = []
    num_sources = 0
    for first_row, first_feature, table in placed:
        rows = slice(first_row, first_row + len(table.index))
        own = table.index_compact
        index[rows] = np.where(own == NEWLINE, NEWLINE, own + num_sources)
        weight[rows] = table.weight
        sources.append(table.source_rows + np.int32(first_feature))
        num_sources += len(table.source_rows)
    source_rows = np.concatenate(sources) if sources else np.empty(0, np.int32)
    return HostRowTable(source_rows, index, weight)
