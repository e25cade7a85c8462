"""The tokenizer of a checkpoint: plain text to ids, ids back to text, also one by one.

Plain text is encoded with special tokens switched off: "<|im_end|>" typed by a user becomes the
ids of these characters. Special tokens come only from `split_special`, which the caller applies to
text that it trusts. All methods may be called from many threads.
"""

import codecs
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ovfast.errors import CheckpointError, PromptError
from ovfast.json_fields import load_json

__all__ = ["IncrementalDecoder", "TextTokenizer"]

# As transformers v5.23 Qwen2Tokenizer
PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class TextTokenizer:
    """A byte-level BPE with special tokens kept apart.

    Args:
        path: directory with tokenizer.json, or with vocab.json and merges.txt.
        markers: tokens that are special whatever the file says, such as "<image>".

    Raises:
        CheckpointError: files are missing or unreadable, or hold another kind of tokenizer.
    """

    def __init__(self, path: Path, markers: Sequence[str]) -> None:
        description, text = _description(path, markers)
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises bare Exception
            raise CheckpointError(
                f"{path}: the tokenizer cannot be built ({error}); expected a byte-level BPE as "
                "Qwen2's. Download tokenizer.json again."
            ) from error
        if "ByteLevel" not in json.dumps(description.get("decoder")):
            raise CheckpointError(
                f"{path / 'tokenizer.json'} does not decode bytes; expected a byte-level BPE as "
                "Qwen2's. Use the checkpoint's own tokenizer.json."
            )
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # From here on special tokens in encoded text are text.
        self.tokenizer.encode_special_tokens = True
        added = {t["content"]: t for t in description["added_tokens"] if t["special"]}
        self.special_ids: dict[str, int] = {text: token["id"] for text, token in added.items()}
        self._flags = {text: (token["lstrip"], token["rstrip"]) for text, token in added.items()}
        # Of the file's own vocabulary: asking the Rust side for it takes ten times as long.
        vocab_ids = frozenset(description["model"]["vocab"].values())
        self.known_ids = vocab_ids | self.tokenizer.get_added_tokens_decoder().keys()
        names = sorted({*self.special_ids, *markers}, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._added_ids = frozenset(self.special_ids.values())

    def split_special(self, text: str) -> list[tuple[str, bool]]:
        """Trusted text in pieces: (piece, whether it is a special token); no piece is empty."""
        pieces = self._special.split(text)
        for index in range(1, len(pieces), 2):
            strip_left, strip_right = self._flags.get(pieces[index], (False, False))
            if strip_left:
                pieces[index - 1] = pieces[index - 1].rstrip()
            if strip_right:
                pieces[index + 1] = pieces[index + 1].lstrip()
        return [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing in it is special.

        Raises:
            PromptError: the text holds lone surrogates.
        """
        try:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(
                "the text holds lone surrogate characters, which are no text; expected valid "
                "Unicode. Replace them, for example with text.encode('utf-8', 'replace').decode()."
            ) from error
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; none for special tokens and unknown ids."""
        if token_id in self._added_ids or token_id not in self.known_ids:
            return b""
        token = self.tokenizer.id_to_token(token_id) or ""
        table = _byte_of_char()
        try:
            return bytes([table[char] for char in token])
        except KeyError:  # an added token that is not special stands for itself
            return token.encode()

    def is_special(self, token_id: int) -> bool:
        """Whether an id is a special token."""
        return token_id in self._added_ids


class IncrementalDecoder:
    """Text of a growing list of ids: what `push` and `flush` return adds up to `decode`.

    Args:
        tokenizer: of the checkpoint.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that one more id completes; a character cut in the middle is held back."""
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """What is still held back, as replacement characters."""
        return self._utf8.decode(b"", final=True)


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable bytes stand for themselves, others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _description(path: Path, markers: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The content of tokenizer.json, with `markers` and Qwen2's control tokens made special; and
    the same as text.
    """
    file = path / "tokenizer.json"
    description = load_json(file)
    is_as_needed = description is not None  # then the file's own text will do
    if description is None:
        description = _from_vocab_and_merges(path)
    added = description.get("added_tokens")
    valid = isinstance(added, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"]
        for token in added
    )
    model = description.get("model")
    if not valid or not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(
            f"{file} has no usable model and added_tokens; expected a file of "
            "the tokenizers library. Download it again."
        )
    for token in description["added_tokens"]:
        given = dict(token)
        if token["content"] in markers or token["content"] in QWEN2_SPECIAL_TOKENS:
            token["special"] = True
        for flag in ("lstrip", "rstrip", "special"):
            token.setdefault(flag, False)
        is_as_needed = is_as_needed and token == given
    text = file.read_text(encoding="utf-8") if is_as_needed else json.dumps(description)
    return description, text


def _from_vocab_and_merges(path: Path) -> dict[str, Any]:
    vocab = load_json(path / "vocab.json")
    if vocab is None or not (path / "merges.txt").is_file():
        raise CheckpointError(
            f"{path} has no tokenizer.json, nor vocab.json with merges.txt; expected one of them. "
            "Download the checkpoint's tokenizer files."
        )
    lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [line.partition(" ") for line in lines if line and not line.startswith("#version")]
    merges = [(left, right) for left, _, right in pairs]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the Rust side raises bare Exception
        raise CheckpointError(
            f"{path}: vocab.json and merges.txt do not fit together ({error}); expected those of "
            "Qwen2. Download them again."
        ) from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    description: dict[str, Any] = json.loads(tokenizer.to_str())
    description["added_tokens"] = _added_tokens(path, vocab)
    return description


def _added_tokens(path: Path, vocab: dict[str, Any]) -> list[dict[str, Any]]:
    """Added tokens in the form of tokenizer.json, from whichever file lists them."""
    config = load_json(path / "tokenizer_config.json") or {}
    listed = config.get("added_tokens_decoder")
    contents = load_json(path / "added_tokens.json")
    if isinstance(listed, dict) and listed:
        tokens = [token | {"id": int(token_id)} for token_id, token in listed.items()]
    elif contents is not None:
        tokens = [{"content": text, "id": token_id} for text, token_id in contents.items()]
    else:
        first = max(vocab.values(), default=-1) + 1
        tokens = [
            {"content": text, "id": first + index}
            for index, text in enumerate(QWEN2_SPECIAL_TOKENS)
        ]
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [defaults | {"special": False} | token for token in tokens]
