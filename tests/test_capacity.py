"""Memory that does not suffice: what counts as free, and what running out of it looks like."""

import pytest
import torch

from ovfast import CapacityError
from ovfast import loading as loading_module

CUDA = torch.device("cuda", 1)


def set_device_memory(
    monkeypatch: pytest.MonkeyPatch, *, free: int, reserved: int, allocated: int
) -> None:
    """A device with so many free bytes, of which torch has taken others."""
    answers = {
        "mem_get_info": (free, 1 << 40),
        "memory_reserved": reserved,
        "memory_allocated": allocated,
    }
    for name, answer in answers.items():

        def tell(device: torch.device, answer: object = answer) -> object:
            assert device == CUDA
            return answer

        monkeypatch.setattr(torch.cuda, name, tell)


@pytest.mark.parametrize(("free", "reserved", "allocated"), [(100, 0, 0), (30, 90, 20)])
def test_what_torch_keeps_unused_is_free(
    monkeypatch: pytest.MonkeyPatch, free: int, reserved: int, allocated: int
) -> None:
    """After an engine is closed, the driver tells that its memory is taken."""
    set_device_memory(monkeypatch, free=free, reserved=reserved, allocated=allocated)
    loading_module._check_memory(70, 30, CUDA)
    with pytest.raises(CapacityError, match=r"do not fit.*free on cuda:1.*smaller max_seq_len"):
        loading_module._check_memory(71, 30, CUDA)
