"""Requests of a batch whose views are encoded together: the same answers, fewer tower runs."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ovfast import Engine, ModelInputs
from ovfast.models.siglip import SiglipTower
from ovfast.request import side_by_side
from tests.support.calls import note_calls
from tests.support.engines import REQUESTS, free_slots, open_engine

ASK = {"max_new_tokens": 4, "ignore_eos": True, "logprobs": 2}
NAMES = ["image", "text", "wide", "three_images", "video", "mixed", "image"]


@pytest.fixture(scope="module", params=["native", "reference"])
def shared(request: Any, tiny_checkpoint: Path) -> Iterator[Engine]:
    options = {"max_batch_size": 3, "backend": request.param}
    with open_engine(tiny_checkpoint, **options) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    yield shared
    set_views(shared, 1)
    assert free_slots(shared) == 3


def set_views(engine: Engine, num_views: int) -> None:
    """The tower still takes one view at a time."""
    engine._model._ops = replace(engine._model._ops, views_a_step=num_views)


@pytest.mark.parametrize(
    ("views", "limit", "expected"),
    [
        ([], 4, 0),
        ([0, 0], 4, 1),
        ([1, 1], 1, 1),
        ([1, 1, 1], 2, 2),
        ([9, 1], 4, 1),
        ([2, 2, 1], 4, 2),
        ([2, 0, 2], 4, 1),
        ([0, 2, 2], 4, 1),
        ([1, 1, 1], 64, 3),
    ],
)
def test_who_goes_together(views: list[int], limit: int, expected: int) -> None:
    requests: list[Any] = [SimpleNamespace(inputs=SimpleNamespace(num_views=n)) for n in views]
    assert side_by_side(requests, limit) == requests[:expected]


def ready_made(inputs: ModelInputs) -> ModelInputs:
    return replace(inputs, media=(), _views=[inputs.views])


@pytest.mark.parametrize("is_ready_made", [False, True])
def test_a_batch_answers_as_its_requests_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, is_ready_made: bool
) -> None:
    inputs = [engine.prepare(**REQUESTS[name]) for name in NAMES]
    if is_ready_made:
        inputs[2] = ready_made(inputs[2])
    views = [each.num_views for each in inputs]
    runs = note_calls(monkeypatch, SiglipTower, "encode", lambda _, pixels, *rest: pixels.num_views)
    for limit in (1, 64):
        set_views(engine, limit)
        runs.clear()
        alone = [engine.generate(each, **ASK) for each in inputs]
        apart = list(runs)
        runs.clear()
        outputs = engine.generate(inputs, **ASK)
        for ours, expected in zip(outputs, alone, strict=True):
            assert (ours.token_ids, ours.logprobs) == (expected.token_ids, expected.logprobs)
            assert ours.usage == expected.usage
        assert sum(runs) == sum(views)
        assert runs == apart if limit == 1 else len(runs) < len(apart)


def test_handles_and_text_go_alone(engine: Engine) -> None:
    with engine.encode(**REQUESTS["image"], keep="prefix") as handle:
        asked = engine.prepare(REQUESTS["image"]["prompt"], media=handle)
        others = [engine.prepare(**REQUESTS[name]) for name in ("image", "text")]
        inputs = [others[0], asked, others[1], others[0], others[0]]
        alone = [engine.generate(each, **ASK) for each in inputs]
        set_views(engine, 64)
        together = engine.generate(inputs, **ASK)
        assert [o.token_ids for o in together] == [o.token_ids for o in alone]
        assert [o.usage for o in together] == [o.usage for o in alone]
        assert together[1].usage.cached_tokens > 0


def test_times_of_requests_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The views' time is everyone's; a prefill's is its own."""
    language_model = type(engine._model.language_model)
    set_views(engine, 64)
    inputs = [engine.prepare(**REQUESTS["image"])] * 3
    note_calls(monkeypatch, SiglipTower, "encode", lambda *_: time.sleep(0.2))
    note_calls(monkeypatch, language_model, "prefill_hidden", lambda *_: time.sleep(0.2))
    times = [output.timings for output in engine.generate(inputs, **ASK)]
    assert len({t.vision_ms for t in times}) == 1
    for t in times:
        assert t.vision_ms >= 200
        assert t.prefill_ms >= 200
    assert times[0].vision_ms + sum(t.prefill_ms for t in times) <= times[-1].ttft_ms


def test_too_many_views_at_a_time_go_one_by_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_views(engine, 64)
    inputs = [engine.prepare(**REQUESTS["image"])] * 3
    expected = engine.generate(inputs, **ASK)
    tried = []

    def too_much(*given: object) -> None:
        tried.append(given)
        raise torch.OutOfMemoryError("of the device")

    monkeypatch.setattr(type(engine._model), "build_together", too_much)
    outputs = engine.generate(inputs, **ASK)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert len(tried) == 1
