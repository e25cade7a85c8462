"""``ovfast convert``: a checkpoint to a packed directory, tensor by tensor.

What is written is what the models get when they load the checkpoint, made by the same `Loader`, so
that both ways give the same bits. The directory is complete or not there: files are written under
other names first, and the weights get their name last.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ovfast.checkpoint import CheckpointWeights, resolve_checkpoint, terminal_progress
from ovfast.config import ModelConfig
from ovfast.errors import CheckpointError, OptionError, QuantizationError
from ovfast.models.parameters import Loader
from ovfast.ops import PackedLinear, make_ops, with_storage
from ovfast.packed_file import PACKED_FILE, Matrix, PackedWriter, is_packed_file
from ovfast.packed_weights import PATCH, PackedShapes, is_packed, packed_shapes
from ovfast.processor import Processor
from ovfast.storage import GROUPS, dtype_name, wanted_storage
from ovfast.tensor_names import LM_HEAD

__all__ = ["convert"]

# What config, tokenizer and template are read from.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
PARTIAL = ".partial"


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quantization: str | None = None,
    dtype: str | torch.dtype = "auto",
) -> Path:
    """Writes a packed directory, which `load` maps into memory instead of packing it again.

    Args:
        model: a directory, a Hub id, or ``"demo"``.
        out: the directory to make; it may exist if it is empty or an earlier packed directory.
        quantization: "int8", "int4" or None, as in ``load``.
        dtype: as in ``load``.

    Returns:
        The directory.

    Raises:
        OptionError, QuantizationError, BackendError: an argument that is wrong or not available
        here. CheckpointError, ConfigError: the checkpoint cannot be used. OSError: `out` cannot be
        written.
    """
    storage = wanted_storage(dtype, quantization)
    if quantization is not None and quantization not in GROUPS:
        raise QuantizationError(
            f"quantization={quantization!r}; a packed directory is for the CPU: expected"
            f" {' or '.join(map(repr, GROUPS))}, or None. On CUDA give it to `load`."
        )
    cpu = torch.device("cpu")
    ops = make_ops(cpu, "native")  # raises where it is not built, before anything is downloaded
    target = _check_target(out)
    path = resolve_checkpoint(model)
    if is_packed(path):
        raise CheckpointError(
            f"model={str(model)!r} is a packed directory; expected an original checkpoint. Convert"
            " that one."
        )
    config = ModelConfig.from_checkpoint(path)
    weights = CheckpointWeights(path, config, progress=terminal_progress())
    Processor(path, config)  # the copies are complete, or nothing is written
    storage = storage or dtype_name(weights.storage_dtype)
    loader = Loader(weights, with_storage(ops, storage), torch.float32, cpu)
    shapes = packed_shapes(config, weights.vocab_size, tied=LM_HEAD not in weights.names)
    _write_directory(path, target, lambda file: _write_weights(file, loader, shapes, config))
    weights.finish()
    return target


def _check_target(out: Any) -> Path:
    if not isinstance(out, str | os.PathLike) or not os.fspath(out):
        raise OptionError(f"out={out!r}; expected the path of a directory to make.")
    target = Path(out).expanduser()
    if not target.exists():
        return target
    if not target.is_dir():
        raise OptionError(f"out={str(out)!r} is a file; expected a directory to make.")
    held = [entry.name for entry in target.iterdir() if not entry.name.endswith(PARTIAL)]
    if held and not is_packed_file(target / PACKED_FILE):
        raise OptionError(
            f"out={str(out)!r} holds other files, such as {min(held)}; expected a new or empty"
            " directory, or an earlier packed one, which is replaced. Choose another."
        )
    return target


def _write_directory(source: Path, target: Path, write_weights: Callable[[Path], None]) -> None:
    """Everything under another name first; names change when all is on the disk."""
    made = not target.exists()
    weights = target / (PACKED_FILE + PARTIAL)
    copies = [name for name in SMALL_FILES if (source / name).is_file()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        weights.unlink(missing_ok=True)
        write_weights(weights)
        for name in copies:
            shutil.copyfile(source / name, target / (name + PARTIAL))
        # From here on it takes no time: no old weights beside new files, nor the reverse.
        (target / PACKED_FILE).unlink(missing_ok=True)
        for name in SMALL_FILES:
            if name in copies:
                (target / (name + PARTIAL)).replace(target / name)
            else:
                (target / name).unlink(missing_ok=True)
        weights.replace(target / PACKED_FILE)
    except BaseException as error:
        for name in (PACKED_FILE, *SMALL_FILES):
            with suppress(OSError):
                (target / (name + PARTIAL)).unlink(missing_ok=True)
        if made and target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, OSError):
            reason = f"{error.strerror or error}; nothing was converted"
            raise OSError(error.errno, reason, str(error.filename or weights)) from error
        raise


def _write_weights(file: Path, loader: Loader, shapes: PackedShapes, config: ModelConfig) -> None:
    storage = loader.ops.storage
    with PackedWriter(file, storage, [*shapes.matrices, *shapes.tensors]) as writer:

        def matrix(name: str, packed: Any) -> None:
            writer.matrix(name, Matrix(packed.kind, packed.rows, packed.cols, packed.bytes()))

        def tensor(name: str, values: torch.Tensor) -> None:
            writer.tensor(name, values.float().numpy())
            left.remove(name)

        left = set(shapes.tensors)
        patch, offset = loader.patch("vision_tower")
        matrix(f"{PATCH}.weight", patch)
        tensor(f"{PATCH}.offset", offset)
        del patch
        for name in shapes.matrices:
            if name == f"{PATCH}.weight":
                continue
            prefix = name.removesuffix(".weight")
            layer = _layer(loader, prefix, config, has_bias=f"{prefix}.bias" in shapes.tensors)
            matrix(name, layer.weight)
            if layer.bias is not None:
                tensor(f"{prefix}.bias", layer.bias)
        for name in sorted(left):
            tensor(name, loader.tensor(name))
        writer.finish()


def _layer(loader: Loader, prefix: str, config: ModelConfig, *, has_bias: bool) -> PackedLinear:
    """A layer as the models ask for it."""
    if prefix == "language_model.embed_tokens":
        return loader.embedding(prefix)
    if prefix.startswith("language_model.") and prefix.endswith(".qkv_proj"):
        return loader.qkv(prefix, config.text.num_heads, config.text.num_kv_heads)
    if prefix.endswith(".gate_up_proj"):
        return loader.gate_up(prefix)
    return loader.linear(prefix, bias=has_bias)
