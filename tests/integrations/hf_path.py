"""lmms-eval's own Hugging Face path, made to run: `llava_hf` over a LLaVA-OneVision checkpoint.

As shipped (0.7.3, transformers 5) it computes no log-likelihood: the context is processed without
its pictures, which transformers refuses, and a document without pictures gives it an empty list,
which transformers refuses too. `HFPath` gives the context the pictures of the call before, and no
list instead of an empty one; every number is still llava_hf's. Its video processor needs
torchvision and is left out.
"""

from pathlib import Path
from typing import Any

import pytest

# As the random checkpoints' own template, for the plain strings that llava_hf fills in.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n'"
    " + message['content'].replace('<image> ', '<image>\\n') + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class GivenAgain:
    """A processor that hands the pictures of a call on to a following call without any."""

    def __init__(self, processor: Any) -> None:
        self._processor, self._images = processor, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, **inputs: Any) -> Any:
        self._images = (inputs.pop("images") or None) if "images" in inputs else self._images
        return self._processor(images=self._images, **inputs)


def load_processor(path: Path, **_: Any) -> Any:
    """The checkpoint's tokenizer, template and PIL picture processor, without torchvision."""
    import json

    from transformers import (
        AutoTokenizer,
        LlavaOnevisionImageProcessorPil,
        LlavaOnevisionProcessor,
    )

    class WithoutVideo(LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, name: str, argument: Any) -> type:
            return type(argument)

    settings = json.loads((Path(path) / "processor_config.json").read_text())
    template = json.loads((Path(path) / "chat_template.json").read_text())["chat_template"]
    wanted = ("num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio")
    return WithoutVideo(
        LlavaOnevisionImageProcessorPil.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
        None,
        chat_template=template,
        **{name: settings[name] for name in wanted},
    )


def load_hf(path: Path, monkeypatch: pytest.MonkeyPatch, *, chat: bool, repaired: bool) -> Any:
    """`llava_hf` on a CPU in float32, its chat or its simple class."""
    import lmms_eval.models.simple.llava_hf as simple
    from lmms_eval.models import get_model

    monkeypatch.setattr(simple.AutoProcessor, "from_pretrained", load_processor)
    model = get_model("llava_hf", force_simple=not chat)(
        pretrained=str(path),
        device="cpu",
        device_map="cpu",
        dtype="float32",
        chat_template=None if chat else TEMPLATE,
    )
    # ovfast never generates placeholders, nor ids that no token has.
    known = set(model.tokenizer.get_vocab().values())
    rows = model.model.get_output_embeddings().weight.shape[0]
    markers = model.tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    banned = {*markers, *(token for token in range(rows) if token not in known)}
    model.model.generation_config.suppress_tokens = sorted(banned)
    if repaired:
        model._image_processor = GivenAgain(model._image_processor)
    return model
