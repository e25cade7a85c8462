"""What one layer of the tower asks of the device: how much memory at a time, how many launches."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import runtime

MAX_LAUNCHES = 7  # two norms, four products, attention: what stands between them is fused


@torch.inference_mode()
def test_beside_the_mlp_only_its_input_is_held(tiny_checkpoint, monkeypatch):
    tower = runtime.load_model(tiny_checkpoint).vision_tower
    ops, made, held = tower._ops, [], []

    def keep(out: torch.Tensor) -> torch.Tensor:
        made.append(weakref.ref(out))
        return out

    def fused_linear(x, packed, *, activation=None, residual=None):
        if activation is not None:
            held.extend(ref() for ref in made if ref() is not None and ref() is not x)
        return keep(ops.fused_linear(x, packed, activation=activation, residual=residual))

    spy = dataclasses.replace(
        ops,
        fused_linear=fused_linear,
        layer_norm=lambda *args: keep(ops.layer_norm(*args)),
        view_attention=lambda *args: keep(ops.view_attention(*args)),
    )
    monkeypatch.setattr(tower, "_ops", spy)
    hidden_states = torch.randn(tower.config.tokens_per_view, tower.config.hidden_size)
    tower._run_layer(tower._layers[0], hidden_states)
    assert len(made) == 7
    assert [tensor for tensor in held if tensor is not hidden_states] == []


class Launches(TorchDispatchMode):
    """Counts kernels in place of launching them, and torch's operations that would launch one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def kernel(self, name: str) -> "Kernel":
        return Kernel(name, self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Kernel:
    """In place of a kernel: `kernel[grid](...)` computes nothing."""

    def __init__(self, name: str, launches: Launches) -> None:
        self._name, self._launches = name, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self._launches.names.append(self._name)


@torch.inference_mode()
def test_a_layer_takes_at_most_seven_launches(tiny_checkpoint, monkeypatch):
    ops_triton = pytest.importorskip("ovfast.ops_triton", reason="needs triton")
    tower, launches = runtime.load_model(tiny_checkpoint).vision_tower, Launches()
    fields = ops_triton.triton_fields(torch.device("cpu"), "auto", interpreting=True)
    monkeypatch.setattr(tower, "_ops", dataclasses.replace(tower._ops, **fields))
    for name in ("layer_norm", "fused_linear", "attention"):
        module = getattr(ops_triton, name)
        monkeypatch.setattr(module, f"_{name}_kernel", launches.kernel(name))
    hidden_states = torch.randn(3 * tower.config.tokens_per_view, tower.config.hidden_size)
    with launches:
        tower._run_layer(tower._layers[0], hidden_states)
    assert {"layer_norm", "fused_linear", "attention"} <= set(launches.names)
    assert len(launches.names) <= MAX_LAUNCHES, launches.names
