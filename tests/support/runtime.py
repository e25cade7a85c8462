"""Our model without an engine: loading, all logits, greedy tokens by a plain loop."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ovfast.checkpoint import CheckpointWeights
from ovfast.config import ModelConfig
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.ops import make_ops
from ovfast.pixels import view_pixels
from tests.support.requests import Request

ROOM = 64  # tokens of cache beyond the prompt


@cache
def load_model(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str = "reference",
) -> LlavaOnevision:
    config, where = ModelConfig.from_checkpoint(path), torch.device(device)
    weights = CheckpointWeights(path, config)
    model = LlavaOnevision(config, weights, make_ops(where, backend), dtype, where)
    weights.finish()
    return model


def embed(model: LlavaOnevision, views: NDArray[np.uint8]) -> torch.Tensor:
    """Patch embeddings of views: (num_views, tokens_per_view, hidden_size)."""
    rows = model.vision_tower.embed(view_pixels(views, model.device))
    return rows.unflatten(0, (len(views), -1))


def encode(model: LlavaOnevision, views: NDArray[np.uint8]) -> torch.Tensor:
    """The tower's features of views: (num_views, tokens_per_view, hidden_size)."""
    rows = model.vision_tower.encode(view_pixels(views, model.device))
    return rows.unflatten(0, (len(views), -1))


def all_logits(model: LlavaOnevision, request: Request) -> torch.Tensor:
    """(num_tokens, vocab_size) float32."""
    cache = model.new_cache(num_slots=1, max_positions=request.num_tokens)
    return model.prefill(request, cache, cache.allocate(), range(request.num_tokens))


def greedy(model: LlavaOnevision, request: Request, num_tokens: int) -> list[int]:
    cache = model.new_cache(num_slots=1, max_positions=request.num_tokens + ROOM)
    slot = cache.allocate()
    logits = model.prefill(request, cache, slot)[0]
    tokens = [int(logits.argmax())]
    while len(tokens) < num_tokens:
        tokens.append(int(model.decode(tokens[-1], cache, slot).argmax()))
    return tokens
