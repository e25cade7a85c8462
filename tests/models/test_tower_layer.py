"""What one layer of the tower asks of the back end: how much memory at a time."""

import dataclasses
import weakref

import torch

from tests.support import runtime


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
