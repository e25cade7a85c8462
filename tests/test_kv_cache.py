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


def filled(length: int, value: float) -> KVCache:
    """A cache of one slot, as a handle keeps it."""
    cache = make_cache(num_slots=1, max_positions=length)
    for tensor in (cache.k_cache, cache.v_cache):
        tensor.fill_(value)
    cache.lengths[0] = length
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copying_a_prefix(dtype: torch.dtype):
    caches = [
        KVCache(CONFIG, num_slots=slots, max_positions=8, dtype=dtype, device=torch.device("cpu"))
        for slots in (2, 1)
    ]
    cache, source = caches
    for own in caches:
        own.k_cache.normal_()
        own.v_cache.normal_()
    before = cache.k_cache.clone(), cache.v_cache.clone()
    source.lengths[0] = 5
    cache.copy_prefix(1, source, 4)
    assert cache.lengths == [0, 4]
    for own, other, old in (
        (cache.k_cache, source.k_cache, before[0]),
        (cache.v_cache, source.v_cache, before[1]),
    ):
        assert torch.equal(own[:, 1, :, :4], other[:, 0, :, :4])
        assert torch.equal(own[:, 1, :, 4:], old[:, 1, :, 4:])
        assert torch.equal(own[:, 0], old[:, 0])
    with pytest.raises(AssertionError):
        make_cache().copy_prefix(0, source, 6)


def test_a_slot_knows_what_it_has_of_a_prefix():
    """Longer and shorter wishes copy what is missing; anything written over it is forgotten."""
    cache, source, other = make_cache(), filled(6, 1.0), filled(6, 2.0)
    cache.copy_prefix(0, source, 4)
    assert [cache.num_copied(0, c) for c in (source, other, None)] == [4, 0, 0]
    source.k_cache.fill_(3)  # shows what is copied again
    cache.copy_prefix(0, source, 6)
    assert cache.k_cache[0, 0, 0, :6, 0].tolist() == [1, 1, 1, 1, 3, 3]
    cache.copy_prefix(0, source, 2)
    assert (cache.lengths[0], cache.num_copied(0, source)) == (2, 2)
    cache.lengths[0] = 8  # a request went on behind it
    assert cache.num_copied(0, source) == 2
    cache.truncate(0, 1)
    assert cache.num_copied(0, source) == 1
    cache.truncate(0, 0)
    cache.copy_prefix(0, other, 3)
    assert (cache.num_copied(0, source), cache.num_copied(0, other)) == (0, 3)
    del other
    assert cache.num_copied(0, None) == 0, "a cache that is gone is not no cache"
    cache.lengths[0] = 5
    with pytest.raises(AssertionError):
        cache.copy_prefix(0, source, 3)  # over positions of a request
    slot = cache.allocate()
    cache.copy_prefix(slot, source, 3)
    cache.free(slot)
    assert cache.num_copied(slot, source) == 0


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
