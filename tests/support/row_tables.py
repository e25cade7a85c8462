"""Tables of rows for the projector's kernels: pooled, kept, newline and text rows."""

import numpy as np
import torch

NEWLINE, TEXT = -1, -2

Table = tuple[torch.Tensor, torch.Tensor]  # index (rows, 4) int32, weight (rows, 4) float32


def pooled_table(side: int, pooled: int) -> Table:
    """Bilinear table of side × side tokens to pooled × pooled, then one newline."""
    centre = (np.arange(pooled, dtype=np.float32) + 0.5) * np.float32(side / pooled) - 0.5
    centre = np.maximum(centre, 0).astype(np.float32)
    low = np.minimum(centre.astype(np.int32), side - 1)
    high = np.minimum(low + 1, side - 1)
    share = centre - low
    rows = np.stack([low, low, high, high], -1)[:, None] * side
    cols = np.stack([low, high, low, high], -1)[None]
    row_weight = np.stack([1 - share, 1 - share, share, share], -1)[:, None]
    col_weight = np.stack([1 - share, share, 1 - share, share], -1)[None]
    index = np.full((pooled * pooled + 1, 4), NEWLINE, np.int32)
    weight = np.zeros((pooled * pooled + 1, 4), np.float32)
    index[:-1] = (rows + cols).reshape(-1, 4)
    weight[:-1] = (row_weight * col_weight).reshape(-1, 4)
    return torch.from_numpy(index), torch.from_numpy(weight)


def random_table(num_out: int, num_rows: int, seed: int) -> Table:
    """Pooled, copied and newline rows, mixed."""
    rng = np.random.default_rng(seed)
    index = rng.integers(0, num_rows, (num_out, 4), dtype=np.int32)
    weight = rng.dirichlet(np.ones(4), num_out).astype(np.float32)
    kind = rng.integers(0, 3, num_out)
    index[kind == 1] = index[kind == 1, :1]
    weight[kind == 1] = (1, 0, 0, 0)
    index[kind == 2] = NEWLINE
    weight[kind == 2] = 0
    return torch.from_numpy(index), torch.from_numpy(weight)


def with_text(
    table: Table, before: int, between: int, after: int, rest: tuple[int, int, int] = (0, 0, 0)
) -> Table:
    """Text rows at the start, in the middle and at the end; `rest` are their other indices, which
    nobody may read. What rows need not have is NaN.
    """
    index, weight = table
    middle = index.shape[0] // 2

    def text(count: int) -> Table:
        rows = torch.tensor([[TEXT, *rest]], dtype=torch.int32).expand(count, 4)
        return rows, torch.full((count, 4), float("nan"))

    parts = (
        text(before),
        (index[:middle], weight[:middle]),
        text(between),
        (index[middle:], weight[middle:]),
        text(after),
    )
    index, weight = (torch.cat(part) for part in zip(*parts, strict=True))
    weight[index[:, 0] == NEWLINE] = float("nan")
    return index.contiguous(), weight
