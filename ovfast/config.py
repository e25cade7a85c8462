"""Model configuration, and the only place that knows the dialects of config.json.

`ModelConfig.from_checkpoint` reads the Hugging Face dialect (`llava_onevision`, any release) and
the original one (`LlavaQwenForCausalLM`), checks every value it uses, and raises ConfigError for
settings that change the arithmetic and that ovfast does not compute. It reads no tensors.

The original dialect does not describe its tower (always SigLIP-so400m, 26 of 27 layers). For small
test models a `vision_config` dict, with the Hugging Face keys, is accepted there too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ovfast.anyres import VisualGeometry
from ovfast.config_visual import check_preprocessor, read_anyres_max, read_pinpoints
from ovfast.errors import CheckpointError, ConfigError
from ovfast.json_fields import Fields, load_json

__all__ = ["ModelConfig", "TextConfig", "VisionConfig"]

IMAGE_TOKEN_ID = 151646
VIDEO_TOKEN_ID = 151647
IM_END_ID = 151645
STORAGE_DTYPES = ("bfloat16", "float16", "float32")
# Values under which a field of generation_config.json has no effect on sampling.
NEUTRAL_GENERATION_FIELDS: dict[str, tuple[object, ...]] = {
    "do_sample": (False,),
    "temperature": (1.0,),
    "top_k": (50, 0),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "suppress_tokens": (),
    "bad_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
}


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The SigLIP tower, with as many layers as are computed; `unused_layers` more are stored."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    unused_layers: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_view(self) -> int:
        return self.grid_side**2

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2

    @property
    def num_parameters(self) -> int:
        """Parameters that are computed with (no post-layernorm, no pooling head)."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        layer = 4 * (hidden * hidden + hidden) + 2 * hidden * mlp + mlp + hidden + 4 * hidden
        embeddings = hidden * (self.patch_dim + 1 + self.tokens_per_view)
        return embeddings + self.num_layers * layer


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The Qwen2 language model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def num_parameters(self) -> int:
        hidden = self.hidden_size
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = (q_rows + 2 * kv_rows) * (hidden + 1) + hidden * q_rows
        layer = attention + 3 * hidden * self.intermediate_size + 2 * hidden
        heads = 1 if self.tie_word_embeddings else 2
        return heads * self.vocab_size * hidden + self.num_layers * layer + hidden


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything about a checkpoint except its tensors and its tokenizer.

    `vocab_size` is what config.json says; the embedding's real row count may differ and decides.
    """

    vision: VisionConfig
    text: TextConfig
    dialect: Literal["hf", "orig"]
    image_token_id: int
    video_token_id: int | None
    grid_pinpoints_hw: tuple[tuple[int, int], ...]
    anyres_max: int | None
    torch_dtype: str
    stop_token_ids: tuple[int, ...]
    ignored_generation_fields: tuple[str, ...]
    name: str

    @property
    def num_parameters(self) -> int:
        """Parameters that are computed with: tower, projector, newline vector, language model."""
        hidden = self.text.hidden_size
        projector = hidden * (self.vision.hidden_size + 1) + hidden * (hidden + 1) + hidden
        return self.vision.num_parameters + projector + self.text.num_parameters

    @property
    def geometry(self) -> VisualGeometry:
        """What the checkpoint fixes about views and grids."""
        vision = self.vision
        return VisualGeometry(
            vision.image_size, vision.patch_size, self.grid_pinpoints_hw, self.anyres_max
        )

    @classmethod
    def from_checkpoint(cls, path: Path) -> "ModelConfig":
        """Read the configuration of a checkpoint directory.

        Args:
            path: directory with config.json and, optionally, generation_config.json,
                preprocessor_config.json and processor_config.json.

        Returns:
            The configuration of what will be computed.

        Raises:
            CheckpointError: config.json is missing, or one of the files is not a JSON object.
            ConfigError: a value is missing, of the wrong type, or asks for other arithmetic.
        """
        path = Path(path)
        config = load_json(path / "config.json")
        if config is None:
            raise CheckpointError(
                f"{path} has no config.json; expected a LLaVA-OneVision checkpoint directory. "
                "Check the path, or download the repository again."
            )
        top = Fields(path / "config.json", config)
        dialect = _dialect(top)
        top.require("quantization_config", (None,), "load the unquantised checkpoint")
        parsed = _parse_hf(top) if dialect == "hf" else _parse_orig(top)
        check_preprocessor(path, parsed)
        generation = load_json(path / "generation_config.json")
        fields = Fields(path / "generation_config.json", generation or {})
        return cls(
            **parsed,
            dialect=dialect,
            torch_dtype=_storage_dtype(top),
            stop_token_ids=_stop_token_ids(fields, top, parsed["text"].vocab_size),
            ignored_generation_fields=_ignored_generation_fields(generation or {}),
            name=path.resolve().name,
        )


def _dialect(top: Fields) -> Literal["hf", "orig"]:
    model_type, architectures = top.values.get("model_type"), top.values.get("architectures")
    if model_type == "llava_onevision":
        return "hf"
    named = isinstance(architectures, list) and "LlavaQwenForCausalLM" in architectures
    # Published files say "llava" on purpose, so the architecture decides there.
    if model_type in ("llava", "llava_qwen", "qwen2") and (named or model_type == "llava_qwen"):
        return "orig"
    raise ConfigError(
        f"{top.file}: model_type is {model_type!r} with architectures {architectures!r}; expected "
        "'llava_onevision' (Hugging Face) or LlavaQwenForCausalLM (original LLaVA-OneVision). "
        "Other model families are not supported."
    )


def _parse_hf(top: Fields) -> dict[str, Any]:
    top.require("projector_hidden_act", ("gelu",))
    top.require("multimodal_projector_bias", (True,))
    top.require("vision_feature_select_strategy", ("full", "patch"))
    vision = _vision(top.section("vision_config"), _feature_layer(top))
    section = top.section("text_config")
    # Old files keep the tie flag in the text configuration only, newer ones may set either.
    tied = section.boolean("tie_word_embeddings", False) or top.boolean(
        "tie_word_embeddings", False
    )
    image_key = "image_token_index" if "image_token_index" in top.values else "image_token_id"
    video_key = "video_token_index" if "video_token_index" in top.values else "video_token_id"
    return {
        "vision": vision,
        "text": _text(section, tied),
        "image_token_id": top.integer(image_key, IMAGE_TOKEN_ID, at_least=0),
        "video_token_id": top.integer(video_key, VIDEO_TOKEN_ID, at_least=0),
        "grid_pinpoints_hw": read_pinpoints(top, vision.image_size, swap=False),
        "anyres_max": read_anyres_max(top, "vision_aspect_ratio", "anyres_max_9"),
    }


def _parse_orig(top: Fields) -> dict[str, Any]:
    top.require("mm_patch_merge_type", ("flat", "spatial_unpad"))
    if top.values.get("mm_patch_merge_type", "flat") != "spatial_unpad":
        raise top.fail("mm_patch_merge_type", "'spatial_unpad'", "use a LLaVA-OneVision one")
    top.require("mm_newline_position", ("one_token",))
    top.require("mm_spatial_pool_mode", ("bilinear",))
    top.require("mm_projector_type", ("mlp2x_gelu",))
    top.require("mm_vision_select_feature", ("patch", "full"))
    # The original tower ignores the number and drops its last layer instead: both mean the same.
    top.require("mm_vision_select_layer", (-2, -1))
    top.require("mm_resampler_type", (None,))
    for key in ("mm_use_im_start_end", "add_faster_video"):
        top.require(key, (False, None))
    if "vision_config" in top.values:
        vision = _vision(top.section("vision_config"), -1)
    else:
        tower = top.values.get("mm_vision_tower", "siglip-so400m-patch14-384")
        if not isinstance(tower, str) or "siglip-so400m-patch14-384" not in tower:
            raise top.fail("mm_vision_tower", "'google/siglip-so400m-patch14-384'")
        vision = VisionConfig(1152, 4304, 26, 16, 384, 14, 1e-6)
    top.require("mm_hidden_size", (vision.hidden_size,))
    return {
        "vision": vision,
        "text": _text(top, top.boolean("tie_word_embeddings", False)),
        "image_token_id": top.integer("image_token_index", IMAGE_TOKEN_ID, at_least=0),
        "video_token_id": None,
        "grid_pinpoints_hw": read_pinpoints(top, vision.image_size, swap=True),
        "anyres_max": read_anyres_max(top, "image_aspect_ratio", None),
    }


def _feature_layer(top: Fields) -> int:
    layer = top.values.get("vision_feature_layer", -1)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int) or isinstance(layer, bool) or layer == 0:
        raise top.fail("vision_feature_layer", "one layer, such as -1 (the last) or -2")
    return layer


def _vision(fields: Fields, feature_layer: int) -> VisionConfig:
    fields.require("model_type", ("siglip_vision_model",))
    fields.require("hidden_act", ("gelu_pytorch_tanh",))
    fields.require("num_channels", (3,))
    stored = fields.integer("num_hidden_layers")
    # As hidden_states[feature_layer], where entry 0 is the embedding: -1 keeps all layers.
    kept = feature_layer if feature_layer > 0 else stored + 1 + feature_layer
    if not 1 <= kept <= stored:
        raise ConfigError(
            f"{fields.file}: vision_feature_layer is {feature_layer}; expected -{stored} to -1 or "
            f"1 to {stored} for a tower of {stored} layers. Correct the file."
        )
    config = VisionConfig(
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=kept,
        # Some files leave the heads out; every published tower has 16.
        num_heads=fields.integer("num_attention_heads", 16),
        image_size=fields.integer("image_size"),
        patch_size=fields.integer("patch_size"),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-6),
        unused_layers=stored - kept,
    )
    if config.hidden_size % config.num_heads:
        raise fields.fail("num_attention_heads", f"a divisor of hidden_size {config.hidden_size}")
    if config.patch_size > config.image_size:
        raise fields.fail("patch_size", f"at most image_size {config.image_size}")
    return config


def _text(fields: Fields, tied: bool) -> TextConfig:
    if fields.prefix:
        fields.require("model_type", ("qwen2",))
    fields.require("hidden_act", ("silu",))
    fields.require("use_sliding_window", (False, None))
    fields.require("mlp_bias", (False,))
    fields.require("attention_bias", (True,))
    layer_types = fields.values.get("layer_types") or []
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        raise fields.fail("layer_types", "only 'full_attention'")
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if "head_dim" not in fields.values and hidden_size % num_heads:
        raise fields.fail("num_attention_heads", f"a divisor of hidden_size {hidden_size}")
    config = TextConfig(
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden_size // num_heads),
        vocab_size=fields.integer("vocab_size", 151936),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(fields),
        max_position_embeddings=fields.integer("max_position_embeddings", 32768),
        tie_word_embeddings=tied,
    )
    if config.num_heads % config.num_kv_heads:
        raise fields.fail("num_key_value_heads", f"a divisor of the {config.num_heads} heads")
    if config.head_dim % 2:
        raise fields.fail("head_dim", f"an even size per head, not {config.head_dim}")
    return config


def _rope_theta(fields: Fields) -> float:
    """The rotary base, from `rope_theta` (transformers 4) or `rope_parameters` (transformers 5)."""
    for key in ("rope_scaling", "rope_parameters"):
        if fields.values.get(key) is None:
            continue
        rope = fields.section(key)
        for name in ("rope_type", "type"):
            rope.require(name, ("default",))
        if rope.number("partial_rotary_factor", 1.0) != 1.0 or "factor" in rope.values:
            raise fields.fail(key, "no rope scaling", "use one that ovfast computes")
        if rope.values.get("rope_theta") is not None:
            return rope.number("rope_theta", 10000.0)
    return fields.number("rope_theta", 10000.0)


def _storage_dtype(top: Fields) -> str:
    sections = [top] + ([top.section("text_config")] if top.values.get("text_config") else [])
    for fields in sections:
        for key in ("dtype", "torch_dtype"):
            value = fields.values.get(key)
            if value is not None and value not in STORAGE_DTYPES:
                raise fields.fail(key, f"one of {', '.join(STORAGE_DTYPES)}")
            if isinstance(value, str):
                return value
    return "float32"


def _stop_token_ids(generation: Fields, top: Fields, vocab_size: int) -> tuple[int, ...]:
    sections = [generation, top]
    if isinstance(top.values.get("text_config"), dict):
        sections.append(top.section("text_config"))
    for fields in sections:
        value = fields.values.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise fields.fail("eos_token_id", "a token id or a list of token ids")
        return tuple(dict.fromkeys(ids))
    return (IM_END_ID,) if vocab_size > IM_END_ID else ()


def _ignored_generation_fields(generation: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        key
        for key, neutral in NEUTRAL_GENERATION_FIELDS.items()
        if generation.get(key) is not None and generation[key] not in neutral
    )
