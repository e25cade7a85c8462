"""A whole engine on a CUDA device, at the real sizes with few layers.

Graphs that are captured, evicted and refused while tokens come; streams that are left; too little
memory; a second device.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ovfast import CapacityError, Engine
from ovfast.models.qwen2_rows import Qwen2Rows
from tests.support.checkpoints import CheckpointSpec
from tests.support.devices import memory_limit, requires_cuda, requires_two
from tests.support.engines import free_slots, open_engine, run_threads
from tests.support.prompts import picture
from tests.support.runners import drain

pytest.importorskip("triton", reason="needs triton")

pytestmark = [requires_cuda, pytest.mark.gpu]

REAL = CheckpointSpec(
    vision_hidden=1152, vision_mlp=4304, vision_heads=16, image_size=384, hidden=896, mlp=4864,
    layers=3, heads=14, kv_heads=2, head_dim=64, vocab_size=152000, dtype=torch.bfloat16,
)  # fmt: skip
PROMPTS = ["One", "Another", "Number three"]
ASK = {"max_new_tokens": 40, "ignore_eos": True}
# Of sampling: each is a graph of its own, and log-probabilities and sorts need memory in it.
KINDS: list[dict[str, Any]] = [
    {},
    {"logprobs": 2},
    {"temperature": 1.0, "top_p": 0.9, "seed": 3},
    {"repetition_penalty": 1.3},
]
MEGABYTE = 1 << 20


def open_real(path: Path, **options: Any) -> Engine:
    defaults = {"device": "cuda", "max_seq_len": 8192, "max_batch_size": 3}
    return open_engine(path, **defaults | options)


def ask_all(engine: Engine, after_each: Callable[[], None] = lambda: None) -> list[list[int]]:
    """All kinds of sampling, alone and beside others, over text and pictures of several sizes."""
    tokens = []
    for options in KINDS:
        for prompts in (PROMPTS[:1], PROMPTS):
            streams = [engine.stream(prompt, **ASK, **options) for prompt in prompts]
            tokens += drain(streams, after_each)
        for size_hw in ((384, 384), (480, 640)):
            stream = engine.stream("What?", images=picture(*size_hw), **ASK, **options)
            tokens += drain([stream], after_each)
    return tokens


def test_graphs_change_no_token(random_checkpoint):
    path = random_checkpoint(REAL)
    with open_real(path, cuda_graphs=False) as engine:
        expected = ask_all(engine)
        assert ask_all(engine) == expected
    with open_real(path) as engine:
        for _ in range(3):  # seen, captured, replayed
            assert ask_all(engine) == expected
        assert engine._model._graphs.keys


@pytest.mark.parametrize("ceiling", ["a little less", "half", "nothing"])
def test_a_ceiling_of_graphs_in_a_decode_loop(random_checkpoint, ceiling):
    """It holds after every token, and what is evicted or refused changes none."""
    with open_real(random_checkpoint(REAL)) as engine:
        graphs = engine._model._graphs
        expected = ask_all(engine)
        assert ask_all(engine) == expected
        num_graphs, held = len(graphs.keys), graphs.nbytes
        assert held > 2 * MEGABYTE
        graphs.clear()
        ceilings = {"a little less": held - MEGABYTE, "half": held // 2, "nothing": 1}
        graphs._max_bytes = ceilings[ceiling]

        def check() -> None:
            assert graphs.nbytes <= graphs._max_bytes

        for _ in range(3):
            assert ask_all(engine, check) == expected
        assert len(graphs.keys) < num_graphs
        if ceiling == "a little less":
            assert graphs.keys
        if ceiling == "nothing":
            assert graphs._refused


def test_captures_that_fail_in_a_decode_loop(random_checkpoint, monkeypatch, caplog):
    """Halfway through; the step then runs without, on the same rows."""
    decode = Qwen2Rows.decode

    def failing(self: Qwen2Rows, *args: Any) -> None:
        decode(self, *args)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("no capture")

    path = random_checkpoint(REAL)
    with open_real(path, cuda_graphs=False) as engine:
        expected = drain(engine.stream(prompt, **ASK) for prompt in PROMPTS)
    monkeypatch.setattr(Qwen2Rows, "decode", failing)
    with open_real(path) as engine:
        for _ in range(2):
            assert drain(engine.stream(prompt, **ASK) for prompt in PROMPTS) == expected
        assert engine._model._graphs.keys == ()
        assert engine._model._graphs.nbytes == 0
    assert "failed (no capture); it runs without a graph" in caplog.text


@pytest.mark.parametrize("graphs", [True, False])
def test_a_stream_that_is_left(random_checkpoint, graphs):
    """Its slot and its row are free within two steps, and its neighbours do not notice."""
    with open_real(random_checkpoint(REAL), cuda_graphs=graphs) as engine:
        expected = [list(engine.generate(prompt, **ASK).token_ids) for prompt in PROMPTS]
        streams = [engine.stream(prompt, **ASK) for prompt in PROMPTS]
        tokens = [[*next(stream).token_ids] for stream in streams]
        streams[1].close()
        others = {0: streams[0], 2: streams[2]}
        for _ in range(2):
            for index, stream in others.items():
                tokens[index] += next(stream).token_ids
        assert free_slots(engine) == 1
        slots = engine._scheduler.loaded().runner._groups[0].state.slots
        assert int((slots >= 0).sum()) == 2
        # A newcomer takes the slot, and decodes beside them.
        assert list(engine.generate(PROMPTS[1], **ASK).token_ids) == expected[1]
        for index, rest in zip(others, drain(others.values()), strict=True):
            assert tokens[index] + rest == expected[index]
        assert free_slots(engine) == 3


def test_too_little_memory(random_checkpoint):
    """A request, logits and a second engine that do not fit say so, and keep nothing."""
    path = random_checkpoint(REAL)
    with open_real(path, max_batch_size=1) as engine:
        inputs = [engine.prepare("Go on."), engine.prepare("word " * 1900)]  # 7 600 tokens
        expected = [engine.generate(each, **ASK).token_ids for each in inputs]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        allocated = torch.cuda.memory_allocated()
        with memory_limit(torch.cuda.memory_reserved() + 8 * MEGABYTE):
            with pytest.raises(CapacityError, match="no memory left for this request") as request:
                engine.generate(inputs[1], **ASK)
            assert free_slots(engine) == 1
            with pytest.raises(CapacityError, match="Ask for fewer with positions="):
                engine.forward(inputs[1])
            with pytest.raises(CapacityError, match=r"do not fit on cuda.*smaller max_seq_len"):
                open_real(path)
            # The rows of the long request were made in a step of their own.
            rows_bytes = inputs[1].num_tokens * engine.config.text.hidden_size * 2
            assert torch.cuda.memory_allocated() <= allocated + rows_bytes + MEGABYTE
        del request
        assert [engine.generate(each, **ASK).token_ids for each in inputs] == expected
        with open_real(path, max_batch_size=1) as second:
            assert second.generate(inputs[0], **ASK).token_ids == expected[0]


@requires_two
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_the_second_device(random_checkpoint, name):
    """In a thread of its own, where device 0 is current and stays as it is."""
    path = random_checkpoint(REAL)
    with torch.cuda.device(1), open_real(path, device="cuda", cuda_graphs=False) as engine:
        expected = ask_all(engine)
    with torch.cuda.device(1 if name == "cuda" else 0):
        engine = open_real(path, device=name)
    with engine:
        assert engine.device == torch.device("cuda", 1)
        allocated = torch.cuda.memory_allocated(0)

        def ask() -> tuple[list[list[int]], int]:
            return ask_all(engine), torch.cuda.current_device()

        for _ in range(3):  # seen, captured, replayed
            assert run_threads([ask]) == [(expected, 0)]
        assert engine._model._graphs.keys
        assert torch.cuda.memory_allocated(0) == allocated
