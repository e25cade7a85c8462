"""JSON files of random checkpoints: config.json in both dialects, generation, processors."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.checkpoints import CheckpointSpec


def write_configs(path: Path, spec: "CheckpointSpec", layout: str) -> None:
    """Write config.json, generation_config.json and, for Hugging Face layouts, the processor files.

    The older layouts use the older spellings: `torch_dtype`, `rope_theta`, the tie flag in
    `text_config` only.
    """
    dtype = str(spec.dtype).removeprefix("torch.")
    new_style = layout in ("v5", "hybrid")
    end_of_text, _, im_end, image, video = range(spec.tokenizer_base, spec.tokenizer_base + 5)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": spec.vision_hidden,
        "intermediate_size": spec.vision_mlp,
        "num_hidden_layers": spec.vision_layers,
        "num_attention_heads": spec.vision_heads,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "vision_use_head": False,
    }
    text: dict[str, Any] = {
        "hidden_size": spec.hidden,
        "intermediate_size": spec.mlp,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": spec.rms_norm_eps,
        "max_position_embeddings": spec.max_position_embeddings,
        "tie_word_embeddings": spec.tie,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": spec.layers,
        "hidden_act": "silu",
    }
    if spec.head_dim * spec.heads != spec.hidden:
        text["head_dim"] = spec.head_dim
    if new_style:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    else:
        text["rope_theta"] = spec.rope_theta
    storage = {"dtype" if new_style else "torch_dtype": dtype}
    if layout == "orig":
        config = _orig_config(spec, text, vision) | storage
        config |= {"eos_token_id": im_end, "image_token_index": image}
    else:
        config = {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "model_type": "llava_onevision",
            "image_token_index": image,
            "video_token_index": video,
            "projector_hidden_act": "gelu",
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": spec.vision_feature_layer,
            "vision_aspect_ratio": f"anyres_max_{spec.anyres_max}",
            "image_grid_pinpoints": spec.pinpoints_hw,
            "multimodal_projector_bias": True,
            "tie_word_embeddings": spec.tie and new_style,
            "text_config": text | {"model_type": "qwen2"},
            "vision_config": vision,
            **storage,
        }
        _write_processor_configs(path, spec)
    generation = {"eos_token_id": [im_end, end_of_text], "pad_token_id": end_of_text}
    _write_json(path / "generation_config.json", generation | {"do_sample": False})
    _write_json(path / "config.json", config)


def _orig_config(
    spec: "CheckpointSpec", text: dict[str, Any], vision: dict[str, Any]
) -> dict[str, Any]:
    config = text | {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_hidden_size": spec.vision_hidden,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": "one_token",
        "mm_spatial_pool_mode": "bilinear",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_resampler_type": None,
        "image_aspect_ratio": f"anyres_max_{spec.anyres_max}",
        "image_grid_pinpoints": [[w, h] for h, w in spec.pinpoints_hw],
        "tokenizer_model_max_length": 32768,
        "use_pos_skipping": False,
        "rope_scaling": None,
    }
    if spec.vision_hidden != 1152:
        config["vision_config"] = vision
    return config


def _write_processor_configs(path: Path, spec: "CheckpointSpec") -> None:
    picture = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"height": spec.image_size, "width": spec.image_size},
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "processor_class": "LlavaOnevisionProcessor",
    }
    image = picture | {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "do_pad": True,
        "image_grid_pinpoints": spec.pinpoints_hw,
    }
    _write_json(path / "preprocessor_config.json", image)
    video = picture | {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    _write_json(path / "video_preprocessor_config.json", video)
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": spec.tokens_per_view,
        "vision_feature_select_strategy": "full",
        "image_token": "<image>",
        "video_token": "<video>",
        "vision_aspect_ratio": f"anyres_max_{spec.anyres_max}",
    }
    _write_json(path / "processor_config.json", processor)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
