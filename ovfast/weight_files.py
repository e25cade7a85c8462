"""The safetensors files of a checkpoint: which there are, what they hold, reading one tensor."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ovfast.errors import CheckpointError
from ovfast.json_fields import load_json
from ovfast.tensor_names import logical_name

__all__ = ["StoredTensor", "listing", "read_headers", "read_tensor"]

STORAGE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk: its file, and its name, dtype and shape there."""

    file: Path
    name: str
    dtype_name: str
    shape: tuple[int, ...]

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
    """A tensor, or one row of it, in a memory map that lives as long as the result."""
    try:
        with _open(tensor.file) as file:
            if row is not None:
                part: torch.Tensor = file.get_slice(tensor.name)[row : row + 1]
                return part.clone()
            whole: torch.Tensor = file.get_tensor(tensor.name)
            return whole
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{tensor.name} cannot be read from {tensor.file} ({error}); the file changed while "
            "loading. Load again."
        ) from error


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its layout-free name."""
    tensors: dict[str, StoredTensor] = {}
    for file, listed in _weight_files(path).items():
        found: set[str] = set()
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (the reader itself cannot be iterated)
                header = opened.get_slice(name)
                stored = StoredTensor(file, name, header.get_dtype(), tuple(header.get_shape()))
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


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Names for a message, sorted, and how many more there are."""
    names = sorted(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
