"""Both sides of one model with the same random weights, made on the device: nothing is read.

A tensor's values depend on its layout-free name and the spec alone, so ovfast and transformers get
the same bits whatever they call it and however they stack it. A directory holds the configuration,
the processors' and a tokenizer, and no weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovfast.config import ModelConfig
from ovfast.tensor_names import LM_HEAD, expected_tensors, logical_name
from tests.support import checkpoint_configs, checkpoints, tokenizers_small
from tests.support.checkpoints import CheckpointSpec


def write_files(directory: Path, spec: CheckpointSpec) -> Path:
    """Everything of a checkpoint but its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint_configs.write_configs(directory, spec, "v5")
    assert spec.chat_template is not None
    tokenizers_small.write_tokenizer(
        directory,
        base=spec.tokenizer_base,
        orig=False,
        chat_template=tokenizers_small.CHAT_TEMPLATES[spec.chat_template],
        template_file=spec.template_file,
    )
    return directory


def random_tensor(
    logical: str, shape: tuple[int, ...], spec: CheckpointSpec, device: torch.device
) -> Tensor:
    """A tensor of a checkpoint, in the dtype of the spec; scaled as `tests.support.checkpoints`."""
    mean, std = checkpoints._distribution(logical, shape, spec)
    generator = torch.Generator(device).manual_seed(zlib.crc32(logical.encode(), spec.seed))
    values = torch.randn(shape, generator=generator, device=device)
    return values.mul_(std).add_(mean).to(spec.dtype)


class RandomWeights:
    """A source of a model's tensors, for `ovfast.models.parameters`.

    Args:
        config: of the model.
        spec: the same sizes.
    """

    def __init__(self, config: ModelConfig, spec: CheckpointSpec) -> None:
        self._expected = expected_tensors(config, spec.vocab_size, tied=spec.tie)
        self._spec = spec

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._expected)

    def take(self, name: str, *, dtype: torch.dtype | None, device: torch.device) -> Tensor:
        entry = self._expected[name]
        parts = [random_tensor(part, shape, self._spec, device) for part, shape in entry.parts]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return whole.reshape(entry.shape).to(dtype or self._spec.dtype)

    def take_packed(self, name: str) -> None:
        """There is nothing packed."""


def transformers_model(directory: Path, spec: CheckpointSpec, device: torch.device) -> Any:
    """Transformers' model (sdpa) with the same weights; it never stops by itself."""
    from transformers import AutoConfig, LlavaOnevisionForConditionalGeneration

    config = AutoConfig.from_pretrained(directory)
    with device:
        model = LlavaOnevisionForConditionalGeneration._from_config(
            config, dtype=spec.dtype, attn_implementation="sdpa"
        )
    model = model.to(device).eval().requires_grad_(False)
    shapes = checkpoints.tensor_shapes(spec)
    for name, tensor in model.state_dict().items():
        logical = logical_name(name)
        if logical != LM_HEAD or not spec.tie:
            tensor.copy_(random_tensor(logical, shapes[logical], spec, device))
    model.generation_config.eos_token_id = None
    return model


def pil_processor(directory: Path) -> Any:
    """Transformers' Pillow image processor."""
    from transformers import LlavaOnevisionImageProcessorPil

    return LlavaOnevisionImageProcessorPil.from_pretrained(directory)


def fast_processor(directory: Path) -> Any:
    """Transformers' image processor that runs on the device.

    Raises:
        ImportError: it needs torchvision, which is not installed.
    """
    import transformers

    kind = getattr(transformers, "LlavaOnevisionImageProcessor", None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        kind = transformers.LlavaOnevisionImageProcessorFast  # its name before 5.0
    if kind is transformers.LlavaOnevisionImageProcessorPil:
        raise ImportError("the fast image processor of transformers needs torchvision")
    return kind.from_pretrained(directory)
