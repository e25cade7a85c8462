"""Triton decode attention against a float64 truth and plain torch, by the accuracy rule."""

import pytest
import torch

from ovfast import reference
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params

decode = pytest.importorskip("ovfast.kernels.decode_attention", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]
ROWS = 16
NAN = float("nan")


class Case:
    """Rows of given lengths in slots of their own, backwards; everything unused is NaN."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        lengths: dict[int, int],
        group: int = 7,
        num_kv_heads: int = 1,
        head_dim: int = 64,
        scale: float = 1.0,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(lengths.values()) + 10 * head_dim + group)

        def random(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        most = max(lengths.values())
        self.lengths = lengths
        self.num_splits = -(-most // decode.SPLIT)
        cache = (len(lengths) + 1, num_kv_heads, most + 3, head_dim)
        self.q = torch.full((ROWS, group * num_kv_heads, head_dim), NAN, dtype=dtype, device=device)
        self.k = torch.full(cache, NAN, dtype=dtype, device=device)
        self.v = self.k.clone()
        self.slots = torch.full((ROWS,), -1, dtype=torch.int32, device=device)
        self.positions = torch.full((ROWS,), 2**31 - 1, dtype=torch.int32, device=device)
        for index, (row, length) in enumerate(lengths.items()):
            slot = len(lengths) - index
            self.q[row] = random(group * num_kv_heads, head_dim)
            self.k[slot, :, :length] = random(num_kv_heads, length, head_dim)
            self.v[slot, :, :length] = random(num_kv_heads, length, head_dim)
            self.slots[row] = slot
            self.positions[row] = length - 1

    def partials(self, max_splits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = (ROWS, self.q.shape[1], max_splits)
        acc = torch.full((*shape, self.q.shape[2]), NAN, device=self.q.device)
        return acc, acc[..., 0].clone(), acc[..., 0].clone()

    def run(
        self, num_splits: int | None = None, num_rows: int = ROWS
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_splits = self.num_splits if num_splits is None else num_splits
        acc, m, sums = self.partials(num_splits + 1)
        decode.decode_attention(
            self.q, self.k, self.v, self.slots, self.positions, acc, m, sums,
            num_splits=num_splits, num_rows=num_rows,
        )  # fmt: skip
        return acc, m, sums

    def combined(self, *partials: torch.Tensor) -> torch.Tensor:
        """What the output projection makes of the partial results; zeros for unused rows."""
        out = torch.zeros_like(self.q)
        for row, length in self.lengths.items():
            if int(self.slots[row]) >= 0:
                used = slice(-(-length // decode.SPLIT))
                acc, m, sums = (x[row, :, used] for x in partials)
                share = torch.exp2(m - m.max(dim=1, keepdim=True).values)
                total = (sums * share).sum(dim=1, keepdim=True)
                out[row] = ((acc * share[..., None]).sum(dim=1) / total).to(out.dtype)
        return out

    def expected(self, row: int, upcast: bool) -> torch.Tensor:
        slot, length = int(self.slots[row]), self.lengths[row]
        k, v = self.k[slot, :, :length], self.v[slot, :, :length]
        out = reference.decode_attention(self.q[row][None], k, v, upcast=upcast)
        return out.view(self.q.shape[1:])

    def check(self) -> None:
        out = self.combined(*self.run())
        for row in range(ROWS):
            if row not in self.lengths:
                assert bool((out[row] == 0).all())
                continue
            same_dtype, truth = self.expected(row, upcast=False), self.expected(row, upcast=True)
            assert_two_times_rule(out[row], same_dtype, truth)


# 1: one key; 2; 255, 256, 257: around one split; 511, 513: around two; 3000: twelve.
@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 511, 513, 3000])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_lengths(device: str, dtype: torch.dtype, length: int) -> None:
    Case(device, dtype, {0: length}).check()


# 7: 0.5B and 7B; 8: 72B; 1: no grouping; 16: no padding.
@pytest.mark.parametrize(("group", "num_kv_heads"), [(7, 2), (8, 1), (8, 4), (1, 2), (16, 1)])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_groups(device: str, dtype: torch.dtype, group: int, num_kv_heads: int) -> None:
    Case(device, dtype, {0: 300}, group, num_kv_heads).check()


# 16 and 32: the tests' and the demo's; 128: 7B and 72B; 8, 40, 120: padded.
@pytest.mark.parametrize("head_dim", [8, 16, 32, 40, 120, 128])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_head_sizes(device: str, dtype: torch.dtype, head_dim: int) -> None:
    Case(device, dtype, {0: 300}, head_dim=head_dim).check()


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_large_scores_do_not_overflow(device: str, dtype: torch.dtype) -> None:
    # q · k / 8 reaches a few thousand: exp of it overflows float32 by far.
    Case(device, dtype, {0: 600}, scale=30.0).check()


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_scores_far_below_zero(device: str, dtype: torch.dtype) -> None:
    # Masked keys must count as -inf: a score of 0 would outweigh all others.
    case = Case(device, dtype, {0: 290})
    case.q.fill_(4.0)
    case.k.sub_(1.0)
    case.check()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_splits_of_different_weight(device: str, dtype: torch.dtype, sign: int) -> None:
    # Scores that grow or fall along the keys: the largest is in the last split or in the first.
    case = Case(device, dtype, {0: 700})
    case.q.abs_()
    case.k.add_(sign * torch.arange(case.k.shape[2], device=device)[:, None] / 700)
    case.check()


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_partials_of_a_split(device: str, dtype: torch.dtype) -> None:
    case = Case(device, dtype, {0: 300}, head_dim=16)
    acc, m, sums = (x[0].double().cpu() for x in case.run())
    q, k, v = (x.double().cpu() for x in (case.q[0], case.k[1, 0, :300], case.v[1, 0, :300]))
    scores = q @ k.T / 4 / torch.log(torch.tensor(2.0, dtype=torch.float64))
    for split, keys in enumerate((slice(0, 256), slice(256, 300))):
        largest = scores[:, keys].amax(1)
        p = (scores[:, keys] - largest[:, None]).exp2()
        # The probabilities have met v rounded, l has not.
        torch.testing.assert_close(m[:, split], largest, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums[:, split], p.sum(1), rtol=1e-5, atol=0.0)
        bound = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        error = (acc[:, split] - p @ v[keys]).abs()
        assert bool((error <= bound * (p @ v[keys].abs())).all())


# Unused rows between used ones; their positions and everything behind a row's last key are NaN or
# far out of the cache. Rows from num_rows on are unused too.
LENGTHS = {0: 5, 1: 700, 4: 256, 5: 1, 9: 300}


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_mixed_lengths(device: str, dtype: torch.dtype) -> None:
    Case(device, dtype, LENGTHS, group=2, head_dim=16).check()


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_row_does_not_see_the_others(device: str, dtype: torch.dtype) -> None:
    case = Case(device, dtype, LENGTHS, group=2, head_dim=16)
    partials = case.run()
    combined = case.combined(*partials)
    slots = case.slots.clone()
    for row, length in LENGTHS.items():
        case.slots.fill_(-1)
        case.slots[row] = slots[row]
        # As few splits and rows as the row needs.
        needed = -(-length // decode.SPLIT)
        alone = case.run(needed, row + 1)
        for beside, x in zip(partials, alone, strict=True):
            assert torch.equal(x[row, :, :needed], beside[row, :, :needed])
        assert torch.equal(case.combined(*alone)[row], combined[row])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_more_splits_than_needed(device: str, dtype: torch.dtype) -> None:
    case = Case(device, dtype, LENGTHS, group=2, head_dim=16)
    exact, many = case.run(), case.run(5)
    for a, b in zip(exact, many, strict=True):
        written = torch.zeros(b.shape[:3], dtype=torch.bool, device=device)
        for row, length in LENGTHS.items():
            needed = -(-length // decode.SPLIT)
            assert torch.equal(a[row, :, :needed], b[row, :, :needed])
            written[row, :, :needed] = True
        # Unused rows and splits keep what they held.
        assert bool(b[~written].isnan().all())
        assert not bool(b[written].isnan().any())
    assert torch.equal(case.combined(*exact), case.combined(*many))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_rows_from_num_rows_on_are_unused(device: str, dtype: torch.dtype) -> None:
    case = Case(device, dtype, LENGTHS, group=2, head_dim=16)
    whole, part = case.run(), case.run(num_rows=5)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[4, :, :1], b[4, :, :1])
        assert bool(b[5:].isnan().all())
    for nothing in (case.run(0), case.run(num_rows=0)):
        assert all(bool(x.isnan().all()) for x in nothing)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_any_outer_strides(device: str, dtype: torch.dtype) -> None:
    case = Case(device, dtype, {0: 300, 3: 20}, group=2, num_kv_heads=2, head_dim=16)
    plain = case.run()
    out = case.combined(*plain)
    # A cache of (positions, heads, slots), heads before rows in q and in the partial results.
    for name in ("k", "v"):
        cache = getattr(case, name)
        wide = torch.full((*cache.shape[2::-1], 24), NAN, dtype=dtype, device=device)
        wide[..., 5:21] = cache.permute(2, 1, 0, 3)
        setattr(case, name, wide[..., 5:21].permute(2, 1, 0, 3))
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    acc, m, sums = case.partials(3)
    acc = acc.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    m, sums = (torch.stack([x, x], dim=3)[..., 1] for x in (m, sums))
    decode.decode_attention(
        case.q, case.k, case.v, case.slots, case.positions, acc, m, sums, num_splits=2
    )
    for row, needed in ((0, 2), (3, 1)):
        for a, b in zip(plain, (acc, m, sums), strict=True):
            assert torch.equal(a[row, :, :needed], b[row, :, :needed])
    assert torch.equal(case.combined(acc, m, sums), out)


# 16 rows of up to 32 768 positions; rows of one length, and alone.
@pytest.mark.parametrize(
    ("group", "num_kv_heads", "head_dim"), [(7, 2, 64), (7, 4, 128), (8, 8, 128)]
)
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_model_sizes(
    device: str, dtype: torch.dtype, group: int, num_kv_heads: int, head_dim: int
) -> None:
    lengths = {row: 1 + 547 * row for row in range(ROWS)} | {3: 32_768}
    Case(device, dtype, lengths, group, num_kv_heads, head_dim).check()


@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_a_cache_beyond_2_31_elements(device: str, dtype: torch.dtype) -> None:
    case = Case(device, dtype, {0: 300}, head_dim=128)
    out = case.combined(*case.run())
    num_slots = 2**31 // (303 * 128) + 2
    for name in ("k", "v"):
        large = torch.empty(num_slots, 1, 303, 128, dtype=dtype, device=device)
        large[-1] = getattr(case, name)[1]
        setattr(case, name, large)
    case.slots[0] = num_slots - 1
    assert torch.equal(case.combined(*case.run()), out)


@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_started_before_the_previous_kernel_ends(device: str, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90")
    case = Case(device, dtype, {0: 300, 3: 20}, num_kv_heads=2)
    plain = case.run()
    acc, m, sums = case.partials(3)
    inputs = (case.q, case.k, case.v, case.slots, case.positions)
    decode.decode_attention(*inputs, acc, m, sums, num_splits=2, pdl=True)
    for a, b in zip(plain, (acc, m, sums), strict=True):
        assert torch.equal(a[0, :, :2], b[0, :, :2])
        assert torch.equal(a[3, :, :1], b[3, :, :1])


def test_supported_head_sizes() -> None:
    assert [size for size in range(-8, 300) if decode.supports(size)] == list(range(8, 129, 8))


F16 = torch.float16
BAD_ARGUMENTS = {
    "q-f64": ("q", torch.zeros(16, 4, 16).double(), TypeError, "q is"),
    "q-15-rows": ("q", torch.zeros(15, 4, 16), ValueError, "q has shape"),
    "q-flat": ("q", torch.zeros(16, 64), ValueError, "q has shape"),
    "q-no-heads": ("q", torch.zeros(16, 0, 16), ValueError, "q has shape"),
    "q-3-heads": ("q", torch.zeros(16, 3, 16), ValueError, "q has 3 heads and the cache 2"),
    "q-34-heads": ("q", torch.zeros(16, 34, 16), ValueError, "q has 34 heads"),
    "q-head-12": ("q", torch.zeros(16, 4, 12), ValueError, "q has heads of 12"),
    "q-head-136": ("q", torch.zeros(16, 4, 136), ValueError, "q has heads of 136"),
    "q-transposed": ("q", torch.zeros(16, 16, 4).transpose(1, 2), ValueError, "q has last-dim"),
    "k-f16": ("k_cache", torch.zeros(3, 2, 9, 16, dtype=F16), TypeError, "k_cache is"),
    "k-narrow": ("k_cache", torch.zeros(3, 2, 9, 8), ValueError, "k_cache has shape"),
    "k-3d": ("k_cache", torch.zeros(2, 9, 16), ValueError, "k_cache has shape"),
    "k-meta": ("k_cache", torch.zeros(3, 2, 9, 16, device="meta"), ValueError, "k_cache is on"),
    "v-f16": ("v_cache", torch.zeros(3, 2, 9, 16, dtype=F16), TypeError, "v_cache is"),
    "v-short": ("v_cache", torch.zeros(3, 2, 8, 16), ValueError, "v_cache has shape"),
    "v-strided": ("v_cache", torch.zeros(3, 2, 9, 32)[..., ::2], ValueError, "v_cache has last"),
    "slots-i64": ("slots", torch.zeros(16, dtype=torch.int64), TypeError, "slots is"),
    "slots-short": ("slots", torch.zeros(15, dtype=torch.int32), ValueError, "slots has shape"),
    "slots-strided": ("slots", torch.zeros(32, dtype=torch.int32)[::2], ValueError, "slots has"),
    "positions-f32": ("positions", torch.zeros(16), TypeError, "positions is"),
    "positions-2d": ("positions", torch.zeros(16, 1).int(), ValueError, "positions has shape"),
    "acc-f16": ("acc", torch.zeros(16, 4, 2, 16, dtype=F16), TypeError, "acc is"),
    "acc-3d": ("acc", torch.zeros(16, 4, 16), ValueError, "acc has shape"),
    "acc-narrow": ("acc", torch.zeros(16, 4, 2, 8), ValueError, "acc has shape"),
    "acc-strided": ("acc", torch.zeros(16, 4, 2, 32)[..., ::2], ValueError, "acc has last"),
    "m-f16": ("m", torch.zeros(16, 4, 2, dtype=F16), TypeError, "m is"),
    "m-3-splits": ("m", torch.zeros(16, 4, 3), ValueError, "m has shape"),
    "l-meta": ("l", torch.zeros(16, 4, 2, device="meta"), ValueError, "l is on meta"),
    "too-many-splits": ("num_splits", 3, ValueError, "num_splits 3"),
    "too-many-rows": ("num_rows", 17, ValueError, "num_rows is 17"),
    "negative-rows": ("num_rows", -1, ValueError, "num_rows is -1"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    changed, value, error, message = BAD_ARGUMENTS[name]
    arguments = {
        "q": torch.zeros(16, 4, 16),
        "k_cache": torch.zeros(3, 2, 9, 16),
        "v_cache": torch.zeros(3, 2, 9, 16),
        "slots": torch.full((16,), -1, dtype=torch.int32),
        "positions": torch.zeros(16, dtype=torch.int32),
        "acc": torch.zeros(16, 4, 2, 16),
        "m": torch.zeros(16, 4, 2),
        "l": torch.zeros(16, 4, 2),
        "num_splits": 1,
        changed: value,
    }
    with pytest.raises(error, match=message):
        decode.decode_attention(**arguments)
