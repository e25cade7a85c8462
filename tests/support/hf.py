"""transformers as the oracle: its model, its picture processor, its greedy generation."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from tests.support.requests import Request

transformers = pytest.importorskip("transformers", minversion="5.10")
# 4.57.0 and 4.57.1 apply the unused post-layernorm; the minimum above already rules them out.
assert transformers.__version__ not in ("4.57.0", "4.57.1")


@cache
def load_model(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        path, dtype=dtype, attn_implementation="sdpa"
    )
    model.generation_config.eos_token_id = None  # always the asked number of tokens
    return model.eval().to(device)


@cache
def _image_processor(path: Path) -> Any:
    return transformers.LlavaOnevisionImageProcessorPil.from_pretrained(path)


def process_images(path: Path, images: list[PILImage.Image]) -> dict[str, Any]:
    """Pictures of one request as the model takes them, by the checkpoint's own PIL processor."""
    batch = _image_processor(path)([images], return_tensors="pt")
    return {
        "pixel_values": batch["pixel_values"],
        "image_sizes": batch["image_sizes"],
        "batch_num_images": torch.tensor([len(images)]),
    }


def normalise(views: np.ndarray) -> torch.Tensor:
    """(V, S, S, 3) uint8 to (V, 3, S, S) float32 by upstream's formula."""
    pixels = torch.from_numpy(views).permute(0, 3, 1, 2).float()
    return (pixels / 255 - 0.5) / 0.5


@dataclass(frozen=True)
class HFInputs:
    input_ids: torch.Tensor
    visual: dict[str, Any]


def make_inputs(
    path: Path, request: Request, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> HFInputs:
    """The same request as transformers' model takes it; pictures by its own PIL processor."""
    visual: dict[str, Any] = {}
    if request.images:
        visual = process_images(path, [PILImage.fromarray(image) for image in request.images])
        visual["pixel_values"] = visual["pixel_values"].to(dtype)
    first = 0
    for plan in request.plans:
        if plan.kind == "video":  # its video processor needs torchvision
            frames = normalise(request.views[first : first + plan.num_views])
            visual["pixel_values_videos"] = frames[None].to(dtype)
        first += plan.num_views
    visual = {name: tensor.to(device) for name, tensor in visual.items()}
    return HFInputs(torch.from_numpy(request.input_ids)[None].to(device), visual)


@torch.no_grad()
def all_logits(model: Any, inputs: HFInputs) -> torch.Tensor:
    """(num_tokens, vocab_size) float32."""
    return model(input_ids=inputs.input_ids, **inputs.visual, use_cache=False).logits[0].float()


@torch.no_grad()
def greedy(model: Any, inputs: HFInputs, num_tokens: int, **options: Any) -> list[int]:
    """Greedy tokens; `options` are further ones of transformers' generate."""
    ids = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=torch.ones_like(inputs.input_ids),
        **inputs.visual,
        do_sample=False,
        max_new_tokens=num_tokens,
        **options,
    )
    return ids[0, inputs.input_ids.shape[1] :].tolist()


@torch.no_grad()
def tower_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """The residual stream after the tower's last layer: what the projector reads."""
    outputs = model.model.vision_tower(pixel_values, output_hidden_states=True)
    return outputs.hidden_states[-1]


@torch.no_grad()
def packed_rows(model: Any, inputs: HFInputs) -> list[torch.Tensor]:
    """Visual tokens of each picture, or of the one video."""
    if "pixel_values_videos" in inputs.visual:
        frames = inputs.visual["pixel_values_videos"]
        return list(model.model.get_video_features(frames).pooler_output)
    return list(model.model.get_image_features(**inputs.visual).pooler_output)
