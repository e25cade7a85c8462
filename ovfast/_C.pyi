import numpy as np
from numpy.typing import NDArray

def pack_views(
    resized: NDArray[np.uint8],
    offset_top: int,
    offset_left: int,
    grid_rows: int,
    grid_cols: int,
    fill: int,
    out: NDArray[np.uint8],
) -> None: ...
