"""Packed directories: a checkpoint whose weights lie ready for the native back end.

Owns which tensors such a directory holds, and the source that a model takes them from. The file
itself: packed_file.py. Writing one: conversion.py.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ovfast.checkpoint import check_vocab
from ovfast.config import ModelConfig
from ovfast.errors import CheckpointError
from ovfast.packed_file import PACKED_FILE, PackedFile
from ovfast.storage import NATIVE_STORAGES
from ovfast.tensor_names import LM_HEAD, expected_tensors
from ovfast.weight_files import listing, problem_list

__all__ = ["PATCH", "PackedCheckpoint", "PackedShapes", "is_packed", "packed_shapes"]

EMBEDDING = "language_model.embed_tokens.weight"
PATCH = "vision_tower.patch_embedding"
BLOCK_ROWS = 16  # as kBlock of csrc/linear.h: gate and up are padded to it, each for itself


class PackedShapes(NamedTuple):
    """What a packed directory holds, by own name: matrices (rows, columns) and plain tensors."""

    matrices: dict[str, tuple[int, ...]]
    tensors: dict[str, tuple[int, ...]]


def is_packed(path: Path) -> bool:
    """Whether a directory holds packed weights."""
    return (path / PACKED_FILE).exists()


def packed_shapes(config: ModelConfig, vocab_size: int, *, tied: bool) -> PackedShapes:
    """The matrices and tensors of a packed directory."""
    matrices: dict[str, tuple[int, ...]] = {}
    tensors: dict[str, tuple[int, ...]] = {}
    for name, expected in expected_tensors(config, vocab_size, tied=tied).items():
        rows, *cols = expected.shape
        if name in (f"{PATCH}.bias", "vision_tower.position_embedding"):
            continue  # both are in the offset
        if name.endswith("gate_up_proj.weight"):
            rows = 2 * math.ceil(rows / 2 / BLOCK_ROWS) * BLOCK_ROWS
        (matrices if cols else tensors)[name] = (rows, *cols)
    vision = config.vision
    tensors[f"{PATCH}.offset"] = (vision.tokens_per_view, vision.hidden_size)
    return PackedShapes(matrices, tensors)


class PackedCheckpoint:
    """The weights of a packed directory, as the models take them: matrices stay in the map.

    Args:
        file: the mapped file.
        path: its directory.
        config: of the checkpoint.
        packed_weights: makes `ovfast._C.PackedWeights` of (kind, rows, cols, bytes).

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen.
    """

    def __init__(
        self,
        file: PackedFile,
        path: Path,
        config: ModelConfig,
        packed_weights: Callable[[str, int, int, Any], Any],
    ) -> None:
        self._file, self._path = file, path / PACKED_FILE
        if file.storage not in NATIVE_STORAGES:
            raise self._damaged(f"its storage is {file.storage!r}")
        embedding = file.matrices.get(EMBEDDING)
        if embedding is None:
            raise self._damaged(f"tensors 1 missing: {EMBEDDING}")
        self.vocab_size = embedding.rows
        check_vocab(self.vocab_size, config, f"{EMBEDDING} in {self._path}")
        shapes = packed_shapes(config, self.vocab_size, tied=LM_HEAD not in file.matrices)
        self._check_complete(shapes)
        self.names = (*shapes.matrices, *shapes.tensors)
        self._left = dict.fromkeys(self.names)
        try:
            self._packed = {
                name: packed_weights(m.kind, m.rows, m.cols, m.data)
                for name, m in file.matrices.items()
            }
        except (TypeError, ValueError) as error:
            raise self._damaged(f"a matrix is not as described ({error})") from error

    def take(self, name: str, *, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
        """A copy of a small tensor; each name can be taken once."""
        assert name in self._left, f"{name} is unknown or was taken before"
        del self._left[name]
        return torch.from_numpy(self._file.tensors[name].copy()).to(device, dtype)

    def take_packed(self, name: str) -> Any:
        """The weights of a matrix, in the map; each name can be taken once."""
        assert name in self._left, f"{name} is unknown or was taken before"
        del self._left[name]
        return self._packed[name]

    def finish(self) -> None:
        """Check that the model took every tensor."""
        assert not self._left, f"tensors never taken: {listing(self._left)}"

    def _check_complete(self, shapes: PackedShapes) -> None:
        found = {name: (m.rows, m.cols) for name, m in self._file.matrices.items()}
        problems = []
        for wanted, given in (
            (shapes.matrices, found),
            (shapes.tensors, {name: values.shape for name, values in self._file.tensors.items()}),
        ):
            missing, unexpected = wanted.keys() - given.keys(), given.keys() - wanted.keys()
            misshapen = [
                f"{name} {given[name]} instead of {shape}"
                for name, shape in wanted.items()
                if name in given and given[name] != shape
            ]
            problems += problem_list(missing, unexpected, misshapen)
        if problems:
            raise self._damaged(f"tensors {'; '.join(problems)}")

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: {what}. Expected what `ovfast convert` writes for the sizes in"
            " config.json; convert the original checkpoint again."
        )
