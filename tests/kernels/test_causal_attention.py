"""Triton causal attention against a float64 truth and plain torch, by the accuracy rule."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from ovfast import reference
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params
from tests.support.interpreter import INTERPRETING

causal = pytest.importorskip("ovfast.kernels.causal_attention", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]
NAN = float("nan")
# NumPy, the interpreter's arithmetic, warns of the NaN that neighbours compute for themselves.
neighbours_are_nan = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning"
)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_inputs(
    device: str,
    dtype: torch.dtype,
    num_keys: int,
    num_heads: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 16,
    scale: float = 1.0,
) -> Inputs:
    """Queries of all positions, keys and values as views of a cache, NaN behind the last key."""
    generator = torch.Generator().manual_seed(1000 * num_keys + head_dim)
    q = torch.randn(num_keys, num_heads, head_dim, generator=generator) * scale
    caches = []
    for _ in range(2):
        cache = torch.full((num_kv_heads, num_keys + 5, head_dim), NAN)
        cache[:, :num_keys].copy_(torch.randn(cache[:, :num_keys].shape, generator=generator))
        cache[:, :num_keys] *= scale
        caches.append(cache.to(device, dtype)[:, :num_keys])
    return q.to(device, dtype), caches[0], caches[1]


def check_case(inputs: Inputs, start: int = 0) -> None:
    q, k, v = inputs
    q = q[start:]
    out = q.new_full((len(q), q.shape[1] * q.shape[2]), NAN)
    assert causal.causal_attention(q, k, v, start, out) is out
    positions = range(start, start + len(q))
    same_dtype = reference.causal_attention(q, k, v, positions)
    truth = reference.causal_attention(q, k, v, positions, upcast=True)
    assert_two_times_rule(out, same_dtype, truth)
    # The rule goes by the largest output, which is that of the first rows: of the others too.
    half = len(q) // 2
    assert_two_times_rule(out[half:], same_dtype[half:], truth[half:])


# 1: one key; 41: odd; 64, 128: whole blocks of keys and of queries; 129: one row more; 300.
@pytest.mark.parametrize("num_keys", [1, 2, 41, 64, 128, 129, 300])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_lengths(device: str, dtype: torch.dtype, num_keys: int) -> None:
    check_case(random_inputs(device, dtype, num_keys))


# A last row alone; a chunk inside a block, to a block's end, from its start and over two ends.
@pytest.mark.parametrize(
    ("start", "num_keys"), [(199, 200), (3, 20), (70, 128), (128, 150), (90, 300)]
)
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_chunks(device: str, dtype: torch.dtype, start: int, num_keys: int) -> None:
    check_case(random_inputs(device, dtype, num_keys), start)


# 8: the smallest; 40: padded; 64: 0.5B; 128: 7B and 72B.
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 128])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_head_sizes(device: str, dtype: torch.dtype, head_dim: int) -> None:
    check_case(random_inputs(device, dtype, 70, head_dim=head_dim))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(14, 2), (8, 1), (3, 3)])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_groups(device: str, dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> None:
    check_case(random_inputs(device, dtype, 20, num_heads, num_kv_heads))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_large_scores_do_not_overflow(device: str, dtype: torch.dtype) -> None:
    # q · k / 8 reaches a few thousand: exp of it overflows float32 by far.
    check_case(random_inputs(device, dtype, 150, head_dim=64, scale=30.0))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_scores_far_below_zero(device: str, dtype: torch.dtype) -> None:
    # Scores around -16. Masked keys must count as -inf: a score of 0 would outweigh all others.
    q, k, v = random_inputs(device, dtype, 150)
    q.fill_(4.0)
    k.sub_(1.0)
    check_case((q, k, v))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_growing_scores_rescale_what_was_summed(device: str, dtype: torch.dtype) -> None:
    # Every block of keys has a new maximum, so sums of earlier blocks decay.
    q, k, v = random_inputs(device, dtype, 300)
    q.abs_()
    k.add_(torch.arange(300, device=device)[:, None] / 100)
    check_case((q, k, v))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_chunks_equal_the_whole(device: str, dtype: torch.dtype) -> None:
    q, k, v = random_inputs(device, dtype, 300)
    whole = causal.causal_attention(q, k, v, 0)
    # Inside a block, over its end, one row, from the start of a block, the rest.
    stops = (0, 20, 130, 131, 256, 300)
    for start, stop in itertools.pairwise(stops):
        out = causal.causal_attention(q[start:stop], k[:, :stop], v[:, :stop], start)
        assert torch.equal(out, whole[start:stop])


@neighbours_are_nan
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_row_does_not_see_later_keys(device: str, dtype: torch.dtype) -> None:
    q, k, v = random_inputs(device, dtype, 140)
    whole = causal.causal_attention(q, k, v, 0)
    # Finite, in the same block: a probability of exactly 0 meets it. NaN from the next block on.
    k[:, 10:] = 100.0
    v[:, 10:] = 1e4
    k[:, 128:] = NAN
    v[:, 128:] = NAN
    q[10:] = NAN
    assert torch.equal(causal.causal_attention(q, k, v, 0)[:10], whole[:10])


@neighbours_are_nan
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_head_does_not_see_the_others(device: str, dtype: torch.dtype) -> None:
    q, k, v = random_inputs(device, dtype, 41, num_heads=4, num_kv_heads=2)
    whole = causal.causal_attention(q, k, v, 0).unflatten(1, (4, 16))
    q[:, [0, 1, 3]] = NAN
    k[0] = NAN
    v[0] = NAN
    out = causal.causal_attention(q, k, v, 0).unflatten(1, (4, 16))
    assert torch.equal(out[:, 2], whole[:, 2])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_any_outer_strides(device: str, dtype: torch.dtype) -> None:
    q, k, v = random_inputs(device, dtype, 41, num_heads=4, num_kv_heads=2)
    whole = causal.causal_attention(q[7:], k, v, 7)
    # Heads outside rows in q, positions outside heads in the cache, NaN around both.
    wide_q = q.new_full((4, 41, 27), NAN)
    wide_q[..., 3:19] = q.transpose(0, 1)
    q = wide_q[..., 3:19].transpose(0, 1)[7:]
    caches = []
    for cache in (k, v):
        wide = cache.new_full((44, 2, 23), NAN)
        wide[:41, :, 5:21] = cache.transpose(0, 1)
        caches.append(wide[:41, :, 5:21].transpose(0, 1))
    out = q.new_full((36, 64 + 9), 9.0)
    causal.causal_attention(q, *caches, 7, out[1:35, 4:68])
    assert torch.equal(out[1:35, 4:68], whole)
    out[1:35, 4:68] = 9
    assert bool((out == 9).all())


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_no_rows(device: str, dtype: torch.dtype) -> None:
    q, k, v = random_inputs(device, dtype, 9)
    out = causal.causal_attention(q[9:], k, v, 9)
    assert (out.shape, out.dtype) == ((0, 32), dtype)


# ptxas makes every product wait for the one before, with a word in its log only, where it cannot
# prove the accumulators untouched: then each of them names the scoreboard gsb0.
@pytest.mark.skipif(INTERPRETING, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize(("index", "products"), [(0, 8), (1, 12)], ids=["head64", "head128"])
def test_tensor_core_products_follow_each_other(
    index: int, products: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.kernels.aot_causal_attention import VARIANTS
    from tests.support.aot import compile_variant

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _, sass = compile_variant(VARIANTS[index], 90)
    found = re.findall(r"HGMMA\.[^;]*;", sass)
    # One group for the scores and one for the values.
    assert (len(found), sum("gsb0" in product for product in found)) == (products, 2)


# 0.5B, 7B, 72B: a picture of 10 views, whole and in chunks.
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(14, 2, 64), (28, 4, 128), (64, 8, 128)]
)
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_model_sizes(
    device: str, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    q, k, v = random_inputs(device, dtype, 7300, num_heads, num_kv_heads, head_dim)
    check_case((q[:700], k[:, :700], v[:, :700]))
    check_case((q, k, v), start=7000)
    whole = causal.causal_attention(q, k, v, 0)
    for start, stop in ((0, 2048), (2048, 4001), (4001, 7300)):
        out = causal.causal_attention(q[start:stop], k[:, :stop], v[:, :stop], start)
        assert torch.equal(out, whole[start:stop])


def test_supported_head_sizes() -> None:
    assert [size for size in range(-8, 300) if causal.supports(size)] == list(range(8, 129, 8))


F16 = torch.float16
BAD_ARGUMENTS = {
    "q-f64": ("q", torch.zeros(5, 4, 16).double(), TypeError, "q is"),
    "q-flat": ("q", torch.zeros(5, 64), ValueError, "q has shape"),
    "q-no-heads": ("q", torch.zeros(5, 0, 16), ValueError, "q has shape"),
    "q-3-heads": ("q", torch.zeros(5, 3, 16), ValueError, "q has 3 heads"),
    "q-head-12": ("q", torch.zeros(5, 4, 12), ValueError, "q has heads of 12"),
    "q-transposed": ("q", torch.zeros(5, 16, 4).transpose(1, 2), ValueError, "q has last-dim"),
    "k-f16": ("k", torch.zeros(2, 8, 16, dtype=F16), TypeError, "k is"),
    "k-long": ("k", torch.zeros(2, 9, 16), ValueError, "k has shape"),
    "k-2d": ("k", torch.zeros(8, 16), ValueError, "k has shape"),
    "k-no-heads": ("k", torch.zeros(0, 8, 16), ValueError, "k has shape"),
    "v-narrow": ("v", torch.zeros(2, 8, 8), ValueError, "v has shape"),
    "v-meta": ("v", torch.zeros(2, 8, 16, device="meta"), ValueError, "v is on meta"),
    "v-strided": ("v", torch.zeros(2, 8, 32)[..., ::2], ValueError, "v has last-dim"),
    "start-negative": ("start", -1, ValueError, "start is -1"),
    "start-late": ("start", 4, ValueError, "k has shape"),
    "out-f16": ("out", torch.zeros(5, 64, dtype=F16), TypeError, "out is"),
    "out-3d": ("out", torch.zeros(5, 4, 16), ValueError, "out has shape"),
    "out-transposed": ("out", torch.zeros(64, 5).t(), ValueError, "out has last-dim"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    changed, value, error, message = BAD_ARGUMENTS[name]
    arguments = {
        "q": torch.zeros(5, 4, 16),
        "k": torch.zeros(2, 8, 16),
        "v": torch.zeros(2, 8, 16),
        "start": 3,
        "out": torch.zeros(5, 64),
        changed: value,
    }
    with pytest.raises(error, match=message):
        causal.causal_attention(**arguments)
