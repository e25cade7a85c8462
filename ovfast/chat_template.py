"""The chat template: from messages to segments of a prompt.

A user's text never passes through the template: a placeholder does, which only this module can have
put there, so no text can pretend to be a special token or a medium.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ovfast.chat import MARKERS, MediaKind, Message, Part, Segment
from ovfast.config import ModelConfig
from ovfast.errors import CheckpointError, PromptError
from ovfast.json_fields import load_json

__all__ = ["ChatTemplate", "load_template", "template_source"]

PLACEHOLDER = re.compile("\ue000(\\d+)\ue001|(<image>|<video>)")

# As LLaVA-NeXT conversation qwen_1_5, media as lmms-eval llava_onevision places them.
ORIG_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<' + part['type'] + '>' }}"
    "{% if not loop.last %}{{ '\\n' if loop.nextitem['type'] == 'text' else ' ' }}{% endif %}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class _GenerationTag(Extension):
    """`{% generation %}`, with which training code marks an assistant's words: renders its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template in an immutable sandbox, as transformers renders it.

    Args:
        source: the Jinja source.
        variables: bos_token, eos_token and the like.

    Raises:
        CheckpointError: the source does not compile.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(
                f"the checkpoint's chat template does not compile ({error}); expected a Jinja "
                "template. Download the checkpoint again."
            ) from error
        self._variables = variables

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """Segments of a chat followed by the prompt for an answer.

        Each turn is as the template renders it. Where the template would move media before text
        that the user put first, or has no place for them, the turn's media are rendered inside
        its text, in the user's order.

        Raises:
            PromptError: the template refuses the chat, or drops or repeats a part of it.
        """
        inlined = [self._inline(m) if _is_interleaved(m) else m for m in messages]
        every_inlined = [self._inline(m) if m.media_kinds else m for m in messages]
        problem: Exception | None = None
        for attempt, as_string in (
            (list(messages), False),
            (inlined, False),
            (every_inlined, False),
            (every_inlined, True),
        ):
            try:
                segments = self._render(attempt, as_string=as_string)
            except Exception as error:  # noqa: BLE001  (a template may fail in any way)
                problem = problem or error
                continue
            if segments is not None:
                return segments
        reason = problem or "it drops or reorders parts"
        raise PromptError(
            f"the checkpoint's chat template cannot render this chat ({reason}); "
            "expected roles and parts that the template knows. Change the chat, or write the full "
            "prompt with raw=True."
        )

    def _render(self, messages: list[Message], *, as_string: bool) -> list[Segment] | None:
        """Segments, or None where the parts do not come out once each and in the user's order."""
        held: list[tuple[Segment, ...]] = []
        wanted: list[str] = []
        visible: list[dict[str, object]] = []
        for message in messages:
            content: list[dict[str, str]] = []
            for part in message.parts:
                if part.kind != "text":
                    wanted.append(MARKERS[part.kind])
                    content.append({"type": part.kind})
                    continue
                text = _visible(part.segments, len(held))
                if text.strip():
                    wanted.append(str(len(held)))
                    held.append(part.segments)
                content.append({"type": "text", "text": text})
            whole = "".join(item["text"] for item in content) if as_string else content
            visible.append({"role": message.role, "content": whole})
        rendered = self._template.render(
            messages=visible,
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **self._variables,
        )
        found = [match[1] or match[2] for match in PLACEHOLDER.finditer(rendered)]
        # A template for plain strings prints a list of parts as Python would.
        if found != wanted or ("{'type'" in rendered and not as_string):
            return None
        return _fill(rendered, held)

    def _inline(self, message: Message) -> Message:
        """The turn with its media inside text parts, each followed by what the template adds."""
        parts = [
            part
            if part.kind == "text"
            else Part("text", (Segment(part.kind, MARKERS[part.kind]), *self._after(part.kind)))
            for part in message.parts
        ]
        return replace(message, parts=tuple(parts))

    def _after(self, kind: MediaKind) -> tuple[Segment, ...]:
        """What the template writes between two media of a kind; a newline where it knows none."""
        newline = (Segment("template", "\n"),)
        probe = [{"role": "user", "content": [{"type": kind}, {"type": kind}]}]
        try:
            rendered = self._template.render(
                messages=probe, add_generation_prompt=False, **self._variables
            )
        except Exception:  # noqa: BLE001  (a template may fail in any way)
            return newline
        pieces = rendered.split(MARKERS[kind])
        if len(pieces) != 3 or pieces[1].strip():
            return newline
        return (Segment("template", pieces[1]),) if pieces[1] else ()


def load_template(path: Path, config: ModelConfig) -> ChatTemplate | None:
    """The chat template of a checkpoint, where transformers would look for it."""
    tokenizer = load_json(path / "tokenizer_config.json") or {}
    if config.dialect == "orig":
        return ChatTemplate(ORIG_TEMPLATE, {})
    variables = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = tokenizer.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            variables[name] = token
    source = template_source(path)
    return None if source is None else ChatTemplate(source, variables)


def template_source(path: Path) -> str | None:
    """The Jinja source of a Hugging Face checkpoint's chat template, if it has one.

    Raises:
        CheckpointError: it is no text.
    """
    source: object = None
    if (path / "chat_template.jinja").is_file():
        source = (path / "chat_template.jinja").read_text(encoding="utf-8")
    for file in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if source is None:
            source = (load_json(path / file) or {}).get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise CheckpointError(f"{path}: chat_template is {source!r:.100}; expected Jinja source.")
    return source


def _is_interleaved(message: Message) -> bool:
    order = [("image", "video", "text").index(part.kind) for part in message.parts]
    return order != sorted(order)


def _visible(segments: tuple[Segment, ...], index: int) -> str:
    """What a template sees of a text: its outer white space around a placeholder."""
    if all(segment.kind == "text" for segment in segments):
        text = "".join(segment.text for segment in segments)
        core = text.strip()
        if not core:
            return text
        before, after = text[: text.index(core)], text[text.index(core) + len(core) :]
        return f"{before}\ue000{index}\ue001{after}"
    return f"\ue000{index}\ue001"


def _fill(rendered: str, held: list[tuple[Segment, ...]]) -> list[Segment]:
    """Puts segments back where their placeholders stand."""
    segments: list[Segment] = []
    end = 0
    places: dict[str, MediaKind] = {marker: kind for kind, marker in MARKERS.items()}
    for match in PLACEHOLDER.finditer(rendered):
        segments.append(Segment("template", rendered[end : match.start()]))
        end = match.end()
        if match[2]:
            segments.append(Segment(places[match[2]], match[2]))
            continue
        texts = held[int(match[1])]
        if all(segment.kind == "text" for segment in texts):
            # The outer white space went through the template, which may have trimmed it.
            texts = (Segment("text", "".join(segment.text for segment in texts).strip()),)
        segments.extend(texts)
    segments.append(Segment("template", rendered[end:]))
    return [segment for segment in segments if segment.text]


def _tojson(value: Any, **options: Any) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
