"""Choosing back ends: what is forced, what is found, and what is told."""

import importlib
import logging
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import ovfast
from ovfast import ops as ops_module
from ovfast import reference, reference_pixels
from ovfast.errors import BackendError, CheckpointError, OptionError
from ovfast.ops import OPERATIONS, Ops, PackedLinear, make_ops
from ovfast.storage import BFLOAT16_MATMUL
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import requires_cuda

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes importing the named modules fail."""
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> object:
        if name in names:
            raise ImportError(f"No module named {name!r}")
        return real(name, package)

    monkeypatch.setattr(ops_module.importlib, "import_module", import_module)


def test_reference_runs_everywhere():
    for device in (CPU, CUDA):
        ops = make_ops(device, "reference")
        assert ops.backend == "reference"
        assert ops.where == dict.fromkeys(OPERATIONS, "reference")


def test_where_names_every_operation():
    ops = make_ops(CPU, "reference")
    operations = {name for name in Ops.__dataclass_fields__ if callable(getattr(ops, name))}
    assert set(ops.where) == operations


@pytest.mark.parametrize("backend", ["cuda", "", "Reference"])
def test_unknown_backend(backend):
    with pytest.raises(OptionError, match="'auto', 'triton', 'native', 'reference'"):
        make_ops(CPU, backend)


def test_ops_are_frozen():
    ops = make_ops(CPU, "reference")
    with pytest.raises(AttributeError):
        ops.backend = "native"
    with pytest.raises(TypeError):
        ops.where["linear"] = "native"


def test_native_is_not_for_cuda():
    with pytest.raises(BackendError, match="CPU only"):
        make_ops(CUDA, "native")


def test_triton_is_not_for_the_cpu():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter takes CPU tensors")
    with pytest.raises(BackendError, match="CUDA device"):
        make_ops(CPU, "triton")


def test_forced_native_without_the_module(monkeypatch):
    hide(monkeypatch, "ovfast._C")
    with pytest.raises(BackendError, match=r"ovfast\._C"):
        make_ops(CPU, "native")


def test_forced_triton_without_triton(monkeypatch):
    hide(monkeypatch, "ovfast.ops_triton")
    with pytest.raises(BackendError, match="Install the `triton` package"):
        make_ops(CUDA, "triton")


def test_auto_without_the_module_warns_once(monkeypatch, caplog):
    hide(monkeypatch, "ovfast._C")
    ops_module._warn_without.cache_clear()
    with caplog.at_level(logging.WARNING, logger="ovfast"):
        assert make_ops(CPU, "auto").backend == "reference"
        assert make_ops(CPU, "auto").backend == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ovfast._C is not built" in caplog.text


def test_auto_on_cuda_without_triton_falls_back(monkeypatch, caplog):
    hide(monkeypatch, "ovfast.ops_triton")
    ops_module._warn_without.cache_clear()
    with caplog.at_level(logging.WARNING, logger="ovfast"):
        assert make_ops(CUDA, "auto").backend == "reference"
    assert "Triton is not installed" in caplog.text


def test_auto_takes_the_native_module_and_says_what_is_left(caplog):
    pytest.importorskip("ovfast._C")
    with caplog.at_level(logging.INFO, logger="ovfast"):
        ops = make_ops(CPU, "auto")
    assert ops.backend == "native"
    assert set(ops.where.values()) == {"native"}
    (record,) = caplog.records
    assert record.getMessage().endswith("from reference: nothing")


@pytest.mark.parametrize("storage", ["bfloat16", BFLOAT16_MATMUL, "int8", "int4"])
def test_attention_is_quantized_where_weights_are(storage):
    """In the tower and a prefill; a token that is decoded reads the cache and multiplies little."""
    native = pytest.importorskip("ovfast._C", reason="the native extension is not built")
    ops = make_ops(CPU, "native", storage=storage)
    pool, quantized = native.ThreadPool(1), storage != "bfloat16"
    q, k, v = torch.randn(40, 4, 16), torch.randn(2, 40, 16), torch.randn(2, 40, 16)
    expected = torch.empty(40, 64)
    arrays = (q.numpy(), k.numpy(), v.numpy())
    native.causal_attention(pool, *arrays, 0, expected.numpy(), quantized)
    assert torch.equal(ops.causal_attention(q, k, v, range(40)), expected)
    native.causal_attention(pool, *arrays, 0, expected.numpy())
    assert torch.equal(ops.decode_attention(q[39:], k, v), expected[39:])
    qkv, out = torch.randn(40, 192), torch.empty(40, 64)
    native.view_attention(pool, qkv.numpy(), 4, 20, out.numpy(), quantized)
    assert torch.equal(ops.view_attention(qkv, 4, 20), out)


def test_auto_on_cuda_takes_triton():
    pytest.importorskip("triton")
    ops = make_ops(CUDA, "auto")
    assert ops.backend == "triton"
    assert ops.where["resample"] == ops.where["project_and_pack"] == "triton"
    assert ops.where["decode_attention"] == ops.where["linear"] == "reference"
    assert ops.where["pack_views"] == "reference"


@pytest.fixture
def flash_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device for which the table of attentions names flash-attn."""
    own = pytest.importorskip("ovfast.ops_triton", reason="needs triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(own.PREFILL_ATTENTION, "H200", "flash")


def add_flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """A stand-in for the package; the dtypes it was called with."""
    seen = []

    def flash_attn_func(q, k, v, *, causal):
        assert causal
        seen.append(q.dtype)
        return torch.full_like(q, 7)

    package = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return seen


def attention_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (*(torch.randn(shape).to(dtype) for shape in [(5, 2, 16), (1, 5, 16), (1, 5, 16)]),)


def assert_is_sdpa(ops: Ops, dtype: torch.dtype) -> None:
    inputs = attention_inputs(dtype)
    expected = reference.causal_attention(*inputs, range(5))
    assert torch.equal(ops.causal_attention(*inputs, range(5)), expected)


@pytest.mark.parametrize("attention", ["auto", "flash"])
def test_flash_attn_where_it_is_fastest(monkeypatch, flash_is_fastest, attention):
    seen = add_flash_attn(monkeypatch)
    ops = make_ops(CUDA, attention=attention)
    for dtype in (torch.bfloat16, torch.float16):
        out = ops.causal_attention(*attention_inputs(dtype), range(5))
        assert torch.equal(out, torch.full((5, 32), 7, dtype=dtype))
    assert_is_sdpa(ops, torch.float32)  # which flash-attn refuses
    assert seen == [torch.bfloat16, torch.float16]


def test_flash_attn_where_no_table_names_it(monkeypatch, flash_is_fastest):
    seen = add_flash_attn(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert_is_sdpa(make_ops(CUDA), torch.bfloat16)
    assert seen == []


def test_flash_attn_that_is_fastest_and_missing(monkeypatch, flash_is_fastest, caplog):
    hide(monkeypatch, "flash_attn")
    with caplog.at_level(logging.WARNING, logger="ovfast"):
        ops = make_ops(CUDA)
    assert "No module named 'flash_attn'" in caplog.text
    assert ops.backend == "triton"
    assert_is_sdpa(ops, torch.bfloat16)
    with pytest.raises(BackendError, match=r"cannot be imported \(No module.*ovfast\[flash\]"):
        make_ops(CUDA, attention="flash")


@pytest.mark.parametrize("dtype", ["float32", torch.float32])
def test_flash_attn_has_no_float32(monkeypatch, flash_is_fastest, dtype):
    """Told before the checkpoint is looked for."""
    add_flash_attn(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    options = {"device": "cuda:0", "attention": "flash"}
    with pytest.raises(OptionError, match="with dtype='float32'; flash-attn computes in 'bfloat16"):
        ovfast.load("/no/such/model", dtype=dtype, **options)
    for allowed in ("auto", "bfloat16", "float16"):
        with pytest.raises(CheckpointError, match="no such directory"):
            ovfast.load("/no/such/model", dtype=allowed, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 41, 300])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, requires_cuda])]
)
def test_adding_a_layer_rounds_once(device, rows, dtype):
    """To rows of a longer residual stream, in place; its neighbours stay."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(rows)
    x, weight, before = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((rows, 96), (64, 96), (rows + 2, 64))
    )
    packed, stream = PackedLinear(weight, None), before.clone()
    out = make_ops(CUDA, "triton").add_linear(x, packed, stream[1:-1])
    assert out.data_ptr() == stream[1:-1].data_ptr()
    plain = reference.add_linear(x, packed, before[1:-1].clone())
    truth = before[1:-1].double() + reference.linear(x, weight, upcast=True)
    assert_two_times_rule(out, plain, truth)
    assert torch.equal(stream[[0, -1]], before[[0, -1]])


@pytest.mark.parametrize(("offset_hw", "grid_hw"), [((0, 0), (1, 1)), ((3, 5), (2, 3))])
def test_native_pack_views_has_the_reference_interface(offset_hw, grid_hw):
    pytest.importorskip("ovfast._C")
    ops = make_ops(CPU, "native")
    side, (rows, cols) = 7, grid_hw
    shape = (rows * side - 2 * offset_hw[0], cols * side - 2 * offset_hw[1], 3)
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    out = np.full((rows * cols, side, side, 3), 99, np.uint8)
    expected = np.zeros_like(out)
    ops.pack_views(picture, offset_hw, grid_hw, 127, out)
    reference_pixels.pack_views(picture, offset_hw, grid_hw, 127, expected)
    np.testing.assert_array_equal(out, expected)


def test_packed_linear_shares_memory():
    """A tied head must not be a second copy of the embedding."""
    ops, weight = make_ops(CPU, "reference"), torch.ones(6, 4)
    packed = ops.pack_linear(weight, None)
    assert packed.weight.data_ptr() == weight.data_ptr()
    assert torch.equal(ops.linear(torch.ones(1, 4), packed), torch.full((1, 6), 4.0))


INTERPRETED = """
import torch
from ovfast import reference
from ovfast.ops import PackedLinear, RowTable, make_ops
from ovfast.pack_table import grid_table

ops = make_ops(torch.device("cpu"), "triton")
assert ops.where["project_and_pack"] == "triton"
table = grid_table(2, 2, (0, 2, 0, 4), (2, 3))
arrays = map(torch.from_numpy, (table.source_rows, table.index_compact, table.weight))
rows, count = RowTable(*arrays, has_pooled=True), len(table.index)
torch.manual_seed(0)
args = (torch.randn(12, 5), rows, PackedLinear(torch.randn(6, 5), torch.randn(6)),
        PackedLinear(torch.randn(6, 6), torch.randn(6)), torch.randn(6),
        torch.zeros(count, dtype=torch.int32), PackedLinear(torch.randn(3, 6), None))
out = ops.project_and_pack(*args, torch.empty(count, 6))
expected = reference.project_and_pack(*args, torch.empty(count, 6))
torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
"""


def test_triton_projector_under_the_interpreter():
    """In a process of its own: TRITON_INTERPRET must be set before Triton is imported."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
