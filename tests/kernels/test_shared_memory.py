"""Tiles fit the shared memory of the device that they are for."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from ovfast.kernels import attention, causal_attention, decode_attention, fused_linear
from ovfast.kernels import shared_memory as sm

BF16 = torch.bfloat16


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def properties(index: int) -> dict[str, int]:
        asked.append(index)
        return {"max_shared_mem": 100_000 + index}

    utils = SimpleNamespace(get_device_properties=properties)
    driver = SimpleNamespace(active=SimpleNamespace(utils=utils))
    monkeypatch.setattr(sm.triton.runtime, "driver", driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    sm._of_index.cache_clear()
    try:
        devices = ["cuda:1", "cuda", "cuda:0", "cuda:1"]
        found = [sm.shared_bytes(torch.device(name)) for name in devices]
        assert found == [100_001, 100_002, 100_000, 100_001]
        assert asked == [1, 2, 0]
    finally:
        sm._of_index.cache_clear()
    assert sm.shared_bytes(torch.device("cpu")) == sm.LARGE


def test_little_memory_costs_the_largest_tiles_and_stages() -> None:
    for views in range(1, 65):
        rows = 729 * views
        small = fused_linear.launch_config(rows, 4304, BF16, sm.SMALL)
        assert small.block_n < 256
        assert fused_linear.launch_config(rows, 4304, BF16, 166_912) == (
            fused_linear.launch_config(rows, 4304, BF16)
        )
    for config in (
        lambda bytes_: attention.launch_config(128, 729, BF16, bytes_),
        lambda bytes_: causal_attention.launch_config(128, BF16, bytes_),
        lambda bytes_: decode_attention.launch_config(128, 7, BF16, bytes_),
    ):
        (meta, options), (small_meta, small_options) = config(sm.LARGE), config(sm.SMALL)
        assert meta == small_meta  # the order of sums stays
        assert small_options["num_stages"] == options["num_stages"] - 1
