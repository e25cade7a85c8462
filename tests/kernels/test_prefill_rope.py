"""Triton rope_and_store against a float64 truth and plain torch, by the accuracy rule."""

import pytest
import torch

from ovfast import reference
from ovfast.models.rope import rope_table
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params

prefill_rope = pytest.importorskip("ovfast.kernels.prefill_rope", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]
HELD = 9.0  # what the cache holds before


class Case:
    """Random rows in plain order, and the same packed as the kernel takes them."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        num_rows: int,
        num_heads: int = 3,
        num_kv_heads: int = 1,
        head_dim: int = 16,
        start: int = 5,
    ) -> None:
        generator = torch.Generator().manual_seed(100 * num_rows + head_dim)
        shape = (num_rows, num_heads + 2 * num_kv_heads, head_dim)
        rows = torch.randn(shape, generator=generator).to(device, dtype)
        self.q, self.k, self.v = rows.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        pairs = rows.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
        self.qkv = torch.cat([pairs[:, :-num_kv_heads], self.v], dim=1).flatten(1)
        stop = start + num_rows
        self.cos, self.sin = rope_table(start, stop, head_dim, 1e4, dtype, torch.device(device))
        cache = (num_kv_heads, stop + 3, head_dim)
        self.k_cache, self.v_cache = (rows.new_full(cache, HELD) for _ in range(2))
        self.start = start
        self.heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}

    def run(self, q_out: torch.Tensor | None = None) -> torch.Tensor:
        caches = (self.k_cache, self.v_cache, self.start)
        out = prefill_rope.rope_and_store(
            self.qkv, self.cos, self.sin, *caches, **self.heads, q_out=q_out
        )
        assert isinstance(out, torch.Tensor)
        return out

    def rotated(self, x: torch.Tensor, upcast: bool) -> torch.Tensor:
        return reference.rope(x.clone(), self.cos, self.sin, upcast=upcast)

    def check(self) -> None:
        q_out = torch.full_like(self.q, float("nan"), memory_format=torch.contiguous_format)
        assert self.run(q_out) is q_out
        stored = slice(self.start, self.start + len(self.q))
        k_out = self.k_cache[:, stored].transpose(0, 1)
        for out, x in ((q_out, self.q), (k_out, self.k)):
            assert_two_times_rule(out, self.rotated(x, upcast=False), self.rotated(x, upcast=True))
        assert torch.equal(self.v_cache[:, stored].transpose(0, 1), self.v)
        for cache in (self.k_cache, self.v_cache):
            cache[:, stored] = HELD
            assert bool((cache == HELD).all())


# 1; 41: odd; 128: one block without a mask; 129: a second block of one row.
@pytest.mark.parametrize("num_rows", [1, 41, 128, 129])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_row_counts(device: str, dtype: torch.dtype, num_rows: int) -> None:
    Case(device, dtype, num_rows).check()


# 2: one pair; 24: padded; 64 and 128: the models.
@pytest.mark.parametrize("head_dim", [2, 24, 32, 64, 128])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_head_sizes(device: str, dtype: torch.dtype, head_dim: int) -> None:
    Case(device, dtype, 9, head_dim=head_dim).check()


# 0: a first chunk; 7300: behind a picture of 10 views.
@pytest.mark.parametrize("start", [0, 1, 7300])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_starts(device: str, dtype: torch.dtype, start: int) -> None:
    Case(device, dtype, 9, 14, 2, start=start).check()


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_chunks_equal_the_whole(device: str, dtype: torch.dtype) -> None:
    whole, chunked = Case(device, dtype, 41), Case(device, dtype, 41)
    q = whole.run()
    for first, stop in ((0, 7), (7, 40), (40, 41)):
        rows = slice(first, stop)
        out = prefill_rope.rope_and_store(
            chunked.qkv[rows], chunked.cos[rows], chunked.sin[rows],
            chunked.k_cache, chunked.v_cache, chunked.start + first, **chunked.heads,
        )  # fmt: skip
        assert torch.equal(out, q[rows])
    assert torch.equal(chunked.k_cache, whole.k_cache)
    assert torch.equal(chunked.v_cache, whole.v_cache)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_row_does_not_see_the_others(device: str, dtype: torch.dtype) -> None:
    case = Case(device, dtype, 3)
    q = case.run().clone()
    k_cache, v_cache = case.k_cache.clone(), case.v_cache.clone()
    for x in (case.qkv, case.cos, case.sin):
        x[[0, 2]] = float("nan")
    assert torch.equal(case.run()[1], q[1])
    assert torch.equal(case.k_cache[:, case.start + 1], k_cache[:, case.start + 1])
    assert torch.equal(case.v_cache[:, case.start + 1], v_cache[:, case.start + 1])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_any_outer_strides(device: str, dtype: torch.dtype) -> None:
    plain, case = (Case(device, dtype, 9, 4, 2) for _ in range(2))
    q = plain.run()
    # Misaligned rows with NaN around them, and a cache of (positions, heads).
    wide = case.qkv.new_full((11, case.qkv.shape[1] + 9), float("nan"))
    wide[:9, 3:-6] = case.qkv
    case.qkv = wide[:9, 3:-6]
    for name in ("cos", "sin"):
        wide = case.qkv.new_full((10, 13), float("nan"))
        wide[:9, 2:10] = getattr(case, name)
        setattr(case, name, wide[:9, 2:10])
    for name in ("k_cache", "v_cache"):
        cache = getattr(case, name)
        wide = cache.new_full((cache.shape[1], 2, 31), HELD)
        setattr(case, name, wide[..., 7:23].transpose(0, 1))
    q_out = case.qkv.new_full((4, 9, 18), HELD)
    case.run(q_out[..., 1:17].transpose(0, 1))
    assert torch.equal(q_out[..., 1:17].transpose(0, 1), q)
    assert bool((q_out[..., [0, 17]] == HELD).all())
    assert torch.equal(case.k_cache, plain.k_cache)
    assert torch.equal(case.v_cache, plain.v_cache)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_no_rows(device: str, dtype: torch.dtype) -> None:
    case = Case(device, dtype, 0)
    assert case.run().shape == (0, 3, 16)
    assert bool((case.k_cache == HELD).all())


# 0.5B, 7B, 72B.
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(14, 2, 64), (28, 4, 128), (64, 8, 128)]
)
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_model_sizes(
    device: str, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    Case(device, dtype, 7300, num_heads, num_kv_heads, head_dim, start=41).check()


def test_supported_head_sizes() -> None:
    supported = [size for size in range(-8, 300) if prefill_rope.supports(size)]
    assert supported == list(range(2, 257, 2))


F16 = torch.float16
BAD_ARGUMENTS = {
    "qkv-f64": ("qkv", torch.zeros(5, 64).double(), TypeError, "qkv is"),
    "qkv-1d": ("qkv", torch.zeros(64), ValueError, "qkv has shape"),
    "qkv-part-of-a-head": ("qkv", torch.zeros(5, 65), ValueError, "qkv has shape"),
    "qkv-odd-head": ("qkv", torch.zeros(5, 12), ValueError, "qkv has shape"),
    "qkv-transposed": ("qkv", torch.zeros(64, 5).t(), ValueError, "qkv has last-dim"),
    "cos-f16": ("cos", torch.zeros(5, 8, dtype=F16), TypeError, "cos is"),
    "cos-whole": ("cos", torch.zeros(5, 16), ValueError, "cos has shape"),
    "sin-short": ("sin", torch.zeros(4, 8), ValueError, "sin has shape"),
    "sin-meta": ("sin", torch.zeros(5, 8, device="meta"), ValueError, "sin is on meta"),
    "k-f16": ("k_cache", torch.zeros(1, 9, 16, dtype=F16), TypeError, "k_cache is"),
    "k-2-heads": ("k_cache", torch.zeros(2, 9, 16), ValueError, "k_cache has shape"),
    "k-2d": ("k_cache", torch.zeros(9, 16), ValueError, "k_cache has shape"),
    "v-short": ("v_cache", torch.zeros(1, 8, 16), ValueError, "v_cache has shape"),
    "v-strided": ("v_cache", torch.zeros(1, 9, 32)[..., ::2], ValueError, "v_cache has last"),
    "q-flat": ("q_out", torch.zeros(5, 32), ValueError, "q_out has shape"),
    "q-f16": ("q_out", torch.zeros(5, 2, 16, dtype=F16), TypeError, "q_out is"),
    "no-heads": ("num_heads", 0, ValueError, "num_heads is 0"),
    "no-kv-heads": ("num_kv_heads", 0, ValueError, "num_kv_heads 0"),
    "negative-start": ("start", -1, ValueError, "start is -1"),
    "beyond-the-cache": ("start", 5, ValueError, "start is 5"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    changed, value, error, message = BAD_ARGUMENTS[name]
    arguments = {
        "qkv": torch.zeros(5, 64),
        "cos": torch.zeros(5, 8),
        "sin": torch.zeros(5, 8),
        "k_cache": torch.zeros(1, 9, 16),
        "v_cache": torch.zeros(1, 9, 16),
        "start": 4,
        "num_heads": 2,
        "num_kv_heads": 1,
        changed: value,
    }
    with pytest.raises(error, match=message):
        prefill_rope.rope_and_store(**arguments)
