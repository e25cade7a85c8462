"""Triton fused_linear against float64 and plain torch, by the accuracy rule."""

import pytest
import torch
from torch.nn import functional

from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params

fl = pytest.importorskip("ovfast.kernels.fused_linear", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]
NAN = float("nan")

# (activation, has a residual, gathers rows): the layers of the tower and the projector's first,
# then what no layer has: an activation before a residual.
LAYERS = {
    "qkv": (None, False, False),
    "out": (None, True, False),
    "fc1": ("gelu_tanh", False, False),
    "projector": ("gelu_erf", False, True),
    "all": ("gelu_tanh", True, True),
}


def make_case(
    layer: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> dict[str, torch.Tensor | str | None]:
    m, n, k = shape
    activation, has_residual, gathers = LAYERS[layer]
    generator = torch.Generator().manual_seed(m + 3 * n + 5 * k)
    num_rows = m + 3 if gathers else m
    rows = torch.randint(0, num_rows, (m,), generator=generator, dtype=torch.int32)
    return {
        "x": torch.randn(num_rows, k, generator=generator).to(dtype),
        # Sums of order one: what enters the activations of a real tower.
        "weight": (torch.randn(n, k, generator=generator) * k**-0.5).to(dtype),
        "bias": torch.randn(n, generator=generator).to(dtype),
        "activation": activation,
        "residual": torch.randn(m, n, generator=generator).to(dtype) if has_residual else None,
        "rows": rows if gathers else None,
    }


def oracle(case: dict[str, torch.Tensor | str | None], dtype: torch.dtype) -> torch.Tensor:
    """The layer in `dtype`, step by step as plain torch rounds it."""
    x = case["x"].to(dtype)
    if case["rows"] is not None:
        x = x[case["rows"].long()]
    out = functional.linear(x, case["weight"].to(dtype), case["bias"].to(dtype))
    if case["activation"] is not None:
        approximate = "tanh" if case["activation"] == "gelu_tanh" else "none"
        out = functional.gelu(out, approximate=approximate)
    return out if case["residual"] is None else case["residual"].to(dtype) + out


def to(case: dict[str, torch.Tensor | str | None], device: str) -> dict[str, object]:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in case.items()
    }


def check_case(
    device: str, dtype: torch.dtype, layer: str, shape: tuple[int, int, int]
) -> torch.Tensor:
    case = make_case(layer, shape, dtype)
    out = fl.fused_linear(**to(case, device)).cpu()
    assert_two_times_rule(out, oracle(case, dtype), oracle(case, torch.float64))
    return out


# 1: one of everything; 41: odd; 150 × 200 × 144: several tiles, none whole, and the demo tower's
# depth; 128 × 128 × 128: whole tiles and no mask along K.
@pytest.mark.parametrize("shape", [(1, 1, 1), (41, 41, 41), (150, 200, 144), (128, 128, 128)])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_layers(device: str, dtype: torch.dtype, layer: str, shape: tuple[int, int, int]) -> None:
    check_case(device, dtype, layer, shape)


# One view and a picture of 1024 × 768; too much work for the interpreter.
@pytest.mark.parametrize("num_views", [1, 7])
@pytest.mark.parametrize(
    ("layer", "width", "depth"),
    [
        ("qkv", 3456, 1152),
        ("out", 1152, 1152),
        ("fc1", 4304, 1152),
        ("out", 1152, 4304),
        ("projector", 896, 1152),
        ("projector", 3584, 1152),
    ],
)
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_real_sizes(
    device: str, dtype: torch.dtype, layer: str, width: int, depth: int, num_views: int
) -> None:
    check_case(device, dtype, layer, (729 * num_views, width, depth))


def inside_nan(tensor: torch.Tensor, after: int = 5) -> torch.Tensor:
    """The same values as part of a wider tensor of NaN, with rows of NaN around."""
    if tensor.ndim == 1:
        return inside_nan(tensor[None], after)[0]
    num_rows, width = tensor.shape
    whole = torch.full((num_rows + 2, width + 3 + after), NAN, dtype=tensor.dtype)
    whole[1:-1, 3 : 3 + width] = tensor
    return whole[1:-1, 3 : 3 + width]


@pytest.mark.parametrize("layer", ["out", "all"])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_rows_at_any_stride_and_nothing_beside_them(
    device: str, dtype: torch.dtype, layer: str
) -> None:
    case = make_case(layer, (41, 70, 90), dtype)
    expected = fl.fused_linear(**to(case, device))
    case |= {name: inside_nan(case[name]) for name in ("x", "weight", "bias", "residual")}
    wide = torch.full((43, 80), 9.0, dtype=dtype, device=device)
    out = wide[1:42, 4:74]
    # Strides survive only within one device: .to() of a view would make it contiguous.
    moved = {name: to({name: value}, device)[name] for name, value in case.items()}
    for name in ("x", "weight", "bias", "residual"):
        whole = case[name]._base.to(device)
        moved[name] = whole.as_strided(
            case[name].shape, case[name].stride(), case[name].storage_offset()
        )
    assert fl.fused_linear(**moved, out=out) is out
    assert torch.equal(out, expected)
    wide[1:42, 4:74] = 9.0
    assert bool((wide == 9).all())


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_gathered_rows_are_those_of_a_copy(device: str, dtype: torch.dtype) -> None:
    case = to(make_case("projector", (70, 41, 100), dtype), device)
    rows = case["rows"].long()
    copied = fl.fused_linear(**(case | {"x": case["x"][rows], "rows": None}))
    unused = torch.ones(case["x"].shape[0], dtype=torch.bool, device=device)
    unused[rows] = False
    case["x"][unused] = NAN
    assert torch.equal(fl.fused_linear(**case), copied)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_residual_in_place(device: str, dtype: torch.dtype) -> None:
    case = to(make_case("out", (70, 150, 41), dtype), device)
    expected = fl.fused_linear(**case)
    assert fl.fused_linear(**case, out=case["residual"]) is case["residual"]
    assert torch.equal(case["residual"], expected)


def assert_views_alone_equal_views_together(
    device: str, dtype: torch.dtype, layer: str, shape: tuple[int, int, int], num_views: int
) -> None:
    tokens, width, depth = shape
    case = to(make_case(layer, (tokens * num_views, width, depth), dtype), device)
    together = fl.fused_linear(**case)
    for view in range(num_views):
        of_view = slice(view * tokens, (view + 1) * tokens)
        alone = dict(case)
        for name in ("residual", "rows") if case["rows"] is not None else ("x", "residual"):
            if case[name] is not None:
                alone[name] = case[name][of_view]
        assert torch.equal(fl.fused_linear(**alone), together[of_view])


@pytest.mark.parametrize("layer", ["out", "projector"])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_view_does_not_depend_on_its_neighbours(
    device: str, dtype: torch.dtype, layer: str
) -> None:
    # 128: views start at the start of a tile. The interpreter's products are those of a BLAS, which
    # sums the last rows of a tile in another order than the first; the gpu test below has 729.
    assert_views_alone_equal_views_together(device, dtype, layer, (128, 72, 144), num_views=3)


# Widths and depths of the tower: one view and seven take different tiles.
@pytest.mark.parametrize(
    ("layer", "width", "depth"),
    [("qkv", 3456, 1152), ("fc1", 4304, 1152), ("out", 1152, 4304), ("projector", 896, 1152)],
)
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_a_real_view_does_not_depend_on_its_neighbours(
    device: str, dtype: torch.dtype, layer: str, width: int, depth: int
) -> None:
    assert_views_alone_equal_views_together(device, dtype, layer, (729, width, depth), num_views=7)


@pytest.mark.parametrize("shape", [(300, 1152, 1152), (300, 200, 4304)])
@pytest.mark.parametrize(
    ("device", "dtype"), [param for param in CUDA_PARAMS if param.values[1] != torch.float32]
)
def test_every_tile_gives_the_same_bits(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    case = to(make_case("all", shape, dtype), device)
    first, *others = (fl.fused_linear(**case, tile=tile) for tile, _ in fl._HALF_TILES)
    for other in others:
        assert torch.equal(other, first)


def test_tiles_follow_the_number_of_views() -> None:
    def block(num_views: int, width: int) -> tuple[int, int]:
        return fl.launch_config(729 * num_views, width, torch.bfloat16)[:2]

    assert block(1, 1152) == (64, 128)  # 108 tiles; of 128 × 256 there would be 30
    assert block(7, 3456) == (128, 256)
    assert block(37, 1152) == (128, 256)
    # The same steps along K whatever the tile, or a view's bits would depend on its neighbours.
    assert {tile.block_k for tile, _ in fl._HALF_TILES} == {64}


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_no_rows(device: str, dtype: torch.dtype) -> None:
    x = torch.ones(0, 8, dtype=dtype, device=device)
    weight = torch.ones(3, 8, dtype=dtype, device=device)
    out = fl.fused_linear(x, weight, weight[:, 0].contiguous())
    assert out.shape == (0, 3)
    assert out.dtype == dtype


BAD_ARGUMENTS = {
    "x-f64": ("x", torch.zeros(5, 8, dtype=torch.float64), TypeError, "x is"),
    "x-1d": ("x", torch.zeros(8), ValueError, "x has shape"),
    "x-no-columns": ("x", torch.zeros(5, 0), ValueError, "x has shape"),
    "x-transposed": ("x", torch.zeros(8, 5).t(), ValueError, "x has last-dim"),
    "weight-f16": ("weight", torch.zeros(3, 8, dtype=torch.float16), TypeError, "weight is"),
    "weight-narrow": ("weight", torch.zeros(3, 7), ValueError, "weight has shape"),
    "weight-1d": ("weight", torch.zeros(8), ValueError, "weight has shape"),
    "weight-no-rows": ("weight", torch.zeros(0, 8), ValueError, "weight has shape"),
    "weight-transposed": ("weight", torch.zeros(8, 3).t(), ValueError, "weight has last-dim"),
    "bias-long": ("bias", torch.zeros(4), ValueError, "bias has shape"),
    "bias-strided": ("bias", torch.zeros(6)[::2], ValueError, "bias has last-dim"),
    "bias-meta": ("bias", torch.zeros(3, device="meta"), ValueError, "bias is on meta"),
    "activation": ("activation", "relu", ValueError, "activation is 'relu'"),
    "residual-short": ("residual", torch.zeros(4, 3), ValueError, "residual has shape"),
    "residual-f16": ("residual", torch.zeros(5, 3).half(), TypeError, "residual is"),
    "rows-int64": ("rows", torch.zeros(5, dtype=torch.int64), TypeError, "rows is"),
    "rows-2d": ("rows", torch.zeros(5, 1, dtype=torch.int32), ValueError, "rows has shape"),
    "out-narrow": ("out", torch.zeros(5, 2), ValueError, "out has shape"),
    "out-transposed": ("out", torch.zeros(3, 5).t(), ValueError, "out has last-dim"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    argument, value, error, message = BAD_ARGUMENTS[name]
    arguments = {"x": torch.zeros(5, 8), "weight": torch.zeros(3, 8), "bias": torch.zeros(3)}
    with pytest.raises(error, match=message):
        fl.fused_linear(**(arguments | {argument: value}))
