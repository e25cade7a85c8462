"""Products of bfloat16 on a CPU: as near as torch in bfloat16, and no bits that hang on luck."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ovfast
from ovfast import BackendError, Engine, OptionError
from ovfast import ops as ops_module
from ovfast.ops import multiplies_bfloat16
from ovfast.storage import BFLOAT16_MATMUL, load_options, wanted_storage
from tests.support.checkpoints import CheckpointSpec
from tests.support.engines import REQUESTS, open_engine

needs_products = pytest.mark.skipif(
    not multiplies_bfloat16(), reason="this CPU multiplies no bfloat16 (AVX512-BF16)"
)
PRECISE: dict[str, Any] = {"dtype": "bfloat16"}
ROUNDED: dict[str, Any] = {"matmul_precision": "bfloat16"}
SPEC = CheckpointSpec(hidden=256, heads=4, kv_heads=2, head_dim=64, mlp=512, layers=3)


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint) -> Path:
    return random_checkpoint(SPEC)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with open_engine(checkpoint, max_batch_size=3, **ROUNDED) as opened:
        yield opened


def logits(engine: Engine, name: str) -> torch.Tensor:
    return engine.forward(engine.prepare(**REQUESTS[name]))


@needs_products
@pytest.mark.parametrize("name", REQUESTS)
def test_is_as_near_as_torch_in_bfloat16(checkpoint: Path, engine: Engine, name: str) -> None:
    """The rule of the kernels for a whole model; torch rounds between its layers, too."""
    with open_engine(checkpoint, backend="reference", **PRECISE) as plain:
        torch_logits = logits(plain, name)
    with open_engine(checkpoint, **PRECISE) as exact:
        truth = logits(exact, name)
    error = float((logits(engine, name) - truth).abs().max())
    assert 0 < error <= float((torch_logits.float() - truth).abs().max())


@needs_products
def test_storage_and_weights(engine: Engine) -> None:
    assert (engine.storage, engine.ops.backend) == (BFLOAT16_MATMUL, "native")
    assert engine.dtype is torch.float32
    layer = engine._model.language_model.layers[0]
    assert {layer.qkv_proj.weight.kind, layer.down_proj.weight.kind} == {"bfloat16"}
    assert engine.estimate("Q").weight_bytes == 2 * engine.config.num_parameters


@needs_products
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_threads(checkpoint: Path, engine: Engine, threads: int) -> None:
    with open_engine(checkpoint, threads=threads, **ROUNDED) as other:
        assert torch.equal(logits(other, "image"), logits(engine, "image"))


@needs_products
def test_answers_do_not_depend_on_neighbours(engine: Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True, "logprobs": 1}
    inputs = [engine.prepare(**REQUESTS[name]) for name in REQUESTS]
    together = engine.generate(inputs, **options)
    for own, answer in zip(inputs, together, strict=True):
        alone = engine.generate(own, **options)
        assert (alone.token_ids, alone.logprobs) == (answer.token_ids, answer.logprobs)


@needs_products
def test_a_packed_directory_gives_the_same_bits(
    checkpoint: Path, engine: Engine, tmp_path: Path
) -> None:
    packed = ovfast.convert(checkpoint, tmp_path / "packed", dtype="bfloat16")
    with open_engine(packed, **ROUNDED) as mapped:
        assert mapped.storage == BFLOAT16_MATMUL
        assert torch.equal(logits(mapped, "image"), logits(engine, "image"))
    with open_engine(packed) as mapped:
        assert mapped.storage == "bfloat16"
    packed = ovfast.convert(checkpoint, tmp_path / "int8", quantization="int8")
    with pytest.raises(OptionError, match="packed as int8"):
        open_engine(packed, **ROUNDED)


@needs_products
def test_weights_of_another_dtype_become_bfloat16(random_checkpoint) -> None:
    with open_engine(random_checkpoint(CheckpointSpec(dtype=torch.float16)), **ROUNDED) as engine:
        assert engine._model.language_model.embedding.weight.kind == "bfloat16"


def test_options() -> None:
    assert wanted_storage("auto", None, "bfloat16") == BFLOAT16_MATMUL
    assert wanted_storage(**load_options(BFLOAT16_MATMUL)) == BFLOAT16_MATMUL
    assert wanted_storage("auto", None, "float32") is None


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (
            {"matmul_precision": "high"},
            r"matmul_precision='high'; expected 'float32' or 'bfloat16'",
        ),
        ({"matmul_precision": None}, r"matmul_precision=None; expected 'float32'"),
        (ROUNDED | {"dtype": "float16"}, r"with dtype='float16'.*weights in bfloat16"),
        (ROUNDED | {"quantization": "int8"}, r"quantization='int8'.*Leave both out"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(OptionError, match=pattern):
        ovfast.load("/no/such/model", device="cpu", **options)


def test_a_cpu_without_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovfast.loading.multiplies_bfloat16", lambda: False)
    monkeypatch.setattr("ovfast.loading.has_native", lambda: True)
    monkeypatch.setattr("ovfast.loading.native_isa", lambda: "avx2")
    with pytest.raises(BackendError, match=r"instruction set 'avx2'.*AVX512-BF16.*Leave it out"):
        ovfast.load("/no/such/model", device="cpu", **ROUNDED)


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("no module")

    monkeypatch.setattr(ops_module.ops_native, "native_module", missing)
    with pytest.raises(BackendError, match=r"ovfast\._C not built"):
        ovfast.load("/no/such/model", device="cpu", **ROUNDED)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_back_ends_have_a_dtype(backend: str) -> None:
    with pytest.raises(BackendError, match=f"backend='{backend}'.*dtype='bfloat16' decides"):
        ovfast.load("/no/such/model", device="cpu", backend=backend, **ROUNDED)
