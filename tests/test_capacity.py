"""Memory that does not suffice: what counts as free, and what running out of it looks like."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from ovfast import BackendError, CapacityError, Engine
from ovfast import loading as loading_module
from ovfast.decode_rows import RowState
from ovfast.kv_cache import KVCache
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.models.qwen2 import Qwen2
from ovfast.models.siglip import SiglipTower
from ovfast.out_of_memory import is_out_of_memory
from tests.support.engines import REQUESTS, free_slots, open_engine
from tests.support.row_decoder import open_rows

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    MemoryError(),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    ValueError("CUDA error: out of memory"),
]
GREEDY = {"max_new_tokens": 9, "ignore_eos": True}
CUDA = torch.device("cuda", 1)


def set_device_memory(
    monkeypatch: pytest.MonkeyPatch, *, free: int, reserved: int, allocated: int
) -> None:
    """A device with so many free bytes, of which torch has taken others."""
    answers = {
        "mem_get_info": (free, 1 << 40),
        "memory_reserved": reserved,
        "memory_allocated": allocated,
    }
    for name, answer in answers.items():

        def tell(device: torch.device, answer: object = answer) -> object:
            assert device == CUDA
            return answer

        monkeypatch.setattr(torch.cuda, name, tell)


@pytest.mark.parametrize(("free", "reserved", "allocated"), [(100, 0, 0), (30, 90, 20)])
def test_what_torch_keeps_unused_is_free(
    monkeypatch: pytest.MonkeyPatch, free: int, reserved: int, allocated: int
) -> None:
    """After an engine is closed, the driver tells that its memory is taken."""
    set_device_memory(monkeypatch, free=free, reserved=reserved, allocated=allocated)
    loading_module._check_memory(70, 30, CUDA)
    with pytest.raises(CapacityError, match=r"do not fit.*free on cuda:1.*smaller max_seq_len"):
        loading_module._check_memory(71, 30, CUDA)


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *OTHERS], ids=repr)
def test_errors_that_mean_it(error: Exception) -> None:
    assert is_out_of_memory(error) == (error in OUT_OF_MEMORY)


def test_what_a_cpu_says() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def fail(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: Exception) -> list[Any]:
    """Makes a method raise when it is done; weak references to those it was called on."""
    method, seen = getattr(owner, name), []

    def failing(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(weakref.ref(self))
        method(self, *args, **options)
        raise error

    monkeypatch.setattr(owner, name, failing)
    return seen


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
@pytest.mark.parametrize("owner", [SiglipTower, Qwen2, LlavaOnevision])
def test_while_loading(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, owner: type, error: Exception
) -> None:
    """What was built is free while the error is still held: less may be loaded there."""
    with monkeypatch.context() as patch:
        seen = fail(patch, owner, "__init__", error)
        with pytest.raises(
            CapacityError, match=r"(?s)do not fit on cpu \(.*Use quantization="
        ) as full:
            open_engine(tiny_checkpoint)
    assert full.value.__cause__ is error
    assert [reference() for reference in seen] == [None]
    open_engine(tiny_checkpoint).close()


def test_a_cache_that_does_not_fit_frees_the_weights(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    new_cache = LlavaOnevision.new_cache

    def failing(self: LlavaOnevision, **sizes: int) -> KVCache:
        models.append(weakref.ref(self))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *_, **__: (_ for _ in ()).throw(OUT_OF_MEMORY[0]))
            return new_cache(self, **sizes)

    monkeypatch.setattr(LlavaOnevision, "new_cache", failing)
    with pytest.raises(CapacityError, match="Lower max_seq_len") as full:
        open_engine(tiny_checkpoint)
    assert full.value.__cause__ is OUT_OF_MEMORY[0]
    assert models[0]() is None


def test_other_errors_of_loading_stay(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = fail(monkeypatch, Qwen2, "__init__", OTHERS[0])
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        open_engine(tiny_checkpoint)
    assert caught.value is OTHERS[0]
    assert seen[0]() is None


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *OTHERS], ids=repr)
def test_in_a_prefill(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The step's own tensors are free while the error is held; the engine goes on."""
    held = []

    def failing(self: SiglipTower, *args: object) -> None:
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        raise error

    is_capacity = error in OUT_OF_MEMORY
    with open_engine(tiny_checkpoint) as engine:
        expected = engine.generate(**REQUESTS["image"], **GREEDY).token_ids
        with monkeypatch.context() as patch:
            patch.setattr(SiglipTower, "encode", failing)
            with pytest.raises(CapacityError if is_capacity else type(error)) as caught:
                engine.generate(**REQUESTS["image"], **GREEDY)
        if is_capacity:
            assert "no memory left for this request" in str(caught.value)
            assert caught.value.__cause__ is error
            assert held[0]() is None
        assert free_slots(engine) == 1
        assert engine.generate(**REQUESTS["image"], **GREEDY).token_ids == expected


def test_in_an_eager_decode_step(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends one request; the neighbour that drove the step goes on."""
    decode = LlavaOnevision.decode

    def failing(self: LlavaOnevision, token_id: int, cache: KVCache, slot: int) -> torch.Tensor:
        if slot == 1:
            raise OUT_OF_MEMORY[2]
        return decode(self, token_id, cache, slot)

    with open_engine(tiny_checkpoint, backend="reference", max_batch_size=2) as engine:
        expected = engine.generate("Fine?", **GREEDY).token_ids
        streams = [engine.stream(prompt, **GREEDY) for prompt in ("Fine?", "Full?")]
        tokens = [*next(streams[0]).token_ids]
        next(streams[1])
        monkeypatch.setattr(LlavaOnevision, "decode", failing)
        tokens += [token for chunk in streams[0] for token in chunk.token_ids]
        assert tuple(tokens) == expected
        with pytest.raises(CapacityError, match=r"no memory left.*CUBLAS_STATUS_ALLOC_FAILED"):
            list(streams[1])


def break_decoder(engine: Engine, group: int, error: Exception) -> None:
    """Makes the next step of a group of rows raise when it is done."""
    runner = engine._scheduler.loaded().runner
    decoder, broken = runner._decoder, [runner._groups[group].state]
    decode = decoder.decode

    def failing(rows: RowState, *shape: int) -> None:
        decode(rows, *shape)
        if rows in broken:
            broken.clear()
            raise error

    decoder.decode = failing


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OUT_OF_MEMORY[0], CapacityError, "no memory left for this request.*out of memory"),
        (OTHERS[0], BackendError, "decode beside it failed.*illegal.*Repeat the request"),
    ],
    ids=["memory", "other"],
)
def test_in_a_step_of_several_rows(
    tiny_checkpoint: Path, error: Exception, kind: type[Exception], message: str
) -> None:
    """All that were in it are told why, whoever drove it; the next requests are right."""
    with open_rows(tiny_checkpoint, max_batch_size=3) as engine:
        expected = engine.generate("Fine?", **GREEDY).token_ids
        streams = [engine.stream(f"Number {index}", **GREEDY) for index in range(3)]
        for stream in streams:
            next(stream)
        break_decoder(engine, 0, error)
        for stream in streams:
            with pytest.raises(kind, match=message) as caught:
                list(stream)
            assert caught.value.__cause__ is error
        assert free_slots(engine) == 3
        assert engine._scheduler.loaded().runner._groups[0].active() == []
        assert engine.generate("Fine?", **GREEDY).token_ids == expected


def test_in_another_group_s_step(tiny_checkpoint: Path) -> None:
    """20 slots are two groups; the rows of the other one go on, also those that drove the step."""
    with open_rows(tiny_checkpoint, max_batch_size=20) as engine:
        ask = GREEDY | {"max_new_tokens": 30}
        prompts = [f"Number {index}" for index in range(17)]
        expected = [output.token_ids for output in engine.generate(prompts, **ask)]
        streams = [engine.stream(prompt, **ask) for prompt in prompts]
        tokens = [list(next(stream).token_ids) for stream in streams]
        break_decoder(engine, 1, OUT_OF_MEMORY[0])
        for index, stream in enumerate(streams[:16]):
            tokens[index] += [token for chunk in stream for token in chunk.token_ids]
            assert tuple(tokens[index]) == expected[index]
        with pytest.raises(CapacityError, match="no memory left"):
            list(streams[16])
