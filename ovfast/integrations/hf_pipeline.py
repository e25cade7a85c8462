"""The shape of transformers' `pipeline("image-text-to-text")`: text and pictures, or chats.

Prompts are laid out by the engine's own processor, answers chosen as by `generate`. A flat list of
pictures costs AnyRes for each, pictures inside a chat or a nested list follow the model's rule for
several pictures, as transformers' processor has it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ovfast.anyres import VisualOptions
from ovfast.engine import Engine
from ovfast.errors import OptionError, PromptError
from ovfast.integrations.arguments import refuse_unknown
from ovfast.integrations.chats import is_chat, prepare_chat
from ovfast.integrations.hf_options import Generation
from ovfast.model_inputs import ModelInputs

__all__ = ["TASK", "Pipeline"]

TASK = "image-text-to-text"
DEFAULT_NEW_TOKENS = 256
NO_EFFECT = ("batch_size", "num_workers", "timeout", "clean_up_tokenization_spaces")
ANYRES = VisualOptions(token_policy="anyres")


class Model(Protocol):
    """What a pipeline needs of `OVFastForConditionalGeneration`."""

    engine: Engine
    generation_config: Any

    @property
    def tokenizer(self) -> Any: ...
    def plan(self, options: Mapping[str, Any], prompt_length: int) -> Generation: ...
    def answer(
        self, prompts: Sequence[ModelInputs], input_ids: Tensor, plan: Generation
    ) -> list[list[int]]: ...


class Pipeline:
    """Answers texts with pictures, or chats; made by `ovfast.integrations.hf.pipeline`."""

    task = TASK

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        return_full_text: bool | None = None,
        return_tensors: bool | None = None,
        stop_sequence: str | Sequence[str] | None = None,
        continue_final_message: bool | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Generates.

        Args:
            images: pictures as `engine.generate` takes them: one, a flat list, or a list for each
                text; or the chats, where text is left out.
            text: a full prompt with an <image> for each picture, a list of prompts, a chat or a
                list of chats; pictures of a chat stand in its messages.
            max_new_tokens: default 256 where neither generate_kwargs nor the checkpoint says.
            generate_kwargs: options of `generate`.
            return_full_text: prompt and answer (default), or the answer alone.
            return_tensors: ids of prompt and answer in place of texts.
            stop_sequence: strings that end an answer.
            continue_final_message: go on with a chat's last message; default where it is an
                assistant's.
            **kwargs: of NO_EFFECT.

        Returns:
            [{"input_text", "generated_text" or "generated_token_ids"}]; a list of such lists for
            several chats, or for several texts without pictures.

        Raises:
            OVFastError: see `ovfast.errors`.
        """
        refuse_unknown(kwargs, NO_EFFECT, "the pipeline")
        if return_full_text is not None and return_tensors is not None:
            raise OptionError("return_full_text with return_tensors; they exclude each other.")
        if text is None:
            images, text = None, images
        several = isinstance(text, list | tuple) and not is_chat(text)
        items = list(text) if several else [text]
        are_chats = all(map(is_chat, items))
        if not items or not (are_chats or all(isinstance(each, str) for each in items)):
            raise PromptError(
                f"text={text!r:.100}; expected a prompt, a chat, or a list of either. With images="
                " alone there is nothing to answer."
            )
        if are_chats and images is not None:
            raise PromptError("a chat with images=; expected pictures in its messages' content.")
        options = self._options(max_new_tokens, generate_kwargs, stop_sequence)
        prompts = self._prompts(items, images, continue_final_message)
        records = self._records(
            items, prompts, options, bool(return_tensors), return_full_text, continue_final_message
        )
        if several and images is None:
            return records
        return [record for group in records for record in group]

    def _options(
        self,
        max_new_tokens: int | None,
        generate_kwargs: Mapping[str, Any] | None,
        stop_sequence: str | Sequence[str] | None,
    ) -> dict[str, Any]:
        options = dict(generate_kwargs or {})
        if max_new_tokens is not None:
            if "max_new_tokens" in options:
                raise OptionError("max_new_tokens also in generate_kwargs; pass one of them.")
            options["max_new_tokens"] = max_new_tokens
        config = self.model.generation_config
        lengths = (options.get("max_new_tokens"), options.get("max_length"))
        if not any((*lengths, config.max_new_tokens, config.max_length)):
            options["max_new_tokens"] = DEFAULT_NEW_TOKENS
        if stop_sequence is not None:
            options["stop_strings"] = stop_sequence
        if options.get("stop_strings") is not None:
            options.setdefault("tokenizer", self.model.tokenizer)
        return options

    def _prompts(
        self, items: list[Any], images: Any, continue_final_message: bool | None
    ) -> list[ModelInputs]:
        engine = self.model.engine
        if is_chat(items[0]):
            return [self._chat(chat, continue_final_message) for chat in items]
        flat: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        if images is None:
            flat = []
        nested = bool(flat) and isinstance(flat[0], list | tuple)
        if nested:
            if len(flat) != len(items):
                raise PromptError(f"{len(items)} texts for {len(flat)} lists of images; pass both.")
            pairs = zip(items, flat, strict=True)
            return [engine.prepare(text, images=list(own), raw=True) for text, own in pairs]
        rest = flat
        prompts = []
        for text in items:
            count = text.count("<image>")
            own, rest = rest[:count], rest[count:]
            prompts.append(engine.prepare(text, images=own, visual=ANYRES, raw=True))
        if rest:
            raise PromptError(
                f"{len(rest)} images have no <image> in the texts; expected one for each. Write"
                " <image> where a picture belongs, or pass a chat."
            )
        return prompts

    def _chat(self, chat: Sequence[Any], continue_final_message: bool | None) -> ModelInputs:
        messages = [_message(message) for message in chat]
        continues = _continues(messages, continue_final_message)
        return prepare_chat(self.model.engine, messages, continue_final=continues)

    def _records(
        self,
        items: list[Any],
        prompts: list[ModelInputs],
        options: dict[str, Any],
        tensors: bool,
        full_text: bool | None,
        continue_final_message: bool | None,
    ) -> list[list[dict[str, Any]]]:
        longest = max(prompt.num_tokens for prompt in prompts)
        plan = self.model.plan(options, longest)
        if plan.return_dict:
            raise OptionError("return_dict_in_generate of a pipeline; call generate() for it.")
        count = plan.num_return_sequences
        repeated = [prompt for prompt in prompts for _ in range(count)]
        ids = [torch.from_numpy(prompt.input_ids) for prompt in repeated]
        pad = plan.pad_token_id or 0
        padded = torch.nn.utils.rnn.pad_sequence(
            ids, batch_first=True, padding_value=pad, padding_side="left"
        )
        answers = self.model.answer(repeated, padded, plan)
        records: list[list[dict[str, Any]]] = [[] for _ in items]
        for index, new_ids in enumerate(answers):
            item = items[index // count]
            record = {"input_text": item}
            if tensors:
                record["generated_token_ids"] = torch.cat([padded[index], torch.tensor(new_ids)])
            else:
                new_text = self.model.engine._processor.decode(new_ids)
                record["generated_text"] = (
                    new_text
                    if full_text is False
                    else _full(item, new_text, continue_final_message)
                )
            records[index // count].append(record)
        return records


def _full(item: Any, new_text: str, continue_final_message: bool | None) -> Any:
    """A prompt and its answer: a text, or the messages of a chat."""
    if isinstance(item, str):
        return item + new_text
    messages = list(item)
    if not _continues(messages, continue_final_message):
        return [*messages, {"role": "assistant", "content": new_text}]
    last = messages[-1]
    content = last["content"]
    if isinstance(content, str):
        longer: Any = content + new_text
    else:
        longer = [*content[:-1], content[-1] | {"text": content[-1]["text"] + new_text}]
    return [*messages[:-1], {"role": last["role"], "content": longer}]


def _continues(messages: Sequence[Any], continue_final_message: bool | None) -> bool:
    if continue_final_message is None:
        return bool(messages[-1].get("role") == "assistant")
    return continue_final_message


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message with base64 pictures as data URIs; everything else is for the engine to check."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    parts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") == "image" and "base64" in part:
            uri = f"data:image;base64,{part['base64']}"
            part = {name: value for name, value in part.items() if name != "base64"} | {"url": uri}
        parts.append(part)
    return message | {"content": parts}
