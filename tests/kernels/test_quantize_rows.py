"""Triton quantize_rows: the numbers of plain torch, bit for bit."""

import pytest
import torch

from ovfast.quantize import quantize_float8
from tests.kernels.decode_oracle import randn
from tests.support.devices import kernel_params

quantize_rows = pytest.importorskip("ovfast.kernels.quantize_rows", reason="needs triton")


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 72), (2, 1032), (1, 4864), (0, 16)])
@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_numbers(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    sizes = torch.logspace(-3, 2, shape[0])[:, None]
    x = (randn(*shape) * sizes).to(device, dtype)
    q, scales = quantize_rows.quantize_rows(x)
    expected, expected_scales = quantize_float8(x.cpu())
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(q.cpu().view(torch.uint8), expected.view(torch.uint8))
    if x.numel():
        assert bool((q.float().abs().amax(1) == quantize_rows.LARGEST).all())


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_rows_without_a_scale(device: str, dtype: torch.dtype) -> None:
    """Zeros stay zeros; a row of an inf or a NaN is NaN, its neighbours are not."""
    x = randn(5, 24).to(device, dtype)
    x[0], x[1, 3], x[3, 23] = 0.0, float("inf"), float("nan")
    if dtype == torch.float32:
        x[0] = 1e-31
    q, scales = quantize_rows.quantize_rows(x)
    products = q.float() * scales[:, None]
    assert torch.equal(products[0].cpu(), torch.zeros(24))
    assert products.isnan().all(1).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(("device", "dtype"), kernel_params())
def test_rows_at_any_stride(device: str, dtype: torch.dtype) -> None:
    x = randn(4, 40).to(device, dtype)
    wide = x.new_full((4, 64), float("nan"))
    wide[:, 8:48] = x
    for one, other in zip(
        quantize_rows.quantize_rows(wide[:, 8:48]), quantize_rows.quantize_rows(x), strict=True
    ):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 4).double(), TypeError, "x is torch.float64"),
        (torch.zeros(4), ValueError, "x has shape"),
        (torch.zeros(1, 32769), ValueError, "x has shape"),
        (torch.zeros(4, 2).t(), ValueError, "x has last"),
    ],
)
def test_bad_arguments_are_named(x: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_rows.quantize_rows(x)
