"""Our processor's tensors, against the official one's on Pillow."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ovfast import MediaError, OptionError, PromptError
from ovfast.integrations.hf import OVFastForConditionalGeneration, OVFastProcessor
from tests.integrations.test_hf_generate import BATCHES, PHOTOS, TURN
from tests.support import hf_processor
from tests.support.prompts import clip

transformers = pytest.importorskip("transformers", minversion="5.10")


@pytest.fixture(scope="module")
def ours(tiny_checkpoint: Path) -> OVFastProcessor:
    return OVFastProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint: Path) -> Any:
    return hf_processor.load_processor(tiny_checkpoint)


def assert_equal(mine: Any, other: Any) -> None:
    assert set(mine) == set(other)
    for name, value in other.items():
        assert torch.equal(mine[name], value), name
        assert mine[name].dtype == value.dtype


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BATCHES)
def test_calls(ours: OVFastProcessor, theirs: Any, name: str, side: str) -> None:
    images, texts = BATCHES[name]
    ours.tokenizer.padding_side = theirs.tokenizer.padding_side = side
    prompts = [TURN.format(text) for text in texts]
    mine = ours(images=images, text=prompts, padding=True)
    assert_equal(mine, theirs(images=images, text=prompts, padding=True, return_tensors="pt"))


CHAT = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": PHOTOS[0]},
            {"type": "text", "text": "Which of these?"},
            {"type": "image", "image": PHOTOS[3]},
        ],
    },
]
SHORT = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
ONE = [
    {
        "role": "user",
        "content": [{"type": "image", "image": PHOTOS[1]}, {"type": "text", "text": "What?"}],
    }
]
STARTED = [*ONE, {"role": "assistant", "content": [{"type": "text", "text": "A star"}]}]


@pytest.mark.parametrize("chat", [CHAT, ONE, SHORT, [CHAT, ONE], STARTED])
def test_chats(ours: OVFastProcessor, theirs: Any, chat: Any) -> None:
    ours.tokenizer.padding_side = theirs.tokenizer.padding_side = "left"
    options: dict[str, Any] = {"add_generation_prompt": chat is not STARTED}
    options["continue_final_message"] = chat is STARTED
    assert ours.apply_chat_template(chat, **options) == theirs.apply_chat_template(chat, **options)
    options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    options["processor_kwargs"] = {"padding": isinstance(chat[0], list)}
    mine = ours.apply_chat_template(chat, **options)
    assert_equal(mine, theirs.apply_chat_template(chat, **options))
    del options["processor_kwargs"]
    options["return_dict"] = False
    assert torch.equal(ours.apply_chat_template(chat, **options), mine["input_ids"])


def test_videos_and_decoding(ours: OVFastProcessor, tiny_checkpoint: Path) -> None:
    """The same request as the engine lays out by itself."""
    model = OVFastForConditionalGeneration.from_pretrained(
        tiny_checkpoint, device_map="cpu", max_seq_len=512
    )
    content: list[dict[str, Any]] = [
        {"type": "video", "video": clip(3)},
        {"type": "text", "text": "Which way?"},
    ]
    inputs = ours.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    assert inputs["pixel_values_videos"].shape == (1, 3, 3, 84, 84)
    answer = model.generate(**inputs, max_new_tokens=6, eos_token_id=None)
    expected = model.engine.generate(
        "Which way?", videos=clip(3), max_new_tokens=6, ignore_eos=True
    )
    width = inputs["input_ids"].shape[1]
    assert answer[0, width:].tolist() == list(expected.token_ids)
    (text,) = ours.batch_decode(answer[:, width:], skip_special_tokens=True)
    assert text == expected.text == ours.decode(answer[0, width:], skip_special_tokens=True)
    model.close()


@pytest.mark.parametrize("none", [{"images": []}, {"images": [[]]}, {"videos": []}])
def test_no_media_are_text_alone(ours: OVFastProcessor, none: dict[str, Any]) -> None:
    batch, plain = ours(text="What?", **none), ours(text="What?")
    assert batch.keys() == plain.keys()
    assert torch.equal(batch["input_ids"], plain["input_ids"])


def test_refusals(ours: OVFastProcessor) -> None:
    for error, arguments in (
        (PromptError, {"text": "<image>"}),
        (PromptError, {"text": "What?", "images": PHOTOS[0]}),
        (OptionError, {"text": "What?", "return_tensors": "np"}),
        (OptionError, {"text": None, "images": PHOTOS[0]}),
        (OptionError, {"text": "What?", "do_resize": False}),
        (OptionError, {"text": []}),
        (OptionError, {"text": ["What?", 5]}),
        (OptionError, {"text": "<video><video>", "videos": [clip(2), clip(3)]}),
        (MediaError, {"text": "<image>", "images": np.zeros((4, 4))}),
        (MediaError, {"text": "<image>", "images": "http://a.b/c.png"}),
    ):
        with pytest.raises(error):
            ours(**arguments)
    with pytest.raises(OptionError, match="trust"):
        OVFastProcessor.from_pretrained("demo", trust_remote_cod=True)
    for chat in ([], "Hi", [CHAT, []], [3]):
        with pytest.raises(PromptError, match="messages as dicts"):
            ours.apply_chat_template(chat)
    part = {"type": "image", "image": PHOTOS[0], "url": "x"}
    with pytest.raises(PromptError, match="one source"):
        ours.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True)
