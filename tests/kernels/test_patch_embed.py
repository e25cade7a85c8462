"""Triton patch_embed against a float64 oracle: windows of pictures that share one buffer."""

from dataclasses import dataclass

import pytest
import torch

from ovfast import reference_pixels
from ovfast.pixels import view_pixels
from tests.support.accuracy import assert_two_times_rule
from tests.support.devices import kernel_params
from tests.support.pixel_cases import (
    ALL_VIEWS,
    BEYOND,
    IDENTITY,
    INSIDE,
    OUTSIDE,
    PADDED,
    SIZES,
    lay_out,
)

kernel = pytest.importorskip("ovfast.kernels.patch_embed", reason="needs triton")

PATCH = 14


@dataclass
class Case:
    """Arguments of a launch on a device, and what makes the truth on the CPU."""

    pixels: torch.Tensor
    windows: torch.Tensor
    weight: torch.Tensor
    offset: torch.Tensor
    views: list[torch.Tensor]
    stored_weight: torch.Tensor
    geometry: dict[str, int]
    dtype: torch.dtype

    def launch(self, windows: torch.Tensor | None = None) -> torch.Tensor:
        windows = self.windows if windows is None else windows
        shape = (len(windows) * len(self.offset), self.weight.shape[0])
        out = torch.full(shape, float("nan"), dtype=self.dtype, device=self.pixels.device)
        returned = kernel.patch_embed(
            self.pixels, windows, self.weight, self.offset, out, **self.geometry
        )
        assert returned is out
        return out

    def check(self) -> None:
        weight, offset = self.stored_weight, self.offset.cpu()
        side = self.geometry["image_size"]
        views = torch.stack(self.views) if self.views else torch.empty(0, side, side, 3).byte()
        pixels = view_pixels(views.numpy(), torch.device("cpu"))
        arguments = (pixels.buffer, pixels.windows, weight.float(), offset, side, self.dtype)
        truth = reference_pixels.patch_embed(*arguments, upcast=True)
        same_dtype = reference_pixels.patch_embed(*arguments)
        assert_two_times_rule(self.launch().cpu(), same_dtype, truth)


def make_case(
    device: str,
    dtype: torch.dtype,
    views: list[tuple[int, int, int, int]],
    *,
    hidden: int = 41,
    sizes: list[tuple[int, int]] = SIZES,
    patch: int = PATCH,
    image: int = 56,
    around: int = 255,
) -> Case:
    """Pictures with gaps between them and behind each row, all of value `around`."""
    generator = torch.Generator().manual_seed(hidden)
    laid_out = lay_out(generator, views, sizes, image, around)
    weight = torch.randn(hidden, 3 * patch * patch, generator=generator) / patch
    stored_weight = weight.to(dtype)
    bias = torch.randn(hidden, generator=generator)
    positions = torch.randn((image // patch) ** 2, hidden, generator=generator)
    return Case(
        pixels=laid_out.pixels.to(device),
        windows=laid_out.windows.to(device),
        weight=kernel.pack_patch_weight(stored_weight).to(device),
        offset=reference_pixels.patch_offset(stored_weight, bias, positions).to(device),
        views=laid_out.views,
        stored_weight=stored_weight,
        geometry={"patch_size": patch, "image_size": image},
        dtype=dtype,
    )


@pytest.mark.parametrize(
    "views",
    [IDENTITY, INSIDE, PADDED, BEYOND, OUTSIDE, ALL_VIEWS],
    ids=["identity", "inside", "padded", "beyond", "outside", "all"],
)
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_windows(device: str, dtype: torch.dtype, views: list[tuple[int, int, int, int]]) -> None:
    make_case(device, dtype, views).check()


# 1: one lane; 64: a whole tile; 144: the demo's, of three tiles, the last partly masked.
@pytest.mark.parametrize("hidden", [1, 64, 144])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_hidden_sizes(device: str, dtype: torch.dtype, hidden: int) -> None:
    make_case(device, dtype, [*INSIDE[:1], *PADDED[:1]], hidden=hidden).check()


# The real view: several tiles of tokens, and six rows and columns that fill no patch.
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_real_view(device: str, dtype: torch.dtype) -> None:
    sizes = [(384, 384), (300, 500)]
    views = [(0, 0, 0, 0), (1, -42, 116, 127)]
    make_case(device, dtype, views, hidden=8, sizes=sizes, image=384).check()


# The real width too; too much work for the interpreter.
@pytest.mark.parametrize("num_views", [1, 7])
@pytest.mark.parametrize(
    ("device", "dtype"), [param for param in kernel_params() if param.values[0] == "cuda"]
)
def test_real_size(device: str, dtype: torch.dtype, num_views: int) -> None:
    sizes = [(384, 384), (1152, 768)]
    views = [(0, 0, 0, 0), *((1, 384 * (i // 2), 384 * (i % 2) - 7, 0) for i in range(6))]
    make_case(device, dtype, views[:num_views], hidden=1152, sizes=sizes, image=384).check()


# Rows of 3, 9 and 48 bytes, padded to 16, 16 and 64; 7 × 7 pixels fill 2 × 2 patches of 3.
@pytest.mark.parametrize(("patch", "image"), [(1, 3), (3, 7), (16, 32)])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_patch_sizes(device: str, dtype: torch.dtype, patch: int, image: int) -> None:
    views = [(0, 0, 0, 0), (2, -1, 2, 127)]
    make_case(device, dtype, views, hidden=5, patch=patch, image=image).check()


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_bytes_around_the_pictures_do_not_count(device: str, dtype: torch.dtype) -> None:
    white, black = (
        make_case(device, dtype, [*PADDED, *BEYOND], around=around).launch() for around in (255, 0)
    )
    assert torch.equal(white, black)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_a_view_alone_has_the_same_bits(device: str, dtype: torch.dtype) -> None:
    case = make_case(device, dtype, ALL_VIEWS)
    together = case.launch().view(len(ALL_VIEWS), 16, -1)
    for index in range(0, len(ALL_VIEWS), 4):
        assert torch.equal(together[index], case.launch(case.windows[index : index + 1]))
    assert torch.equal(together.flip(0).flatten(0, 1), case.launch(case.windows.flip(0)))


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_no_views(device: str, dtype: torch.dtype) -> None:
    case = make_case(device, dtype, [])
    assert case.windows.shape == (0, 7)
    assert case.launch().shape == (0, 41)


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_rows_at_any_stride(device: str, dtype: torch.dtype) -> None:
    case = make_case(device, dtype, INSIDE)
    wide_offset = torch.full((16, 50), float("nan"), device=device)
    wide_offset[:, 3:44] = case.offset
    wide_out = torch.full((48, 50), 9.0, dtype=dtype, device=device)
    arguments = (case.pixels, case.windows, case.weight, wide_offset[:, 3:44])
    kernel.patch_embed(*arguments, wide_out[:, 4:45], **case.geometry)
    assert torch.equal(wide_out[:, 4:45], case.launch())
    assert bool((wide_out[:, :4] == 9).all())
    assert bool((wide_out[:, 45:] == 9).all())


# A float32 result of half-precision weights is the sum itself: it rounds to the half one.
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_float32_out(device: str, dtype: torch.dtype) -> None:
    case = make_case(device, dtype, INSIDE)
    out = torch.empty(48, 41, device=device)
    kernel.patch_embed(case.pixels, case.windows, case.weight, case.offset, out, **case.geometry)
    assert torch.equal(out.to(dtype), case.launch())


def test_packed_weight() -> None:
    weight = torch.arange(2 * 3 * 14 * 14).reshape(2, -1)
    packed = kernel.pack_patch_weight(weight)
    assert packed.shape == (2, 14, 64)
    assert packed.dtype == weight.dtype
    assert packed.is_contiguous()
    for row, column, channel in ((0, 0, 0), (3, 5, 2), (13, 13, 1)):
        expected = weight[:, channel * 196 + row * 14 + column]
        assert torch.equal(packed[:, row, 3 * column + channel], expected)
    assert torch.equal(packed[:, :, :42].sum(), weight.sum())
    assert not packed[:, :, 42:].any()
    assert kernel.pack_patch_weight(torch.ones(5, 12)).shape == (5, 2, 16)
    assert kernel.pack_patch_weight(torch.ones(0, 768)).shape == (0, 16, 64)


@pytest.mark.parametrize("shape", [(4,), (4, 0), (4, 13), (4, 15), (4, 2, 3)])
def test_weight_of_no_square_patch(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected .*3 · patch_size²"):
        kernel.pack_patch_weight(torch.zeros(shape))


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


BAD_ARGUMENTS = {
    "pixels-int8": ("pixels", torch.zeros(99, dtype=torch.int8), TypeError, "pixels is"),
    "pixels-3d": ("pixels", torch.zeros(5, 5, 3, dtype=torch.uint8), ValueError, "pixels has"),
    "pixels-strided": (
        "pixels",
        torch.zeros(99, dtype=torch.uint8)[::2],
        ValueError,
        "pixels has last-dimension stride",
    ),
    "windows-int32": ("windows", ints(2, 7).int(), TypeError, "windows is"),
    "windows-1d": ("windows", ints(7), ValueError, "windows has shape"),
    "windows-6": ("windows", ints(2, 6), ValueError, "windows has shape"),
    "windows-strided": ("windows", ints(2, 9)[:, :7], ValueError, "windows has strides"),
    "windows-meta": ("windows", ints(2, 7).to("meta"), ValueError, "windows is on meta"),
    "weight-f64": ("weight", torch.zeros(8, 2, 16).double(), TypeError, "weight is"),
    "weight-unpacked": ("weight", torch.zeros(8, 12), ValueError, "weight has shape"),
    "weight-wide": ("weight", torch.zeros(8, 2, 32), ValueError, "weight has shape"),
    "weight-strided": ("weight", torch.zeros(2, 8, 16).transpose(0, 1), ValueError, "weight has"),
    "offset-f16": ("offset", torch.zeros(9, 8).half(), TypeError, "offset is"),
    "offset-tokens": ("offset", torch.zeros(4, 8), ValueError, "offset has shape"),
    "offset-transposed": ("offset", torch.zeros(8, 9).t(), ValueError, "offset has last"),
    "out-f64": ("out", torch.zeros(18, 8).double(), TypeError, "out is"),
    "out-rows": ("out", torch.zeros(17, 8), ValueError, "out has shape"),
    "out-transposed": ("out", torch.zeros(8, 18).t(), ValueError, "out has last"),
    "patch-0": ("patch_size", 0, ValueError, "patch_size 0"),
    "patch-above-image": ("patch_size", 7, ValueError, "patch_size 7"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    argument, value, error, message = BAD_ARGUMENTS[name]
    arguments = {
        "pixels": torch.zeros(99, dtype=torch.uint8),
        "windows": ints(2, 7),
        "weight": torch.zeros(8, 2, 16),
        "offset": torch.zeros(9, 8),
        "out": torch.zeros(18, 8),
        "patch_size": 2,
        "image_size": 6,
    }
    with pytest.raises(error, match=message):
        kernel.patch_embed(**(arguments | {argument: value}))
