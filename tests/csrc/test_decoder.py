"""The native decode step: against plain torch, and a clean error for every wrong argument."""

import numpy as np
import pytest
import torch

from ovfast import reference
from ovfast.models.rope import rope_table
from ovfast.quantize import dequantize, fake_quantized_linear, quantize
from ovfast.storage import GROUPS

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 100, 24, 4, 2, 6, 41, 2
SLOTS, POSITIONS, EPS = 5, 300, 1e-6
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM


def randn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


class Model:
    """Random parameters, the native decoder over them, and the same step in torch."""

    def __init__(self, threads=2, storage="float32"):
        self.pool, self.storage = native.ThreadPool(threads), storage
        self.embedding, self.head = randn(VOCAB, HIDDEN), randn(VOCAB, HIDDEN, seed=1)
        self.norm = randn(HIDDEN, seed=2)
        cpu = torch.device("cpu")
        self.tables = rope_table(0, POSITIONS, HEAD_DIM, 1e4, torch.float32, cpu)
        self.layers = [self._layer(10 * index + 10) for index in range(LAYERS)]

    def _layer(self, seed):
        return {
            "input_norm": randn(HIDDEN, seed=seed),
            "qkv": randn(WIDTH, HIDDEN, seed=seed + 1, scale=0.3),
            "qkv_bias": randn(WIDTH, seed=seed + 2),
            "o": randn(HIDDEN, HEADS * HEAD_DIM, seed=seed + 3, scale=0.3),
            "post_norm": randn(HIDDEN, seed=seed + 4),
            "gate_up": randn(2 * MLP, HIDDEN, seed=seed + 5, scale=0.3),
            "down": randn(HIDDEN, MLP, seed=seed + 6, scale=0.3),
        }

    def pack(self, *weights, interleaved=False):
        return native.pack(self.pool, self.storage, [w.numpy() for w in weights], interleaved)

    def arguments(self):
        return {
            "pool": self.pool,
            "embedding": self.pack(self.embedding),
            "norm": self.norm.numpy(),
            "head": self.pack(self.head),
            "eps": EPS,
            "num_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "cos": self.tables[0].numpy(),
            "sin": self.tables[1].numpy(),
        }

    def layer_arguments(self, index=0):
        layer = dict(self.layers[index])
        packed = {name: self.pack(layer[name]) for name in ("qkv", "o", "down")}
        gate, up = layer["gate_up"].chunk(2)
        packed["gate_up"] = self.pack(gate, up, interleaved=True)
        return {name: value.numpy() for name, value in layer.items()} | packed

    def decoder(self):
        decoder = native.Decoder(**self.arguments())
        for index in range(LAYERS):
            decoder.add_layer(**self.layer_arguments(index))
        return decoder

    def linear(self, x, weight):
        """x @ weightᵀ in the dtype of x."""
        if self.storage == "float32":
            return x @ weight.to(x.dtype).t()
        upcast, bits = x.dtype == torch.float64, 16 if self.storage == "int8" else 8
        return fake_quantized_linear(x, weight, None, self.storage, input_bits=bits, upcast=upcast)

    def embed(self, token):
        if self.storage == "float32":
            return self.embedding[token : token + 1]
        q, scales, factors = quantize(self.embedding, self.storage)
        return (dequantize(q, scales, GROUPS[self.storage]) * factors)[token : token + 1]

    def expected(self, tokens, slots, positions, k_cache, v_cache, dtype):
        """Logits (rows, VOCAB), row by row, in a dtype; the caches are extended."""
        k_cache, v_cache = k_cache.to(dtype), v_cache.to(dtype)
        rows = []
        for token, slot, position in zip(tokens, slots, positions, strict=True):
            x = self.embed(token).to(dtype)
            cos, sin = (table[position : position + 1].to(dtype) for table in self.tables)
            for index, layer in enumerate(self.layers):
                normed = rms_norm(x, layer["input_norm"].to(dtype))
                qkv = self.linear(normed, layer["qkv"]) + layer["qkv_bias"].to(dtype)
                keys, values = k_cache[index, slot], v_cache[index, slot]
                q = reference.rope_and_store(qkv, cos, sin, keys, values, position, HEADS, KV_HEADS)
                stop = position + 1
                attended = reference.decode_attention(q, keys[:, :stop], values[:, :stop])
                x = x + self.linear(attended, layer["o"])
                normed = rms_norm(x, layer["post_norm"].to(dtype))
                gate, up = self.linear(normed, layer["gate_up"]).chunk(2, dim=-1)
                x = x + self.linear(torch.nn.functional.silu(gate) * up, layer["down"])
            rows.append(self.linear(rms_norm(x, self.norm.to(dtype)), self.head))
        return torch.cat(rows)


def rms(x):
    return float(x.double().square().mean().sqrt())


def rms_norm(x, weight):
    return x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight


def caches(seed=3):
    shape = (LAYERS, SLOTS, KV_HEADS, POSITIONS, HEAD_DIM)
    return randn(*shape, seed=seed), randn(*shape, seed=seed + 1)


def step(decoder, tokens, slots, positions, k_cache, v_cache, forbidden=None):
    rows = len(tokens)
    logits, greedy = np.full((rows, VOCAB), np.nan, np.float32), np.full(rows, -9, np.int32)
    decoder.step(
        k_cache.numpy(),
        v_cache.numpy(),
        *(np.array(values, np.int32) for values in (tokens, slots, positions)),
        np.zeros(VOCAB, np.uint8) if forbidden is None else forbidden,
        logits,
        greedy,
    )
    return torch.from_numpy(logits), greedy.tolist()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_is_that_of_plain_torch(isa, threads):
    model = Model(threads)
    k_cache, v_cache = caches()
    rows = [7, 99, 0, 7], [4, 0, 2, 1], [0, 299, 41, 256]
    truth = model.expected(*rows, k_cache.clone(), v_cache.clone(), torch.float64)
    plain_k, plain_v = k_cache.clone(), v_cache.clone()
    plain = model.expected(*rows, plain_k, plain_v, torch.float32)
    logits, greedy = step(model.decoder(), *rows, k_cache, v_cache)
    # Two layers amplify the rounding of the first: compared in the mean, not at the worst element.
    assert rms(logits - truth) <= 2 * rms(plain - truth)
    assert greedy == logits.argmax(dim=1).tolist()
    # What was appended, and nothing else.
    torch.testing.assert_close(k_cache, plain_k, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(v_cache, plain_v, rtol=1e-4, atol=1e-4)
    before, _ = caches()
    changed = (k_cache != before).any(dim=-1).any(dim=2).any(dim=0)
    assert changed.nonzero().tolist() == sorted(map(list, zip(rows[1], rows[2], strict=True)))


# Inputs are quantised: one that rounds the other way moves a sum by a step of its largest.
@pytest.mark.parametrize(("storage", "bound"), [("int8", 1 / 32767), ("int4", 1 / 127)])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_quantised_step_is_that_of_plain_torch(isa, threads, storage, bound):
    model, (k_cache, v_cache) = Model(threads, storage), caches()
    rows = [7, 99, 0, 7], [4, 0, 2, 1], [0, 299, 41, 256]
    truth = model.expected(*rows, k_cache.clone(), v_cache.clone(), torch.float64)
    logits, greedy = step(model.decoder(), *rows, k_cache, v_cache)
    assert rms(logits - truth) <= bound * rms(truth)
    assert greedy == logits.argmax(dim=1).tolist()


def test_positions_behind_are_not_read(isa):
    model = Model()
    decoder, (k_cache, v_cache) = model.decoder(), caches()
    expected, _ = step(decoder, [5], [1], [20], k_cache.clone(), v_cache.clone())
    k_cache[:, 1, :, 20:] = torch.nan
    v_cache[:, 1, :, 20:] = torch.nan
    logits, _ = step(decoder, [5], [1], [20], k_cache, v_cache)
    assert torch.equal(logits, expected)


def test_forbidden_tokens_are_not_the_greedy_one():
    decoder, forbidden = Model().decoder(), np.zeros(VOCAB, np.uint8)
    logits, (best,) = step(decoder, [5], [1], [20], *caches())
    forbidden[best] = 1
    again, (second,) = step(decoder, [5], [1], [20], *caches(), forbidden)
    assert torch.equal(logits, again)
    assert second == logits[0].topk(2).indices[1]
    _, none = step(decoder, [], [], [], *caches())
    assert none == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_heads", 3, "whole groups of heads"),
        ("head_dim", 5, "even head_dim"),
        ("num_kv_heads", 0, "num_kv_heads is 0"),
        ("norm", np.zeros(7, np.float32), "norm has shape"),
        ("cos", np.zeros((9, 4), np.float32), "cos has shape"),
        ("sin", np.zeros((0, 3), np.float32), "rows of cos and sin is 0"),
        ("head", "embedding of 8", r"head is \(4, 8\)"),
    ],
)
def test_sizes_of_the_model(name, value, message):
    model = Model()
    arguments = model.arguments()
    if isinstance(value, str):
        value = model.pack(torch.ones(4, 8))
    with pytest.raises(ValueError, match=message):
        native.Decoder(**arguments | {name: value})


@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down", "input_norm", "qkv_bias"])
def test_sizes_of_a_layer(name):
    model = Model()
    decoder, arguments = native.Decoder(**model.arguments()), model.layer_arguments()
    wrong = (
        model.pack(torch.ones(9, 9)) if name not in ("input_norm", "qkv_bias") else model.norm[1:]
    )
    wrong = wrong.numpy() if isinstance(wrong, torch.Tensor) else wrong
    with pytest.raises(ValueError, match=name):
        decoder.add_layer(**arguments | {name: wrong})
    with pytest.raises((TypeError, ValueError)):
        decoder.add_layer(**arguments | {name: None})
    with pytest.raises(ValueError, match="no layers"):
        step(decoder, [1], [0], [0], *caches())


def test_arguments_of_a_step():
    decoder, (k_cache, v_cache) = Model().decoder(), caches()
    for rows, message in (
        (([VOCAB], [0], [0]), r"tokens\[0\] is 100"),
        (([-1], [0], [0]), r"tokens\[0\] is -1"),
        (([1], [SLOTS], [0]), r"slots\[0\] is 5"),
        (([1], [0], [POSITIONS]), r"positions\[0\] is 300"),
        (([1, 1], [2, 2], [0, 1]), r"slots\[1\] appears twice"),
        (([1, 1], [2], [0, 1]), "slots has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            step(decoder, *rows, k_cache, v_cache)
    with pytest.raises(ValueError, match="share memory"):
        step(decoder, [1], [0], [0], k_cache, k_cache)
    with pytest.raises(ValueError, match="v_cache has shape"):
        step(decoder, [1], [0], [0], k_cache, v_cache[:, :, :, :9].contiguous())
    with pytest.raises(TypeError, match="float64"):
        step(decoder, [1], [0], [0], k_cache.double(), v_cache)
    locked = k_cache.numpy()
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        step(decoder, [1], [0], [0], torch_like(locked), v_cache)


def test_no_layer_after_a_step():
    model = Model()
    decoder = model.decoder()
    step(decoder, [1], [0], [0], *caches())
    with pytest.raises(ValueError, match="has made a step"):
        decoder.add_layer(**model.layer_arguments())


def torch_like(array):
    """An array that step() takes as it is."""

    class Holder:
        def numpy(self):
            return array

    return Holder()
