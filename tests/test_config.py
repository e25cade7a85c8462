"""ModelConfig: both dialects, old and new spellings, and refusal of what is not computed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ovfast.config import ModelConfig, VisionConfig
from ovfast.errors import CheckpointError, ConfigError, OVFastError
from tests.support.checkpoint_configs import write_configs
from tests.support.checkpoints import (
    LAYOUTS,
    PRESETS,
    CheckpointSpec,
    make_checkpoint,
    tensor_shapes,
)

SPEC = CheckpointSpec(heads=8, kv_heads=2, head_dim=64, tie=False, rope_theta=5e5, grid=(2, 3))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return _configs_only(tmp_path, SPEC)


def edit(path: Path, change: dict[str, Any], file: str = "config.json") -> None:
    """Set (or, with ..., remove) keys; a dotted key reaches into a section."""
    content = json.loads((path / file).read_text())
    for key, value in change.items():
        *sections, last = key.split(".")
        target = content
        for section in sections:
            target = target[section]
        if value is ...:
            target.pop(last)
        else:
            target[last] = value
    (path / file).write_text(json.dumps(content))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(tmp_path: Path, layout: str) -> None:
    config = ModelConfig.from_checkpoint(make_checkpoint(tmp_path / "a", SPEC, layout=layout))
    assert config.vision == VisionConfig(144, 208, 2, 2, 84, 14, 1e-6)
    assert (config.vision.head_dim, config.vision.grid_side) == (72, 6)
    assert (config.vision.tokens_per_view, config.vision.patch_dim) == (36, 588)
    assert (config.text.num_heads, config.text.num_kv_heads, config.text.head_dim) == (8, 2, 64)
    assert (config.text.rope_theta, config.text.rms_norm_eps) == (5e5, 1e-6)
    assert not config.text.tie_word_embeddings
    assert config.dialect == ("orig" if layout == "orig" else "hf")
    assert config.image_token_id == 595
    assert config.video_token_id == (None if layout == "orig" else 596)
    assert config.grid_pinpoints_hw == tuple((84 * i, 84 * j) for i in (1, 2) for j in (1, 2, 3))
    assert (config.anyres_max, config.torch_dtype) == (9, "float32")
    assert config.stop_token_ids == (594, 592)
    assert (config.ignored_generation_fields, config.name) == ((), "a")


@pytest.mark.parametrize("size", ["tiny", "0.5b", "7b"])
def test_num_parameters_counts_what_is_computed(tmp_path: Path, size: str) -> None:
    spec = PRESETS[size]
    config = ModelConfig.from_checkpoint(_configs_only(tmp_path, spec))
    total = 0
    for name, shape in tensor_shapes(spec).items():
        count = 1
        for side in shape:
            count *= side
        total += 0 if "post_layernorm" in name else count
    assert config.num_parameters == total
    if size != "tiny":  # published totals include the unused post-layernorm
        assert total + 2 * 1152 == {"0.5b": 893_675_552, "7b": 8_030_807_584}[size]


def _configs_only(path: Path, spec: CheckpointSpec, layout: str = "v5") -> Path:
    write_configs(path, spec, layout)
    return path


def test_original_config_without_vision_section_is_the_so400m_tower(tmp_path: Path) -> None:
    path = _configs_only(tmp_path, SPEC, "orig")
    edit(
        path,
        {"vision_config": ..., "mm_hidden_size": 1152, "image_grid_pinpoints": "(1x1),...,(6x6)"},
    )
    config = ModelConfig.from_checkpoint(path)
    assert config.vision == VisionConfig(1152, 4304, 26, 16, 384, 14, 1e-6)
    assert config.grid_pinpoints_hw[0] == (384, 384)
    assert len(set(config.grid_pinpoints_hw)) == 36
    assert max(config.grid_pinpoints_hw) == (2304, 2304)


def test_original_pinpoints_are_width_first(tmp_path: Path) -> None:
    path = _configs_only(tmp_path, SPEC, "orig")
    edit(path, {"image_grid_pinpoints": [[84, 168]]})
    assert ModelConfig.from_checkpoint(path).grid_pinpoints_hw == ((168, 84),)


@pytest.mark.parametrize(("layer", "kept"), [(-1, 2), (-2, 1), (1, 1), (2, 2), ([-2], 1)])
def test_feature_layer_drops_layers(checkpoint: Path, layer: object, kept: int) -> None:
    edit(checkpoint, {"vision_feature_layer": layer})
    vision = ModelConfig.from_checkpoint(checkpoint).vision
    assert (vision.num_layers, vision.unused_layers) == (kept, 2 - kept)


def test_old_and_missing_spellings(checkpoint: Path) -> None:
    text = {"rope_parameters": ..., "rope_theta": 1000000.0, "rms_norm_eps": 1e-5}
    edit(checkpoint, {f"text_config.{key}": value for key, value in text.items()})
    edit(
        checkpoint,
        {
            "image_token_index": ...,
            "video_token_index": ...,
            "image_token_id": 595,
            "dtype": ...,
            "torch_dtype": "float16",
            "vision_config.num_attention_heads": ...,
            "vision_config.hidden_size": 160,
            "vision_aspect_ratio": "anyres_max_4",
            "multimodal_projector_bias": ...,
        },
    )
    edit(checkpoint, {"vision_aspect_ratio": ...}, "processor_config.json")
    config = ModelConfig.from_checkpoint(checkpoint)
    assert (config.text.rope_theta, config.text.rms_norm_eps) == (1e6, 1e-5)
    assert (config.image_token_id, config.video_token_id) == (595, 151647)
    assert (config.torch_dtype, config.anyres_max) == ("float16", 4)
    assert config.vision.num_heads == 16


def test_stop_ids_fall_back(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    assert ModelConfig.from_checkpoint(checkpoint).stop_token_ids == ()  # 608 rows have no 151645
    edit(checkpoint, {"text_config.vocab_size": 152000})
    assert ModelConfig.from_checkpoint(checkpoint).stop_token_ids == (151645,)
    edit(checkpoint, {"text_config.eos_token_id": 7})
    assert ModelConfig.from_checkpoint(checkpoint).stop_token_ids == (7,)
    edit(checkpoint, {"eos_token_id": [5, 6, 5]})
    assert ModelConfig.from_checkpoint(checkpoint).stop_token_ids == (5, 6)


def test_ignored_generation_fields_are_named(checkpoint: Path) -> None:
    fields = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    edit(checkpoint, fields | {"repetition_penalty": 1.1, "min_p": None}, "generation_config.json")
    ignored = ModelConfig.from_checkpoint(checkpoint).ignored_generation_fields
    assert set(ignored) == {"do_sample", "temperature", "top_p", "top_k", "repetition_penalty"}


def test_config_is_frozen(checkpoint: Path) -> None:
    config = ModelConfig.from_checkpoint(checkpoint)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"  # type: ignore[misc]


HF_REFUSED = [
    ("model_type", "llava_next"),
    ("model_type", ...),
    ("vision_config", ...),
    ("vision_config", [1]),
    ("text_config", "qwen2"),
    ("text_config.num_attention_heads", ...),
    ("text_config.num_attention_heads", 0),
    ("text_config.num_attention_heads", "8"),
    ("text_config.num_attention_heads", True),
    ("text_config.num_key_value_heads", 3),
    ("text_config.num_hidden_layers", 2.0),
    ("text_config.hidden_size", None),
    ("text_config.head_dim", 63),
    ("text_config.rms_norm_eps", "1e-6"),
    ("text_config.rms_norm_eps", float("nan")),
    ("text_config.hidden_act", "gelu"),
    ("text_config.model_type", "llama"),
    ("text_config.use_sliding_window", True),
    ("text_config.layer_types", ["full_attention", "sliding_attention"]),
    ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}),
    ("text_config.rope_scaling", "linear"),
    ("text_config.rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
    ("text_config.rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ("vision_config.hidden_size", 145),
    ("vision_config.patch_size", 85),
    ("vision_config.patch_size", [14, 14]),
    ("vision_config.hidden_act", "gelu"),
    ("vision_config.num_channels", 4),
    ("vision_config.model_type", "clip_vision_model"),
    ("vision_feature_layer", 0),
    ("vision_feature_layer", -4),
    ("vision_feature_layer", [-1, -2]),
    ("vision_feature_select_strategy", "default"),
    ("projector_hidden_act", "relu"),
    ("multimodal_projector_bias", False),
    ("vision_aspect_ratio", "pad"),
    ("vision_aspect_ratio", "anyres_max_0"),
    ("vision_aspect_ratio", 9),
    ("image_grid_pinpoints", []),
    ("image_grid_pinpoints", [[84, 100]]),
    ("image_grid_pinpoints", [[84]]),
    ("image_grid_pinpoints", ...),
    ("image_grid_pinpoints", "1x1"),
    ("image_token_index", "<image>"),
    ("dtype", "float8_e4m3fn"),
    ("quantization_config", {"quant_method": "awq"}),
    ("eos_token_id", "<|im_end|>"),
]


@pytest.mark.parametrize(("key", "value"), HF_REFUSED)
def test_refused_in_the_hugging_face_dialect(checkpoint: Path, key: str, value: object) -> None:
    (checkpoint / "generation_config.json").unlink()
    edit(checkpoint, {key: value})
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        ModelConfig.from_checkpoint(checkpoint)
    last = key.rsplit(".", maxsplit=1)[-1]
    assert last in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_newline_position", "grid"),
        ("mm_spatial_pool_mode", "average"),
        ("mm_patch_merge_type", "flat"),
        ("mm_patch_merge_type", ...),
        ("mm_projector_type", "linear"),
        ("mm_resampler_type", "spatial_pool"),
        ("mm_use_im_start_end", True),
        ("mm_vision_select_layer", -3),
        ("mm_hidden_size", 1024),
        ("image_aspect_ratio", "square"),
        ("image_aspect_ratio", ...),
        ("image_grid_pinpoints", ...),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("use_sliding_window", True),
        ("architectures", ["LlavaLlamaForCausalLM"]),
    ],
)
def test_refused_in_the_original_dialect(tmp_path: Path, key: str, value: object) -> None:
    path = _configs_only(tmp_path, SPEC, "orig")
    edit(path, {key: value})
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_checkpoint(path)


def test_another_tower_is_refused(tmp_path: Path) -> None:
    path = _configs_only(tmp_path, SPEC, "orig")
    edit(path, {"vision_config": ..., "mm_vision_tower": "openai/clip-vit-large-patch14-336"})
    with pytest.raises(ConfigError, match="mm_vision_tower"):
        ModelConfig.from_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.48, 0.46, 0.41]),
        ("image_std", [0.5, 0.5, 0.4]),
        ("do_resize", False),
        ("do_normalize", False),
        ("do_center_crop", True),
        ("resample", 2),
        ("rescale_factor", 1.0),
        ("size", {"height": 336, "width": 336}),
        ("size", {"height": [84]}),
        ("image_grid_pinpoints", [[84, 84]]),
    ],
)
def test_other_picture_settings_are_refused(checkpoint: Path, key: str, value: object) -> None:
    edit(checkpoint, {key: value}, "preprocessor_config.json")
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: {key}"):
        ModelConfig.from_checkpoint(checkpoint)
    # transformers 5 may keep the same settings in the processor's file
    nested = json.loads((checkpoint / "preprocessor_config.json").read_text())
    (checkpoint / "preprocessor_config.json").unlink()
    edit(checkpoint, {"image_processor": nested}, "processor_config.json")
    with pytest.raises(ConfigError, match=rf"processor_config\.json: image_processor\.{key}"):
        ModelConfig.from_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"), [("num_image_tokens", 729), ("vision_aspect_ratio", "anyres_max_4")]
)
def test_processor_must_agree_with_config(checkpoint: Path, key: str, value: object) -> None:
    edit(checkpoint, {key: value}, "processor_config.json")
    with pytest.raises(ConfigError, match=rf"processor_config\.json: {key}"):
        ModelConfig.from_checkpoint(checkpoint)


def test_only_config_json_is_needed(checkpoint: Path) -> None:
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert ModelConfig.from_checkpoint(checkpoint).vision.image_size == 84


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{", b"null", b"[" * 100_000])
def test_unreadable_config(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_checkpoint(checkpoint)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelConfig.from_checkpoint(tmp_path)
    with pytest.raises(OVFastError):
        ModelConfig.from_checkpoint(tmp_path / "nowhere")
