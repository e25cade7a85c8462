"""The row runner gives what the eager runner gives, whatever runs beside it and ahead of it."""

import dataclasses
import threading

import pytest
import torch

from ovfast import BackendError, CapacityError, Engine
from ovfast.device_sampling import SamplerKind
from ovfast.row_runner import AHEAD
from tests.support.engines import REQUESTS, open_engine
from tests.support.row_decoder import open_rows, use_rows
from tests.support.runners import (
    OPTIONS,
    assert_batch_of_many,
    assert_options_side_by_side,
    assert_same_answer,
)


@pytest.fixture(scope="module")
def plain(tiny_checkpoint):
    with open_engine(tiny_checkpoint) as engine:
        yield engine


@pytest.fixture(scope="module")
def rows(tiny_checkpoint):
    with open_rows(tiny_checkpoint, max_batch_size=20) as engine:
        yield engine


def comparable(output):
    """An output without its times and text."""
    return dataclasses.replace(output, timings=None)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["text", "image"])
def test_alone(plain: Engine, rows: Engine, name, options):
    ignore = {"ignore_eos": "min_new_tokens" not in options}
    expected = plain.generate(**REQUESTS[name], **options, **ignore)
    got = rows.generate(**REQUESTS[name], **options, **ignore)
    assert_same_answer(got, expected, 1e-5)


def test_a_batch_of_more_rows_than_a_group_holds(plain: Engine, rows: Engine):
    assert_batch_of_many(plain, rows)


def test_different_options_side_by_side(plain: Engine, rows: Engine):
    assert_options_side_by_side(plain, rows)


def test_stop_ids_end_on_the_device(plain: Engine, rows: Engine):
    free = plain.generate("Tell me.", ignore_eos=True, max_new_tokens=12).token_ids
    stop = next(token for i, token in enumerate(free) if i > 3 and token not in free[:i])
    out = rows.generate("Tell me.", ignore_eos=True, max_new_tokens=12, stop_token_ids=[stop])
    assert out.finish_reason == "stop"
    assert out.token_ids == free[: free.index(stop) + 1]


def test_the_device_is_ahead_by_no_more_than_it_may(tiny_checkpoint):
    with open_rows(tiny_checkpoint) as engine:
        runner = engine._scheduler.loaded().runner
        stream = engine.stream("Count.", ignore_eos=True, max_new_tokens=20)
        for tokens in range(1, 8):
            next(stream)
            assert len(runner._decoder.calls) == tokens - 1 + AHEAD
        stream.close()
        assert engine._scheduler.num_free_slots == 1


def test_a_closed_stream_frees_its_row_at_once(tiny_checkpoint, plain: Engine):
    """The next request takes the row that steps under way still hold."""
    with open_rows(tiny_checkpoint) as engine:
        for count in (1, 2, 5):
            stream = engine.stream("Count.", ignore_eos=True, max_new_tokens=50)
            for _ in range(count):
                next(stream)
            stream.close()
            options = {"ignore_eos": True, "max_new_tokens": 6}
            expected = plain.generate(**REQUESTS["image"], **options).token_ids
            assert engine.generate(**REQUESTS["image"], **options).token_ids == expected
        assert engine._scheduler.loaded().runner._groups[0].active() == []


def test_contexts_beyond_a_split(plain: Engine, rows: Engine):
    prompt = "word " * 60
    options = {"ignore_eos": True, "max_new_tokens": 30}
    expected = plain.generate(prompt, **options).token_ids
    assert rows.generate(prompt, **options).token_ids == expected
    calls = rows._scheduler.loaded().runner._decoder.calls
    assert {splits for _, splits in calls} >= {1, 2}
    assert all(count in (1, 2, 4, 8, 16) for count, _ in calls)


def test_logits_that_are_not_finite_end_one_request(tiny_checkpoint, plain: Engine):
    with open_rows(tiny_checkpoint, max_batch_size=2) as engine:
        decoder = engine._scheduler.loaded().runner._decoder
        decode = type(decoder).decode

        def broken(rows, num_rows, num_splits):
            decode(decoder, rows, num_rows, num_splits)
            rows.logits[rows.slots == broken_slot] = torch.nan

        broken_slot = -5
        decoder.decode = broken
        healthy = engine.stream("Fine?", ignore_eos=True, max_new_tokens=8)
        tokens = [*next(healthy).token_ids]
        ill = engine.stream("Ill?", ignore_eos=True, max_new_tokens=8)
        next(ill)
        broken_slot = 1
        with pytest.raises(BackendError, match="not finite"):
            list(ill)
        for chunk in healthy:
            tokens += chunk.token_ids
        expected = plain.generate("Fine?", ignore_eos=True, max_new_tokens=8).token_ids
        assert tuple(tokens) == expected


def test_an_interrupt_inside_a_step(tiny_checkpoint, plain: Engine):
    with open_rows(tiny_checkpoint) as engine:
        decoder = engine._scheduler.loaded().runner._decoder
        decode = type(decoder).decode
        cut = [3]

        def interrupted(rows, num_rows, num_splits):
            decode(decoder, rows, num_rows, num_splits)
            cut[0] -= 1
            if cut[0] == 0:
                raise KeyboardInterrupt

        decoder.decode = interrupted
        with pytest.raises(KeyboardInterrupt):
            engine.generate("Go.", ignore_eos=True, max_new_tokens=9)
        assert engine._scheduler.num_free_slots == 1
        options = {"ignore_eos": True, "max_new_tokens": 9}
        assert (
            engine.generate("Go.", **options).token_ids
            == plain.generate("Go.", **options).token_ids
        )


def test_threads_share_the_rows(plain: Engine, rows: Engine):
    options = {"temperature": 1.2, "seed": 2, "max_new_tokens": 10}
    prompts = [f"Thread {index}" for index in range(6)]
    expected = {prompt: plain.generate(prompt, **options).token_ids for prompt in prompts}
    got = {}

    def work(prompt: str) -> None:
        got[prompt] = rows.generate(prompt, **options).token_ids

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == expected


def test_graphs_are_kept_by_shape(tiny_checkpoint):
    with open_engine(tiny_checkpoint) as engine:
        runner = use_rows(engine)
        for _ in range(2):
            engine.generate("Go.", ignore_eos=True, max_new_tokens=6)
        keys = runner._graphs.keys
        assert len(keys) == 1
        engine.generate("Go.", ignore_eos=True, max_new_tokens=6, temperature=1.0)
        assert len(runner._graphs.keys) == 2


def graph_shapes(runner) -> list[tuple[int, int]]:
    """(rows, splits) of what is captured, the least recently used first."""
    return [(plan.num_rows, plan.num_splits) for _, plan in runner._graphs.keys]


@pytest.mark.parametrize(
    ("max_batch_size", "max_rows"), [(1, 1), (3, 4), (8, 8), (20, 16)], ids=str
)
def test_warmup_captures_greedy_steps_of_any_shape(tiny_checkpoint, max_batch_size, max_rows):
    """A context of 1024 positions has 6 splits: it is looked at as 8."""
    with open_engine(tiny_checkpoint, max_batch_size=max_batch_size) as engine:
        runner = use_rows(engine)
        engine.warmup()
        rows = [count for count in (1, 2, 4, 8, 16) if count <= max_rows]
        expected = {(count, splits) for count in rows for splits in (1, 2, 4, 8)}
        assert set(graph_shapes(runner)) == expected
        assert all(plan.kind == SamplerKind() for _, plan in runner._graphs.keys)
        num_graphs = len(runner._graphs.keys)
        engine.generate(["One", "Two"], ignore_eos=True, max_new_tokens=250)
        assert len(runner._graphs.keys) == num_graphs


def test_warmup_leaves_no_trace(tiny_checkpoint, plain: Engine):
    with open_engine(tiny_checkpoint, max_batch_size=2) as engine:
        runner = use_rows(engine)
        engine.warmup()
        state = runner._groups[0].state
        assert bool((state.slots == -1).all())
        assert runner.poll() == []
        for options in OPTIONS:
            expected = plain.generate("After.", **options)
            assert_same_answer(engine.generate("After.", **options), expected, 1e-5)


def test_warmup_stays_below_the_ceiling(tiny_checkpoint):
    """The shortest contexts first, and nothing that was captured goes."""
    with open_engine(tiny_checkpoint, max_batch_size=2) as engine:
        runner = use_rows(engine, graph_bytes=3)
        engine.warmup()
        assert sorted(graph_shapes(runner)) == [(1, 1), (1, 2), (2, 1)]
        use_rows(engine, graph_bytes=0)
        engine.warmup()


def test_warmup_beside_a_request_changes_nothing(tiny_checkpoint, plain: Engine):
    ask = {"ignore_eos": True, "max_new_tokens": 8}
    with open_engine(tiny_checkpoint, max_batch_size=2) as engine:
        runner = use_rows(engine)
        stream = engine.stream("Count.", **ask)
        tokens = [*next(stream).token_ids]
        engine.warmup()
        for chunk in stream:
            tokens += chunk.token_ids
        assert tuple(tokens) == plain.generate("Count.", **ask).token_ids
        assert len(runner._graphs.keys) <= 2
        engine.warmup()
        assert len(runner._graphs.keys) == 8


def test_numbers_beyond_float32_and_int64(plain: Engine, rows: Engine):
    for options in ({"temperature": 1e39, "seed": 3}, {"repetition_penalty": 1e39}):
        ask = {"ignore_eos": True, "max_new_tokens": 4, **options}
        got, expected = rows.generate("Go.", **ask), plain.generate("Go.", **ask)
        assert len(got.token_ids) == 4
        assert got.token_ids == expected.token_ids or "repetition_penalty" in options
    assert rows._scheduler.loaded().runner._groups[0].active() == []


def test_more_alternatives_than_ids_need_no_new_group(tiny_checkpoint):
    with open_rows(tiny_checkpoint) as engine:
        for _ in range(3):
            out = engine.generate("Go.", max_new_tokens=2, ignore_eos=True, logprobs=5000)
            assert len(out.logprobs[0].top) == engine._vocab_size
        assert len(engine._scheduler.loaded().runner._groups) == 1


def test_an_admission_that_fails_leaves_no_row(tiny_checkpoint, monkeypatch):
    with open_rows(tiny_checkpoint) as engine:
        engine.generate("Go.", max_new_tokens=2, ignore_eos=True)
        group = engine._scheduler.loaded().runner._groups[0]

        def fail(*args: object) -> None:
            raise torch.OutOfMemoryError("none left")

        with monkeypatch.context() as patch:
            patch.setattr(type(group.state), "choose", fail)
            with pytest.raises(CapacityError):
                engine.generate("Go.", max_new_tokens=2)
        assert group.active() == []
        assert bool((group.state.slots < 0).all())
        assert len(engine.generate("Go.", max_new_tokens=3, ignore_eos=True).token_ids) == 3
