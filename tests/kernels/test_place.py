"""Triton project_and_place against float64 and plain torch; copied rows exactly."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params
from tests.support.row_tables import NEWLINE, TEXT, Table, pooled_table, random_table, with_text

place = pytest.importorskip("ovfast.kernels.place", reason="needs triton")
fl = pytest.importorskip("ovfast.kernels.fused_linear", reason="needs triton")

CUDA_PARAMS = [param for param in kernel_params() if param.values[0] == "cuda"]
NAN = float("nan")
NUM_WORDS = 7


def kept_table(sources: list[int]) -> Table:
    index = torch.tensor(sources, dtype=torch.int32)[:, None].repeat(1, 4)
    return index, torch.tensor([[1.0, 0, 0, 0]]).repeat(len(sources), 1)


def make_case(
    table: Table, num_sources: int, d: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    index, weight = table
    generator = torch.Generator().manual_seed(17 * num_sources + d)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    token_ids = torch.randint(1, NUM_WORDS, index.shape[:1], generator=generator, dtype=torch.int32)
    embed_tokens = normal(NUM_WORDS, d)
    token_ids[index[:, 0] != TEXT] = 0
    embed_tokens[0] = NAN  # no text row has this token
    return {
        "hidden": normal(num_sources, d).to(dtype),
        "index": index,
        "weight": weight,
        "linear_weight": (normal(d, d) * d**-0.5).to(dtype),
        "linear_bias": normal(d).to(dtype),
        "newline": normal(d).to(dtype),
        "token_ids": token_ids,
        "embed_tokens": embed_tokens.to(dtype),
    }


def mixed(case: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The operand of the rows that are products."""
    is_product = case["index"][:, 0] >= 0
    index, weight = case["index"][is_product].long(), case["weight"][is_product]
    taps = case["hidden"].to(dtype)[torch.where(weight == 0, index[:, :1], index)]
    return (taps * weight.to(dtype)[..., None]).sum(1)


def oracle(case: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The rows that are products, step by step as plain torch rounds them."""
    pooled = mixed(case, dtype)
    return functional.linear(pooled, case["linear_weight"].to(dtype), case["linear_bias"].to(dtype))


def has_pooled(case: dict[str, torch.Tensor]) -> bool:
    is_product = case["index"][:, 0] >= 0
    return bool((case["weight"][is_product, 1:] != 0).any())


def run(case: dict[str, torch.Tensor], device: str) -> torch.Tensor:
    """The kernel's output, into a tensor of NaN, back on the CPU."""
    moved = {name: value.to(device) for name, value in case.items()}
    shape = case["index"].shape[0], case["hidden"].shape[1]
    out = torch.full(shape, NAN, dtype=case["hidden"].dtype, device=device)
    assert place.project_and_place(**moved, out=out, has_pooled=has_pooled(case)) is out
    return out.cpu()


def check_rows(out: torch.Tensor, case: dict[str, torch.Tensor]) -> None:
    first = case["index"][:, 0]
    dtype = case["hidden"].dtype
    if bool((first >= 0).any()):
        assert_two_times_rule(out[first >= 0], oracle(case, dtype), oracle(case, torch.float64))
    newlines = first == NEWLINE
    assert torch.equal(out[newlines], case["newline"].expand(int(newlines.sum()), -1))
    tokens = case["token_ids"][first == TEXT].long()
    assert torch.equal(out[first == TEXT], case["embed_tokens"][tokens])


# 41: odd, one step along K of which most is masked; 64: a whole step; 144: three, two tiles of
# columns. 90 rows of visual tokens: two tiles of rows, with all kinds of row in both.
@pytest.mark.parametrize("d", [41, 64, 144])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_all_kinds_of_row(device: str, dtype: torch.dtype, d: int) -> None:
    table = with_text(random_table(90, 9, seed=d), before=3, between=2, after=1)
    case = make_case(table, 9, d, dtype)
    check_rows(run(case, device), case)


# Tiles of one kind: text, kept rows, text and newlines, pooled rows, text.
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_tiles_of_one_kind(device: str, dtype: torch.dtype) -> None:
    index, weight = with_text(kept_table(list(range(64))), before=64, between=0, after=40)
    newlines = torch.full((24, 4), NEWLINE, dtype=torch.int32), torch.zeros(24, 4)
    pooled = pooled_table(9, 8)
    table = torch.cat([index, newlines[0], pooled[0]]), torch.cat([weight, newlines[1], pooled[1]])
    case = make_case(with_text(table, before=0, between=0, after=70), 81, 64, dtype)
    check_rows(run(case, device), case)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_video_pooling_27_to_14(device: str, dtype: torch.dtype) -> None:
    case = make_case(with_text(pooled_table(27, 14), 5, 0, 2), 27 * 27, 64, dtype)
    check_rows(run(case, device), case)


# The widths of the language models; too much work for the interpreter.
@pytest.mark.parametrize("d", [896, 3584, 8192])
@pytest.mark.parametrize(("device", "dtype"), CUDA_PARAMS)
def test_model_widths(device: str, dtype: torch.dtype, d: int) -> None:
    case = make_case(with_text(pooled_table(27, 14), 14, 3, 5), 27 * 27, d, dtype)
    check_rows(run(case, device), case)


def linear(case: dict[str, torch.Tensor], rows: torch.Tensor, device: str) -> torch.Tensor:
    """The layer alone, by fused_linear."""
    # The interpreter's products are those of a BLAS, whose order depends on the tile's width; on a
    # device no tile changes the bits, as a test of fused_linear asserts.
    tile = fl.Tile(*place.launch_config(*rows.shape, rows.dtype))
    return fl.fused_linear(
        rows.to(device),
        case["linear_weight"].to(device),
        case["linear_bias"].to(device),
        tile=tile if device == "cpu" else None,
    ).cpu()


# With a pooled row anywhere, kept rows are pooled too: of one tap, a copy.
@pytest.mark.parametrize("has_pooled_row", [False, True])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_kept_rows_have_the_bits_of_fused_linear(
    device: str, dtype: torch.dtype, has_pooled_row: bool
) -> None:
    index, weight = kept_table([*range(20, 41), *range(20)])
    if has_pooled_row:
        index[7] = torch.tensor([3, 4, 5, 6], dtype=torch.int32)
        weight[7] = torch.tensor([0.5, 0.25, 0.125, 0.125])
    case = make_case((index, weight), 41, 144, dtype)
    expected = linear(case, case["hidden"][index[:, 0].long()], device)
    is_kept = weight[:, 0] == 1
    assert torch.equal(run(case, device)[is_kept], expected[is_kept])


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_pooled_rows_are_rounded_once_before_the_product(device: str, dtype: torch.dtype) -> None:
    index, weight = (value[:-1] for value in pooled_table(9, 7))  # without its newline
    case = make_case((index, weight), 81, 144, dtype)
    pooled = torch.empty(49, 144, dtype=dtype, device=device)
    arguments = (case["hidden"], index, weight)
    place.pool_rows(*(value.to(device) for value in arguments), pooled)
    assert_two_times_rule(pooled.cpu(), mixed(case, dtype), mixed(case, torch.float64))
    assert torch.equal(run(case, device), linear(case, pooled, device))


# A picture's rows are the same alone and after another picture; 64 rows each, so that they start a
# tile: see test_fused_linear for why that matters to the interpreter.
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_picture_does_not_depend_on_its_neighbours(device: str, dtype: torch.dtype) -> None:
    first, second = random_table(64, 20, seed=1), kept_table([*range(64)])
    together = make_case(
        (torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])), 64, 144, dtype
    )
    alone = together | {
        name: together[name][64:].contiguous() for name in ("index", "weight", "token_ids")
    }
    assert torch.equal(run(together, device)[64:], run(alone, device))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_unused_rows_and_taps_are_not_read(device: str, dtype: torch.dtype) -> None:
    index, weight = with_text(random_table(40, 9, seed=2), 2, 0, 1)
    is_product = (index[:, 0] >= 0)[:, None]
    index += is_product.int()  # row 0 is used by none: where a tap that is not read would point
    is_used = is_product & (weight != 0)
    case = make_case((index, weight), 11, 64, dtype)
    expected = run(case, device)
    index[is_product & ~is_used] = 10
    unused = torch.ones(11, dtype=torch.bool)
    unused[index[is_used].long()] = False
    assert unused.nonzero().flatten().tolist() == [0, 10]
    case["hidden"][unused] = NAN
    assert torch.equal(run(case | {"index": index}, device), expected)


def inside_nan(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The same values as part of a wider tensor of NaN (or large), with such rows around."""
    if tensor.ndim == 1:
        return inside_nan(tensor[None], device)[0]
    num_rows, width = tensor.shape
    filler = NAN if tensor.is_floating_point() else 2**30
    whole = torch.full((num_rows + 2, width + 9), filler, dtype=tensor.dtype, device=device)
    whole[1:-1, 4:-5] = tensor.to(device)
    return whole[1:-1, 4:-5]


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_rows_at_any_stride_and_nothing_beside_them(device: str, dtype: torch.dtype) -> None:
    case = make_case(with_text(random_table(40, 9, seed=5), 2, 2, 1), 9, 41, dtype)
    wide = torch.full((47, 50), 9.0, dtype=dtype, device=device)
    out = wide[1:46, 4:45]
    framed = {name: inside_nan(value, device) for name, value in case.items()}
    place.project_and_place(**framed, out=out, has_pooled=True)
    assert torch.equal(out.cpu(), run(case, device))
    out[:] = 9.0
    assert bool((wide == 9).all())


@pytest.mark.parametrize("num_rows", [0, 1])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_no_row_and_one(device: str, dtype: torch.dtype, num_rows: int) -> None:
    case = make_case(kept_table([2] * num_rows), 3, 41, dtype)
    out = run(case, device)
    assert out.shape == (num_rows, 41)
    check_rows(out, case)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_text_alone(device: str, dtype: torch.dtype) -> None:
    index = np.full((5, 4), TEXT, np.int32)
    case = make_case((torch.from_numpy(index), torch.full((5, 4), NAN)), 0, 41, dtype)
    case["linear_weight"].fill_(NAN)
    case["newline"].fill_(NAN)
    check_rows(run(case, device), case)


BAD_ARGUMENTS = {
    "hidden-f64": ("hidden", torch.zeros(5, 8, dtype=torch.float64), TypeError, "hidden is"),
    "hidden-1d": ("hidden", torch.zeros(8), ValueError, "hidden has shape"),
    "hidden-no-columns": ("hidden", torch.zeros(5, 0), ValueError, "hidden has shape"),
    "hidden-transposed": ("hidden", torch.zeros(8, 5).t(), ValueError, "hidden has last-dim"),
    "index-int64": ("index", torch.zeros(3, 4, dtype=torch.int64), TypeError, "index is"),
    "index-3-taps": ("index", torch.zeros(3, 3, dtype=torch.int32), ValueError, "index has shape"),
    "weight-f16": ("weight", torch.zeros(3, 4).half(), TypeError, "weight is"),
    "weight-short": ("weight", torch.zeros(2, 4), ValueError, "weight has shape"),
    "linear_weight-f16": ("linear_weight", torch.zeros(8, 8).half(), TypeError, "linear_weight is"),
    "linear_weight-narrow": ("linear_weight", torch.zeros(8, 7), ValueError, "linear_weight has"),
    "linear_bias-long": ("linear_bias", torch.zeros(9), ValueError, "linear_bias has shape"),
    "newline-f16": ("newline", torch.zeros(8).half(), TypeError, "newline is"),
    "newline-meta": ("newline", torch.zeros(8, device="meta"), ValueError, "newline is on meta"),
    "token_ids-int64": ("token_ids", torch.zeros(3).long(), TypeError, "token_ids is"),
    "token_ids-2d": ("token_ids", torch.zeros(3, 1).int(), ValueError, "token_ids has shape"),
    "embed_tokens-1d": ("embed_tokens", torch.zeros(8), ValueError, "embed_tokens has shape"),
    "embed_tokens-wide": ("embed_tokens", torch.zeros(6, 9), ValueError, "embed_tokens has shape"),
    "out-narrow": ("out", torch.zeros(3, 7), ValueError, "out has shape"),
    "out-3d": ("out", torch.zeros(1, 3, 8), ValueError, "out has shape"),
    "out-transposed": ("out", torch.zeros(8, 3).t(), ValueError, "out has last-dim"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    argument, value, error, message = BAD_ARGUMENTS[name]
    case = make_case(kept_table([0, 1, 2]), 5, 8, torch.float32)
    changed = case | {"out": torch.zeros(3, 8)} | {argument: value}
    with pytest.raises(error, match=message):
        place.project_and_place(**changed, has_pooled=False)
