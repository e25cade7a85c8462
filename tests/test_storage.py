"""How weights are kept: the options that choose it, what they refuse, and what they cost."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ovfast
from ovfast import BackendError, CapacityError, Engine, OptionError, QuantizationError, ops_native
from ovfast import loading as loading_module
from ovfast.cpu_threads import available_threads
from ovfast.storage import (
    GROUPS,
    NATIVE_STORAGES,
    bytes_per_param,
    load_options,
    wanted_storage,
)
from tests.support.checkpoints import CheckpointSpec, make_checkpoint
from tests.support.engines import open_engine

pytest.importorskip("ovfast._C", reason="the native extension is not built")
Make = Callable[..., Path]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights_of(engine: Engine) -> list[Any]:
    """All packed weights of an engine but the tower's patch embedding."""
    model = engine._model.language_model
    layers = [getattr(layer, name) for layer in model.layers for name in ("qkv_proj", "down_proj")]
    return [packed.weight for packed in (model.embedding, model.lm_head, *layers)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_keeps_the_checkpoint_s_dtype(random_checkpoint: Make, dtype: torch.dtype) -> None:
    with open_engine(random_checkpoint(CheckpointSpec(dtype=dtype))) as engine:
        assert engine.storage == str(dtype).removeprefix("torch.")
        assert {weights.kind for weights in weights_of(engine)} == {engine.storage}
        assert engine.dtype is torch.float32


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_options_choose_the_storage(tiny_checkpoint: Path, storage: str) -> None:
    name = "quantization" if storage.startswith("int") else "dtype"
    with open_engine(tiny_checkpoint, **{name: storage}) as engine:
        assert (engine.ops.backend, engine.storage) == ("native", storage)
        assert {weights.kind for weights in weights_of(engine)} == {storage}
        estimate = engine.estimate("Q", max_new_tokens=20)
        params = engine.config.num_parameters
        assert estimate.weight_bytes == round(params * bytes_per_param(storage))
        per_token = engine._scheduler.loaded().cache.bytes_per_token
        assert estimate.kv_cache_bytes == per_token * (estimate.prompt_tokens + 20)
        logits = engine.forward(engine.prepare("Hello"), positions=[0])
        assert bool(torch.isfinite(logits).all())


def test_bytes_per_parameter_are_those_of_packed_weights(tiny_checkpoint: Path) -> None:
    """Of a matrix without padding, to the last bit of its scales."""
    native = ops_native.native_module()
    for storage in ("float32", "bfloat16", "float16", "int8", "int4"):
        packed = native.pack(native.ThreadPool(1), storage, [torch.ones(64, 512).numpy()])
        factors = 4 * 512 if storage in GROUPS else 0
        assert packed.nbytes - factors == 64 * 512 * bytes_per_param(storage)


def test_options_of_load_ask_for_the_storage() -> None:
    for storage in NATIVE_STORAGES:
        assert wanted_storage(**load_options(storage)) == storage
    assert load_options("fp8") == {"dtype": "auto", "quantization": "fp8"}
    assert wanted_storage("auto", "fp8") is None
    assert wanted_storage("float16", "fp8") == "float16"  # of all that fp8 leaves alone


def test_the_reference_computes_in_the_named_dtype(random_checkpoint: Make) -> None:
    path = random_checkpoint(CheckpointSpec(dtype=torch.bfloat16))
    for dtype, storage in (("auto", "float32"), ("bfloat16", "bfloat16")):
        with open_engine(path, backend="reference", dtype=dtype) as engine:
            assert (engine.storage, str(engine.dtype)) == (storage, f"torch.{storage}")


@pytest.mark.parametrize(
    ("dtype", "quantization", "kind", "pattern"),
    [
        (
            "auto",
            "int3",
            QuantizationError,
            r"quantization='int3'; expected 'int8', 'int4', 'fp8', or N",
        ),
        ("auto", 8, QuantizationError, r"quantization=8; expected 'int8'"),
        ("auto", True, QuantizationError, r"quantization=True; expected 'int8'"),
        ("int8", None, OptionError, r"dtype='int8'; expected 'auto', 'float32'"),
        (torch.int8, None, OptionError, r"dtype=torch.int8; expected 'auto'"),
        ("bfloat16", "int8", OptionError, r"dtype='bfloat16' with quantization='int8'.*'auto'"),
    ],
)
def test_options_that_mean_nothing(
    dtype: Any, quantization: Any, kind: type[Exception], pattern: str
) -> None:
    with pytest.raises(kind, match=pattern):
        wanted_storage(dtype, quantization)
    with pytest.raises(kind, match=pattern):
        ovfast.load("/no/such/model", dtype=dtype, quantization=quantization)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_quantisation_needs_the_native_back_end(backend: str) -> None:
    with pytest.raises(QuantizationError, match=f"quantization='int8' with backend='{backend}'"):
        ovfast.load("/no/such/model", device="cpu", backend=backend, quantization="int8")


def test_quantisation_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(QuantizationError, match=r"with device='cuda:0'; only the native CPU"):
        ovfast.load("/no/such/model", device="cuda:0", quantization="int4")


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_float8_needs_triton(backend: str) -> None:
    with pytest.raises(
        QuantizationError, match=r"'fp8' with back end '\w+' on cpu; it needs Triton"
    ):
        ovfast.load("/no/such/model", device="cpu", backend=backend, quantization="fp8")


def test_float8_needs_ada(monkeypatch: pytest.MonkeyPatch) -> None:
    own = pytest.importorskip("ovfast.ops_triton", reason="needs triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(QuantizationError, match=r"on A100, compute capability 8\.0; it needs 8\.9"):
        own.float8_fields(torch.device("cuda"), interpreting=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert own.float8_fields(torch.device("cuda"), interpreting=False)["quantization"] == "fp8"


def test_quantisation_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("no module")

    monkeypatch.setattr(ops_native, "native_module", missing)
    with pytest.raises(QuantizationError, match=r"with ovfast\._C not built"):
        ovfast.load("/no/such/model", device="cpu", quantization="int8")


def test_memory_is_checked_in_the_storage(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(tiny_checkpoint) as engine:
        params = engine.config.num_parameters
    monkeypatch.setattr(loading_module, "_available_bytes", lambda: 2 * params)
    open_engine(tiny_checkpoint, quantization="int8").close()
    open_engine(tiny_checkpoint, dtype="float16").close()
    with pytest.raises(CapacityError, match=r"do not fit.*Use quantization='int8' or 'int4'"):
        open_engine(tiny_checkpoint)


def test_threads_are_the_pool_s(tiny_checkpoint: Path) -> None:
    before = torch.get_num_threads()
    with open_engine(tiny_checkpoint) as engine:
        assert engine.ops.pool.num_threads == available_threads()
    with open_engine(tiny_checkpoint, threads=3) as engine:
        assert engine.ops.pool.num_threads == 3
    assert torch.get_num_threads() == before


def test_threads_of_plain_torch(tiny_checkpoint: Path) -> None:
    before = torch.get_num_threads()
    try:
        open_engine(tiny_checkpoint, backend="reference", threads=3).close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [0, -1, 1025, 2.0, True])
def test_numbers_of_threads_that_are_none(threads: Any) -> None:
    with pytest.raises(OptionError, match=f"threads={threads!r}; expected an integer"):
        ovfast.load("/no/such/model", threads=threads)


@pytest.mark.parametrize("name", ["avx9", "AVX2"])
def test_unknown_instruction_sets(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("OVFAST_ISA", name)
    with pytest.raises(BackendError, match=f"OVFAST_ISA='{name}'.*scalar"):
        open_engine(tiny_checkpoint)


def test_where_says_what_is_native(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also after the checkpoint has decided the storage, and the back end is logged once."""
    path = make_checkpoint(tmp_path, CheckpointSpec(dtype=torch.float16))
    with caplog.at_level(logging.INFO, "ovfast"), open_engine(path) as engine:
        assert engine.ops.where["linear"] == "native"
        assert engine.ops.where["head"] == "native"
    assert caplog.text.count("back end native on cpu") == 1
