"""Names of tensors: from any disk layout to a layout-free name, and from there to ovfast's own.

Disk names are matched by one full regex that covers the original repository and every release of
transformers. Own names fuse what one product computes: q, k, v in rows, then gate and up.
"""

import re
from typing import NamedTuple

from ovfast.config import ModelConfig, TextConfig, VisionConfig

__all__ = ["EMBEDDING", "LM_HEAD", "Expected", "expected_tensors", "is_unused", "logical_name"]

EMBEDDING = "llm.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

DISK_NAME = re.compile(
    r"""(?:model\.)?(?:
    vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(?P<tower>.+)
    | multi_modal_projector\.(?P<linear>linear_[12]\.(?:weight|bias))
    | mm_projector\.(?P<index>[02])\.(?P<kind>weight|bias)
    | (?P<newline>image_newline)
    | (?:language_model\.)?(?P<head>lm_head\.weight)
    | (?:language_model\.(?:model\.)?)?(?P<llm>(?:embed_tokens|layers|norm)\..+)
    | (?:language_model\.(?:model\.)?)?(?P<rotary>rotary_emb\.inv_freq)
    )""",
    re.VERBOSE,
)
# Present in published files and never computed with: the norm after the tower, its pooling head,
# tables of the rotary embedding.
UNUSED = re.compile(
    r"tower\.post_layernorm\.(?:weight|bias)|tower\.head\..+|(?:.+\.)?rotary_emb\.inv_freq"
)
TOWER_LAYER = re.compile(
    r"tower\.encoder\.layers\.(\d+)\."
    r"(?:layer_norm[12]|self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])\.(?:weight|bias)"
)

Shape = tuple[int, ...]


class Expected(NamedTuple):
    """An own tensor: its shape, and the layout-free names and shapes stacked into it by rows."""

    shape: Shape
    parts: tuple[tuple[str, Shape], ...]


def logical_name(disk_name: str) -> str:
    """The layout-free name of a tensor; the name itself where no layout has it."""
    match = DISK_NAME.fullmatch(disk_name)
    if match is None:
        return disk_name
    if match["tower"]:
        return f"tower.{match['tower']}"
    if match["linear"]:
        return f"projector.{match['linear']}"
    if match["index"]:
        return f"projector.linear_{1 if match['index'] == '0' else 2}.{match['kind']}"
    if match["llm"]:
        return f"llm.{match['llm']}"
    return match["newline"] or match["head"] or match["rotary"]


def is_unused(logical: str, config: ModelConfig, *, tied: bool) -> bool:
    """Whether a tensor outside the expected ones is known and may be left unread."""
    if UNUSED.fullmatch(logical) or (tied and logical == LM_HEAD):
        return True
    layer = TOWER_LAYER.fullmatch(logical)
    if layer is None:
        return False
    # The feature is taken before the last layer of the source tower, which may still be stored.
    kept, unused = config.vision.num_layers, max(1, config.vision.unused_layers)
    return kept <= int(layer[1]) < kept + unused


def expected_tensors(config: ModelConfig, vocab_size: int, *, tied: bool) -> dict[str, Expected]:
    """Every tensor of a model by its own name, in the order in which a model asks for them."""
    width, hidden = config.vision.hidden_size, config.text.hidden_size
    table = _tower(config.vision)
    for name, cols in (("linear_1", width), ("linear_2", hidden)):
        _linear(table, f"multi_modal_projector.{name}", [(f"projector.{name}", hidden)], cols)
    _single(table, "image_newline", "image_newline", (hidden,))
    _single(table, "language_model.embed_tokens.weight", EMBEDDING, (vocab_size, hidden))
    for layer in range(config.text.num_layers):
        _text_layer(table, config.text, layer)
    _single(table, "language_model.norm.weight", "llm.norm.weight", (hidden,))
    if not tied:
        _single(table, "lm_head.weight", LM_HEAD, (vocab_size, hidden))
    return table


def _single(table: dict[str, Expected], own: str, logical: str, shape: Shape) -> None:
    table[own] = Expected(shape, ((logical, shape),))


def _linear(
    table: dict[str, Expected],
    own: str,
    parts: list[tuple[str, int]],
    cols: int,
    *,
    bias: bool = True,
) -> None:
    """A product whose weight rows (and biases) are stacked from `parts`: names with row counts."""
    rows = sum(count for _, count in parts)
    weights = tuple((f"{name}.weight", (count, cols)) for name, count in parts)
    table[f"{own}.weight"] = Expected((rows, cols), weights)
    if bias:
        biases = tuple((f"{name}.bias", (count,)) for name, count in parts)
        table[f"{own}.bias"] = Expected((rows,), biases)


def _tower(vision: VisionConfig) -> dict[str, Expected]:
    table: dict[str, Expected] = {}
    width, mlp, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    disk = "tower.embeddings.patch_embedding"
    # Stored as a convolution; flattened in (channel, row, column) order.
    table["vision_tower.patch_embedding.weight"] = Expected(
        (width, vision.patch_dim), ((f"{disk}.weight", (width, 3, patch, patch)),)
    )
    _single(table, "vision_tower.patch_embedding.bias", f"{disk}.bias", (width,))
    _single(
        table,
        "vision_tower.position_embedding",
        "tower.embeddings.position_embedding.weight",
        (vision.tokens_per_view, width),
    )
    for layer in range(vision.num_layers):
        own, disk = f"vision_tower.layers.{layer}", f"tower.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            for kind in ("weight", "bias"):
                _single(table, f"{own}.{norm}.{kind}", f"{disk}.{norm}.{kind}", (width,))
        qkv = [(f"{disk}.self_attn.{p}_proj", width) for p in "qkv"]
        _linear(table, f"{own}.qkv_proj", qkv, width)
        _linear(table, f"{own}.out_proj", [(f"{disk}.self_attn.out_proj", width)], width)
        _linear(table, f"{own}.fc1", [(f"{disk}.mlp.fc1", mlp)], width)
        _linear(table, f"{own}.fc2", [(f"{disk}.mlp.fc2", width)], mlp)
    return table


def _text_layer(table: dict[str, Expected], text: TextConfig, layer: int) -> None:
    own, disk = f"language_model.layers.{layer}", f"llm.layers.{layer}"
    hidden, mlp = text.hidden_size, text.intermediate_size
    q_rows, kv_rows = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    for norm in ("input_layernorm", "post_attention_layernorm"):
        _single(table, f"{own}.{norm}.weight", f"{disk}.{norm}.weight", (hidden,))
    qkv = [(f"{disk}.self_attn.{p}_proj", q_rows if p == "q" else kv_rows) for p in "qkv"]
    _linear(table, f"{own}.qkv_proj", qkv, hidden)
    output = [(f"{disk}.self_attn.o_proj", hidden)]
    _linear(table, f"{own}.o_proj", output, q_rows, bias=False)
    gate_up = [(f"{disk}.mlp.gate_proj", mlp), (f"{disk}.mlp.up_proj", mlp)]
    _linear(table, f"{own}.gate_up_proj", gate_up, hidden, bias=False)
    _linear(table, f"{own}.down_proj", [(f"{disk}.mlp.down_proj", hidden)], mlp, bias=False)
