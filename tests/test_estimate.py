"""estimate, from sizes alone, counts what prepare then builds."""

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ovfast import Engine, MediaError, OptionError, PromptError, VisualOptions
from tests.support.checkpoints import CheckpointSpec, tensor_shapes
from tests.support.engines import open_engine
from tests.support.prompts import picture, user

NUM_INPUTS = 1000
PIXELS = picture(400, 400)
SPEC = CheckpointSpec(image_size=28, vision_layers=1, layers=1)


@pytest.fixture(scope="module")
def engine(random_checkpoint: Any) -> Iterator[Engine]:
    """Views of 28 pixels: all the geometry of larger ones, at a ninth of the resizing."""
    with open_engine(random_checkpoint(SPEC), visual=VisualOptions(max_views=7)) as engine:
        yield engine


def random_size(rng: random.Random) -> tuple[int, int]:
    """Log-uniform, so that thin and tiny ones are as frequent as the others."""
    return round(400 ** rng.random()), round(400 ** rng.random())


def random_options(rng: random.Random) -> VisualOptions | None:
    if rng.random() < 0.2:
        return None  # the engine's
    return VisualOptions(
        token_policy=rng.choice(["paper", "anyres", "lmms_eval"]),
        unpad_rounding=rng.choice(["hf", "orig"]),
        anyres_max=rng.choice([None, None, 1, 2, 4, 9, 100]),
        max_views=rng.choice([None, None, 1, 2, 5, 10]),
    )


def random_prompt(rng: random.Random, num_images: int, num_videos: int) -> Any:
    words = rng.choices(["What", "is", "this", "日本", "<image", "\n"], k=rng.randint(1, 9))
    text = " ".join([*words, "?"])
    parts: list[Any] = ["IMAGE"] * num_images + ["VIDEO"] * num_videos + [text, "and?"]
    rng.shuffle(parts)
    return rng.choice([text, user(*parts)])


@pytest.mark.parametrize("seed", range(4))
def test_estimate_equals_prepare(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    views = set()
    for _ in range(NUM_INPUTS // 4):
        sizes = [random_size(rng) for _ in range(rng.choice([0, 1, 1, 1, 2, 4]))]
        frames = [rng.randint(1, 6) for _ in range(rng.choice([0, 0, 1, 2]))]
        prompt, visual = random_prompt(rng, len(sizes), len(frames)), random_options(rng)
        system = rng.choice([None, "Be brief."])
        estimate = engine.estimate(
            prompt, image_sizes_hw=sizes, num_frames=frames, visual=visual, system=system
        )
        inputs = engine.prepare(
            prompt,
            images=[PIXELS[:height, :width] for height, width in sizes],
            videos=[np.zeros((count, 9, 13, 3), np.uint8) for count in frames],
            visual=visual,
            system=system,
        )
        what = (prompt, sizes, frames, visual)
        assert estimate.prompt_tokens == inputs.num_tokens == len(inputs.input_ids), what
        assert estimate.visual_tokens == inputs.num_visual_tokens, what
        assert estimate.num_views == inputs.num_views == len(inputs.views), what
        assert estimate.text_tokens == inputs.num_tokens - inputs.num_visual_tokens, what
        views.add(estimate.num_views)
    assert len(views) > 15


def test_bytes_are_the_engine_s(engine: Engine) -> None:
    """Of the cache as it is laid out, and of all tensors of the checkpoint."""
    estimate = engine.estimate("Q", image_sizes_hw=[(50, 60)], max_new_tokens=20)
    cache = engine._scheduler.loaded().cache
    assert estimate.kv_cache_bytes == cache.bytes_per_token * (estimate.prompt_tokens + 20)
    stored = sum(math.prod(shape) for shape in tensor_shapes(SPEC).values())
    unused = 2 * SPEC.vision_hidden  # post_layernorm
    assert estimate.weight_bytes == 4 * (stored - unused)
    assert estimate.decode_bytes_per_token > 0
    more = engine.estimate("Q", image_sizes_hw=[(50, 60)], max_new_tokens=21)
    assert more.kv_cache_bytes - estimate.kv_cache_bytes == cache.bytes_per_token


def test_bad_arguments(engine: Engine) -> None:
    with pytest.raises(OptionError, match=r"max_new_tokens=0; expected"):
        engine.estimate("Q", max_new_tokens=0)
    with pytest.raises(PromptError, match="1 <image> markers for 0 images"):
        engine.estimate("<image>")
    with pytest.raises(MediaError, match="at least 1"):
        engine.estimate("Q", image_sizes_hw=[(0, 5)])
    with pytest.raises(MediaError, match="at least 1 frame"):
        engine.estimate("Q", num_frames=[0])
    with pytest.raises(MediaError, match="expected a pair"):
        engine.estimate("Q", image_sizes_hw=[5])
    with pytest.raises(OptionError, match="expected VisualOptions"):
        engine.estimate("Q", visual="paper")
    with pytest.raises(OptionError, match="num_frames=5; expected a list"):
        engine.estimate("Q", num_frames=5)
    with pytest.raises(OptionError, match="image_sizes_hw=None; expected a list"):
        engine.estimate("Q", image_sizes_hw=None)
    with pytest.raises(OptionError, match="machine=5; expected a Machine"):
        engine.estimate("Q", machine=5)
