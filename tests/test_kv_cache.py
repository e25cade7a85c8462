"""Slots of the key-value cache: taking, giving back, room, and memory that fills as it is used."""

import dataclasses
import resource
import sys

import pytest
import torch

from ovfast.config import TextConfig
from ovfast.errors import CapacityError
from ovfast.kv_cache import KVCache, kv_bytes_per_token

CONFIG = TextConfig(
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=608,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def make_cache(
    config: TextConfig = CONFIG, *, num_slots: int = 2, max_positions: int = 8
) -> KVCache:
    return KVCache(
        config,
        num_slots=num_slots,
        max_positions=max_positions,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_layout_and_bytes():
    cache = make_cache()
    assert cache.k_cache.shape == cache.v_cache.shape == (3, 2, 2, 8, 16)
    assert cache.bytes_per_token == 2 * 3 * 2 * 16 * 4
    assert cache.nbytes == cache.bytes_per_token * 2 * 8
    # model.md: 12 288 bytes a token at 0.5B in 16 bit
    half_billion = dataclasses.replace(CONFIG, num_layers=24, num_kv_heads=2, head_dim=64)
    assert kv_bytes_per_token(half_billion, torch.bfloat16) == 12_288


def test_layer_is_a_view_of_one_slot():
    cache = make_cache()
    for tensor in (cache.k_cache, cache.v_cache):
        tensor.zero_()
    k, v = cache.layer(2, 1)
    k[:, 5], v[:, 6] = 1, 2
    assert k.shape == (2, 8, 16)
    assert float(cache.k_cache[2, 1, :, 5].sum()) == float(cache.k_cache.sum()) == 32
    assert float(cache.v_cache[2, 1, :, 6].sum()) == float(cache.v_cache.sum()) == 64


def test_slots_are_taken_and_given_back():
    cache = make_cache()
    first, second = cache.allocate(), cache.allocate()
    assert {first, second} == {0, 1}
    assert cache.num_free_slots == 0
    with pytest.raises(CapacityError, match="max_batch_size"):
        cache.allocate()
    cache.lengths[second] = 5
    cache.free(second)
    assert cache.num_free_slots == 1
    assert cache.allocate() == second
    assert cache.lengths[second] == 0


def test_freeing_twice_is_a_bug():
    cache = make_cache()
    slot = cache.allocate()
    cache.free(slot)
    with pytest.raises(AssertionError):
        cache.free(slot)


def test_room_and_truncation():
    cache = make_cache()
    slot = cache.allocate()
    cache.check_room(slot, 8)
    with pytest.raises(CapacityError, match=r"9 more tokens after 0 exceed the 8 tokens"):
        cache.check_room(slot, 9)
    cache.lengths[slot] = 6
    with pytest.raises(CapacityError, match="max_seq_len"):
        cache.check_room(slot, 3)
    cache.truncate(slot, 4)
    assert cache.lengths[slot] == 4
    cache.check_room(slot, 4)
    with pytest.raises(AssertionError):
        cache.truncate(slot, 5)


def test_memory_that_cannot_be_reserved():
    config = dataclasses.replace(CONFIG, num_layers=10_000, head_dim=4096)
    with pytest.raises(CapacityError, match="GB"):
        make_cache(config, num_slots=1000, max_positions=1_000_000)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_memory_is_touched_only_as_it_fills():
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = make_cache(num_slots=4, max_positions=1_000_000)  # 3 GB
    cache.layer(0, 0)[0][:, :100] = 1
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    assert cache.nbytes > 3e9
    assert grown_mib < 64
