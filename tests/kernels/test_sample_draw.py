"""Tokens drawn by Triton against those of plain torch, through the choice of whole rows.

The sum of weights has another order and exp may round otherwise, so a token may differ where the
random number falls within EDGE of the edge between two tokens; everything else is exact.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ovfast import device_sampling
from ovfast.decode_kernels import DecodeKernels
from ovfast.decode_rows import ROWS, RowState
from ovfast.device_sampling import ERROR_TOKEN, SamplerKind
from ovfast.ops import make_ops
from ovfast.sampling import SamplingParams, philox_uniform
from tests.support.devices import requires_cuda
from tests.support.row_states import (
    DEVICES,
    OPTIONS,
    STATE,
    assert_same_rows,
    best_of_blocks,
    copy_rows,
    make_rows,
)

triton = pytest.importorskip("triton", reason="needs triton")
tl = triton.language
sample_draw = pytest.importorskip("ovfast.kernels.sample_draw", reason="needs triton")

EDGE = 1e-6  # of the sum of all weights
# numpy tells what the interpreter computes of rows in error.
quiet = pytest.mark.filterwarnings("ignore:invalid value encountered")


def kernels_of(device: str) -> DecodeKernels:
    kernels = make_ops(torch.device(device), "triton").decode
    assert kernels is not None
    return kernels


def kind_of(options: Sequence[SamplingParams]) -> SamplerKind:
    kind = SamplerKind()
    for each in options:
        kind = kind | SamplerKind.of(each)
    return kind


def distance_to_an_edge(rows: RowState, row: int, kind: SamplerKind) -> float:
    """From the row's random number to the nearest sum of weights, of all weights."""
    one = slice(row, row + 1)
    logits, params, counts = rows.logits[one], rows.params.rows(row, row + 1), rows.counts[one]
    scores = device_sampling._allowed_scores(
        logits, params, counts, rows.forbidden, masks=kind.masks
    )
    scaled = device_sampling._scaled(scores, scores.amax(1), params)
    weights, kept = device_sampling._weights(scaled, params, sorts=kind.sorts)
    kept &= weights >= params.min_p[:, None]
    cumulative = scaled.double().exp().masked_fill(~kept, 0.0)[0].cumsum(0)
    uniform = device_sampling.philox_uniform_rows(params.seed, counts)
    return float((cumulative / cumulative[-1] - uniform).abs().min())


def check_case(
    before: RowState, num_rows: int, kind: SamplerKind, *, decoded: bool = False
) -> list[int]:
    """The tokens of rows chosen by kernels; other rows keep every value."""
    ours, plain = copy_rows(before, kernels_of(str(before.logits.device))), copy_rows(before)
    if decoded:
        values, ids = best_of_blocks(before.logits.masked_fill(before.forbidden, -math.inf))
        ours.block_max.copy_(values)
        ours.block_argmax.copy_(ids)
    ours.choose(0, num_rows, kind, None, decoded=decoded)
    plain.choose(0, num_rows, kind, None)
    other = (ours.tokens != plain.tokens).nonzero()[:, 0].tolist()
    for row in other:
        assert distance_to_an_edge(before, row, kind) < EDGE
    assert len(other) <= 1, "an edge is hit about once in a million draws"
    for twin in (ours, plain):  # what differs with reason is left out
        for name in STATE:
            getattr(twin, name)[other] = 0
        twin.output.tokens[other] = 0
        twin.params.seen[other] = False
    assert_same_rows(ours, plain)
    return [int(token) for token in ours.output.tokens[:num_rows, 0]]


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16])
@pytest.mark.parametrize("vocab_size", [41, 640, 2500])
@pytest.mark.parametrize("device", DEVICES)
def test_options_side_by_side(device: str, vocab_size: int, num_rows: int) -> None:
    """Free rows, stops and lengths among them."""
    for turn in (0, 7):
        options = OPTIONS[turn:] + OPTIONS[:turn]
        rows = make_rows(device, vocab_size, turn, options)
        check_case(rows, num_rows, kind_of(options[:num_rows]))


@pytest.mark.parametrize("decoded", [True, False], ids=["step", "first-token"])
@pytest.mark.parametrize("index", range(len(OPTIONS)))
@pytest.mark.parametrize("device", DEVICES)
def test_each_kind_alone(device: str, index: int, *, decoded: bool) -> None:
    options = OPTIONS[index : index + 1]
    rows = make_rows(device, 1100, index, options)
    check_case(rows, 5, kind_of(options), decoded=decoded)


@pytest.mark.parametrize(
    "options",
    [
        SamplingParams(temperature=1.0),
        pytest.param(OPTIONS[9], marks=pytest.mark.slow),
        pytest.param(OPTIONS[13], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_many_seeds(device: str, options: SamplingParams) -> None:
    """96 draws of three blocks of ids, most of them of different tokens."""
    tokens = set()
    for seed in range(6):
        rows = make_rows(device, 2500, seed, (options,))
        rows.logits /= 4
        tokens |= set(check_case(rows, 16, SamplerKind.of(options)))
    assert len(tokens) > 40


@pytest.mark.parametrize("device", DEVICES)
def test_equal_weights_have_exact_edges(device: str) -> None:
    """Sums of ones are exact in any order, so no draw may differ."""
    rows = make_rows(device, 2048, 3, (SamplingParams(temperature=0.7),))
    rows.logits.fill_(2.0)
    rows.forbidden.fill_(False)
    ours, plain = copy_rows(rows, kernels_of(device)), copy_rows(rows)
    for seed in range(10):
        for twin in (ours, plain):
            twin.params.seed[:, 0] = torch.arange(ROWS) + 100 * seed
            twin.choose(0, 16, SamplerKind(random=True), None)
        assert_same_rows(ours, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_see_the_others(device: str) -> None:
    """Nor the rules that they need."""
    rows = make_rows(device, 2500, 4, OPTIONS)
    kind, kernels = kind_of(OPTIONS), kernels_of(device)
    together = copy_rows(rows, kernels)
    together.choose(0, 16, kind, None)
    for row in (1, 5, 9, 13):
        alone = copy_rows(rows, kernels)
        alone.logits[:row] = math.nan
        alone.logits[row + 1 :] = math.nan
        alone.choose(row, row + 1, SamplerKind.of(OPTIONS[row % len(OPTIONS)]), None)
        assert alone.tokens[row] == together.tokens[row]
        assert torch.equal(alone._weight_sums[row], together._weight_sums[row])


@quiet
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("device", DEVICES)
def test_logits_that_are_not_finite(device: str, bad: float) -> None:
    rows = make_rows(device, 1100, 5, (SamplingParams(temperature=1.0),))
    rows.slots[:] = 1
    rows.forbidden[[70, 1080]] = torch.tensor([False, True], device=device)
    rows.logits[0, 70] = rows.logits[1, 1080] = bad
    rows.logits[2] = bad
    tokens = check_case(rows, 4, SamplerKind(random=True))
    errors = [bad != -math.inf, False, True, False]
    assert [token == ERROR_TOKEN for token in tokens] == errors


@quiet
@pytest.mark.parametrize("sorts", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_everything_forbidden(device: str, *, sorts: bool) -> None:
    rows = make_rows(device, 1100, 6, (SamplingParams(temperature=1.0),))
    rows.slots[:] = 1
    rows.forbidden.fill_(True)
    kind = SamplerKind(random=True, sorts=sorts)
    assert check_case(rows, 16, kind) == [ERROR_TOKEN] * ROWS


@triton.jit
def _uniform_kernel(seed_ptr, counts_ptr, out_ptr):
    row = tl.program_id(0)
    tl.store(out_ptr + row, sample_draw._uniform(seed_ptr, counts_ptr, row))


@pytest.mark.parametrize("device", DEVICES)
def test_random_numbers_are_those_of_one_row(device: str) -> None:
    rng = np.random.default_rng(0)
    seeds = [0, 1, 2**32 - 1, 2**32, 2**64 - 1, *(int(s) for s in rng.integers(0, 2**63, 50))]
    counts = [0, 1, 2**31, 2**33 + 5, *(int(i) for i in rng.integers(0, 2**40, 51))]
    words = torch.tensor([[seed & 0xFFFFFFFF, seed >> 32] for seed in seeds], device=device)
    out = torch.zeros(len(seeds), dtype=torch.float64, device=device)
    _uniform_kernel[(len(seeds),)](words, torch.tensor(counts, device=device), out)
    assert out.tolist() == [philox_uniform(s, i) for s, i in zip(seeds, counts, strict=True)]


@requires_cuda
@pytest.mark.gpu
def test_programmatic_launch_changes_nothing() -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs sm_90")
    rows = make_rows("cuda", 152000, 3, OPTIONS)
    check_case(rows, 16, kind_of(OPTIONS))  # the kernels of ops have it


@requires_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [152000, 152128])
def test_real_sizes(vocab_size: int) -> None:
    for seed in range(5):
        options = OPTIONS[seed:] + OPTIONS[:seed]
        check_case(make_rows("cuda", vocab_size, seed, options), 16, kind_of(options))


def make_arguments(rows: RowState) -> dict[str, Any]:
    vocab_size, params = rows.logits.shape[1], rows.params
    return {
        "logits": rows.logits,
        "forbidden": rows.forbidden_bytes,
        "block_max": torch.zeros(ROWS, -(-vocab_size // 64)),
        "temperature": params.temperature,
        "min_p": params.min_p,
        "sums": torch.zeros(ROWS, sample_draw.sample_blocks(vocab_size)).double(),
    }


BAD = {
    "temperature": ("temperature", torch.zeros(16).double(), TypeError, "temperature is"),
    "min-p": ("min_p", torch.zeros(1), ValueError, "min_p has shape"),
    "sums-f32": ("sums", torch.zeros(16, 2), TypeError, "sums is"),
    "sums-short": ("sums", torch.zeros(16, 1).double(), ValueError, "sums has shape"),
    "kept-i8": ("kept", torch.zeros(16, 1100).char(), TypeError, "kept is"),
    "kept-rows": ("kept", torch.zeros(1, 1100).bool(), ValueError, "kept has shape"),
    "seed": ("seed", torch.zeros(16).long(), ValueError, "seed has shape"),
    "counts": ("counts", torch.zeros(16).int(), TypeError, "counts is"),
    "drawn": ("drawn", torch.zeros(16).long(), TypeError, "drawn is"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    argument, value, error, message = BAD[name]
    rows = make_rows("cpu", 1100, 0)
    more = {"seed": rows.params.seed, "counts": rows.counts, "drawn": rows.tokens}
    arguments = make_arguments(rows) | more | {argument: value}
    with pytest.raises(error, match=message):
        sample_draw.sample_draw(**arguments)
    if argument not in more:
        for other in more:
            del arguments[other]
        with pytest.raises(error, match=message):
            sample_draw.sample_weights(**arguments)
