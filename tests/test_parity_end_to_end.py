"""From PIL pictures and strings to logits and tokens, through the public calls, as transformers.

Ids come from its tokenizer, pictures from its image processor, logits and tokens from its model;
only a video's frames are resized here, with Pillow, because its video processor needs torchvision.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import ovfast
from ovfast import Engine, api
from tests.support import hf
from tests.support.checkpoints import LAYOUTS, CheckpointSpec
from tests.support.engines import open_engine

LOGITS_BOUND = 2e-4  # of the largest magnitude
NUM_TOKENS = 32
SPECS = {
    "tied": CheckpointSpec(),
    "untied": CheckpointSpec(hidden=192, heads=8, kv_heads=1, head_dim=128, tie=False, seed=1),
}


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Shapes on a gradient: a picture with smooth parts, edges and colours."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, width, dtype=np.float32)[None, :, None]
    pixels = np.broadcast_to(ramp * rng.uniform(0.3, 1, 3), (height, width, 3))
    picture = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(2, 40)
        draw.ellipse((x - r, y - r, x + r, y + r), tuple(rng.integers(0, 256, 3).tolist()))
    return picture


def movie(num_frames: int) -> np.ndarray:
    return np.stack([np.asarray(scene(60, 100, seed)) for seed in range(num_frames)])


@dataclass(frozen=True)
class Case:
    """A call, and the prompt that it must come to."""

    prompt: Any
    rendered: str
    images: tuple[Image.Image, ...] = ()
    video: np.ndarray | None = None

    def arguments(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "images": list(self.images), "videos": self.video}


def question(text: str, media: str = "", **options: Any) -> Case:
    rendered = f"<|im_start|>user\n{media}{text}<|im_end|>\n<|im_start|>assistant\n"
    return Case(text, rendered, **options)


INTERLEAVED = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Before "},
            {"type": "image"},
            {"type": "text", "text": "between "},
            {"type": "video"},
            {"type": "text", "text": "after?"},
        ],
    },
    {"role": "assistant", "content": "A circle."},
    {"role": "user", "content": "Which colour?"},
]
CASES = {
    "text": question("How many shapes are in the picture?"),
    "small": question("What is this?", "<image>\n", images=(scene(20, 30),)),
    "wide": question("What is this?", "<image>\n", images=(scene(90, 300, 1),)),
    "tall": question("Beschreibe das 日本!", "<image>\n", images=(scene(333, 120, 2),)),
    "shrunk": question("What is this?", "<image>\n", images=(scene(420, 430, 3),)),
    "three": question(
        "Which image?", "<image>\n" * 3, images=tuple(scene(50 + 40 * i, 90, i) for i in range(3))
    ),
    "video": question("Which way?", "<video>\n", video=movie(5)),
    "interleaved": Case(
        INTERLEAVED,
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nBefore <image>\nbetween <video>\nafter?<|im_end|>\n"
        "<|im_start|>assistant\nA circle.<|im_end|>\n"
        "<|im_start|>user\nWhich colour?<|im_end|>\n<|im_start|>assistant\n",
        (scene(170, 200, 4),),
        movie(3),
    ),
}


@dataclass(frozen=True)
class Pair:
    path: Path
    engine: Engine


@pytest.fixture(scope="module", params=SPECS)
def pair(request: pytest.FixtureRequest, random_checkpoint: Any) -> Iterator[Pair]:
    path = random_checkpoint(SPECS[request.param])
    with open_engine(path, max_seq_len=2048) as engine:
        yield Pair(path, engine)


def hf_inputs(path: Path, case: Case) -> hf.HFInputs:
    import transformers

    visual: dict[str, Any] = {}
    rendered = case.rendered
    if case.images:
        visual = hf.process_images(path, list(case.images))
        for count in image_token_counts(path, case.images):
            rendered = rendered.replace("<image>", "\0" * count, 1)
    if case.video is not None:
        frames = [Image.fromarray(f).resize((84, 84), Image.Resampling.BICUBIC) for f in case.video]
        visual["pixel_values_videos"] = hf.normalise(np.stack([np.asarray(f) for f in frames]))[
            None
        ]
        rendered = rendered.replace("<video>", "<video>" * (9 * len(case.video) + 1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer(rendered.replace("\0", "<image>"), return_tensors="pt")["input_ids"]
    return hf.HFInputs(ids, visual)


def image_token_counts(path: Path, images: tuple[Image.Image, ...]) -> list[int]:
    """As its processor expands placeholders."""
    import transformers

    if len(images) > 1:
        return [36 + 1] * len(images)
    theirs = transformers.LlavaOnevisionProcessor.__new__(transformers.LlavaOnevisionProcessor)
    theirs.num_image_tokens, theirs.vision_aspect_ratio = 36, "anyres_max_9"
    theirs.image_processor = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(path)
    return [theirs._get_number_of_features(images[0].height, images[0].width, 84, 84)]


def assert_logits_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((logits - expected).abs().max() / expected.abs().max())
    assert error <= LOGITS_BOUND, f"logits differ by {error:.2e} of their largest magnitude"


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens(pair: Pair, name: str) -> None:
    case, engine = CASES[name], pair.engine
    theirs, model = hf_inputs(pair.path, case), hf.load_model(pair.path)
    inputs = engine.prepare(**case.arguments())
    assert inputs.input_ids.tolist() == theirs.input_ids[0].tolist()
    assert_logits_close(engine.forward(inputs), hf.all_logits(model, theirs))
    forbidden = engine._processor.forbidden_ids.tolist()
    expected = hf.greedy(model, theirs, NUM_TOKENS, suppress_tokens=forbidden)
    output = engine.generate(**case.arguments(), max_new_tokens=NUM_TOKENS, ignore_eos=True)
    assert list(output.token_ids) == expected


def test_the_module_level_call(tiny_checkpoint: Path) -> None:
    """ovfast.generate and ovfast.stream load once and answer as an engine does."""
    options = {"model": tiny_checkpoint, "device": "cpu", "max_new_tokens": 6, "ignore_eos": True}
    with open_engine(tiny_checkpoint) as engine:
        expected = engine.generate(
            "What?", images=scene(90, 90), max_new_tokens=6, ignore_eos=True
        ).token_ids
    assert ovfast.generate("What?", images=scene(90, 90), **options).token_ids == expected
    chunks = ovfast.stream("What?", images=scene(90, 90), **options)
    assert tuple(t for chunk in chunks for t in chunk.token_ids) == expected
    engine = api._engines.get(tiny_checkpoint, device="cpu")
    assert engine is api._engines.get(tiny_checkpoint, device="cpu")
    engine.close()
    assert ovfast.generate("What?", images=scene(90, 90), **options).token_ids == expected
    api._engines.get(tiny_checkpoint, device="cpu").close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load_to_the_same_logits(random_checkpoint: Any, layout: str) -> None:
    """The raw prompt is the same text for both dialects; its placeholders differ in name only."""
    raw = CASES["interleaved"].rendered
    media = {"images": list(CASES["interleaved"].images), "videos": movie(3)}
    logits = []
    for path in (random_checkpoint(), random_checkpoint(layout=layout)):
        with open_engine(path) as engine:
            inputs = engine.prepare(raw, raw=True, **media)
            logits.append(engine.forward(inputs))
    assert torch.equal(logits[0], logits[1])


def test_original_checkpoints_ask_with_their_own_template(random_checkpoint: Any) -> None:
    """qwen_1_5 has a system turn, which the Hugging Face template has only on request."""
    system = "You are a helpful assistant."
    options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True, "images": scene(90, 120)}
    with open_engine(random_checkpoint(layout="orig")) as original:
        tokens = original.generate("What?", **options).token_ids
    with open_engine(random_checkpoint()) as engine:
        assert engine.generate("What?", system=system, **options).token_ids == tokens
        assert engine.generate("What?", **options).token_ids != tokens
