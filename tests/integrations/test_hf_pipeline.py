"""The image-text-to-text pipeline, against transformers' own over the same checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ovfast import MediaError, OptionError, PromptError
from ovfast.integrations import hf
from tests.integrations.test_hf_generate import photo
from tests.support import hf_processor

transformers = pytest.importorskip("transformers", minversion="5.10")

PHOTOS = [photo(90, 120), photo(60, 300, 1), photo(50, 70, 3)]


def chat(*parts: Any) -> list[dict[str, Any]]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


class Pipes(NamedTuple):
    ours: hf.Pipeline
    theirs: Any
    never: list[int]


@pytest.fixture(scope="module")
def pipes(tiny_checkpoint: Path) -> Iterator[Pipes]:
    ours = hf.pipeline(
        "image-text-to-text", tiny_checkpoint, device="cpu", dtype="float32", max_seq_len=2048
    )
    processor = hf_processor.load_processor(tiny_checkpoint)
    processor.tokenizer.padding_side = "left"  # on the right its answers would go on from padding
    theirs = transformers.ImageTextToTextPipeline(
        model=hf_processor.load_model(tiny_checkpoint), processor=processor
    )
    yield Pipes(ours, theirs, ours.model.engine._processor.forbidden_ids.tolist())
    ours.model.engine.close()


ASSISTANT = {"role": "assistant", "content": [{"type": "text", "text": "The star is"}]}
CALLS: dict[str, dict[str, Any]] = {
    "text": {"images": PHOTOS[0], "text": "<image>\nWhat is shown?"},
    "texts": {"images": PHOTOS[:2], "text": ["<image>\nWhat?", "<image> Describe this, please."]},
    "flat": {"images": PHOTOS[1:], "text": "<image><image> Which?"},
    "nested": {
        "images": [PHOTOS[:2], PHOTOS[2:]],
        "text": ["<image><image> Which?", "<image> Is?"],
    },
    "chat": {"text": chat(PHOTOS[0], "What is shown?")},
    "chats": {"text": [chat(*PHOTOS[1:], "Which?"), chat("How many?")]},
    "new_text": {"text": chat(PHOTOS[2], "What?"), "return_full_text": False},
    "continued": {"text": [*chat(PHOTOS[2], "What?"), ASSISTANT]},
    "tensors": {"text": chat(PHOTOS[2], "What?"), "return_tensors": True},
    "text_only": {"text": "How many shapes?"},
}


@pytest.mark.parametrize("name", CALLS)
def test_answers_as_transformers_pipeline(pipes: Pipes, name: str) -> None:
    def call(pipe: Any) -> Any:
        options = {"suppress_tokens": pipes.never}
        return pipe(**CALLS[name], max_new_tokens=8, generate_kwargs=options)

    assert plain(call(pipes.ours)) == plain(call(pipes.theirs))


def plain(value: Any) -> Any:
    """Comparable: tensors as lists, transformers' Chat as its messages."""
    value = getattr(value, "messages", value)
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return {key: plain(each) for key, each in value.items()} if isinstance(value, dict) else value


def test_stop_sequence_and_default_length(pipes: Pipes) -> None:
    calls = CALLS["chat"] | {"return_full_text": False}
    (free,) = pipes.ours(**calls)
    ids = pipes.ours(**CALLS["chat"], return_tensors=True)[0]["generated_token_ids"]
    tokenizer = pipes.ours.model.tokenizer
    words = [tokenizer.decode(token) for token in ids[-200:-50]]
    word = next(word for word in words if word.isascii() and len(word.strip()) > 1)
    (stopped,) = pipes.ours(**calls, stop_sequence=word)
    assert free["generated_text"].startswith(stopped["generated_text"])
    assert word in stopped["generated_text"]
    assert len(stopped["generated_text"]) < len(free["generated_text"])


def test_several_answers_a_prompt(pipes: Pipes) -> None:
    sampled = {"do_sample": True, "num_return_sequences": 3}
    records = pipes.ours(text=chat("What?"), max_new_tokens=6, generate_kwargs=sampled)
    assert len(records) == 3
    assert len({record["generated_text"][-1]["content"] for record in records}) > 1


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (OptionError, {"max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 3}}),
        (OptionError, {"return_tensors": True, "return_full_text": False}),
        (OptionError, {"skip_special_tokens": False}),
        (OptionError, {"generate_kwargs": {"num_beams": 2}}),
        (OptionError, {"generate_kwargs": {"return_dict_in_generate": True}}),
        (PromptError, {"images": PHOTOS[0]}),
        (PromptError, {"continue_final_message": True}),
    ],
)
def test_refusals(pipes: Pipes, error: type[Exception], options: dict[str, Any]) -> None:
    with pytest.raises(error):
        pipes.ours(text=chat("What?"), **options)


def test_refused_tasks_and_urls(pipes: Pipes) -> None:
    with pytest.raises(OptionError, match="image-text-to-text"):
        hf.pipeline("text-generation")
    with pytest.raises(OptionError, match="device"):
        hf.pipeline(model=pipes.ours.model, device="cpu")
    for text in (None, [], 5, [chat("What?"), "What?"], ["What?", chat("What?")], [chat("a"), []]):
        with pytest.raises(PromptError):
            pipes.ours(text=text)
    for content in (None, [], ["A"]):
        last = {"role": "assistant", "content": content}
        with pytest.raises(PromptError):
            pipes.ours(text=[*chat("What?"), last])
    with pytest.raises(PromptError):
        pipes.ours(text=[{"role": "assistant"}])
    content = [{"type": "image", "url": "http://example.org/a.png"}]
    with pytest.raises(MediaError, match="is a URL"):
        pipes.ours(text=[{"role": "user", "content": content}])
    with pytest.raises(PromptError, match="1 images have no <image>"):
        pipes.ours(images=PHOTOS[0], text="What?")


def test_base64_pictures_of_a_chat(pipes: Pipes) -> None:
    import base64
    import io

    buffer = io.BytesIO()
    PHOTOS[0].save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image", "base64": encoded}, {"type": "text", "text": "What is shown?"}]
    options = {"max_new_tokens": 5, "return_full_text": False}
    (ours,) = pipes.ours(text=[{"role": "user", "content": content}], **options)
    (expected,) = pipes.ours(text=chat(PHOTOS[0], "What is shown?"), **options)
    assert ours["generated_text"] == expected["generated_text"]
