"""`generate` over the official processor's tensors, against transformers' own model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from ovfast import Engine, OptionError, PromptError
from ovfast.integrations import hf
from ovfast.integrations.hf import OVFastForConditionalGeneration
from tests.support import hf_processor
from tests.support.prompts import picture

transformers = pytest.importorskip("transformers", minversion="5.10")

TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
NEW_TOKENS = 12


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(picture(height, width, seed))


PHOTOS = [photo(90, 120), photo(60, 300, 1), photo(333, 120, 2), photo(50, 70, 3)]
# Images and texts of one processor call. Flat lists cost AnyRes for each picture, nested ones
# squares where a prompt has several.
BATCHES: dict[str, tuple[Any, list[str]]] = {
    "text": (None, ["How many?", "A longer question about nothing at all?"]),
    "single": (PHOTOS[0], ["<image>\nWhat is shown?"]),
    "flat": (PHOTOS[:3], ["<image>\nWhat?", "<image>\nA longer question, this?", "<image>\nIs?"]),
    "flat_two": (PHOTOS[:3], ["<image><image>\nWhich?", "Before <image> and after?"]),
    "nested": ([PHOTOS[:2], [PHOTOS[2]]], ["<image>\n<image>\nWhich one?", "<image>\nWhat?"]),
    "nested_adjacent": ([PHOTOS[:3]], ["<image><image><image>Which one?"]),
    "nested_text": ([[PHOTOS[3]], PHOTOS[1:3]], ["<image>\nWhat is it?", "<image> or <image>?"]),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalty": {"repetition_penalty": 1.3},
    "min_tokens": {"min_new_tokens": 4, "eos_token_id": list(range(0, 592, 2))},
    "max_length": {"max_new_tokens": None, "max_length": 300},
    "no_eos": {"eos_token_id": None},
    "half_eos": {"eos_token_id": list(range(0, 592, 3)), "pad_token_id": 7},
    "greedy_settings": {"temperature": 0.3, "top_p": 0.9, "use_cache": False},
}


class Pair(NamedTuple):
    ours: OVFastForConditionalGeneration
    theirs: Any
    processor: Any
    never: list[int]

    def inputs(self, name: str, side: str = "left") -> dict[str, Any]:
        images, texts = BATCHES[name]
        self.processor.tokenizer.padding_side = side
        prompts = [TURN.format(text) for text in texts]
        return dict(self.processor(images=images, text=prompts, padding=True, return_tensors="pt"))

    def both(self, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        """What both answer, transformers without the ids that ovfast never generates."""
        options = {"max_new_tokens": NEW_TOKENS, "suppress_tokens": self.never} | options
        return self.ours.generate(**inputs, **options), self.theirs.generate(**inputs, **options)


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: Path) -> Iterator[Pair]:
    ours = OVFastForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, device_map="cpu", max_batch_size=2, max_seq_len=2048
    )
    yield Pair(
        ours,
        hf_processor.load_model(tiny_checkpoint),
        hf_processor.load_processor(tiny_checkpoint),
        ours.engine._processor.forbidden_ids.tolist(),
    )
    ours.close()


@pytest.mark.parametrize(
    "name",
    [
        "text",
        "flat_two",
        "nested_text",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("single", "flat", "nested", "nested_adjacent")
        ),
    ],
)
def test_batches_of_every_nesting(pair: Pair, name: str) -> None:
    ours, theirs = pair.both(pair.inputs(name))
    assert ours.dtype == torch.int64
    assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["text", "single", "flat", "nested"])
def test_options(pair: Pair, name: str, options: str) -> None:
    inputs = pair.inputs(name)
    if options == "penalty" and name not in ("single",):
        # There padding counts as part of the prompt, which is penalised.
        inputs = {key: value[:1] for key, value in pair.inputs("single").items()}
    given = dict(OPTIONS[options])
    if "max_length" in given:
        given["max_length"] += inputs["input_ids"].shape[1] - 290
    ours, theirs = pair.both(inputs, **given)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", ["min_tokens", "penalty"])
def test_options_of_one_prompt(pair: Pair, options: str) -> None:
    ours, theirs = pair.both(pair.inputs("single"), **OPTIONS[options])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["flat", pytest.param("nested", marks=pytest.mark.slow)])
def test_padding_on_the_right_answers_as_padding_on_the_left(pair: Pair, name: str) -> None:
    """transformers itself goes on from the padding, which is no answer to compare with."""
    left, right = pair.inputs(name), pair.inputs(name, "right")
    assert not torch.equal(left["input_ids"], right["input_ids"])
    width = left["input_ids"].shape[1]
    ours = pair.ours.generate(**right, max_new_tokens=8)
    assert torch.equal(ours[:, :width], right["input_ids"])
    assert torch.equal(ours[:, width:], pair.both(left, max_new_tokens=8)[1][:, width:])


def video_inputs(pair: Pair, num_videos: int, num_frames: int, image: bool) -> dict[str, Any]:
    """The processor asks for torchvision before it takes a video: its tokens are put in here, at
    the end of the user's turn."""
    side = pair.ours.engine.config.vision.image_size
    asked = TURN.format(("<image>\n" if image else "") + "Which way?")
    pair.processor.tokenizer.padding_side = "left"
    images = [PHOTOS[0]] * num_videos if image else None
    inputs = dict(
        pair.processor(images=images, text=[asked] * num_videos, padding=True, return_tensors="pt")
    )
    for name, value in (("input_ids", pair.processor.video_token_id), ("attention_mask", 1)):
        before, after = inputs[name][:, :-5], inputs[name][:, -5:]
        tokens = torch.full((num_videos, num_frames * 9 + 1), value)
        inputs[name] = torch.cat([before, tokens, after], dim=1)
    frames = hf_processor.normalised_frames(num_videos, num_frames, side)
    return inputs | {"pixel_values_videos": frames}


@pytest.mark.parametrize(
    ("num_videos", "num_frames", "image"),
    [(1, 3, False), (2, 1, True), pytest.param(2, 8, True, marks=pytest.mark.slow)],
)
def test_videos(pair: Pair, num_videos: int, num_frames: int, image: bool) -> None:
    inputs = video_inputs(pair, num_videos, num_frames, image)
    ours, theirs = pair.both(inputs)
    assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_batches(pair: Pair, seed: int) -> None:
    """Sizes, numbers of pictures and texts at random, nested and flat."""
    rng = np.random.default_rng(seed)
    images: list[list[Image.Image]] = []
    texts = []
    for row in range(int(rng.integers(1, 4))):
        count = int(rng.integers(1, 4))
        sizes = rng.integers(20, 400, (count, 2)).tolist()
        images.append([photo(*size, seed + row) for size in sizes])
        texts.append(TURN.format("<image> " * count + "x" * int(rng.integers(1, 40))))
    given: Any = images if seed % 3 else [each for row in images for each in row]
    pair.processor.tokenizer.padding_side = "left"
    inputs = pair.processor(images=given, text=texts, padding=True, return_tensors="pt")
    ours, theirs = pair.both(dict(inputs))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_pixel_values_of_half_precision(pair: Pair, dtype: torch.dtype) -> None:
    """As `inputs.to(device, dtype)` makes them; the bytes behind them are the same."""
    inputs = pair.inputs("flat")
    expected = pair.ours.generate(**inputs, max_new_tokens=6)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    assert torch.equal(pair.ours.generate(**inputs, max_new_tokens=6), expected)


def test_without_batch_num_images_every_picture_is_cut(pair: Pair) -> None:
    inputs = pair.inputs("flat_two")
    del inputs["batch_num_images"]
    ours, theirs = pair.both(inputs)
    assert torch.equal(ours, theirs)


def test_packed_pixel_values_and_a_guessed_mask(pair: Pair) -> None:
    """Views side by side instead of filled up; padding known by its id alone."""
    inputs = pair.inputs("flat")
    expected = pair.ours.generate(**inputs, max_new_tokens=6)
    geometry = pair.ours.engine.config.geometry
    from ovfast.anyres import VisualOptions, plan_image

    views = [
        pixels[: plan_image(tuple(size), geometry, VisualOptions(), num_images=1).num_views]
        for pixels, size in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True)
    ]
    inputs["pixel_values"] = torch.cat(views)
    assert inputs.pop("attention_mask").min() == 0
    options = {"max_new_tokens": 6, "eos_token_id": 594}  # the padding's id is a stop id otherwise
    assert torch.equal(pair.ours.generate(**inputs, **options), expected)


def test_plain_torch_reads_the_views_too(pair: Pair, tiny_checkpoint: Path) -> None:
    """The native back end would resize pictures by itself; here there are none, only views."""
    assert pair.ours.engine.ops.reads_pictures
    reference = OVFastForConditionalGeneration.from_pretrained(
        tiny_checkpoint, device_map="cpu", backend="reference", max_seq_len=512
    )
    assert not reference.engine.ops.reads_pictures
    inputs = pair.inputs("nested")
    ours, theirs = reference.generate(**inputs, max_new_tokens=4), pair.both(inputs)[1]
    assert torch.equal(ours, theirs[:, : ours.shape[1]])
    reference.close()


def test_criteria_and_stop_strings_end_a_row(pair: Pair) -> None:
    inputs = pair.inputs("single")
    width = inputs["input_ids"].shape[1]
    plain = pair.both(inputs)[1][0, width:]
    words = [pair.processor.tokenizer.decode(token) for token in plain[2:9]]
    word = next(word for word in words if word.isascii() and word.strip())
    ours, theirs = pair.both(inputs, stop_strings=[word], tokenizer=pair.processor.tokenizer)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] < width + NEW_TOKENS

    def two_tokens(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        assert scores is None
        return torch.tensor([ids.shape[1] >= width + 2])

    criteria = transformers.StoppingCriteriaList([two_tokens])
    ours, theirs = pair.both(inputs, stopping_criteria=criteria)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] == width + 2
    assert pair.ours.generate(**inputs, max_time=0.0).shape[1] == width + 1
    with pytest.raises(OptionError, match="max_time='x'; expected seconds"):
        pair.ours.generate(**inputs, max_time="x")


def test_a_clock_is_for_one_row(pair: Pair) -> None:
    """Rows with criteria follow one another: it would run out in the first."""
    inputs = pair.inputs("flat")
    clock = transformers.MaxTimeCriteria(max_time=5.0)
    for options in ({"max_time": 5.0}, {"stopping_criteria": [clock]}):
        with pytest.raises(OptionError, match=r"max_time=5\.0 with \d rows; expected one row"):
            pair.ours.generate(**inputs, **options)


def test_a_batch_with_criteria_is_filled_up(pair: Pair) -> None:
    inputs = pair.inputs("flat")
    width = inputs["input_ids"].shape[1]
    rows = pair.both(inputs)[1][:, width:]
    wanted = int(rows[0, 4])

    def ends(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return ids[:, -1] == wanted

    ours, theirs = pair.both(inputs, stopping_criteria=[ends])
    assert torch.equal(ours, theirs)


def test_a_streamer_gets_the_prompt_then_each_token(pair: Pair) -> None:
    inputs = pair.inputs("single")
    seen: dict[str, list[Any]] = {"ours": [], "theirs": []}

    class Recorder:
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def put(self, value: torch.Tensor) -> None:
            seen[self.kind].append(value.tolist())

        def end(self) -> None:
            seen[self.kind].append("end")

    options = {"max_new_tokens": 5, "suppress_tokens": pair.never}
    pair.ours.generate(**inputs, **options, streamer=Recorder("ours"))
    pair.theirs.generate(**inputs, **options, streamer=Recorder("theirs"))
    assert seen["ours"] == seen["theirs"]
    assert len(seen["ours"]) == 7
    with pytest.raises(OptionError, match="streamer with 3 rows"):
        pair.ours.generate(**pair.inputs("flat"), streamer=Recorder("ours"))


def test_logits_and_scores_of_each_step(pair: Pair) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    inputs = pair.inputs("single")
    ours, theirs = pair.both(inputs, max_new_tokens=5, min_new_tokens=2, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("logits", "scores"):
        assert len(ours[name]) == len(theirs[name]) == 5
        for mine, other in zip(ours[name], theirs[name], strict=True):
            assert mine.shape == other.shape
            assert torch.equal(mine.isinf(), other.isinf())
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(
    ("keep", "side"), [(0, "right"), (3, "left"), (torch.tensor([0, 170, -1]), "left")]
)
def test_logits_of_prompts(pair: Pair, side: str, keep: Any) -> None:
    inputs = pair.inputs("nested", side)
    ours = pair.ours(**inputs, logits_to_keep=keep).logits
    with torch.no_grad():
        theirs = pair.theirs(**inputs, logits_to_keep=keep).logits
    assert ours.shape == theirs.shape
    mask = inputs["attention_mask"].bool()
    kept = mask[:, keep] if isinstance(keep, torch.Tensor) else mask[:, -keep:]
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-4, atol=2e-3)
    assert not ours[~kept].any()
    for refused in ({"labels": inputs["input_ids"]}, {"max_new_tokens": 3}):
        with pytest.raises(OptionError):
            pair.ours(**inputs, **refused)


def test_a_trained_model_stops_where_transformers_does() -> None:
    path = Path(hf.__file__).parents[1] / "demo"
    picture = Image.open(path / "samples" / "shapes.png").convert("RGB")
    text = TURN.format("<image>\nHow many shapes are in the picture?")
    inputs = dict(hf_processor.load_processor(path)(images=picture, text=text, return_tensors="pt"))
    theirs = hf_processor.load_model(path)
    ours = hf.OVFastForConditionalGeneration.from_pretrained("demo", device_map="cpu")
    width = inputs["input_ids"].shape[1]
    never = ours.engine._processor.forbidden_ids.tolist()
    for options, ends in (
        ({}, True),
        ({"eos_token_id": None}, False),
        ({"eos_token_id": 1}, False),
    ):
        given = {"max_new_tokens": 20, "suppress_tokens": never} | options
        answer = ours.generate(**inputs, **given)
        assert torch.equal(answer, theirs.generate(**inputs, **given))
        assert (answer.shape[1] < width + 20) == ends
    ours.close()


def test_sampling_follows_torchs_seed(pair: Pair) -> None:
    inputs = pair.inputs("flat")
    options = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2}

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return pair.ours.generate(**inputs, **options, max_new_tokens=8)

    first = run(0)
    assert len(first) == 6
    assert torch.equal(first, run(0))
    assert not torch.equal(first, run(1))
    assert not torch.equal(first[0], first[1])
    greedy = pair.ours.generate(**inputs, max_new_tokens=8)
    assert torch.equal(
        pair.ours.generate(**inputs, do_sample=True, top_k=1, max_new_tokens=8), greedy
    )


def test_the_checkpoints_generation_config_counts(pair: Pair, monkeypatch: Any) -> None:
    inputs = pair.inputs("single")
    width = inputs["input_ids"].shape[1]
    assert pair.ours.generate(**inputs).shape[1] == width + 20
    monkeypatch.setattr(pair.ours.generation_config, "max_new_tokens", 3)
    assert pair.ours.generate(**inputs).shape[1] == width + 3
    config = transformers.GenerationConfig(max_new_tokens=2)
    assert pair.ours.generate(**inputs, generation_config=config).shape[1] == width + 2
    assert pair.ours.generate(inputs.pop("input_ids"), **inputs, max_new_tokens=1).shape[1] == (
        width + 1
    )
    monkeypatch.setattr(pair.ours.generation_config, "num_beams", 4)
    with pytest.raises(OptionError, match="num_beams=4"):
        pair.ours.generate(**pair.inputs("single"))


def test_placeholders_and_pictures_must_fit(pair: Pair) -> None:
    one, two = pair.inputs("single"), pair.inputs("flat_two")
    with pytest.raises(PromptError, match="no image left"):
        pair.ours.generate(input_ids=one["input_ids"])
    with pytest.raises(PromptError, match="no <image> tokens left"):
        pair.ours.generate(**(two | {"input_ids": one["input_ids"], "attention_mask": None}))
    cut = {"input_ids": one["input_ids"][:, :20], "attention_mask": None}
    with pytest.raises(PromptError, match="do not match"):
        pair.ours.generate(**(one | cut))


def test_a_reloaded_engine_is_the_models_own(pair: Pair) -> None:
    assert isinstance(pair.ours.engine, Engine)
    assert pair.ours.eval() is pair.ours
    assert pair.ours.to("cpu", torch.float32) is pair.ours
    assert pair.ours.config.model_type == "llava_onevision"
