"""The safetensors files of a checkpoint: which there are, what they hold, reading one tensor."""

import json
import math
import mmap
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ovfast.errors import CheckpointError
from ovfast.json_fields import load_json
from ovfast.tensor_names import logical_name

__all__ = ["StoredTensor", "listing", "problem_list", "read_headers", "read_tensor"]

STORAGE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk: its file, and its name, dtype, shape and place (in bytes) there."""

    file: Path
    name: str
    dtype_name: str
    shape: tuple[int, ...]
    begin: int

    @property
    def dtype(self) -> torch.dtype:
        return STORAGE_DTYPES[self.dtype_name]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _open(file: Path) -> Any:
    """A safetensors file; its reader checks header, offsets and length."""
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        what = "is missing" if missing else f"is not a readable safetensors file ({error})"
        raise CheckpointError(
            f"{file} {what}; expected a complete safetensors file. Download it again."
        ) from error


def read_tensor(tensor: StoredTensor, row: int | None = None) -> torch.Tensor:
    """A tensor, or one row of it, in a memory map of it alone that lives as long as the result.

    The header is not read again: of a large file that takes longer than most of its tensors.
    """
    count = math.prod(tensor.shape)
    begin, shape = tensor.begin, tensor.shape
    if row is not None:
        count //= shape[0]
        begin, shape = begin + row * count * tensor.dtype.itemsize, (1, *shape[1:])
    if count == 0:
        return torch.empty(shape, dtype=tensor.dtype)
    page_start = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = begin - page_start + count * tensor.dtype.itemsize
    try:
        with tensor.file.open("rb") as file:
            # Copy-on-write, because torch warns of memory that it must not write.
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=page_start)
        mapped.madvise(mmap.MADV_WILLNEED)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{tensor.name} cannot be read from {tensor.file} ({error}); the file changed while "
            "loading. Load again."
        ) from error
    flat = torch.frombuffer(mapped, dtype=tensor.dtype, count=count, offset=begin - page_start)
    return flat.view(shape)


def _data_offsets(file: Path) -> dict[str, int]:
    """Where each tensor of a checked file begins."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its layout-free name."""
    tensors: dict[str, StoredTensor] = {}
    for file, listed in _weight_files(path).items():
        found: set[str] = set()
        with _open(file) as opened:
            begins = _data_offsets(file)
            for name in opened.keys():  # noqa: SIM118  (the reader itself cannot be iterated)
                header = opened.get_slice(name)
                dtype, shape = header.get_dtype(), tuple(header.get_shape())
                stored = StoredTensor(file, name, dtype, shape, begins[name])
                logical = logical_name(name)
                if logical in tensors:
                    twin = tensors[logical]
                    raise CheckpointError(
                        f"{path} holds a tensor twice: {twin.name} in {twin.file.name} and {name} "
                        f"in {file.name}; expected it once. Remove the stale file."
                    )
                tensors[logical] = stored
                found.add(name)
        if listed - found:
            raise CheckpointError(
                f"{file} lacks tensors that the index places there: {listing(listed - found)}. "
                "Download the file again."
            )
    _check_dtypes(tensors.values())
    return tensors


def _weight_files(path: Path) -> dict[Path, set[str]]:
    """Safetensors files of a checkpoint, each with the names that an index places there."""
    single, index_file = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return {single: set()}
    index = load_json(index_file)
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
            for name in weight_map.values()
        ):
            raise CheckpointError(
                f"{index_file} has no usable weight_map; expected tensor names, each with the "
                "name of a safetensors file beside it. Download it again."
            )
        files: dict[Path, set[str]] = {}
        for tensor, name in weight_map.items():
            files.setdefault(path / name, set()).add(tensor)
        return files
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: set()}
    if found:
        raise CheckpointError(
            f"{path} holds {listing(file.name for file in found)} without "
            "model.safetensors.index.json; expected the index beside several files. Download it."
        )
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{path} holds weights only as pickles ({listing(pickles)}), which can run code when "
            "read; expected safetensors. Convert it on a machine where you trust it, for example "
            "with transformers' save_pretrained."
        )
    raise CheckpointError(
        f"{path} holds no weights; expected model.safetensors, or several with an index. "
        "Download the checkpoint again."
    )


def _check_dtypes(tensors: Iterable[StoredTensor]) -> None:
    wrong = [
        f"{tensor.name} ({tensor.dtype_name})"
        for tensor in tensors
        if tensor.dtype_name not in STORAGE_DTYPES and "inv_freq" not in tensor.name
    ]
    if wrong:
        raise CheckpointError(
            f"tensors of a dtype that ovfast does not read: {listing(wrong)}; expected "
            f"{', '.join(STORAGE_DTYPES)}. Load the unquantised checkpoint."
        )


def problem_list(
    missing: Collection[str], unexpected: Collection[str], misshapen: Collection[str]
) -> list[str]:
    """For a message: how many tensors are wrong in each way, and which."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    return [f"{len(names)} {kind}: {listing(names)}" for kind, names in kinds.items() if names]


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Names for a message, sorted, and how many more there are."""
    names = sorted(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
