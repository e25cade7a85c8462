"""Maker of random LLaVA-OneVision checkpoints, in every disk layout, without transformers.

Weights are scaled so that activations stay near 1 and next-token distributions are peaked: greedy
ties are unlikely, which gives token-for-token comparisons between runtimes a meaning. A tensor's
values depend on the seed and on what the tensor is, never on the layout. The unused post-layernorm
gets odd constants, so that a runtime which applies it fails at once.

    python -m tests.support.checkpoints OUT --size 0.5b --layout v5 --dtype bfloat16

writes tensor by tensor: the memory needed is that of a few million numbers.
"""

import argparse
import dataclasses
import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tests.support import checkpoint_configs, tokenizers_small

LAYOUTS = ("classic", "in_memory", "hybrid", "v5", "orig")
POST_LAYERNORM = {"weight": 37.0, "bias": -5.0}
CHUNK = 1 << 22  # numbers made at a time
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

# Prefixes by writer: transformers 4.45–4.57 and 5.0 on disk; ≥ 4.52 in memory; 5.5 on disk;
# ≥ 5.10 on disk; the original repository.
PREFIXES = {
    "classic": {
        "llm.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "projector.": "multi_modal_projector.",
        "image_newline": "image_newline",
        "tower.": "vision_tower.vision_model.",
    },
    "in_memory": {
        "llm.": "model.language_model.",
        "lm_head.": "lm_head.",
        "projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
        "tower.": "model.vision_tower.vision_model.",
    },
    "hybrid": {
        "llm.": "model.language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
        "tower.": "model.vision_tower.vision_model.",
    },
    "v5": {
        "llm.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "projector.": "multi_modal_projector.",
        "image_newline": "image_newline",
        "tower.": "vision_tower.",
    },
    "orig": {
        "llm.": "model.",
        "lm_head.": "lm_head.",
        "projector.linear_1.": "model.mm_projector.0.",
        "projector.linear_2.": "model.mm_projector.2.",
        "image_newline": "model.image_newline",
        "tower.": "model.vision_tower.vision_tower.vision_model.",
    },
}


@dataclass(frozen=True)
class CheckpointSpec:
    """Sizes of a random checkpoint; the defaults are a tiny model with real head sizes."""

    vision_hidden: int = 144
    vision_mlp: int = 208
    vision_layers: int = 2
    vision_heads: int = 2
    image_size: int = 84
    patch_size: int = 14
    hidden: int = 128
    mlp: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 608
    tokenizer_base: int = tokenizers_small.SMALL_BASE
    tie: bool = True
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    vision_feature_layer: int = -1
    grid: tuple[int, int] = (6, 6)  # canvases up to (rows, columns) of image_size
    anyres_max: int = 9
    dtype: torch.dtype = torch.float32
    seed: int = 0
    chat_template: str | None = "converter"
    template_file: str = "json"  # "jinja", "json" or "tokenizer_config"
    vocab_and_merges: bool = False  # vocab.json and merges.txt in place of tokenizer.json

    @property
    def tokens_per_view(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def pinpoints_hw(self) -> list[list[int]]:
        rows, cols = self.grid
        side = self.image_size
        return [[side * i, side * j] for i in range(1, rows + 1) for j in range(1, cols + 1)]


_FULL_TOWER = {
    "vision_hidden": 1152,
    "vision_mlp": 4304,
    "vision_layers": 26,
    "vision_heads": 16,
    "image_size": 384,
    "tokenizer_base": tokenizers_small.QWEN2_BASE,
}
PRESETS = {
    "tiny": CheckpointSpec(),
    # Tiny sizes with the real ids, vocabulary and picture geometry.
    "tiny-qwen2": CheckpointSpec(
        vocab_size=152000, tokenizer_base=tokenizers_small.QWEN2_BASE, image_size=384
    ),
    "0.5b": CheckpointSpec(
        **_FULL_TOWER,
        hidden=896,
        mlp=4864,
        layers=24,
        heads=14,
        kv_heads=2,
        head_dim=64,
        vocab_size=152000,
        tie=True,
    ),
    "7b": CheckpointSpec(
        **_FULL_TOWER,
        hidden=3584,
        mlp=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        vocab_size=152128,
        tie=False,
    ),
}


def make_checkpoint(
    path: Path | str,
    spec: CheckpointSpec | None = None,
    *,
    layout: str = "v5",
    max_shard_bytes: int | None = None,
) -> Path:
    """Write a complete random checkpoint.

    Args:
        path: directory to make (it may exist).
        spec: sizes, dtype, seed and tokenizer; the tiny preset where None.
        layout: one of LAYOUTS: how tensors are named and config.json is written.
        max_shard_bytes: shard size with an index file; None writes one file.

    Returns:
        The directory.
    """
    path, spec = Path(path), spec or CheckpointSpec()
    path.mkdir(parents=True, exist_ok=True)
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    checkpoint_configs.write_configs(path, spec, layout)
    tokenizers_small.write_tokenizer(
        path,
        base=spec.tokenizer_base,
        orig=layout == "orig",
        vocab_and_merges=spec.vocab_and_merges,
        chat_template=_template(spec) if layout != "orig" else None,
        template_file=spec.template_file,
    )
    _write_weights(path, spec, layout, max_shard_bytes)
    return path


def tensor_name(logical: str, layout: str) -> str:
    """The name in a layout of a tensor that `tensor_shapes` lists."""
    for prefix, replacement in PREFIXES[layout].items():
        if logical.startswith(prefix):
            return replacement + logical[len(prefix) :]
    raise KeyError(logical)


def tensor_shapes(spec: CheckpointSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its layout-free name, with its shape."""
    width, mlp = spec.vision_hidden, spec.vision_mlp
    shapes: dict[str, tuple[int, ...]] = {
        "tower.embeddings.patch_embedding.weight": (width, 3, spec.patch_size, spec.patch_size),
        "tower.embeddings.patch_embedding.bias": (width,),
        "tower.embeddings.position_embedding.weight": (spec.tokens_per_view, width),
        "tower.post_layernorm.weight": (width,),
        "tower.post_layernorm.bias": (width,),
        "projector.linear_1.weight": (spec.hidden, width),
        "projector.linear_1.bias": (spec.hidden,),
        "projector.linear_2.weight": (spec.hidden, spec.hidden),
        "projector.linear_2.bias": (spec.hidden,),
        "image_newline": (spec.hidden,),
        "llm.embed_tokens.weight": (spec.vocab_size, spec.hidden),
        "llm.norm.weight": (spec.hidden,),
    }
    for layer in range(spec.vision_layers):
        prefix = f"tower.encoder.layers.{layer}."
        for name, rows, cols in (
            *((f"self_attn.{p}_proj", width, width) for p in ("q", "k", "v", "out")),
            ("mlp.fc1", mlp, width),
            ("mlp.fc2", width, mlp),
        ):
            shapes |= {f"{prefix}{name}.weight": (rows, cols), f"{prefix}{name}.bias": (rows,)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{prefix}{norm}.weight": (width,), f"{prefix}{norm}.bias": (width,)}
    q_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    for layer in range(spec.layers):
        prefix = f"llm.layers.{layer}."
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, spec.hidden)
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (spec.hidden, q_rows)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (spec.mlp, spec.hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (spec.mlp, spec.hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (spec.hidden, spec.mlp)
        shapes[f"{prefix}input_layernorm.weight"] = (spec.hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (spec.hidden,)
    if not spec.tie:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden)
    return shapes


def make_tensor(logical: str, spec: CheckpointSpec) -> torch.Tensor:
    """One whole tensor, in the dtype of the spec."""
    shape = tensor_shapes(spec)[logical]
    return torch.cat(list(_chunks(logical, shape, spec))).reshape(shape)


def _chunks(logical: str, shape: tuple[int, ...], spec: CheckpointSpec) -> Iterator[torch.Tensor]:
    mean, std = _distribution(logical, shape, spec)
    # 32 bits: the CPU's generator ignores all others.
    generator = torch.Generator().manual_seed(zlib.crc32(logical.encode(), spec.seed))
    left = math.prod(shape)
    while left:
        count = min(left, CHUNK)
        left -= count
        values = torch.randn(count, generator=generator)
        yield values.mul_(std).add_(mean).to(spec.dtype)


def _distribution(
    logical: str, shape: tuple[int, ...], spec: CheckpointSpec
) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values.

    A tied embedding is small, so that a token does not predict itself again and again; the final
    norm then brings the logits to a standard deviation near 4. Queries are large, so that attention
    picks rather than averages, and pictures change answers.
    """
    if "post_layernorm" in logical:
        return POST_LAYERNORM[logical.rsplit(".", 1)[1]], 0.0
    if logical == "llm.embed_tokens.weight":
        return 0.0, 0.05 if spec.tie else 1.0
    if logical == "llm.norm.weight":
        return 80.0 * spec.hidden**-0.5 if spec.tie else 1.0, 0.1
    if logical in ("image_newline", "tower.embeddings.position_embedding.weight"):
        return 0.0, 0.5
    if logical == "lm_head.weight":
        return 0.0, 4.0 * spec.hidden**-0.5
    if len(shape) > 1:
        gain = 2.5 if logical.startswith("llm.") and "q_proj" in logical else 1.0
        return 0.0, gain * math.prod(shape[1:]) ** -0.5
    if "norm" in logical and logical.endswith("weight"):
        return 1.0, 0.1
    return 0.0, 0.02 if "norm" not in logical else 0.1


def _write_weights(
    path: Path, spec: CheckpointSpec, layout: str, max_shard_bytes: int | None
) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for logical, shape in sorted(tensor_shapes(spec).items()):
        size = math.prod(shape) * spec.dtype.itemsize
        if max_shard_bytes is not None and shards[-1] and used + size > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][logical] = shape
        used += size
    if max_shard_bytes is None:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {
            tensor_name(logical, layout): name
            for name, shard in zip(names, shards, strict=True)
            for logical in shard
        }
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for name, shard in zip(names, shards, strict=True):
        with (path / name).open("wb") as file:
            _write_shard(file, shard, spec, layout)


def _write_shard(
    file: BinaryIO, shard: dict[str, tuple[int, ...]], spec: CheckpointSpec, layout: str
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for logical, shape in shard.items():
        end = offset + math.prod(shape) * spec.dtype.itemsize
        header[tensor_name(logical, layout)] = {
            "dtype": SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for logical, shape in shard.items():
        for chunk in _chunks(logical, shape, spec):
            file.write(chunk.view(torch.uint8).numpy().data)


def _template(spec: CheckpointSpec) -> str | None:
    if spec.chat_template is None:
        return None
    return tokenizers_small.CHAT_TEMPLATES[spec.chat_template]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=PRESETS, default="tiny")
    parser.add_argument("--layout", choices=LAYOUTS, default="v5")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-bytes", type=int)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    spec = dataclasses.replace(PRESETS[args.size], dtype=dtype, seed=args.seed)
    make_checkpoint(args.out, spec, layout=args.layout, max_shard_bytes=args.max_shard_bytes)


if __name__ == "__main__":
    main()
