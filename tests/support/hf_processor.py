"""transformers' official processor without torchvision, and its model with its own stop ids."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.10")


class WithoutVideos(transformers.LlavaOnevisionProcessor):
    """Its own code; only the check for a video processor, which needs torchvision, is left out."""

    def check_argument_for_proper_class(self, *arguments: Any) -> None:
        del arguments


@cache
def load_processor(path: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    pictures = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(path)
    config = transformers.AutoConfig.from_pretrained(path)
    vision = config.vision_config
    return WithoutVideos(
        image_processor=pictures,
        tokenizer=tokenizer,
        video_processor=None,
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=json.loads((path / "chat_template.json").read_text())["chat_template"],
    )


@cache
def load_model(path: Path) -> Any:
    return transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def normalised_frames(num_videos: int, num_frames: int, side: int) -> torch.Tensor:
    """(num_videos, num_frames, 3, side, side) as the fast video processor normalises."""
    rng = np.random.default_rng(num_frames)
    levels = rng.integers(0, 256, (num_videos, num_frames, 3, side, side)).astype(np.float32)
    return (torch.from_numpy(levels) - 127.5) / 127.5
