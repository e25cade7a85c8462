"""Native attention, exact and quantised: the two-times rule, bits that depend on the row and its
keys alone, NaN.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ovfast import reference
from ovfast.quantize import fake_quantized_attention
from tests.support.accuracy import assert_two_times_rule, half_ulp

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

NAN = float("nan")


def random_tensor(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator) * scale


def view_attention(
    qkv: torch.Tensor, heads: int, tokens: int, quantized: bool = False, threads: int = 1
) -> torch.Tensor:
    out = torch.full((len(qkv), qkv.shape[1] // 3), 77.0)
    pool = native.ThreadPool(threads)
    native.view_attention(pool, qkv.numpy(), heads, tokens, out.numpy(), quantized)
    return out


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: Sequence[int],
    quantized: bool = False,
    threads: int = 1,
) -> torch.Tensor:
    out = torch.full((len(q), q.shape[1] * q.shape[2]), 77.0)
    if isinstance(positions, range):
        at: Any = positions.start
    else:
        at = np.array(positions, np.int64)
    arrays = (q.numpy(), k.numpy(), v.numpy())
    native.causal_attention(native.ThreadPool(threads), *arrays, at, out.numpy(), quantized)
    return out


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: Sequence[int],
    positions: Sequence[int],
    threads: int = 1,
) -> torch.Tensor:
    out = torch.full((len(q), q.shape[1] * q.shape[2]), 77.0)
    native.decode_attention(
        native.ThreadPool(threads),
        *(array.numpy() for array in (q, k_cache, v_cache)),
        np.array(slots, np.int32),
        np.array(positions, np.int32),
        out.numpy(),
    )
    return out


def view_truth(qkv: torch.Tensor, heads: int, tokens: int) -> torch.Tensor:
    parts = qkv.view(len(qkv), 3, heads, -1)
    views = [parts[first : first + tokens].unbind(1) for first in range(0, len(qkv), tokens)]
    return torch.cat([reference.attention(*view, upcast=True) for view in views])


# (views, tokens, heads, head_dim): the tower's head, the demo's views, one token, sizes on both
# sides of a block of 128 keys and of a chunk of 48 rows, head_dims that no vector divides.
VIEWS = [
    (1, 169, 2, 72),
    (3, 16, 2, 24),
    (2, 1, 1, 2),
    (1, 41, 3, 10),
    (2, 127, 1, 16),
    (2, 128, 1, 18),
    (2, 129, 1, 8),
    (1, 260, 1, 64),
    (5, 49, 2, 6),
    (2, 40, 2, 1),
    (1, 140, 1, 33),
]


@pytest.mark.parametrize(("views", "tokens", "heads", "head_dim"), VIEWS)
def test_view_two_times_rule(isa: str, views: int, tokens: int, heads: int, head_dim: int) -> None:
    qkv = random_tensor(views * tokens, 3 * heads * head_dim, scale=1.5)
    out = view_attention(qkv, heads, tokens)
    plain = reference.view_attention(qkv, heads, tokens)
    assert_two_times_rule(out, plain, view_truth(qkv, heads, tokens))


def fake_view_attention(
    qkv: torch.Tensor, heads: int, tokens: int, *, upcast: bool
) -> torch.Tensor:
    parts = qkv.view(len(qkv), 3, heads, -1)
    outs = []
    for first in range(0, len(qkv), tokens):
        q, k, v = parts[first : first + tokens].unbind(1)
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        outs.append(fake_quantized_attention(q, k, v, [tokens - 1] * tokens, upcast=upcast))
    return torch.cat(outs)


def assert_as_the_fake(out: torch.Tensor, fake: torch.Tensor, truth: torch.Tensor) -> None:
    """The rule, with two ulps for the scales of an integer sum; and weights rounded alike: but few
    may be a unit apart, their scores being so.
    """
    error, fake_error = ((one.double() - truth).abs().max() for one in (out, fake))
    assert error <= 2 * fake_error + 4 * half_ulp(truth, torch.float32)
    assert (out - fake).norm() <= 0.25 * (fake - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize(("views", "tokens", "heads", "head_dim"), VIEWS)
def test_quantized_view_is_as_the_fake(
    isa: str, views: int, tokens: int, heads: int, head_dim: int
) -> None:
    qkv = random_tensor(views * tokens, 3 * heads * head_dim, scale=1.5)
    out = view_attention(qkv, heads, tokens, quantized=True)
    fakes = (fake_view_attention(qkv, heads, tokens, upcast=upcast) for upcast in (False, True))
    assert_as_the_fake(out, *fakes)


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_whole_tower_view(isa: str, quantized: bool) -> None:
    qkv = random_tensor(2 * 729, 3 * 16 * 72)
    out = view_attention(qkv, 16, 729, quantized)
    if quantized:
        fakes = (fake_view_attention(qkv, 16, 729, upcast=upcast) for upcast in (False, True))
        assert_as_the_fake(out, *fakes)
    else:
        assert_two_times_rule(out, reference.view_attention(qkv, 16, 729), view_truth(qkv, 16, 729))
    assert torch.equal(view_attention(qkv, 16, 729, quantized, threads=3), out)


@pytest.mark.parametrize("quantized", [False, True])
def test_views_do_not_see_each_other(isa: str, quantized: bool) -> None:
    qkv = random_tensor(4 * 20, 3 * 2 * 24)
    whole = view_attention(qkv, 2, 20, quantized)
    for threads in (2, 3):
        assert torch.equal(view_attention(qkv, 2, 20, quantized, threads=threads), whole)
    alone = view_attention(qkv[20:40], 2, 20, quantized)
    assert torch.equal(alone, whole[20:40]), "a view alone"
    wide = torch.full((80, 150), NAN)
    wide[:, 3:147] = qkv
    strided = view_attention(wide[:, 3:147], 2, 20, quantized)
    assert torch.equal(strided, whole), "rows at another stride"
    qkv[20:40] = NAN
    out = view_attention(qkv, 2, 20, quantized)
    assert bool(out[20:40].isnan().all()), "NaN in, NaN out"
    out[20:40] = whole[20:40]
    assert torch.equal(out, whole)


# (rows, start, heads, kv_heads, head_dim): both language models' groups, prefixes of one key and
# on both sides of a block of 128, one row, the demo's head, head_dims that no vector divides.
CAUSAL = [
    (1, 0, 1, 1, 2),
    (150, 0, 7, 1, 64),
    (60, 127, 7, 1, 128),
    (41, 1, 4, 2, 18),
    (49, 128, 2, 2, 10),
    (7, 250, 6, 3, 24),
    (130, 130, 2, 1, 16),
    (40, 3, 2, 1, 7),
    (30, 120, 2, 2, 17),
]


@pytest.mark.parametrize(("rows", "start", "heads", "kv_heads", "head_dim"), CAUSAL)
def test_causal_two_times_rule(
    isa: str, rows: int, start: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    q = random_tensor(rows, heads, head_dim, scale=1.5)
    k = random_tensor(kv_heads, start + rows, head_dim, scale=1.5)
    v = random_tensor(kv_heads, start + rows, head_dim, seed=1)
    positions = range(start, start + rows)
    out = causal_attention(q, k, v, positions)
    plain = reference.causal_attention(q, k, v, positions)
    truth = reference.causal_attention(q, k, v, positions, upcast=True)
    assert_two_times_rule(out, plain, truth)
    out = causal_attention(q, k, v, positions, quantized=True)
    fakes = (
        fake_quantized_attention(q, k, v, positions, upcast=upcast) for upcast in (False, True)
    )
    assert_as_the_fake(out, *fakes)


def causal_inputs(num_keys: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 18) -> Any:
    q = random_tensor(num_keys, heads, head_dim, scale=1.5)
    k = random_tensor(kv_heads, num_keys, head_dim, scale=1.5)
    return q, k, random_tensor(kv_heads, num_keys, head_dim, seed=1)


@pytest.mark.parametrize("quantized", [False, True])
def test_causal_bits_depend_on_the_row_and_its_keys_alone(isa: str, quantized: bool) -> None:
    """Threads, chunks of a prefill, any choice of rows, keys behind: all the same bits."""
    q, k, v = causal_inputs(300)
    whole = causal_attention(q, k, v, range(300), quantized)
    for threads in (2, 3):
        assert torch.equal(causal_attention(q, k, v, range(300), quantized, threads=threads), whole)
    for first, last in ((0, 1), (1, 130), (130, 300), (7, 8), (299, 300), (100, 149)):
        part = causal_attention(q[first:last], k, v, range(first, last), quantized)
        assert torch.equal(part, whole[first:last]), f"rows {first} to {last}"
        shorter = causal_attention(
            q[first:last], k[:, :last], v[:, :last], range(first, last), quantized
        )
        assert torch.equal(shorter, whole[first:last]), f"only the keys before {last}"
    for positions in ([0, 299], [5, 6, 7, 120, 127, 128, 129, 255, 256], [40], list(range(300))):
        assert torch.equal(
            causal_attention(q[positions], k, v, positions, quantized), whole[positions]
        )
    again = causal_attention(q[[9, 9, 200]], k, v, [9, 9, 200], quantized)
    assert torch.equal(again, whole[[9, 9, 200]])


@pytest.mark.parametrize("quantized", [False, True])
def test_causal_strided_rows_and_heads(isa: str, quantized: bool) -> None:
    """Queries inside rows of queries, keys and values; keys of a slot of a longer cache."""
    q, k, v = causal_inputs(50)
    whole = causal_attention(q, k, v, range(50), quantized)
    qkv = torch.full((50, 8, 18), NAN)
    qkv[:, :4] = q
    caches = torch.full((2, 2, 3, 90, 18), NAN)  # (k or v, heads, layers, positions, head_dim)
    caches[0, :, 1, :50], caches[1, :, 1, :50] = k, v
    k_cache, v_cache = caches[:, :, 1]
    assert torch.equal(causal_attention(qkv[:, :4], k_cache, v_cache, range(50), quantized), whole)


@pytest.mark.parametrize("quantized", [False, True])
def test_nan_behind_a_row_does_not_reach_it(isa: str, quantized: bool) -> None:
    q, k, v = causal_inputs(200)
    whole = causal_attention(q, k, v, range(200), quantized)
    for first in (1, 77, 128, 199):
        for poisoned in (k, v):
            kept = poisoned[:, first:].clone()
            poisoned[:, first:] = NAN
            out = causal_attention(q, k, v, range(200), quantized)
            assert torch.equal(out[:first], whole[:first])
            assert bool(out[first:].isnan().all())
            poisoned[:, first:] = kept


# Scores of ±80 and of ±10 000: neither exp of a score nor a first maximum may overflow.
@pytest.mark.parametrize("largest", [80.0, 1e4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_scores(isa: str, largest: float, sign: float) -> None:
    """Rising, falling and equal scores, in all three kinds of attention."""
    steps = torch.linspace(-1, 1, 300) * largest * sign
    q = torch.full((1, 1, 4), 1.0)
    k = steps[None, :, None].repeat(1, 1, 4) / 2  # the sum of four, scaled by 4^-0.5
    v = random_tensor(1, 300, 4)
    plain = reference.causal_attention(q, k, v, [299])
    truth = reference.causal_attention(q, k, v, [299], upcast=True)
    assert_two_times_rule(causal_attention(q, k, v, [299]), plain, truth)
    assert_two_times_rule(decode_attention(q, k[None], v[None], [0], [299]), plain, truth)
    qkv = torch.stack([q[0].repeat(300, 1), k[0], v[0]], dim=1).flatten(1)
    views = view_attention(qkv, 1, 300)
    assert_two_times_rule(views, plain.repeat(300, 1), truth.repeat(300, 1))
    fakes = [fake_quantized_attention(q, k, v, [299], upcast=upcast) for upcast in (False, True)]
    assert_as_the_fake(causal_attention(q, k, v, [299], quantized=True), *fakes)
    views = view_attention(qkv, 1, 300, quantized=True)
    assert_as_the_fake(views, *(fake.repeat(300, 1) for fake in fakes))


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return float((out - truth).norm() / truth.norm())


# How many times larger a dimension of keys or of values is, and the share of the first key's weight
# → the largest loss. int8 weights cost a layer 0.008.
LOSSES = [
    (1.0, 1.0, 0.0, 0.001),
    (100.0, 1.0, 0.0, 0.01),
    (1.0, 100.0, 0.0, 0.003),
    (1.0, 1.0, 0.9, 0.003),
]


@pytest.mark.parametrize(("key_dim", "value_dim", "sink", "most"), LOSSES)
def test_what_quantized_attention_loses(
    isa: str, key_dim: float, value_dim: float, sink: float, most: float
) -> None:
    """Also where a first key takes nearly all the weight and has next to no value."""
    q, k, v = causal_inputs(300, head_dim=64)
    k[..., 5] *= key_dim
    q[..., 5] /= key_dim
    v[..., 7] *= value_dim
    if sink:
        q[..., 3], k[..., 3], k[:, 0, 3] = 8.0, 0.0, 14.0
        v[:, 0] /= 50
        score = torch.einsum("hd,khd->kh", q[299], k.repeat_interleave(2, 0).transpose(0, 1)) / 8
        assert bool((score.softmax(0)[0] > sink).all())
    out = causal_attention(q, k, v, range(300), quantized=True)
    truth = reference.causal_attention(q, k, v, range(300), upcast=True)
    assert relative_error(out[1:], truth[1:]) < most


@pytest.mark.parametrize("scale", [1e-29, 1e34])
def test_quantized_attention_of_small_and_large_values(isa: str, scale: float) -> None:
    q, k, v = causal_inputs(300)
    out = causal_attention(q, k, v * scale, range(300), quantized=True)
    whole = causal_attention(q, k, v, range(300), quantized=True)
    assert relative_error(out / scale, whole) < 1e-3


def test_the_largest_sums_of_quantized_values(isa: str) -> None:
    """Equal weights of equal values: no sum of integers is larger."""
    q, k = torch.zeros(1, 1, 8), random_tensor(1, 256, 8)
    for value in (3.0, -3.0):
        v = torch.full((1, 256, 8), value)
        out = causal_attention(q, k, v, [255], quantized=True)
        torch.testing.assert_close(out, torch.full((1, 8), value), rtol=1e-6, atol=0)


# The last has a payload, which arithmetic hands on.
POISONS = [NAN, float("inf"), -float("inf"), float(np.uint32(0x7FFFFFFF).view(np.float32))]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_quantized_attention_of_one_element_that_is_not_finite(
    isa: str, name: str, poison: float
) -> None:
    """NaN in all results of the heads that see it, and the same bits in all others."""
    q, k, v = causal_inputs(300)
    whole = causal_attention(q, k, v, range(300), quantized=True).view(300, 4, 18)
    for at in (0, 5, 20, 140, 299):
        inputs = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        row = inputs["q"][at, 1] if name == "q" else inputs[name][1, at]
        row.numpy()[7] = poison
        out = causal_attention(**inputs, positions=range(300), quantized=True).view(300, 4, 18)
        hit = torch.zeros(300, 4, dtype=torch.bool)
        if name == "q":
            hit[at, 1] = True
        else:
            hit[at:, 2:] = True
        assert bool(out[hit].isnan().all())
        assert torch.equal(out[~hit], whole[~hit])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_with_a_payload_stays_nan(isa: str, name: str) -> None:
    """In exact attention too, and in that of a decode step."""
    inputs = dict(zip("qkv", causal_inputs(300), strict=True))
    inputs["q"] = inputs["q"][299:]
    poisoned = inputs[name] if name == "q" else inputs[name][:, 5]
    poisoned.numpy()[..., 3] = POISONS[-1]
    out = causal_attention(**inputs, positions=[299])
    decoded = decode_attention(inputs["q"], inputs["k"][None], inputs["v"][None], [0], [299])
    for result in (out, decoded):
        heads = result.view(4, 18)
        assert bool((heads[:, 3] if name == "v" else heads).isnan().all())


def test_quantized_attention_of_zeros(isa: str) -> None:
    q, k, v = causal_inputs(40)
    zero = torch.zeros_like
    out = causal_attention(q, k, zero(v), range(40), quantized=True)
    assert torch.equal(out, zero(out))
    mean = causal_attention(zero(q), k, v, range(40), quantized=True)
    truth = reference.causal_attention(zero(q), k, v, range(40), upcast=True)
    assert relative_error(mean, truth) < 1e-3
    assert torch.equal(causal_attention(q, zero(k), v, range(40), quantized=True), mean)
    tiny = causal_attention(q, k, v * 1e-35, range(40), quantized=True)
    assert float(tiny.abs().max()) < 1e-33


# (heads, kv_heads, head_dim, last positions): both language models' groups over several parts of
# 256 keys, more heads than a tile has rows, one key, the edges of a part and of a panel.
DECODE = [
    (14, 2, 64, (0, 15, 16, 254, 255, 256, 600)),
    (7, 1, 128, (300,)),
    (13, 1, 18, (270, 7)),
    (4, 4, 10, (31, 33)),
    (2, 1, 2, (1, 511, 512)),
    (9, 3, 24, (40,)),
    (6, 1, 6, (8,)),
]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "positions"), DECODE)
def test_decode_two_times_rule(
    isa: str, heads: int, kv_heads: int, head_dim: int, positions: tuple[int, ...]
) -> None:
    rows = len(positions)
    q = random_tensor(rows, heads, head_dim, scale=1.5)
    k = random_tensor(rows, kv_heads, max(positions) + 1, head_dim, scale=1.5)
    v = random_tensor(rows, kv_heads, max(positions) + 1, head_dim, seed=1)
    slots = list(reversed(range(rows)))
    out = decode_attention(q, k, v, slots, positions)
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        keys = (k[slot, :, : position + 1], v[slot, :, : position + 1])
        plain = reference.decode_attention(q[row : row + 1], *keys)
        truth = reference.decode_attention(q[row : row + 1], *keys, upcast=True)
        assert_two_times_rule(out[row : row + 1], plain, truth)


def test_decode_bits_depend_on_the_row_and_its_keys_alone(isa: str) -> None:
    positions = [0, 700, 255, 256, 17, 511, 512, 300, 1, 2, 3, 64, 128, 400, 90, 699]
    slots = [(5 * i + 3) % 16 for i in range(16)]
    q = random_tensor(16, 6, 18, scale=1.5)
    k, v = random_tensor(16, 2, 701, 18, scale=1.5), random_tensor(16, 2, 701, 18, seed=1)
    whole = decode_attention(q, k, v, slots, positions)
    for threads in (2, 3):
        assert torch.equal(decode_attention(q, k, v, slots, positions, threads), whole)
    for row in range(16):
        one = slice(row, row + 1)
        alone = decode_attention(q[one], k, v, slots[one], positions[one])
        assert torch.equal(alone, whole[one]), f"row {row} alone"
    for slot, position in zip(slots, positions, strict=True):
        k[slot, :, position + 1 :] = NAN
        v[slot, :, position + 1 :] = NAN
    assert torch.equal(decode_attention(q, k, v, slots, positions), whole), "NaN behind the keys"


def test_decode_gives_nan_for_nan(isa: str) -> None:
    q, k, v = random_tensor(2, 2, 18), random_tensor(2, 1, 40, 18), random_tensor(2, 1, 40, 18)
    k[1, 0, 20, 3] = NAN
    out = decode_attention(q, k, v, [0, 1], [39, 39])
    assert not bool(out[0].isnan().any())
    assert bool(out[1].isnan().all())


def test_zero_rows(isa: str) -> None:
    k = random_tensor(2, 5, 6)
    q = torch.empty(0, 4, 6)
    assert view_attention(torch.empty(0, 36), 2, 7).shape == (0, 12)
    for positions in (range(5, 5), []):
        assert causal_attention(q, k, k.clone(), positions).shape == (0, 24)
    assert decode_attention(q, k[None], k[None].clone(), [], []).shape == (0, 24)


def test_decode_reads_one_layer_of_a_strided_cache(isa: str) -> None:
    caches = torch.full((2, 3, 2, 2, 50, 18), NAN)  # (k or v, slots, layers, heads, …)
    caches[:, :, 1] = random_tensor(2, 3, 2, 50, 18)
    k, v = caches[:, :, 1]
    q = random_tensor(2, 4, 18)
    out = decode_attention(q, k, v, [2, 0], [49, 30])
    assert torch.equal(out, decode_attention(q, k.contiguous(), v.contiguous(), [2, 0], [49, 30]))
