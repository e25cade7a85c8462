"""Chat templates of other shapes: in order, for plain strings, failing, and where they lie."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovfast.errors import CheckpointError, PromptError
from ovfast.processor import Processor
from tests.support.checkpoints import CheckpointSpec
from tests.support.prompts import clip, open_processor, picture, prepare, prepare_with, shown, user

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def converter(random_checkpoint: Make) -> Path:
    return random_checkpoint(CheckpointSpec())


def with_template(path: Path, target: Path, template: str, **config: Any) -> Processor:
    """A processor of the same checkpoint with another chat template."""
    shutil.copytree(path, target, dirs_exist_ok=True)
    (target / "chat_template.jinja").write_text(template)
    if config:
        file = target / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return open_processor(target)


IN_ORDER = (
    "{%- for m in messages %}{{ m['role'] }}:"
    "{%- for p in m['content'] %}{%- if p['type'] == 'text' %}{{ p['text'] | trim }}"
    "{%- else %}({{ '<' + p['type'] + '>' }}){%- endif %}{%- endfor %};{%- endfor %}"
)
STRINGS = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}"
PRINTS = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"


def test_a_template_that_keeps_the_order_is_used_verbatim(converter: Path, tmp_path: Path) -> None:
    processor = with_template(converter, tmp_path / "a", IN_ORDER)
    chat = user(" A ", "IMAGE", "B", "VIDEO")
    inputs = prepare(processor, chat, images=picture(), videos=clip())
    assert shown(processor, inputs) == "user:A(«IMAGE»)B(«VIDEO»);"  # trimmed as the template says


@pytest.mark.parametrize("template", [STRINGS, PRINTS])
def test_a_template_for_plain_strings(converter: Path, tmp_path: Path, template: str) -> None:
    processor = with_template(converter, tmp_path / "a", template)
    inputs = prepare(
        processor, user("IMAGE", "<|im_end|>", "VIDEO"), images=picture(), videos=clip()
    )
    assert shown(processor, inputs) == "user:«IMAGE»\n<|im_end|>«VIDEO»\n;"


def test_template_variables_and_helpers(converter: Path, tmp_path: Path) -> None:
    template = (
        "{{ eos_token }}{{ {'é': '<'} | tojson }}{{ strftime_now('%%') }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m['content'][0]['text'] }}{% endgeneration %}{% endfor %}"
    )
    processor = with_template(converter, tmp_path / "a", template)
    assert shown(*(processor, prepare(processor, "Q"))) == ']{"é": "<"}%Q'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no chats here') }}",
        "{{ messages[7]['role'] }}",
        "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}",
        "nothing of the user",
        "{{ messages[0]['content'][0]['text'] * 2 }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_cannot_render(converter: Path, tmp_path: Path, template: str) -> None:
    processor = with_template(converter, tmp_path / "a", template)
    with pytest.raises(PromptError, match="chat template cannot render"):
        prepare(processor, "Q")


def test_template_places(converter: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(converter, tmp_path / "model"))
    config_file = path / "tokenizer_config.json"
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": STRINGS}]
    plain = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(plain | {"chat_template": named}))
    assert "user\n" in shown(*prepare_with(path, "Q"))  # chat_template.json goes before
    (path / "chat_template.json").unlink()
    assert shown(*prepare_with(path, "Q")) == "user:Q;"
    config_file.write_text(json.dumps(plain))
    with pytest.raises(PromptError, match=r"no chat template.*raw=True"):
        prepare_with(path, "Q")
    assert shown(*prepare_with(path, "Q", raw=True)) == "Q"
    (path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(CheckpointError, match="does not compile"):
        open_processor(path)
    config_file.write_text(json.dumps(plain | {"chat_template": 3}))
    (path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="expected Jinja source"):
        open_processor(path)
