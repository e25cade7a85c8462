"""The demo model as trainable torch modules, and its export as a Hugging Face checkpoint.

Parameter names are those of the published Hugging Face layout, so ``state_dict`` is the checkpoint.
Only training needs these modules; ``ovfast`` runs the exported files.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch import Tensor, nn

IMAGE_SIZE, PATCH = 56, 14
GRIDS = [[IMAGE_SIZE * rows, IMAGE_SIZE * cols] for rows in (1, 2, 3) for cols in (1, 2, 3)]
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
VOCAB = 640
VISION = {
    "hidden_size": 144,
    "intermediate_size": 576,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
HEAD_DIM, ROPE_THETA, EPS = 64, 10000.0, 1e-6
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
    "{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Attention(nn.Module):
    """Self-attention with the tower's or the language model's projection names."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        out_name: str,
        biases: tuple[bool, bool],
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.out_name = (
            heads,
            kv_heads,
            head_dim,
            out_name,
        )
        self.q_proj = nn.Linear(width, heads * head_dim, bias=biases[0])
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=biases[0])
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=biases[0])
        self.add_module(out_name, nn.Linear(heads * head_dim, width, bias=biases[1]))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.get_submodule(self.out_name)(y.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class VisionLayer(nn.Module):
    """A pre-norm block of the tower."""

    def __init__(self) -> None:
        super().__init__()
        width = VISION["hidden_size"]
        heads = VISION["num_attention_heads"]
        self.layer_norm1 = nn.LayerNorm(width, eps=EPS)
        self.self_attn = Attention(width, heads, heads, width // heads, "out_proj", (True, True))
        self.layer_norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, VISION["intermediate_size"])
        self.mlp.fc2 = nn.Linear(VISION["intermediate_size"], width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="tanh"))


class VisionTower(nn.Module):
    """SigLIP without head: uint8 views (views, S, S, 3) → (views, tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        width, tokens = VISION["hidden_size"], (IMAGE_SIZE // PATCH) ** 2
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, width, PATCH, PATCH)
        self.embeddings.position_embedding = nn.Embedding(tokens, width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            VisionLayer() for _ in range(VISION["num_hidden_layers"])
        )
        self.post_layernorm = nn.LayerNorm(width, eps=EPS)  # stored by the format, never used

    def forward(self, views: Tensor) -> Tensor:
        pixels = (views.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = x + self.embeddings.position_embedding.weight
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class TextLayer(nn.Module):
    """A pre-norm block of the language model."""

    def __init__(self) -> None:
        super().__init__()
        width = TEXT["hidden_size"]
        self.input_layernorm = nn.RMSNorm(width, eps=EPS)
        heads, kv_heads = TEXT["num_attention_heads"], TEXT["num_key_value_heads"]
        self.self_attn = Attention(width, heads, kv_heads, HEAD_DIM, "o_proj", (True, False))
        self.post_attention_layernorm = nn.RMSNorm(width, eps=EPS)
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(width, TEXT["intermediate_size"], bias=False)
        self.mlp.up_proj = nn.Linear(width, TEXT["intermediate_size"], bias=False)
        self.mlp.down_proj = nn.Linear(TEXT["intermediate_size"], width, bias=False)

    def forward(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask, rope)
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))


class LanguageModel(nn.Module):
    """Qwen2 with tied embeddings, on embeddings, an explicit mask and explicit positions."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, TEXT["hidden_size"])
        self.model.layers = nn.ModuleList(TextLayer() for _ in range(TEXT["num_hidden_layers"]))
        self.model.norm = nn.RMSNorm(TEXT["hidden_size"], eps=EPS)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (batch, length, width) after the final norm; mask (batch, 1, length,
        length) bool.
        """
        inverse = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angles = (positions[..., None].float() * inverse).repeat(1, 1, 2)[:, None]
        rope = (angles.cos(), angles.sin())
        for layer in self.model.layers:
            x = layer(x, mask, rope)
        return self.model.norm(x)


class DemoModel(nn.Module):
    """The whole of the demo model; ``state_dict`` has the published Hugging Face names."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = VisionTower()
        self.multi_modal_projector = nn.Module()
        self.multi_modal_projector.linear_1 = nn.Linear(VISION["hidden_size"], TEXT["hidden_size"])
        self.multi_modal_projector.linear_2 = nn.Linear(TEXT["hidden_size"], TEXT["hidden_size"])
        self.image_newline = nn.Parameter(torch.randn(TEXT["hidden_size"]) * 0.02)
        self.language_model = LanguageModel()
        for name, weight in self.named_parameters():
            if weight.dim() >= 2:
                nn.init.normal_(weight, std=0.02 if "embed" in name else weight[0].numel() ** -0.5)

    @property
    def tower(self) -> VisionTower:
        return self.vision_tower.vision_model

    def language_parts(self) -> list[nn.Module]:
        """All but the tower."""
        newline = nn.ParameterList([self.image_newline])
        return [self.multi_modal_projector, newline, self.language_model]

    def project(self, features: Tensor) -> Tensor:
        return self.multi_modal_projector.linear_2(
            F.gelu(self.multi_modal_projector.linear_1(features))
        )


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer with Qwen2's pre-tokenizer and special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*texts, *["system", "user", "assistant"] * 50], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIALS]
    )
    return tokenizer


def export(model: DemoModel, tokenizer: Tokenizer, out: Path) -> None:
    """Writes a Hugging Face checkpoint directory in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    ids = {text: tokenizer.token_to_id(text) for text in SPECIALS}
    tensors = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    preprocessor = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "do_pad": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_grid_pinpoints": GRIDS,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIALS[1:]),
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    video = {
        k: v
        for k, v in preprocessor.items()
        if k not in ("image_grid_pinpoints", "image_processor_type", "do_pad")
    }
    files = {
        "config.json": hf_config(ids),
        "generation_config.json": {
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "do_sample": False,
            "pad_token_id": ids["<|endoftext|>"],
        },
        "preprocessor_config.json": preprocessor,
        "video_preprocessor_config.json": {
            **video,
            "video_processor_type": "LlavaOnevisionVideoProcessor",
        },
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": (IMAGE_SIZE // PATCH) ** 2,
            "vision_feature_select_strategy": "full",
            "image_token": "<image>",
            "video_token": "<video>",
            "vision_aspect_ratio": "anyres_max_9",
        },
        "tokenizer_config.json": tokenizer_config,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=1) + "\n")


def hf_config(ids: dict[str, int]) -> dict[str, object]:
    """The ``config.json`` of the demo model."""
    end = ids["<|im_end|>"]
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "torch_dtype": "bfloat16",
        "image_token_index": ids["<image>"],
        "video_token_index": ids["<video>"],
        "image_grid_pinpoints": GRIDS,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": True,
        "vision_config": {
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": EPS,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            **TEXT,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "vocab_size": VOCAB,
            "max_position_embeddings": 4096,
            "rope_theta": ROPE_THETA,
            "rms_norm_eps": EPS,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": end,
        },
    }
