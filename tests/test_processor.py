"""ModelInputs: transformers' ids and token counts, spans, plans and views that belong together."""

import base64
import io
import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovfast.anyres import VisualOptions
from ovfast.demo_run import samples_path
from ovfast.processor import Processor
from tests.support.checkpoints import CheckpointSpec
from tests.support.prompts import (
    FORGERIES,
    IMAGE,
    PAPER,
    TEXTS,
    VIDEO,
    clip,
    open_processor,
    picture,
    prepare,
    user,
)
from tests.support.tokenizers_small import CHAT_TEMPLATES

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


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", minversion="5.10")


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_as_transformers(converter: Path, transformers: Any, text: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(converter)
    assert open_processor(converter).encode_text(text) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", ["converter", "docs"])
@pytest.mark.parametrize("text", [t for t in TEXTS if "\ue000" not in t])
@pytest.mark.parametrize("system", [None, " You are terse. "])
def test_chat_as_transformers(
    request: pytest.FixtureRequest, transformers: Any, name: str, text: str, system: str | None
) -> None:
    path = request.getfixturevalue(name)
    processor = open_processor(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    chat: list[dict[str, Any]] = [
        *([{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []),
        *user("IMAGE", "IMAGE", "VIDEO", text),
        {"role": "assistant", "content": [{"type": "text", "text": "Answer.\n" + text}]},
        *user(text),
    ]
    images, videos = [picture(), picture(300, 50)], [clip(4)]
    inputs = prepare(processor, chat, images=images, videos=videos)
    prompt = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, chat_template=CHAT_TEMPLATES[name]
    )
    counts = iter([37, 37])
    pieces = [
        "<image>" * next(counts) if piece == "<image>" else piece
        for piece in tokenizer_split(prompt)
    ]
    expected = "".join(pieces).replace("<video>", "<video>" * (4 * 9 + 1))
    assert inputs.input_ids.tolist() == tokenizer(expected)["input_ids"]


def tokenizer_split(prompt: str) -> list[str]:
    head, *rest = prompt.split("<image>")
    return [head, *itertools.chain.from_iterable(("<image>", part) for part in rest)]


def test_token_counts_as_transformers(converter: Path, transformers: Any) -> None:
    """One picture of 300 random sizes: placeholders as its processor counts them."""
    processor = open_processor(converter)
    theirs = transformers.LlavaOnevisionProcessor.__new__(transformers.LlavaOnevisionProcessor)
    theirs.num_image_tokens, theirs.vision_aspect_ratio = 36, "anyres_max_9"
    theirs.image_processor = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(converter)
    rng = np.random.default_rng(5)
    for height, width in np.exp(rng.uniform(0, np.log(3000), (300, 2))).astype(int).tolist():
        ids, spans, _ = processor.layout("Q", images=[(height, width)], visual=PAPER)
        count = theirs._get_number_of_features(height, width, 84, 84)
        assert spans[0].end - spans[0].start == count == (ids == IMAGE).sum(), (height, width)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_media_parts_take_their_sources(converter: Path, tmp_path: Path) -> None:
    processor = open_processor(converter)
    pictures = [picture(60 + 30 * seed, 100, seed) for seed in range(6)]
    file = tmp_path / "p.png"
    file.write_bytes(_png(pictures[1]))
    uri = "data:image/png;base64," + base64.b64encode(_png(pictures[2])).decode()
    chat = user(
        "a",
        {"type": "image", "image": pictures[0]},
        {"type": "image", "path": str(file)},
        "b",
        {"type": "image_url", "image_url": {"url": uri}},
        "IMAGE",
        {"type": "image_url", "image_url": uri},
        {"type": "video", "video": [Image.fromarray(p[:60]) for p in pictures[:2]]},
        "IMAGE",
    )
    inputs = prepare(processor, chat, images=[pictures[3], _png(pictures[5])])
    order = [0, 1, 2, 3, 2, 5]
    views = list(inputs.views)
    for index, plan in zip(order, [p for p in inputs.plans if p.kind != "video"], strict=True):
        assert plan.size_hw == pictures[index].shape[:2]
    assert [span.kind for span in inputs.spans] == ["image"] * 5 + ["video", "image"]
    single = prepare(processor, "Q", images=[pictures[5], pictures[0]])
    assert np.array_equal(views[0], single.views[1])
    assert np.array_equal(views[-1], single.views[0])


def test_spans_plans_and_views_belong_together(processor: Processor) -> None:
    images, videos = [picture(200, 90), picture(30, 300, 1)], [clip(2), clip(5, 1)]
    prompt = "<video> and <image>, then <image> and <video>"
    options = {"visual": VisualOptions(token_policy="anyres")}
    inputs = prepare(processor, prompt, images=images, videos=videos, **options)
    assert [s.kind for s in inputs.spans] == ["video", "image", "image", "video"]
    assert [s.plan_index for s in inputs.spans] == [0, 1, 2, 3]
    assert inputs.num_views == sum(plan.num_views for plan in inputs.plans)
    assert inputs.num_tokens == len(inputs.input_ids)
    row, visual = 0, np.zeros(inputs.num_tokens, bool)
    for span, medium in zip(inputs.spans, [videos[0], *images, videos[1]], strict=True):
        plan = inputs.plans[span.plan_index]
        assert span.end - span.start == plan.num_tokens
        alone = {"images": medium} if span.kind == "image" else {"videos": medium}
        assert np.array_equal(
            inputs.views[row : row + plan.num_views],
            prepare(processor, "Q", **alone, **options).views,
        )
        row += plan.num_views
        visual[span.start : span.end] = True
    hf = processor.config.dialect == "hf"
    assert set(inputs.input_ids[visual].tolist()) == ({IMAGE, VIDEO} if hf else {IMAGE})
    assert visual.sum() == inputs.num_visual_tokens
    assert not np.isin(inputs.input_ids[~visual], [IMAGE, VIDEO]).any()


def test_the_policy_counts_pictures_apart_from_videos(converter: Path) -> None:
    processor = open_processor(converter)
    kinds = [p.kind for p in prepare(processor, "Q", images=picture(), videos=clip()).plans]
    assert kinds == ["anyres", "video"]
    kinds = [p.kind for p in prepare(processor, "Q", images=[picture()] * 2, videos=clip()).plans]
    assert kinds == ["square", "square", "video"]


def test_layout_equals_prepare(processor: Processor) -> None:
    rng = random.Random(3)
    for _ in range(60):
        images = [
            picture(rng.randint(1, 400), rng.randint(1, 400)) for _ in range(rng.randint(0, 3))
        ]
        videos = [clip(rng.randint(1, 4)) for _ in range(rng.randint(0, 2))]
        parts: list[object] = ["IMAGE"] * len(images) + ["VIDEO"] * len(videos)
        parts += rng.choices(["some text", "<image>", "more\n"], k=rng.randint(1, 3))
        rng.shuffle(parts)
        prompt = rng.choice([user(*parts), "What is this?"])
        policy = rng.choice(["paper", "anyres", "lmms_eval"])
        visual = VisualOptions(token_policy=policy, max_views=rng.choice([None, 1, 4]))
        inputs = prepare(processor, prompt, images=images, videos=videos, visual=visual)
        ids, spans, plans = processor.layout(
            prompt,
            images=[image.shape[:2] for image in images],
            videos=[(len(video), video.shape[1:3]) for video in videos],
            visual=visual,
        )
        assert np.array_equal(ids, inputs.input_ids)
        assert ids.dtype == np.int64
        assert (spans, plans) == (inputs.spans, inputs.plans)


def test_layout_takes_sizes_for_every_media_part(converter: Path) -> None:
    processor = open_processor(converter)
    chat = user({"type": "image", "image": "not read.png"}, "Q")
    _, spans, _ = processor.layout(chat, images=[(84, 84)], visual=PAPER)
    assert len(spans) == 1


def test_one_medium_needs_no_list(converter: Path) -> None:
    processor = open_processor(converter)
    frames = list(clip())
    many = prepare(processor, "Q", videos=[clip()])
    for videos in (clip(), frames, [Image.fromarray(f) for f in frames], [frames], (clip(),)):
        assert np.array_equal(prepare(processor, "Q", videos=videos).views, many.views)
    assert len(prepare(processor, "Q", videos=[frames, frames]).plans) == 2
    assert prepare(processor, "Q", images=[], videos=[]).num_views == 0


def test_options_choose_the_frames_of_a_file(converter: Path) -> None:
    processor, path = open_processor(converter), samples_path() / "clip.mp4"  # 8 frames, a second
    for options, count in (({}, 8), ({"num_frames": 3}, 3), ({"fps": 4.0}, 4)):
        inputs = prepare(processor, "Q", videos=path, visual=VisualOptions(**options))
        assert inputs.plans[0].num_frames == count


def test_timings_and_options_are_recorded(converter: Path) -> None:
    visual = VisualOptions(max_views=1)
    inputs = prepare(open_processor(converter), "Q", images=_png(picture()), visual=visual)
    assert inputs.media_ms > 0
    assert inputs.preprocess_ms > 0
    assert inputs.visual is visual


def test_threads_share_a_processor(converter: Path) -> None:
    processor = open_processor(converter)
    prompts = [user("IMAGE", text) for text in TEXTS] + list(FORGERIES[2:])
    sizes = [[(80, 90)] if isinstance(prompt, list) else [] for prompt in prompts]

    def ids() -> list[list[int]]:
        return [
            processor.layout(prompt, images=size, visual=PAPER)[0].tolist()
            for prompt, size in zip(prompts, sizes, strict=True)
        ]

    expected, found = ids(), []
    threads = [threading.Thread(target=lambda: found.append(ids())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8
