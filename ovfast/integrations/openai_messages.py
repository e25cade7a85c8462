"""OpenAI's message shape, turned into the chats that an engine takes.

`image_url` and `video_url` may be a string or an object, parts may carry further keys that clients
send. Sources are data URIs; paths only below a directory that the caller allows, because messages
may come from somebody else. Nothing is fetched.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ovfast.errors import MediaError, PromptError

__all__ = ["parse_messages"]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXT_TYPES = {"text": "text", "input_text": "text", "output_text": "text"}
# Part type: the key of its source, and the kind of medium.
MEDIA_TYPES = {
    "image_url": ("image_url", "image"),
    "input_image": ("image_url", "image"),
    "image_pil": ("image_pil", "image"),
    "image": ("image", "image"),
    "video_url": ("video_url", "video"),
    "video": ("video", "video"),
}
# Keys of a message that say nothing to a model without tools; they must be empty where given.
EMPTY_KEYS = ("tool_calls", "function_call", "audio", "refusal")
FRAMES = re.compile(r"data:video/(jpeg|png);base64,", re.IGNORECASE)  # frames, parted by commas
URL = re.compile(r"([a-z][a-z0-9+.-]*):(//[^/]*)?", re.IGNORECASE)


def parse_messages(
    messages: Any, *, allowed_path: str | os.PathLike[str] | None = None
) -> list[dict[str, Any]]:
    """Messages as `Engine.generate` takes a chat.

    Args:
        messages: a list of {"role", "content"}; content is a text or a list of parts, in order.
        allowed_path: the directory below which paths and file:// URLs may be read; None for none.

    Returns:
        Messages of {"role", "content"} alone; pictures and videos are parts with their sources.

    Raises:
        PromptError: anything else, tools and audio among it.
        MediaError: a source that is not allowed.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise PromptError(
            f"messages={messages!r:.100}; expected a list such as [{{'role': 'user', 'content':"
            " 'What is this?'}]."
        )
    return [_message(message, index, allowed_path) for index, message in enumerate(messages)]


def _message(message: Any, index: int, allowed_path: Any) -> dict[str, Any]:
    where = f"message {index}"
    dump = getattr(message, "model_dump", None)  # clients' own classes
    message = dump() if callable(dump) else message
    if not isinstance(message, dict) or "role" not in message:
        raise PromptError(
            f"{where} is {message!r:.100}; expected a dict with 'role' and 'content'."
        )
    role = ROLES.get(message["role"]) if isinstance(message["role"], str) else None
    if role is None:
        raise PromptError(
            f"{where} has role {message['role']!r}; expected one of {', '.join(ROLES)}. The model"
            " knows no tools."
        )
    for key in EMPTY_KEYS:
        if message.get(key):
            raise PromptError(f"{where} has {key}; the model knows none. Leave it out.")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, Sequence) or not content:
        raise PromptError(
            f"{where} has content {content!r:.100}; expected a text or a list of parts."
        )
    return {"role": role, "content": [_part(part, where, allowed_path) for part in content]}


def _part(part: Any, where: str, allowed_path: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = _type(part, where)
    if kind in TEXT_TYPES:
        text = part.get("text")
        if not isinstance(text, str):
            raise PromptError(f"{where} has text part {part!r:.100}; expected 'text' to be a str.")
        return {"type": "text", "text": text}
    key, medium = MEDIA_TYPES[kind]
    source = part.get(key)
    if isinstance(source, dict):
        source = source.get("url")
    if source is None:
        raise PromptError(
            f"{where} has part {part!r:.100}; expected {key!r} to be a data URI, or a dict whose"
            " 'url' is one."
        )
    return {"type": medium, medium: _source(source, medium, allowed_path)}


def _type(part: Any, where: str) -> str:
    """The type of a part, said or shown by its only known key."""
    known = {**TEXT_TYPES, **MEDIA_TYPES}
    if isinstance(part, dict):
        kind = part.get("type")
        if kind is None:
            shown = [
                name for name in ("text", "image_url", "image_pil", "video_url") if name in part
            ]
            kind = shown[0] if len(shown) == 1 else None
        if isinstance(kind, str) and kind in known:
            return kind
    given = part.get("type", part) if isinstance(part, dict) else part
    raise PromptError(
        f"{where} has a part of type {given!r:.100}; expected one of {', '.join(known)}."
    )


def _source(source: Any, medium: str, allowed_path: Any) -> Any:
    """A source that may be loaded; objects such as PIL images as they are."""
    if isinstance(source, list | tuple):  # frames, each of which may be a path
        return [_source(each, "image", allowed_path) for each in source]
    if not isinstance(source, str | os.PathLike):
        return source
    text = os.fspath(source)
    if text[:5].lower() == "data:":
        header = FRAMES.match(text)
        frames = text[header.end() :].split(",") if header else []
        if header is None or medium != "video":
            return text
        return [f"data:image/{header[1]};base64,{frame}" for frame in frames]
    url = URL.match(text)
    if url is not None and url[1].lower() != "file":
        raise MediaError(
            f"{medium} {text[:100]!r} is a URL; expected a data URI. ovfast fetches nothing:"
            f" download it and send 'data:{medium}/…;base64,…'."
        )
    path = text if url is None else unquote(text[url.end() :])
    if not allowed_path:
        raise MediaError(
            f"{medium} {text[:100]!r} is a path; expected a data URI, because no directory is"
            " allowed. Send the file's content, or set allowed_local_media_path."
        )
    root = Path(allowed_path).resolve()
    try:
        resolved = Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte
        raise MediaError(f"{medium} {text[:100]!r} is no readable path: {error}.") from error
    if not resolved.is_relative_to(root):
        raise MediaError(
            f"{medium} {text[:100]!r} is outside {str(root)!r}, the only directory that may be"
            " read. Send the file's content, or move it there."
        )
    return str(resolved)
