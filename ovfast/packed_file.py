"""The file of a packed directory: every weight in the layout of the native back end, ready to map.

A safetensors file whose data begins at a multiple of 64 bytes. Matrices come first, as uint8 of
their packed length, which is a multiple of 64 too; small float32 tensors stand behind them. So
every matrix lies as the kernels want it, and loading copies nothing of it. The layout is that of
`csrc/linear.h`, the same for every instruction set.
"""

import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ovfast.errors import CheckpointError

__all__ = ["PACKED_FILE", "Matrix", "PackedFile", "PackedWriter", "is_packed_file"]

PACKED_FILE = "packed.safetensors"
FORMAT = "ovfast-packed"
VERSION = 2  # of the layout of matrices; another one is packed anew
ALIGNMENT = 64
HEADER_BYTES_A_TENSOR = 200  # at most, its name aside: dtype, shape, offsets, matrix
DTYPES: dict[str, Any] = {"U8": np.uint8, "F32": np.float32}

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A packed matrix: the storage of its weights, its outputs and inputs, its bytes."""

    kind: str
    rows: int
    cols: int
    data: NDArray[np.uint8]


class PackedWriter:
    """Writes a packed file in one pass; the header's place is kept free until the end.

    Args:
        file: made new.
        storage: of the linear layers.
        names: of all tensors that will come.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, file: Path, storage: str, names: list[str]) -> None:
        self._storage = storage
        most = 1024 + sum(2 * len(name.encode()) + HEADER_BYTES_A_TENSOR for name in names)
        self._data_start = -(-(8 + most) // ALIGNMENT) * ALIGNMENT
        self._header: dict[str, Any] = {}
        self._matrices: dict[str, tuple[str, int, int]] = {}
        self._small: dict[str, Array] = {}
        self._end = 0
        self._file = file.open("xb")
        self._file.seek(self._data_start)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def matrix(self, name: str, matrix: Matrix) -> None:
        """Writes a matrix behind those before it."""
        assert matrix.data.nbytes % ALIGNMENT == 0
        self._matrices[name] = (matrix.kind, matrix.rows, matrix.cols)
        self._append(name, "U8", matrix.data)

    def tensor(self, name: str, values: NDArray[np.float32]) -> None:
        """Keeps a small tensor, which is written at the end."""
        self._small[name] = np.ascontiguousarray(values, np.float32)

    def finish(self) -> None:
        """Writes small tensors and header, and waits until the disk has them."""
        for name, values in self._small.items():
            self._append(name, "F32", values)
        about = {
            "format": FORMAT,
            "version": str(VERSION),
            "storage": self._storage,
            "matrices": _json(self._matrices),
        }
        text = _json({"__metadata__": about} | self._header).encode()
        length = self._data_start - 8
        assert len(text) <= length
        self._file.seek(0)
        self._file.write(struct.pack("<Q", length) + text.ljust(length))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _append(self, name: str, dtype: str, values: Array) -> None:
        start, self._end = self._end, self._end + values.nbytes
        self._header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [start, self._end],
        }
        self._file.write(values.reshape(-1).view(np.uint8).data)


class PackedFile:
    """A packed file in a read-only memory map, which lives as long as an array of it.

    Attributes:
        storage: of the linear layers.
        matrices: by name.
        tensors: the small float32 ones, by name.

    Args:
        file: its path.

    Raises:
        CheckpointError: no packed file, a damaged one, or one of another version.
    """

    def __init__(self, file: Path) -> None:
        about = _metadata(file)
        if about.get("format") != FORMAT:
            raise CheckpointError(
                f"{file} is a safetensors file, but not one of ovfast's packed ones; expected what"
                " `ovfast convert` writes. Convert the original checkpoint."
            )
        if about.get("version") != str(VERSION):
            raise CheckpointError(
                f"{file} has version {about.get('version')} of the packed layout; expected"
                f" {VERSION}. Convert the original checkpoint again with this ovfast."
            )
        try:
            self.storage: str = about["storage"]
            shapes = json.loads(about["matrices"])
            for _, rows, cols in shapes.values():
                if type(rows) is not int or type(cols) is not int:
                    raise TypeError(f"{rows!r} × {cols!r} is no size")
            arrays = _map(file)
            self.matrices = MappingProxyType(
                {
                    name: Matrix(kind, rows, cols, arrays.pop(name))
                    for name, (kind, rows, cols) in shapes.items()
                }
            )
        except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(
                f"{file} has a damaged header ({type(error).__name__}: {error}); expected what"
                " `ovfast convert` writes. Convert the original checkpoint again."
            ) from error
        self.tensors: Mapping[str, Array] = MappingProxyType(arrays)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def is_packed_file(file: Path) -> bool:
    """Whether `ovfast convert` wrote the file, in any version."""
    try:
        return _metadata(file).get("format") == FORMAT
    except CheckpointError:
        return False


def _metadata(file: Path) -> dict[str, str]:
    """The file's own description; the reader checks header, offsets and length."""
    try:
        with safe_open(str(file), framework="np") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({error}); expected what `ovfast convert`"
            " writes, complete. Convert the original checkpoint again."
        ) from error


def _map(file: Path) -> dict[str, Array]:
    """Every tensor of a checked file, as arrays over one map."""
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_WILLNEED)
    (length,) = struct.unpack("<Q", mapped[:8])
    header = json.loads(mapped[8 : 8 + length])
    data = np.frombuffer(mapped, np.uint8)[8 + length :]
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            arrays[name] = data[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays
