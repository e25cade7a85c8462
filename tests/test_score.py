"""Likelihoods of continuations: against transformers, against forward, and lmms-eval's form."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ovfast import CapacityError, Engine, OptionError, PromptError, ScoreOutput
from ovfast.models.qwen2 import Qwen2
from ovfast.models.siglip import SiglipTower
from tests.support.engines import REQUESTS, free_slots, open_engine
from tests.support.prompts import IM_END

BOUND = 1e-4
NEWLINE = 198
CONTINUATIONS = [" a red circle", "yes", "日本 🧑‍🚀", "\nand then", " No.\n\nMaybe", "<|im_end|>"]


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path) -> Iterator[Engine]:
    with open_engine(tiny_checkpoint) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    yield shared
    assert free_slots(shared) == 1


def hf_logits(path: Path, engine: Engine, name: str, ids: list[int]) -> torch.Tensor:
    """transformers' logits of prompt and continuation; pictures by its own processor."""
    from tests.support import hf
    from tests.support.requests import Request

    inputs, images = engine.prepare(**REQUESTS[name]), REQUESTS[name].get("images", ())
    images = tuple(images) if isinstance(images, list | tuple) else (images,)
    request = Request(np.array(ids), inputs.spans, inputs.plans, inputs.views, images)
    return hf.all_logits(hf.load_model(path), hf.make_inputs(path, request))


@pytest.mark.parametrize("include_terminator", [False, True])
@pytest.mark.parametrize("name", ["text", "image", "video"])
def test_sums_are_transformers(
    engine: Engine, tiny_checkpoint: Path, name: str, include_terminator: bool
) -> None:
    """Ids and sums; the loss of transformers with the prompt masked is the negative mean."""
    transformers = pytest.importorskip("transformers", minversion="5.10")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    prompt = engine.prepare(**REQUESTS[name]).input_ids.tolist()
    scores = engine.score(
        **REQUESTS[name],
        continuations=CONTINUATIONS[:3],
        include_terminator=include_terminator,
    )
    for text, score in zip(CONTINUATIONS, scores, strict=False):
        whole = "<|im_start|>assistant\n" + text + ("<|im_end|>\n" if include_terminator else "")
        head = tokenizer("<|im_start|>assistant\n")["input_ids"]
        ids = prompt[: -len(head)] + tokenizer(whole)["input_ids"]
        assert prompt == ids[: len(prompt)]
        assert list(score.token_ids) == ids[len(prompt) :]
        rows = hf_logits(tiny_checkpoint, engine, name, ids)[len(prompt) - 1 : -1]
        targets = torch.tensor(score.token_ids)
        expected = rows.log_softmax(1)[torch.arange(len(targets)), targets]
        np.testing.assert_allclose(score.token_logprobs, expected.numpy(), atol=BOUND)
        assert score.logprob == pytest.approx(float(expected.double().sum()), abs=BOUND)
        loss = float(torch.nn.functional.cross_entropy(rows, targets))
        assert -score.mean_logprob == pytest.approx(loss, abs=BOUND)
        assert score.is_greedy == bool((rows.argmax(1) == targets).all())


def test_lmms_eval_form(engine: Engine) -> None:
    """The mean loss over candidate and terminator; sum = −mean · (candidate tokens + 2)."""
    plain = engine.score(**REQUESTS["image"], continuations=CONTINUATIONS)
    ended = engine.score(**REQUESTS["image"], continuations=CONTINUATIONS, include_terminator=True)
    for without, score in zip(plain, ended, strict=True):
        assert score.token_ids == (*without.token_ids, IM_END, NEWLINE)
        assert score.token_logprobs[:-2] == pytest.approx(without.token_logprobs, abs=1e-5)
        loss = -score.mean_logprob
        assert score.logprob == pytest.approx(-loss * (len(without.token_ids) + 2))
        assert without.logprob == pytest.approx(without.mean_logprob * len(without.token_ids))


def from_forward(engine: Engine, inputs: Any, score: ScoreOutput, ids: list[int]) -> None:
    """`ids`: the prompt as it stands before the scored tokens."""
    whole = type(inputs)(
        np.array([*ids, *score.token_ids]), inputs.spans, inputs.plans, inputs.media, inputs.visual
    )
    rows = range(len(ids) - 1, len(whole.input_ids) - 1)
    logprobs = engine.forward(whole, positions=rows).log_softmax(1)
    expected = logprobs[torch.arange(len(score.token_ids)), torch.tensor(score.token_ids)]
    # Another number of rows is another order of sums: a few float32 spacings of the largest logit.
    np.testing.assert_allclose(score.token_logprobs, expected.numpy(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", REQUESTS)
def test_values_are_those_of_forward(engine: Engine, name: str) -> None:
    inputs = engine.prepare(**REQUESTS[name])
    prompt = inputs.input_ids.tolist()
    texts = [" a red circle", "yes", "日本 🧑‍🚀", "<|im_end|>"]
    for score in engine.score(inputs, texts):
        from_forward(engine, inputs, score, prompt)


def test_text_is_never_special(engine: Engine) -> None:
    score = engine.score("Q", ["<|im_end|>"])[0]
    assert IM_END not in score.token_ids
    assert engine._processor.decode(score.token_ids) == "<|im_end|>"


DOUBLE_NEWLINE = 590


@pytest.fixture(scope="module")
def merging(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with two newlines as one token, as Qwen2's tokenizer has them."""
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("merging") / "model"))
    description = json.loads((path / "tokenizer.json").read_text())
    vocab = description["model"]["vocab"]
    vocab["ĊĊ"] = vocab.pop(f"Ġw{DOUBLE_NEWLINE}")
    description["model"]["merges"].append(["Ċ", "Ċ"])
    (path / "tokenizer.json").write_text(json.dumps(description))
    return path


def test_a_leading_newline_merges_with_the_prompt_s(merging: Path) -> None:
    """As lmms-eval's mask leaves it: the merged token takes the place of the prompt's last, and
    what follows it is scored.
    """
    transformers = pytest.importorskip("transformers", minversion="5.10")
    tokenizer = transformers.AutoTokenizer.from_pretrained(merging)
    with open_engine(merging) as engine:
        inputs = engine.prepare("Q")
        prompt = inputs.input_ids.tolist()
        rendered = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
        assert prompt == tokenizer(rendered)["input_ids"]
        plain, merged = engine.score(inputs, ["Yes", "\nYes"])
        ids = tokenizer(rendered + "\nYes")["input_ids"]
        assert ids[len(prompt) - 1] == DOUBLE_NEWLINE
        assert list(merged.token_ids) == ids[len(prompt) :] == list(plain.token_ids)
        from_forward(engine, inputs, merged, ids[: len(prompt)])
        from_forward(engine, inputs, plain, prompt)
        assert merged.logprob != pytest.approx(plain.logprob, abs=0.01)
        with pytest.raises(PromptError, match="adds no token"):
            engine.score(inputs, ["\n"])


def test_a_continuation_that_changes_the_prompt_s_last_token(engine: Engine) -> None:
    """A raw prompt that ends inside a word: the continuation's tokens start before its end."""
    inputs = engine.prepare("The image show", raw=True)
    prompt = inputs.input_ids.tolist()
    full = engine._processor.encode_text("The image shows a red circle")
    assert full[: len(prompt)] != prompt
    shows, other = engine.score(inputs, ["s a red circle", " a"])
    assert list(shows.token_ids) == full[len(prompt) :]
    from_forward(engine, inputs, shows, full[: len(prompt)])
    from_forward(engine, inputs, other, prompt)
    alone = engine.score(inputs, ["s a red circle"])[0]
    assert alone.token_ids == shows.token_ids
    assert alone.logprob == pytest.approx(shows.logprob, abs=1e-5)
    with pytest.raises(PromptError, match=r"'s' adds no token.*Leave it out"):
        engine.score(inputs, [" a", "s"])
    ended = engine.score(inputs, ["s"], include_terminator=True)[0]
    assert ended.token_ids == (IM_END, NEWLINE)


def test_one_prefill_serves_all(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    views, rows = [], []
    encode, prefill = SiglipTower.encode, Qwen2.prefill_hidden

    def counting_encode(self: Any, views_given: Any, *rest: Any) -> Any:
        views.append(views_given.num_views)
        return encode(self, views_given, *rest)

    def counting_prefill(self: Any, embeds: Any, *rest: Any) -> Any:
        rows.append(len(embeds))
        return prefill(self, embeds, *rest)

    monkeypatch.setattr(SiglipTower, "encode", counting_encode)
    monkeypatch.setattr(Qwen2, "prefill_hidden", counting_prefill)
    inputs = engine.prepare(**REQUESTS["three_images"])
    scores = engine.score(inputs, CONTINUATIONS)
    assert views == [1, 1, 1]
    assert rows == [inputs.num_tokens - 1] + [len(score.token_ids) for score in scores]


def test_order_and_neighbours_do_not_matter(engine: Engine) -> None:
    inputs = engine.prepare(**REQUESTS["image"])
    together = engine.score(inputs, CONTINUATIONS)
    assert engine.score(inputs, CONTINUATIONS[::-1]) == together[::-1]
    assert [engine.score(inputs, [text])[0] for text in CONTINUATIONS] == together
    assert engine.score(inputs, iter(CONTINUATIONS)) == together
    assert engine.score(inputs, []) == []


def test_greedy(engine: Engine) -> None:
    """A greedy answer, given back as a continuation, is greedy; another is not."""
    inputs = engine.prepare("What?")
    for count in range(1, 40):
        output = engine.generate(inputs, max_new_tokens=count, ignore_eos=True)
        ids = engine._processor.continue_ids(inputs.input_ids.tolist(), output.text)
        if ids[inputs.num_tokens :] == list(output.token_ids) and count > 1:
            break
    scores = engine.score(inputs, [output.text, output.text + " zebra", "zebra"])
    assert [score.is_greedy for score in scores] == [True, False, False]


def test_bad_arguments(engine: Engine) -> None:
    for bad in ("yes", None, 3, [1], ["a", None], [b"a"]):
        with pytest.raises(OptionError, match=r"continuations=.*expected a list of str.*Put"):
            engine.score("Q", bad)
    with pytest.raises(PromptError, match="adds no token"):
        engine.score("Q", [""])
    with pytest.raises(CapacityError, match=r"the engine holds 1024.*Shorten"):
        engine.score("Q", ["word " * 1024])
    assert engine.score("Q", [""], include_terminator=True)[0].token_ids == (IM_END, NEWLINE)
