"""Copies to the device: the same values and strides, and a host that goes on."""

import pytest
import torch

from ovfast.staging import Staging, to_device
from tests.support.devices import host_never_waits, requires_cuda

CPU = torch.device("cpu")
SLEEP_CYCLES = 2 * 10**8  # of the device: about a tenth of a second


def test_on_a_cpu_nothing_is_copied():
    values = torch.arange(6)
    assert to_device(values, CPU) is values
    assert Staging(CPU).upload(values.numpy()).data_ptr() == values.data_ptr()


@requires_cuda
@pytest.mark.gpu
def test_the_host_goes_on_while_the_device_is_busy():
    device, staging = torch.device("cuda"), Staging(torch.device("cuda"))
    values = torch.arange(12, dtype=torch.int32).view(3, 4)
    wanted = values.t().clone()
    # The first time memory is pinned and the kernel loaded.
    to_device(values.t(), device).add(staging.upload(values.numpy()).t())
    torch.cuda.synchronize()
    with host_never_waits():
        torch.cuda._sleep(SLEEP_CYCLES)
        transposed = to_device(values.t(), device)
        uploaded = staging.upload(values.numpy())
        copied = uploaded.add(uploaded)
        asleep = torch.cuda.Event()
        asleep.record()
        assert not asleep.query()
    values.fill_(-1)
    assert transposed.stride() == (1, 4)
    assert torch.equal(transposed.cpu(), wanted)
    assert torch.equal(copied.cpu(), 2 * wanted.t())
