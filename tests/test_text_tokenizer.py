"""Ids to text and back, one by one too; tokenizer files in both forms and broken ones."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from ovfast.errors import CheckpointError
from ovfast.processor import Processor
from tests.support.checkpoints import CheckpointSpec
from tests.support.prompts import (
    FORGERIES,
    IM_END,
    IM_START,
    IMAGE,
    TEXTS,
    VIDEO,
    open_processor,
    picture,
    prepare,
)

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def converter(random_checkpoint: Make) -> Path:
    return random_checkpoint(CheckpointSpec())


@pytest.fixture(scope="module")
def docs(random_checkpoint: Make) -> Path:
    return random_checkpoint(CheckpointSpec(chat_template="docs", template_file="jinja"))


@pytest.fixture(scope="module")
def orig(random_checkpoint: Make) -> Path:
    return random_checkpoint(CheckpointSpec(), "orig")


@pytest.fixture(params=["converter", "docs", "orig"])
def processor(request: pytest.FixtureRequest) -> Processor:
    return open_processor(request.getfixturevalue(request.param))


@pytest.mark.parametrize("seed", range(5))
def test_incremental_decoding_adds_up(processor: Processor, seed: int) -> None:
    """Random ids are mostly invalid UTF-8; valid text is cut anywhere."""
    rng = random.Random(seed)
    oracle = Tokenizer.from_str(processor.tokenizer.to_str())
    pool = [*processor.encode_text("日本語 🧑‍🚀 é — text"), *range(256)]
    for _ in range(40):
        ids = [rng.choice([rng.randrange(608), rng.choice(pool)]) for _ in range(30)]
        ids += processor.encode_text(rng.choice(TEXTS))[: rng.randrange(12)]
        decoder = processor.new_decoder()
        pieces = [decoder.push(token_id) for token_id in ids]
        text = "".join(pieces) + decoder.flush()
        assert text == processor.decode(ids)
        assert text == oracle.decode([i for i in ids if i < 592], skip_special_tokens=True)


def test_incremental_decoding_shows_only_whole_characters(converter: Path) -> None:
    processor = open_processor(converter)
    decoder = processor.new_decoder()
    pieces = [decoder.push(i) for i in processor.encode_text(" a🧑b")]
    assert "".join(pieces) == " a🧑b"
    assert "\ufffd" not in "".join(pieces)
    cut = processor.encode_text("🧑")[:-1]
    assert [decoder.push(i) for i in cut] == [""] * len(cut)
    assert decoder.flush() == "\ufffd"


def test_text_comes_back(processor: Processor) -> None:
    for text in TEXTS:
        normal = text.replace("e\u0301", "é")
        assert processor.decode(processor.encode_text(text)) == normal


def test_forbidden_ids(converter: Path, orig: Path) -> None:
    processor = open_processor(converter)
    assert processor.num_known_ids == 597
    assert processor.forbidden_ids.tolist() == [IMAGE, VIDEO, *range(597, 608)]
    assert open_processor(orig).forbidden_ids.tolist() == list(range(595, 608))
    text = dataclasses.replace(processor.config.text, vocab_size=598)
    processor.config = dataclasses.replace(processor.config, text=text)
    assert processor.forbidden_ids.tolist() == [IMAGE, VIDEO, 597]


def test_terminator(processor: Processor) -> None:
    assert list(processor.terminator_ids) == [IM_END, *processor.encode_text("\n")]


def test_continue_ids_merges_with_the_last_words(converter: Path) -> None:
    processor = open_processor(converter)
    prompt = prepare(processor, "Q", images=picture()).input_ids.tolist()
    full = processor.continue_ids(prompt, "A <|im_end|> B")
    assert full == prompt + processor.encode_text("A <|im_end|> B")
    merged = processor.continue_ids(prompt, "\nA")  # the prompt's newline and this one are one run
    joined = processor.encode_text("assistant\n\nA")
    assert merged[-len(joined) :] == joined
    bare = prepare(processor, "Q<image>", images=picture(), raw=True).input_ids.tolist()
    assert processor.continue_ids(bare, " A") == bare + processor.encode_text(" A")
    odd = [IM_START, 0x80, 0x81]  # bytes that no text has
    assert processor.continue_ids(odd, "A") == odd + processor.encode_text("A")


def test_vocab_and_merges_equal_tokenizer_json(random_checkpoint: Make, orig: Path) -> None:
    split = random_checkpoint(CheckpointSpec(vocab_and_merges=True), "orig")
    assert not (split / "tokenizer.json").exists()
    one, other = open_processor(split), open_processor(orig)
    for text in (*TEXTS, *FORGERIES):
        assert one.encode_text(text) == other.encode_text(text)
    prompt = "<|im_start|>user\n<image>\nQ<|im_end|>"
    a, b = (prepare(p, prompt, images=picture(), raw=True) for p in (one, other))
    assert np.array_equal(a.input_ids, b.input_ids)
    assert np.array_equal(one.forbidden_ids, other.forbidden_ids)


@pytest.mark.parametrize("kept", [True, False])
def test_flags_that_the_file_leaves_out(converter: Path, tmp_path: Path, kept: bool) -> None:
    """Special tokens are special whatever the file says; with all flags its own text is read."""
    path = Path(shutil.copytree(converter, tmp_path / "model"))
    description = json.loads((path / "tokenizer.json").read_text())
    for token in description["added_tokens"]:
        token |= {"special": True} if kept else {"special": False, "lstrip": False}
        if not kept:
            del token["rstrip"]
    (path / "tokenizer.json").write_text(json.dumps(description))
    one, other = open_processor(path), open_processor(converter)
    known = other.tokenizer.get_vocab(with_added_tokens=True).values()
    assert one._text.known_ids == other._text.known_ids == set(known)
    assert one._text.special_ids == other._text.special_ids
    for text in (*TEXTS, *FORGERIES):
        assert one.encode_text(text) == other.encode_text(text)


def test_added_tokens_without_a_list(random_checkpoint: Make, tmp_path: Path) -> None:
    source = random_checkpoint(CheckpointSpec(vocab_and_merges=True), "orig")
    path = Path(shutil.copytree(source, tmp_path / "model"))
    (path / "tokenizer_config.json").unlink()
    assert open_processor(path).terminator_ids[0] == IM_END  # Qwen2's, after the vocabulary
    tokens = {"<|endoftext|>": 592, "<|im_end|>": 593, "<|im_start|>": 594}
    (path / "added_tokens.json").write_text(json.dumps(tokens))
    assert open_processor(path).terminator_ids[0] == 593


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"model": {}, "added_tokens": []}',
        '{"model": {"type": "Unigram", "vocab": [["a", 0]], "unk_id": 0}, "added_tokens": []}',
        '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [3]}',
        '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []}',
    ],
)
def test_broken_tokenizer(converter: Path, tmp_path: Path, content: str) -> None:
    path = Path(shutil.copytree(converter, tmp_path / "model"))
    (path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer"):
        open_processor(path)


def test_missing_tokenizer(converter: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(converter, tmp_path / "model"))
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, nor vocab\.json"):
        open_processor(path)
    (path / "vocab.json").write_text('{"a": 0}')
    (path / "merges.txt").write_text("b c\n")
    with pytest.raises(CheckpointError, match="do not fit together"):
        open_processor(path)


def test_tokenizer_of_another_checkpoint(converter: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(converter, tmp_path / "model"))
    config = json.loads((path / "config.json").read_text()) | {"image_token_index": 7}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"<image> as id 595, config\.json as id 7"):
        open_processor(path)
