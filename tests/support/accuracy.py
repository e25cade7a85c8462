"""The one accuracy rule of arithmetic kernels: twice the error of torch in the same dtype."""

import math

import torch


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> float:
    """Half the spacing of `dtype` at the largest magnitude of `values`."""
    if values.numel() == 0:
        return 0.0
    largest = float(values.abs().max())
    info = torch.finfo(dtype)
    # Below the smallest normal number the spacing is constant.
    exponent = math.floor(math.log2(max(largest, info.smallest_normal)))
    return 0.5 * info.eps * 2.0**exponent


def assert_two_times_rule(
    out: torch.Tensor, same_dtype_ref: torch.Tensor, fp64_ref: torch.Tensor
) -> None:
    """Asserts err(out) ≤ 2 · err(same_dtype_ref) + half an ulp, errors being the worst element.

    Args:
        out: what the kernel made.
        same_dtype_ref: the same by plain torch in out's dtype.
        fp64_ref: the truth in float64, from the same inputs.
    """
    assert out.shape == same_dtype_ref.shape == fp64_ref.shape
    assert out.dtype == same_dtype_ref.dtype
    assert fp64_ref.dtype == torch.float64
    if out.numel() == 0:
        return
    truth = fp64_ref.cpu()
    assert bool(torch.isfinite(out).all()), "the kernel's output is not finite"
    error = float((out.cpu().double() - truth).abs().max())
    torch_error = float((same_dtype_ref.cpu().double() - truth).abs().max())
    bound = 2.0 * torch_error + half_ulp(truth, out.dtype)
    assert error <= bound, (
        f"error {error:.3e} is above the bound {bound:.3e} (torch {torch_error:.3e})"
    )
