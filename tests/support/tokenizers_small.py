"""Tokenizers of random checkpoints: a real byte-level BPE, in two sizes, and two chat templates."""

import functools
import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
ORIG_SPECIAL_TOKENS = SPECIAL_TOKENS[:3]
SMALL_BASE = 592  # entries before the special tokens; the real tokenizer has 151643
QWEN2_BASE = 151643

# As transformers v5.23 Qwen2Tokenizer
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CONVERTER_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all videos then #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>\\n' }}{% endfor %}{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{'<|im_end|>\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DOCS_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT_TEMPLATES = {"converter": CONVERTER_TEMPLATE, "docs": DOCS_TEMPLATE}

CORPUS = (
    "What is shown in this image? The image shows a red circle and a blue square.",
    "Which image shows a green triangle? You are a helpful assistant.\n",
    "system\nuser\nassistant\n",
    "Which way does the star move? It moves from left to right, then up and down.",
    "Describe the picture in detail, please. There are three shapes in the picture.",
    "Is there a yellow star in the upper left corner? Yes. No. How many? One, two, three, four.",
)


@functools.cache
def make_tokenizer_json(
    *, base: int = SMALL_BASE, special: tuple[str, ...] = SPECIAL_TOKENS
) -> str:
    """tokenizer.json of a byte-level BPE with `base` entries followed by the special tokens.

    The 256 bytes and a few hundred merges are real; the rest are entries that only decoding meets.
    """
    learner = _pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    learner.train_from_iterator(CORPUS, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab: dict[str, int] = learned["vocab"]
    for index in range(len(vocab), base):
        vocab[f"Ġw{index}"] = index
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = _pipeline(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    assert tokenizer.token_to_id(special[0]) == base
    return str(tokenizer.to_str())


def _pipeline(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_tokenizer(
    path: Path,
    *,
    base: int,
    orig: bool,
    vocab_and_merges: bool = False,
    chat_template: str | None,
    template_file: str,
) -> None:
    """Write tokenizer and template files into a checkpoint directory.

    Args:
        path: the directory.
        base: entries before the special tokens.
        orig: leave out <image> and <video>, as original checkpoints do.
        vocab_and_merges: write vocab.json and merges.txt in place of tokenizer.json.
        chat_template: the template, or None for a checkpoint without one.
        template_file: "jinja", "json" or "tokenizer_config": where the template goes.
    """
    special = ORIG_SPECIAL_TOKENS if orig else SPECIAL_TOKENS
    text = make_tokenizer_json(base=base, special=special)
    if vocab_and_merges:
        model = json.loads(text)["model"]
        (path / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
        merges = "\n".join(" ".join(pair) for pair in model["merges"])
        (path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    else:
        (path / "tokenizer.json").write_text(text)
    decoder = {
        str(base + index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, token in enumerate(special)
    }
    config: dict[str, object] = {
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
        "tokenizer_class": "Qwen2Tokenizer" if vocab_and_merges else "PreTrainedTokenizerFast",
    }
    if chat_template is not None:
        if template_file == "jinja":
            (path / "chat_template.jinja").write_text(chat_template)
        elif template_file == "json":
            (path / "chat_template.json").write_text(json.dumps({"chat_template": chat_template}))
        else:
            config["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
