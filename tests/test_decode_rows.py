"""What a choice launches: kernels by a stand-in, the rest by what torch dispatches."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ovfast.decode_kernels import DecodeKernels
from ovfast.decode_rows import RowState
from ovfast.device_sampling import SamplerKind

VIEWS = {"slice", "select", "unsqueeze", "view", "expand", "detach"}


class Launches(TorchDispatchMode):
    """Names of what is launched: of torch's operations all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    def kernel(self, name: str) -> Any:
        return lambda *args, **kwargs: self.names.append(name)


def launches_of(kind: SamplerKind, num_top: int | None, *, decoded: bool) -> list[str]:
    launches = Launches()
    fields = {
        field.name: launches.kernel(field.name)
        for field in dataclasses.fields(DecodeKernels)
        if field.name.startswith(("decode_", "sample_", "embed_"))
    }
    del fields["sample_blocks"]
    kernels = DecodeKernels(
        split=256,
        supports=lambda head_dim: True,
        out_splits=lambda hidden, columns: 1,
        down_splits=lambda hidden, columns: 1,
        head_blocks=lambda vocab_size: -(-vocab_size // 64),
        sample_blocks=lambda vocab_size: -(-vocab_size // 1024),
        **fields,
    )
    rows = RowState(200, torch.zeros(200, dtype=torch.bool), 4, kernels)
    with launches:
        rows.choose(0, 2, kind, num_top, decoded=decoded)
    return launches.names


def test_a_greedy_step_launches_one_kernel() -> None:
    assert launches_of(SamplerKind(), None, decoded=True) == ["decode_finish"]


DRAWS = ["sample_weights", "sample_draw"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (SamplerKind(), []),
        (SamplerKind(masks=True), ["sample_best"]),
        (SamplerKind(random=True), DRAWS),
        (SamplerKind(masks=True, random=True), ["sample_best", *DRAWS]),
    ],
    ids=str,
)
def test_sampling_launches_kernels_alone(kind: SamplerKind, expected: list[str]) -> None:
    assert launches_of(kind, None, decoded=True) == [*expected, "decode_finish"]
    # Of the first token no decoder has left the best ids.
    first = launches_of(kind, None, decoded=False)
    assert first == ["sample_best", *(DRAWS if kind.random else []), "decode_finish"]


@pytest.mark.parametrize(("masks", "count"), [(False, 33), (True, 44)])
def test_the_sorts_are_of_torch(count: int, *, masks: bool) -> None:
    """30 operations find what top_k and top_p keep, and 10 more apply the masks again."""
    names = launches_of(SamplerKind(masks, True, True), None, decoded=True)
    assert names.count("sort") == 2
    assert names[-3:] == [*DRAWS, "decode_finish"]
    assert len(names) == count, names


@pytest.mark.parametrize(("num_top", "count"), [(0, 5), (3, 9)])
def test_log_probabilities_are_a_few_more(num_top: int, count: int) -> None:
    names = launches_of(SamplerKind(), num_top, decoded=True)
    assert names[:2] == ["decode_finish", "_log_softmax"]
    assert len(names) == count, names
