"""The CPU's linear layer against plain torch, around every boundary where it changes the call."""

import pytest
import torch
import torch.nn.functional as F

from ovfast import cpu_linear
from tests.support.accuracy import assert_two_times_rule


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = cpu_linear.linear(x, weight, bias)
    assert out.is_contiguous()
    # oneDNN sums along a row in one chain where MKL sums in several: 4 times the rule's allowance.
    slack = (out.double() - truth) / 4 + truth
    assert_two_times_rule(slack.float(), F.linear(x, weight, bias), truth)


# Rows around NARROW_ROWS; widths around NARROW_WIDTH; 41 and 1 divide nothing; 16 · odd and 2 · odd
# take the first and the last number of chunks.
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 41])
@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(48, 64), (16, 2047), (16, 2048), (22, 2100), (41, 7), (1, 1)],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(rows, out_features, in_features, with_bias):
    bias = randn(out_features) if with_bias else None
    assert_linear(randn(rows, in_features), randn(out_features, in_features), bias)


@pytest.mark.parametrize("rows", [3, 30])
def test_rows_of_a_wider_tensor(rows):
    """The gate half of gate_up, and heads beside keys, come as columns of a wider tensor."""
    assert_linear(randn(rows, 40)[:, :20], randn(32, 20), None)


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(cpu_linear, "_prefers_onednn", lambda: False)
    x, weight, bias = randn(9, 20), randn(32, 20), randn(32)
    assert torch.equal(cpu_linear.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_torchs_own(dtype):
    x, weight, bias = randn(1, 20).to(dtype), randn(32, 20).to(dtype), randn(32).to(dtype)
    assert torch.equal(cpu_linear.linear(x, weight, bias), F.linear(x, weight, bias))


def test_bits_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for rows in (1, 3, 300):
            x, weight = randn(rows, 896), randn(1152, 896)
            torch.set_num_threads(1)
            alone = cpu_linear.linear(x, weight)
            torch.set_num_threads(2)
            assert torch.equal(cpu_linear.linear(x, weight), alone)
    finally:
        torch.set_num_threads(before)
