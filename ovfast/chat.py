"""Prompts and chats, checked: what is trusted text, what is a user's text, where media stand."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ovfast.errors import PromptError

__all__ = [
    "BARE",
    "MARKERS",
    "Message",
    "Part",
    "Segment",
    "mark_places",
    "parse_chat",
    "parse_question",
]

MediaKind = Literal["image", "video"]
MARKERS: dict[MediaKind, str] = {"image": "<image>", "video": "<video>"}
MARKER = re.compile("(<image>|<video>)")
ROLES = ("system", "user", "assistant")
SOURCE_KEYS = {
    "image": ("image", "path", "url"),
    "video": ("video", "path", "url"),
    "image_url": ("image_url",),
    "video_url": ("video_url",),
}
BARE = object()  # source of a media part that takes the next of images= or videos=


class Segment(NamedTuple):
    """A stretch of a prompt. "template" text may hold special tokens, "text" never does."""

    kind: Literal["template", "text", "image", "video"]
    text: str


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a message: text (as segments, which may hold markers) or a medium."""

    kind: Literal["text", "image", "video"]
    segments: tuple[Segment, ...] = ()
    source: object = BARE


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    parts: tuple[Part, ...]

    @property
    def media_kinds(self) -> list[str]:
        """Kinds of all media of the turn, in its order, those of markers included."""
        kinds: list[str] = []
        for part in self.parts:
            inner = [s.kind for s in part.segments if s.kind in MARKERS]
            kinds += inner if part.kind == "text" else [part.kind]
        return kinds


def parse_question(question: str, num_images: int, num_videos: int) -> Message:
    """A plain string as a user's turn; markers in it are places, media without markers go first.

    Raises:
        PromptError: it is empty, or its markers are not as many as the media.
    """
    pieces = mark_places(question)
    leading: list[Part] = []
    counts: dict[MediaKind, int] = {"image": num_images, "video": num_videos}
    for kind, count in counts.items():
        marked = sum(piece.kind == kind for piece in pieces)
        if marked and marked != count:
            raise PromptError(
                f"the prompt has {marked} <{kind}> markers for {count} {kind}s; expected as many "
                f"markers as {kind}s, or none. To write <{kind}> as text, pass a chat: "
                "[{'role': 'user', 'content': ...}]."
            )
        leading += [Part(kind) for _ in range(0 if marked else count)]
    return Message("user", (*leading, Part("text", pieces)))


def mark_places(text: str, kind: Literal["template", "text"] = "text") -> tuple[Segment, ...]:
    """Segments of a plain string: `kind` text between places of media."""
    if not text.strip():
        raise PromptError(
            f"the prompt is {text!r}; expected a question or instruction. Pass some text."
        )
    places = {marker: name for name, marker in MARKERS.items()}
    return tuple(Segment(places.get(piece, kind), piece) for piece in MARKER.split(text) if piece)


def parse_chat(chat: Sequence[object]) -> list[Message]:
    """Checked messages of a chat; markers in its texts are text.

    Raises:
        PromptError: anything but a list of {"role", "content"} with known parts.
    """
    messages = [_parse_message(message, index) for index, message in enumerate(chat)]
    if not any(
        part.kind != "text" or any(s.text.strip() for s in part.segments)
        for message in messages
        for part in message.parts
        if message.role != "system"
    ):
        raise PromptError("the chat says nothing; expected a user's text, picture or video.")
    return messages


def _parse_message(message: object, index: int) -> Message:
    where = f"message {index}"
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        given = sorted(map(str, message)) if isinstance(message, dict) else type(message).__name__
        raise PromptError(f"{where} is {given}; expected a dict with exactly 'role' and 'content'.")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(f"{where} has role {role!r}; expected one of {', '.join(ROLES)}.")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple) or not content:
        raise PromptError(
            f"{where} has content {content!r:.100}; expected a str or a list of parts such as "
            "{'type': 'text', 'text': ...} or {'type': 'image', 'image': ...}."
        )
    return Message(role, tuple(_parse_part(part, where) for part in content))


def _parse_part(part: object, where: str) -> Part:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise PromptError(f"{where} has part {part!r:.100}; expected a dict with a 'type'.")
    kind = part["type"]
    if kind == "text":
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PromptError(
                f"{where} has text part {part!r:.100}; expected {{'type': 'text', 'text': str}}."
            )
        return Part("text", (Segment("text", part["text"]),))
    if kind not in SOURCE_KEYS:
        raise PromptError(
            f"{where} has a part of type {kind!r}; expected text, {', '.join(SOURCE_KEYS)}."
        )
    medium: MediaKind = "video" if kind.startswith("video") else "image"
    keys = sorted(set(part) - {"type"})
    if not keys and kind == medium:
        return Part(medium)
    if len(keys) != 1 or keys[0] not in SOURCE_KEYS[kind]:
        raise PromptError(
            f"{where} has a part of type {kind!r} with keys {keys}; expected exactly one of "
            f"{', '.join(SOURCE_KEYS[kind])}."
        )
    source = part[keys[0]]
    if keys[0] == kind and kind.endswith("_url") and isinstance(source, dict):
        if set(source) != {"url"}:
            raise PromptError(
                f"{where} has {kind} with keys {sorted(map(str, source))}; expected only 'url'."
            )
        source = source["url"]
    if source is None:
        raise PromptError(
            f"{where} has a {medium} part with None; expected a {medium}, or a part with only a "
            f"type, which takes the next of {medium}s=."
        )
    return Part(medium, source=source)
