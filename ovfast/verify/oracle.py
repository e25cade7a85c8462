"""transformers as the reference: its tokenizer, its Pillow image processor, its model.

Everything is read from the one forward pass that transformers itself makes, by hooks: what the
projector gets, what the language model gets, what the head gets.
"""

import contextlib
import gc
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ovfast.config import ModelConfig
from ovfast.errors import BackendError
from ovfast.model_inputs import ModelInputs
from ovfast.verify.cases import NUM_NEW_TOKENS, Case, expand_prompt
from ovfast.verify.stages import Head, Stages

__all__ = ["Oracle", "cache_argument", "why_unavailable"]

# Releases from it on have the Pillow processor and do not apply the unused post-layernorm, as
# 4.57.0 and 4.57.1 do.
MIN_VERSION = (5, 10)


def why_unavailable(config: ModelConfig) -> str | None:
    """Why transformers cannot be the reference of a checkpoint; None if it can."""
    install = f"install it with: pip install 'transformers>={'.'.join(map(str, MIN_VERSION))}'"
    if config.dialect != "hf":
        return (
            "the checkpoint has the original layout, which transformers cannot load; verify its "
            "Hugging Face conversion, which ovfast computes alike"
        )
    try:
        version = str(importlib.import_module("transformers").__version__)
    except ImportError as error:
        return f"transformers cannot be imported ({error}); {install}"
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < MIN_VERSION:
        return f"transformers {version} is too old; {install}"
    return None


def cache_argument(module: torch.nn.Module, cache: Any) -> dict[str, Any]:
    """A cache to go on with, as the module's release of transformers names it: from 5.24 on
    "cache", before "past_key_values".
    """
    names = inspect.signature(module.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}


class Oracle:
    """A checkpoint in transformers; a context manager that frees the model at its end.

    Args:
        path: the checkpoint's directory, in a Hugging Face layout.
        dtype: of weights and activations.
        device: of the model.

    Raises:
        BackendError: transformers cannot load the checkpoint.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        transformers: Any = importlib.import_module("transformers")
        self.version = str(transformers.__version__)
        self._dtype, self._device = dtype, device
        with _quiet(transformers):
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
                processor = transformers.LlavaOnevisionImageProcessorPil
                self._image_processor = processor.from_pretrained(path)
                model, info = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
                    path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
                )
            except Exception as error:
                raise self._cannot_load(path, f"{type(error).__name__}: {error}") from error
        if info["missing_keys"]:
            names = ", ".join(sorted(info["missing_keys"])[:5])
            raise self._cannot_load(path, f"it finds no {names} and would draw random ones")
        self._model = model.eval().to(device)

    def _cannot_load(self, path: Path, why: str) -> BackendError:
        return BackendError(
            f"transformers {self.version} cannot load {path} ({why:.500}); expected a checkpoint "
            "in a Hugging Face layout. Try another release of transformers."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del self._model
        gc.collect()  # modules and their hooks are cycles
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def prompt_ids(self, case: Case, num_tokens: list[int]) -> list[int]:
        """Ids of a case's prompt.

        Args:
            case: the case.
            num_tokens: of each picture and video, in the order of the prompt.
        """
        text = expand_prompt(case, num_tokens)
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def views(self, case: Case, num_views: list[int]) -> list[NDArray[np.uint8]]:
        """Views of each picture of a case, as bytes.

        Args:
            case: the case.
            num_views: of each picture; transformers pads all to the most, with zeros.

        Returns:
            For each picture (views, image_size, image_size, 3).
        """
        pixel_values = self._image_inputs(case)["pixel_values"]
        levels = ((pixel_values.double() * 0.5 + 0.5) * 255).round().to(torch.uint8)
        channels_last = levels.permute(0, 1, 3, 4, 2).numpy()
        return [v[:n] for v, n in zip(channels_last, num_views, strict=True)]

    def head(self) -> Head:
        """The model's head; it outlives the model."""
        weight, device = self._model.lm_head.weight.detach(), self._device
        return lambda hidden: torch.nn.functional.linear(hidden.to(device), weight).float().cpu()

    @torch.inference_mode()
    def run(self, case: Case, inputs: ModelInputs, forbidden: Tensor) -> Stages:
        """Runs a case, once over its prompt and then token by token.

        Args:
            case: the case.
            inputs: its ids, and the views of its videos (transformers' video processor needs
                torchvision).
            forbidden: (vocab_size,) bool, ids that are never generated.

        Raises:
            ValueError, RuntimeError: transformers refuses the request.
        """
        model, seen = self._model, _Seen()
        visual = self._visual_inputs(case, inputs)
        with seen.listen(model), _exact_convolution(self._device):
            input_ids = torch.from_numpy(inputs.input_ids)[None].to(self._device)
            outputs = model.model(input_ids=input_ids, use_cache=True, **visual)
        hidden, cache = outputs.last_hidden_state[0], outputs.past_key_values
        token_ids: list[int] = []
        rows: list[Tensor] = []
        last = hidden[-1:]
        while True:
            logits = model.lm_head(last)[0].float().cpu().masked_fill(forbidden, -torch.inf)
            rows.append(logits)
            token_ids.append(int(logits.argmax()))
            if len(token_ids) == NUM_NEW_TOKENS:
                break
            token = torch.tensor([[token_ids[-1]]], device=self._device)
            outputs = model.model(input_ids=token, **cache_argument(model.model, cache))
            last = outputs.last_hidden_state[0]
        spans = [seen.inputs_embeds[span.start : span.end] for span in inputs.spans]
        return Stages(
            features=torch.cat(seen.features) if seen.features else None,
            rows=torch.cat([seen.inputs_embeds[:0], *spans]),
            hidden=hidden.cpu(),
            token_ids=tuple(token_ids),
            token_logits=torch.stack(rows),
        )

    def _image_inputs(self, case: Case) -> dict[str, Tensor]:
        pictures = [Image.fromarray(image) for image in case.images]
        # Nested: one sample of several pictures. A flat list would be one picture a sample.
        batch = self._image_processor([pictures], return_tensors="pt")
        return {"pixel_values": batch["pixel_values"], "image_sizes": batch["image_sizes"]}

    def _visual_inputs(self, case: Case, inputs: ModelInputs) -> dict[str, Tensor]:
        visual: dict[str, Tensor] = {}
        if case.images:
            visual = self._image_inputs(case)
            visual["batch_num_images"] = torch.tensor([len(case.images)])
        if case.videos:
            assert len(case.videos) == 1  # videos of different lengths are no one tensor
            (frames,) = views_of(inputs, "video")
            pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
            visual["pixel_values_videos"] = ((pixels / 255 - 0.5) / 0.5)[None]
        return {
            name: value.to(self._device, self._dtype if value.is_floating_point() else None)
            for name, value in visual.items()
        }


def views_of(inputs: ModelInputs, kind: str) -> list[NDArray[np.uint8]]:
    """Views of each picture ("image") or video ("video") of a request, in its order."""
    found, first = [], 0
    for span in inputs.spans:
        last = first + inputs.plans[span.plan_index].num_views
        if span.kind == kind:
            found.append(inputs.views[first:last])
        first = last
    return found


class _Seen:
    """What passes between the parts of a transformers model during one forward pass."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []  # of pictures, then of videos: the order of its calls
        self.inputs_embeds = torch.empty(0)

    @contextlib.contextmanager
    def listen(self, model: Any) -> Iterator[None]:
        hooks = (
            model.model.multi_modal_projector.register_forward_pre_hook(self._on_projector),
            model.model.language_model.register_forward_pre_hook(
                self._on_language_model, with_kwargs=True
            ),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _on_projector(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.features.append(args[0].cpu())

    def _on_language_model(self, module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.inputs_embeds = named["inputs_embeds"][0].cpu()


def _exact_convolution(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """By default cuDNN rounds the float32 patch embedding to TF32, which errs by 1e-3."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    manager: contextlib.AbstractContextManager[Any] = torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, allow_tf32=False
    )
    return manager


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bars and advice, which are about other uses."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
