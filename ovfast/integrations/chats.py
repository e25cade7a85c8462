"""Chats laid out: with an answer to follow, or with the last message to be continued."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ovfast.anyres import VisualOptions
from ovfast.chat import parse_chat
from ovfast.engine import Engine
from ovfast.errors import PromptError
from ovfast.model_inputs import ModelInputs

__all__ = ["is_chat", "prepare_chat", "prompt_text"]


def is_chat(value: Any) -> bool:
    """Whether it is one chat: messages as dicts, whatever is in them."""
    is_list = isinstance(value, list | tuple) and len(value) > 0
    return is_list and all(isinstance(message, dict) for message in value)


def prepare_chat(
    engine: Engine,
    messages: Sequence[Any],
    *,
    continue_final: bool = False,
    visual: VisualOptions | None = None,
) -> ModelInputs:
    """Lays a chat out.

    Args:
        engine: whose template and tokenizer are used.
        messages: a chat as `Engine.generate` takes it.
        continue_final: leave the last message open; it must be an assistant's single text.
        visual: how pictures become tokens; None takes the engine's.

    Raises:
        OVFastError: as `Engine.prepare`.
    """
    messages = list(messages)
    if not continue_final:
        return engine.prepare(messages, visual=visual)
    last = parse_chat(messages)[-1]
    texts = [segment.text for part in last.parts for segment in part.segments]
    if last.role != "assistant" or len(last.parts) != 1 or not texts or len(messages) < 2:
        raise PromptError(
            "the last message is to be continued, and is not an assistant's single text after"
            " another message; expected one. Pass continue_final_message=False."
        )
    opened = engine.prepare(messages[:-1], visual=visual)
    # The template's last newline may become one token with those that the text begins with.
    ids = engine._processor.continue_ids(opened.input_ids.tolist(), texts[0])
    return replace(opened, input_ids=np.array(ids, np.int64))


def prompt_text(engine: Engine, inputs: ModelInputs) -> str:
    """A laid-out prompt as text, with one placeholder for each picture and video."""
    ids = inputs.input_ids.tolist()
    for span in reversed(inputs.spans):
        ids[span.start : span.end] = ids[span.start : span.start + 1]
    return str(engine._processor.tokenizer.decode(ids, skip_special_tokens=False))
