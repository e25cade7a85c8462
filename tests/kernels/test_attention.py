"""Triton attention against a float64 truth and plain torch, by the accuracy rule."""

import re
from pathlib import Path

import pytest
import torch

from ovfast import reference
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params
from tests.support.interpreter import INTERPRETING

attention = pytest.importorskip("ovfast.kernels.attention", reason="needs triton")

# NumPy, the interpreter's arithmetic, warns of the NaN that neighbours compute for themselves.
neighbours_are_nan = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning"
)
CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]


def random_qkv(
    device: str,
    dtype: torch.dtype,
    num_views: int,
    tokens: int,
    num_heads: int = 2,
    head_dim: int = 72,
    scale: float = 1.0,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * tokens + 10 * head_dim + num_views)
    shape = (num_views * tokens, 3 * num_heads * head_dim)
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def expected(qkv: torch.Tensor, num_heads: int, tokens: int, upcast: bool) -> torch.Tensor:
    """The reference of each view alone."""
    views = qkv.unflatten(0, (-1, tokens)).unflatten(2, (3, num_heads, -1))
    outs = [reference.attention(*view.unbind(1), upcast=upcast) for view in views]
    return torch.cat(outs)


def check_case(qkv: torch.Tensor, num_heads: int, tokens: int) -> None:
    out = qkv.new_full((qkv.shape[0], qkv.shape[1] // 3), float("nan"))
    returned = attention.attention(qkv, out, num_heads=num_heads, tokens_per_view=tokens)
    assert returned is out
    same_dtype = expected(qkv, num_heads, tokens, upcast=False)
    assert_two_times_rule(out, same_dtype, expected(qkv, num_heads, tokens, upcast=True))


# 72: the tower, 64 + 16 with 8 columns masked; 64 and 16: no second part; 40: 32 + 16;
# 128: two parts of 64; 120: the second part of 64 masked.
@pytest.mark.parametrize("head_dim", [16, 40, 64, 72, 120, 128])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_head_sizes(device: str, dtype: torch.dtype, head_dim: int) -> None:
    check_case(random_qkv(device, dtype, 1, 70, head_dim=head_dim), 2, 70)


# 1: one key; 16: the demo, a tail of its own size; 41: odd; 64: one whole block of keys and
# 128 two, with no key masked; 65 and 129: a tail of one key; 129: a second block of queries.
@pytest.mark.parametrize("tokens", [1, 16, 41, 64, 65, 128, 129])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_token_counts(device: str, dtype: torch.dtype, tokens: int) -> None:
    check_case(random_qkv(device, dtype, 2, tokens), 2, tokens)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_large_scores_do_not_overflow(device: str, dtype: torch.dtype) -> None:
    # q · k / √72 reaches a few thousand: exp of it overflows float32 by far.
    check_case(random_qkv(device, dtype, 1, 70, scale=30.0), 2, 70)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_scores_far_below_zero(device: str, dtype: torch.dtype) -> None:
    # Scores around -34. Masked keys must count as -inf: a score of 0 would outweigh all others.
    qkv = random_qkv(device, dtype, 1, 70)
    q, k, _ = qkv.chunk(3, dim=1)
    q.fill_(4.0)
    k.sub_(1.0)
    check_case(qkv, 2, 70)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_growing_scores_rescale_what_was_summed(device: str, dtype: torch.dtype) -> None:
    # Every block of keys has a new maximum, so sums of earlier blocks decay.
    qkv = random_qkv(device, dtype, 1, 150)
    q, k, _ = qkv.chunk(3, dim=1)
    q.abs_()
    k.add_(torch.arange(150, device=device)[:, None] / 150)
    check_case(qkv, 2, 150)


@neighbours_are_nan
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_view_does_not_see_the_others(device: str, dtype: torch.dtype) -> None:
    qkv = random_qkv(device, dtype, 3, 70)
    whole = attention.attention(qkv, num_heads=2, tokens_per_view=70)
    for view in range(3):
        rows = slice(70 * view, 70 * view + 70)
        alone = attention.attention(qkv[rows].clone(), num_heads=2, tokens_per_view=70)
        assert torch.equal(whole[rows], alone)
        others = torch.full_like(qkv, float("nan"))
        others[rows] = qkv[rows]
        beside_nan = attention.attention(others, num_heads=2, tokens_per_view=70)
        assert torch.equal(beside_nan[rows], alone)


@neighbours_are_nan
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_head_does_not_see_the_others(device: str, dtype: torch.dtype) -> None:
    qkv = random_qkv(device, dtype, 1, 41, num_heads=3)
    whole = attention.attention(qkv, num_heads=3, tokens_per_view=41).unflatten(1, (3, 72))
    for head in range(3):
        others = torch.full_like(qkv, float("nan")).unflatten(1, (3, 3, 72))
        others[:, :, head] = qkv.unflatten(1, (3, 3, 72))[:, :, head]
        out = attention.attention(others.flatten(1), num_heads=3, tokens_per_view=41)
        assert torch.equal(out.unflatten(1, (3, 72))[:, head], whole[:, head])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_rows_at_any_stride(device: str, dtype: torch.dtype) -> None:
    qkv = random_qkv(device, dtype, 2, 20)
    # Misaligned rows, with NaN around them and behind the last.
    wide = qkv.new_full((42, 432 + 33), float("nan"))
    wide[:40, 11 : 11 + 432] = qkv
    wide_out = qkv.new_full((43, 144 + 7), 9.0)
    attention.attention(
        wide[:40, 11 : 11 + 432], wide_out[1:41, 3 : 3 + 144], num_heads=2, tokens_per_view=20
    )
    out = attention.attention(qkv, num_heads=2, tokens_per_view=20)
    assert torch.equal(wide_out[1:41, 3 : 3 + 144], out)
    wide_out[1:41, 3 : 3 + 144] = 9
    assert bool((wide_out == 9).all())


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_no_views(device: str, dtype: torch.dtype) -> None:
    qkv = torch.empty(0, 3 * 2 * 72, dtype=dtype, device=device)
    out = attention.attention(qkv, num_heads=2, tokens_per_view=729)
    assert (out.shape, out.dtype) == ((0, 144), dtype)


# ptxas makes every product wait for the one before, with a word in its log only, where it cannot
# prove the accumulators untouched: then each of them names the scoreboard gsb0.
@pytest.mark.skipif(INTERPRETING, reason="the interpreter replaces the compiler")
def test_tensor_core_products_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.kernels.aot_attention import VARIANTS
    from tests.support.aot import compile_variant

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _, sass = compile_variant(VARIANTS[0], 90)
    products = re.findall(r"HGMMA\.[^;]*;", sass)
    groups = [product for product in products if "gsb0" in product]
    # Two for the scores and two for the values, of the loop and of the last keys.
    assert (len(products), len(groups)) == (22, 8)


# 1 and 2 views: fewer programs than SMs; 7: a picture of 1024 × 768; 37: the most a picture has.
@pytest.mark.parametrize("num_views", [1, 2, 7, 37])
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_tower_size(device: str, dtype: torch.dtype, num_views: int) -> None:
    qkv = random_qkv(device, dtype, num_views, 729, num_heads=16)
    whole = attention.attention(qkv, num_heads=16, tokens_per_view=729)
    for view in {0, num_views - 1}:
        rows = slice(729 * view, 729 * view + 729)
        check_case(qkv[rows], 16, 729)
        alone = attention.attention(qkv[rows], num_heads=16, tokens_per_view=729)
        assert torch.equal(whole[rows], alone)


def test_supported_head_sizes() -> None:
    supported = [size for size in range(-8, 300) if attention.supports(size)]
    assert supported == [16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128]
    for size in supported:
        head_a, head_b = attention.head_split(size)
        assert head_a in (16, 32, 64)
        assert head_b in (0, 16, 32, 64)
        assert head_a <= size <= head_a + head_b < 2 * size
        assert (head_b == 0) == (head_a == size)


QKV = torch.zeros(6, 96)
BAD_ARGUMENTS = {
    "qkv-f64": (QKV.double(), None, 2, 3, TypeError, "qkv is"),
    "qkv-1d": (torch.zeros(96), None, 2, 3, ValueError, "qkv has shape"),
    "qkv-part-of-a-view": (QKV, None, 2, 4, ValueError, "qkv has shape"),
    "qkv-part-of-a-head": (torch.zeros(6, 97), None, 2, 3, ValueError, "qkv has shape"),
    "qkv-transposed": (torch.zeros(96, 6).t(), None, 2, 3, ValueError, "qkv has last-dim"),
    "no-heads": (QKV, None, 0, 3, ValueError, "num_heads is 0"),
    "no-tokens": (QKV, None, 2, 0, ValueError, "tokens_per_view 0"),
    "head-dim-8": (QKV, None, 4, 3, ValueError, "head_dim is 8"),
    "head-dim-0": (QKV[:, :0], None, 4, 3, ValueError, "head_dim is 0"),
    "out-f16": (QKV, torch.zeros(6, 32).half(), 2, 3, TypeError, "out is"),
    "out-wide": (QKV, torch.zeros(6, 33), 2, 3, ValueError, "out has shape"),
    "out-short": (QKV, torch.zeros(3, 32), 2, 3, ValueError, "out has shape"),
    "out-meta": (QKV, torch.zeros(6, 32, device="meta"), 2, 3, ValueError, "out is on meta"),
    "out-transposed": (QKV, torch.zeros(32, 6).t(), 2, 3, ValueError, "out has last-dim"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    qkv, out, num_heads, tokens, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        attention.attention(qkv, out, num_heads=num_heads, tokens_per_view=tokens)
