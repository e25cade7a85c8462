"""The native back end answers as plain torch does, whatever decodes beside it."""

import numpy as np
import pytest
import torch

from ovfast import BackendError, CapacityError, Engine
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.native_runner import NativeRunner
from tests.support.engines import REQUESTS, free_slots, open_engine
from tests.support.runners import (
    OPTIONS,
    assert_batch_of_many,
    assert_options_side_by_side,
    assert_same_answer,
)

pytest.importorskip("ovfast._C", reason="the native extension is not built")


@pytest.fixture(scope="module")
def plain(tiny_checkpoint):
    with open_engine(tiny_checkpoint, backend="reference") as engine:
        yield engine


@pytest.fixture(scope="module")
def native(tiny_checkpoint):
    with open_engine(tiny_checkpoint, backend="native", max_batch_size=20, threads=2) as engine:
        assert isinstance(engine._scheduler.loaded().runner, NativeRunner)
        yield engine


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", REQUESTS)
def test_alone(plain: Engine, native: Engine, name, options):
    ignore = {"ignore_eos": "min_new_tokens" not in options}
    expected = plain.generate(**REQUESTS[name], **options, **ignore)
    got = native.generate(**REQUESTS[name], **options, **ignore)
    assert_same_answer(got, expected, 1e-4)


def test_a_batch_of_more_than_a_step_holds(plain: Engine, native: Engine):
    assert_batch_of_many(plain, native)


def test_different_options_side_by_side(plain: Engine, native: Engine):
    assert_options_side_by_side(plain, native)


def test_a_full_slot_ends_its_request_alone(tiny_checkpoint):
    with open_engine(tiny_checkpoint, backend="native", max_batch_size=2, max_seq_len=64) as engine:
        room = 64 - engine.prepare("Go on.").num_tokens
        with pytest.raises(CapacityError):
            engine.generate("Go on.", max_new_tokens=room + 1)
        output = engine.generate("Go on.", max_new_tokens=room, ignore_eos=True)
        assert len(output.token_ids) == room
        assert free_slots(engine) == 2


def test_logits_that_are_not_finite_end_the_request_alone(tiny_checkpoint, monkeypatch):
    with open_engine(tiny_checkpoint, backend="native", max_batch_size=2) as engine:
        runner = engine._scheduler.loaded().runner
        step, calls = runner._decoder.step, []

        class Broken:
            def step(self, k, v, tokens, slots, positions, forbidden, logits, greedy):
                step(k, v, tokens, slots, positions, forbidden, logits, greedy)
                calls.append(len(slots))
                if len(calls) == 3:
                    logits[0, 5], greedy[0] = float("nan"), -1

        monkeypatch.setattr(runner, "_decoder", Broken())
        first = engine.stream("One", ignore_eos=True, max_new_tokens=8)
        second = engine.stream("Two", ignore_eos=True, max_new_tokens=8)
        next(first), next(second)
        with pytest.raises(BackendError, match="finite"):
            list(first)
        tokens = [token for chunk in second for token in chunk.token_ids]
        assert max(calls) == 2
        assert len(tokens) == 7
        assert free_slots(engine) == 2


def test_a_step_that_fails_is_done_one_by_one(tiny_checkpoint, monkeypatch, caplog):
    options = {"ignore_eos": True, "max_new_tokens": 8}
    with open_engine(tiny_checkpoint, backend="native", max_batch_size=2) as engine:
        expected = engine.generate("Two", **options).token_ids
        runner, decode = engine._scheduler.loaded().runner, LlavaOnevision.decode

        class Broken:
            def step(self, *args):
                raise MemoryError("no workspace")

        def failing(self, token_id, cache, slot):
            if slot == bad_slot:
                raise RuntimeError("a broken request")
            return decode(self, token_id, cache, slot)

        first, second = engine.stream("One", **options), engine.stream("Two", **options)
        next(first)
        (bad_slot,) = runner._active
        tokens = list(next(second).token_ids)
        monkeypatch.setattr(runner, "_decoder", Broken())
        monkeypatch.setattr(LlavaOnevision, "decode", failing)
        with pytest.raises(RuntimeError, match="a broken request"):
            list(first)
        tokens += [token for chunk in second for token in chunk.token_ids]
        assert tuple(tokens) == expected
        assert free_slots(engine) == 2
    assert "joint decode step failed" in caplog.text


def test_a_step_can_be_repeated(native: Engine):
    """As after an interrupt: the logits of a step that was not consumed are those used."""
    expected = native.generate("Once", ignore_eos=True, max_new_tokens=6).token_ids
    runner = native._scheduler.loaded().runner
    stream = native.stream("Once", ignore_eos=True, max_new_tokens=6)
    other = native.stream("More", ignore_eos=True, max_new_tokens=6)
    tokens = list(next(stream).token_ids)
    next(other)
    runner._decode_together()
    runner._decode_together()
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert tuple(tokens) == expected
    list(other)


def test_a_step_that_was_cut_keeps_its_logits(native: Engine):
    """A slot whose token was not chosen yet, while its neighbour decodes on in the same memory."""
    options = {"ignore_eos": True, "max_new_tokens": 6, "temperature": 2.0, "seed": 3}
    expected = [native.generate(prompt, **options).token_ids for prompt in ("Once", "More")]
    runner = native._scheduler.loaded().runner
    streams = [native.stream(prompt, **options) for prompt in ("Once", "More")]
    tokens = [list(next(stream).token_ids) for stream in streams]
    runner._decode_together()
    _, last = runner._active
    runner._step(last, runner._active[last])  # the interrupt came before the first slot's turn
    runner._decode_together()
    for got, stream in zip(tokens, streams, strict=True):
        got += [token for chunk in stream for token in chunk.token_ids]
    assert [tuple(got) for got in tokens] == expected


def test_a_slot_forgets_what_was_decoded_for_the_one_before(tiny_checkpoint):
    with open_engine(tiny_checkpoint, backend="native") as engine:
        options = {"ignore_eos": True, "max_new_tokens": 6}
        expected = engine.generate("More", **options).token_ids
        stream = engine.stream("Once", **options)
        next(stream)
        engine._scheduler.loaded().runner._decode_together()
        stream.close()
        assert engine.generate("More", **options).token_ids == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_threads_or_neighbours(tiny_checkpoint, dtype):
    options = {"backend": "native", "max_batch_size": 20, "max_seq_len": 600, "dtype": dtype}
    slots = np.array([7, 0, 19, 3, 11, 12, 13, 14, 15, 16, 17, 18, 1, 2, 4, 5, 6, 8], np.int32)
    positions = np.array([3, 0, 511, 599, 256, *range(100, 113)], np.int32)
    tokens = np.arange(5, 5 + len(slots), dtype=np.int32)
    seen = {}
    for threads, groups in (
        (1, [[0], [1], [2], [3], [17]]),
        (3, [range(18)]),
        (2, [[3, 0], [17, 2, 1]]),
    ):
        with open_engine(tiny_checkpoint, threads=threads, **options) as engine:
            runner, cache = engine._scheduler.loaded().runner, engine._scheduler.loaded().cache
            generator = torch.Generator().manual_seed(0)
            cache.k_cache.normal_(generator=generator)
            cache.v_cache.normal_(generator=generator)
            for group in groups:
                rows = np.array(list(group))
                logits = np.empty((len(rows), engine._model.vocab_size), np.float32)
                runner._decoder.step(
                    runner._k_cache,
                    runner._v_cache,
                    tokens[rows],
                    slots[rows],
                    positions[rows],
                    runner._forbidden_bytes,
                    logits,
                    np.empty(len(rows), np.int32),
                )
                for row, values in zip(rows.tolist(), logits, strict=True):
                    assert np.array_equal(seen.setdefault(row, values), values)
    assert len(seen) == 18
