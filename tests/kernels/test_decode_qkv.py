"""Triton decode_qkv against a float64 truth and plain torch, by the accuracy rule."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ovfast import reference
from tests.kernels.decode_oracle import (
    EPS,
    ROWS,
    randn,
    residual_and_partials,
    rms_norm,
    rms_norm_truth,
    summed,
)
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params

decode_qkv = pytest.importorskip("ovfast.kernels.decode_qkv", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]
SENTINEL = 7.0  # in caches and outputs, where nothing may be written


@dataclass(frozen=True, slots=True)
class Sizes:
    hidden_size: int = 192
    num_heads: int = 3
    num_kv_heads: int = 1
    head_dim: int = 64
    num_slots: int = 20
    max_positions: int = 9


DEMO = Sizes()
ODD = Sizes(hidden_size=64, num_heads=7, head_dim=16)
LOOP = Sizes(hidden_size=1032, num_heads=1, head_dim=32)

# Slots by row, and their positions: batches of 1, 2, 5 and 16, with unused rows between.
BATCHES = {
    1: ([3], [0]),
    2: ([-1, 0, -1, 5], [0, 8, 0, 4]),
    5: ([4, -1, 2, 0, -1, -1, 1, 3], [8, 99, 0, 3, 99, 99, 7, 1]),
    16: (list(range(19, 3, -1)), [row % 9 for row in range(16)]),
}


def make_arguments(
    device: str, dtype: torch.dtype, sizes: Sizes, batch: int, num_partials: int
) -> dict[str, Any]:
    width, dim = sizes.hidden_size, sizes.head_dim
    num_weights = (sizes.num_heads + 2 * sizes.num_kv_heads) * dim
    residual, partials = residual_and_partials(device, width, num_partials)
    slots, positions = BATCHES[batch]
    angles = randn(sizes.max_positions, dim // 2, seed=5) * 3
    rest = ROWS - len(slots)
    cache_shape = (sizes.num_slots, sizes.num_kv_heads, sizes.max_positions, dim)
    weights = {
        "norm_weight": 1 + randn(width, seed=3, scale=0.2),
        "weight": randn(num_weights, width, seed=4, scale=width**-0.5),
        "bias": randn(num_weights, seed=6),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "q": torch.full((ROWS, sizes.num_heads * dim), SENTINEL),
        "k_cache": torch.full(cache_shape, SENTINEL),
        "v_cache": torch.full(cache_shape, SENTINEL),
    }
    return {
        "residual_in": residual,
        "partials": partials,
        "residual_out": torch.full_like(residual, SENTINEL),
        "eps": EPS,
        "slots": torch.tensor(slots + [-1] * rest, dtype=torch.int32, device=device),
        "positions": torch.tensor(positions + [99] * rest, dtype=torch.int32, device=device),
        **{name: tensor.to(device, dtype) for name, tensor in weights.items()},
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "num_rows": len(slots),
    }


def launch(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs the kernel with the weight packed; `arguments` has it as upstream has."""
    heads = arguments["num_heads"], arguments["num_kv_heads"]
    head_dim = arguments["k_cache"].shape[-1]
    packed = decode_qkv.pack_qkv_rows(*heads, head_dim).to(arguments["weight"].device)
    weight, bias = arguments["weight"][packed], arguments["bias"][packed]
    decode_qkv.decode_qkv(**arguments | {"weight": weight, "bias": bias})
    return arguments


def expected(arguments: dict[str, Any], upcast: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of every used row, in order."""
    a = arguments
    used = a["slots"] >= 0
    inputs = a["residual_in"], a["partials"]
    if upcast:
        x = rms_norm_truth(*inputs, a["norm_weight"])
    else:
        x = rms_norm(summed(*inputs), a["norm_weight"])
    qkv = reference.linear(x[used], a["weight"], a["bias"], upcast=upcast)
    qkv = qkv.unflatten(1, (-1, a["k_cache"].shape[-1]))
    positions = a["positions"][used].long()
    tables = a["cos"][positions], a["sin"][positions]
    num_heads, num_kv_heads = a["num_heads"], a["num_kv_heads"]
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), 1)
    q, k = (reference.rope(y.clone(), *tables, upcast=upcast) for y in (q, k))
    return q.flatten(1), k, v


def check_case(arguments: dict[str, Any]) -> None:
    launch(arguments)
    a = arguments
    used = (a["slots"] >= 0).nonzero()[:, 0]
    slots, positions = a["slots"][used].long(), a["positions"][used].long()
    found = a["q"][used], a["k_cache"][slots, :, positions], a["v_cache"][slots, :, positions]
    same_dtype, truth = expected(a, upcast=False), expected(a, upcast=True)
    for out, out_same, out_truth in zip(found, same_dtype, truth, strict=True):
        assert_two_times_rule(out, out_same, out_truth)
    # Nothing else was written.
    a["q"][used] = SENTINEL
    for cache in (a["k_cache"], a["v_cache"]):
        cache[slots, :, positions] = SENTINEL
        assert bool((cache == SENTINEL).all())
    assert bool((a["q"] == SENTINEL).all())
    rows = a["num_rows"]
    assert torch.equal(a["residual_out"][:rows], summed(a["residual_in"], a["partials"])[:rows])
    assert bool((a["residual_out"][rows:] == SENTINEL).all())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_batches(device: str, dtype: torch.dtype, batch: int) -> None:
    check_case(make_arguments(device, dtype, DEMO, batch, num_partials=1))


# LOOP has more columns than one tile, and 8 of its last.
@pytest.mark.parametrize("num_partials", [0, 5])
@pytest.mark.parametrize("sizes", [ODD, LOOP], ids=["odd", "loop"])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_sizes(device: str, dtype: torch.dtype, sizes: Sizes, num_partials: int) -> None:
    check_case(make_arguments(device, dtype, sizes, 5, num_partials))


@pytest.mark.parametrize("sizes", [ODD, LOOP], ids=["odd", "loop"])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_row_does_not_see_the_others(device: str, dtype: torch.dtype, sizes: Sizes) -> None:
    whole = launch(make_arguments(device, dtype, sizes, 16, num_partials=2))
    for row in (0, 6, 15):
        alone = make_arguments(device, dtype, sizes, 16, num_partials=2)
        for name in ("residual_in", "partials", "slots", "positions"):
            rows = alone[name].movedim(-2, 0) if alone[name].ndim > 1 else alone[name]
            rows[0] = rows[row].clone()
            if rows.ndim > 1:
                rows[1:] = float("nan")
        launch(alone | {"num_rows": 1})
        assert torch.equal(alone["q"][0], whole["q"][row])
        assert torch.equal(alone["residual_out"][0], whole["residual_out"][row])
        slot, position = int(whole["slots"][row]), int(whole["positions"][row])
        for name in ("k_cache", "v_cache"):
            written = alone[name][slot, :, position]
            assert torch.equal(written, whole[name][slot, :, position])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_strides_and_what_lies_behind(device: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(device, dtype, ODD, 5, num_partials=1)
    plain = launch(make_arguments(device, dtype, ODD, 5, num_partials=1))
    # Slots and layers of one cache lie apart; the weight has NaN beside its columns.
    shape = arguments["k_cache"].shape
    both = torch.full((shape[2], shape[0], 2, shape[1], shape[3] + 3), SENTINEL).to(device, dtype)
    views = [both[:, :, layer, :, 1 : 1 + shape[3]].permute(1, 2, 0, 3) for layer in (0, 1)]
    caches = dict(zip(("k_cache", "v_cache"), views, strict=True))
    packed = decode_qkv.pack_qkv_rows(7, 1, 16).to(device)
    weight = arguments["weight"]
    wide = weight.new_full((weight.shape[0] + 16, weight.shape[1] + 8), float("nan"))
    view = wide[: weight.shape[0], : weight.shape[1]]
    view.copy_(weight[packed])
    changed = caches | {"weight": view, "bias": arguments["bias"][packed]}
    decode_qkv.decode_qkv(**arguments | changed)
    assert torch.equal(caches["k_cache"], plain["k_cache"])
    assert torch.equal(caches["v_cache"], plain["v_cache"])
    assert torch.equal(arguments["q"], plain["q"])
    caches["k_cache"].fill_(SENTINEL)
    caches["v_cache"].fill_(SENTINEL)
    assert bool((both == SENTINEL).all())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "sizes",
    [Sizes(896, 14, 2, 64, 20, 64), Sizes(3584, 28, 4, 128, 20, 64)],
    ids=["0.5b", "7b"],
)
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_real_sizes(device: str, dtype: torch.dtype, sizes: Sizes, batch: int) -> None:
    check_case(make_arguments(device, dtype, sizes, batch, num_partials=5))


@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_programmatic_launch_changes_nothing(device: str, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs sm_90")
    plain = launch(make_arguments(device, dtype, DEMO, 16, num_partials=5))
    early = launch(make_arguments(device, dtype, DEMO, 16, num_partials=5) | {"pdl": True})
    for name in ("q", "k_cache", "v_cache", "residual_out"):
        assert torch.equal(plain[name], early[name])


def test_pack_qkv_rows() -> None:
    assert decode_qkv.pack_qkv_rows(1, 1, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 9, 10, 11]


BAD_ARGUMENTS = {
    "weight-f64": ("weight", torch.zeros(144, 64, dtype=torch.float64), TypeError, "weight is"),
    "weight-narrow": ("weight", torch.zeros(144, 60), ValueError, "weight has shape"),
    "weight-rows": ("weight", torch.zeros(143, 64), ValueError, "weight has 143 rows"),
    "weight-transposed": ("weight", torch.zeros(64, 144).t(), ValueError, "weight has last"),
    "head-dim": ("weight", torch.zeros(72, 64), ValueError, "head_dim is 8"),
    "no-heads": ("num_heads", 0, ValueError, "weight has"),
    "rows": ("num_rows", 17, ValueError, "num_rows is 17"),
    "residual-f16": ("residual_in", torch.zeros(16, 64).half(), TypeError, "residual_in is"),
    "residual-rows": ("residual_in", torch.zeros(15, 64), ValueError, "residual_in has shape"),
    "partials-2d": ("partials", torch.zeros(16, 64), ValueError, "partials has shape"),
    "partials-strided": (
        "partials",
        torch.zeros(1, 16, 128)[..., ::2],
        ValueError,
        "partials has strides",
    ),
    "out-rows": ("residual_out", torch.zeros(15, 64), ValueError, "residual_out has shape"),
    "norm-short": ("norm_weight", torch.zeros(63), ValueError, "norm_weight has shape"),
    "bias-f16": ("bias", torch.zeros(144).half(), TypeError, "bias is"),
    "cos-short": ("cos", torch.zeros(8, 8), ValueError, "cos has shape"),
    "sin-meta": ("sin", torch.zeros(9, 8, device="meta"), ValueError, "sin is on meta"),
    "slots-i64": ("slots", torch.zeros(16, dtype=torch.int64), TypeError, "slots is"),
    "positions": ("positions", torch.zeros(9, dtype=torch.int32), ValueError, "positions has"),
    "q-wide": ("q", torch.zeros(16, 144), ValueError, "q has shape"),
    "k-cache-3d": ("k_cache", torch.zeros(20, 9, 16), ValueError, "k_cache has shape"),
    "v-cache-strided": (
        "v_cache",
        torch.zeros(20, 1, 16, 9).mT,
        ValueError,
        "v_cache has last-dim",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    argument, value, error, message = BAD_ARGUMENTS[name]
    arguments = make_arguments("cpu", torch.float32, ODD, 1, 1) | {argument: value}
    with pytest.raises(error, match=message):
        decode_qkv.decode_qkv(**arguments)


def test_residual_needs_two_buffers() -> None:
    arguments = make_arguments("cpu", torch.float32, replace(ODD), 1, 1)
    arguments["residual_out"] = arguments["residual_in"]
    with pytest.raises(ValueError, match="two buffers"):
        decode_qkv.decode_qkv(**arguments)
