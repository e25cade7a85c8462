"""The static key-value cache: slots of contiguous positions, one request a slot.

Owns the memory and the lengths; knows nothing of attention or of requests. Memory is reserved at
once and touched only as it fills. A slot remembers how many of its first positions are a copy of
another cache's, so that they need not be copied again.
"""

import weakref

import numpy as np
import torch
from torch import Tensor

from ovfast.config import TextConfig
from ovfast.errors import CapacityError


class KVCache:
    """Keys and values of all layers for `num_slots` requests.

    Attributes:
        k_cache: (num_layers, num_slots, num_kv_heads, max_positions, head_dim).
        v_cache: as k_cache.
        lengths: filled positions of each slot.
        max_positions: positions of a slot.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        num_slots: int,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Reserves the cache.

        Args:
            config: of the language model.
            num_slots: requests that can be held at once.
            max_positions: tokens a slot can hold.
            dtype: of keys and values.
            device: of the model.

        Raises:
            CapacityError: the memory cannot be reserved.
        """
        shape = (config.num_layers, num_slots, config.num_kv_heads, max_positions, config.head_dim)
        self.max_positions = max_positions
        self.lengths = [0] * num_slots
        self._free = list(range(num_slots))[::-1]
        # Of each slot the cache that its first positions were copied from, and how many they are;
        # never more than its length, for what lies behind that may be overwritten.
        self._copied: list[tuple[weakref.ref[KVCache] | None, int]] = [(None, 0)] * num_slots
        self.bytes_per_token = kv_bytes_per_token(config, dtype)
        try:
            # Not zeros: the system hands out pages as they are written.
            self.k_cache = torch.empty(shape, dtype=dtype, device=device)
            self.v_cache = torch.empty(shape, dtype=dtype, device=device)
        except (RuntimeError, MemoryError) as error:
            need_bytes = self.bytes_per_token * num_slots * max_positions
            raise CapacityError(
                f"a cache of {num_slots} slots of {max_positions} tokens needs"
                f" {need_bytes / 1e9:.2f} GB, which {device} cannot reserve. Lower max_seq_len or"
                " max_batch_size."
            ) from error

    @property
    def num_slots(self) -> int:
        return len(self.lengths)

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Reserved bytes."""
        return self.k_cache.nbytes + self.v_cache.nbytes

    def allocate(self) -> int:
        """Takes an empty slot.

        Raises:
            CapacityError: all slots are taken.
        """
        if not self._free:
            raise CapacityError(
                f"all {self.num_slots} slots hold a request; wait for one to finish or close a"
                " stream, or load with a larger max_batch_size."
            )
        slot = self._free.pop()
        self.truncate(slot, 0)
        return slot

    def free(self, slot: int) -> None:
        """Gives a slot back."""
        assert 0 <= slot < self.num_slots
        assert slot not in self._free
        self.truncate(slot, 0)
        self._free.append(slot)

    def truncate(self, slot: int, length: int) -> None:
        """Forgets the positions of a slot from `length` on."""
        assert 0 <= length <= self.lengths[slot]
        source, num_copied = self._copied[slot]
        self._copied[slot] = (source, min(num_copied, length))
        self.lengths[slot] = length

    def num_copied(self, slot: int, source: "KVCache | None") -> int:
        """How many of a slot's first positions are those of `source`."""
        known, length = self._copied[slot]
        return length if source is not None and known is not None and known() is source else 0

    def copy_prefix(self, slot: int, source: "KVCache", length: int) -> None:
        """Makes a slot the first positions of another cache; copies what it does not have of them.

        Args:
            slot: holds no positions but such ones.
            source: a cache of the same model, whose slot 0 is read.
            length: positions wanted.
        """
        have = self.lengths[slot]
        assert have == self.num_copied(slot, source)
        assert length <= source.lengths[0]
        if have >= length:
            self.truncate(slot, length)
            return
        for own, other in ((self.k_cache, source.k_cache), (self.v_cache, source.v_cache)):
            _copy(own[:, slot, :, have:length], other[:, 0, :, have:length])
        self.lengths[slot] = length
        self._copied[slot] = (weakref.ref(source), length)

    def check_room(self, slot: int, num_tokens: int) -> None:
        """Checks that a slot can take `num_tokens` more.

        Raises:
            CapacityError: it cannot; nothing has changed.
        """
        length = self.lengths[slot]
        if length + num_tokens > self.max_positions:
            raise CapacityError(
                f"{num_tokens} more tokens after {length} exceed the {self.max_positions} tokens"
                " of a slot. Shorten the prompt, lower max_views or num_frames, or load with a"
                " larger max_seq_len."
            )

    def layer(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer: views (num_kv_heads, max_positions, head_dim)."""
        return self.k_cache[layer, slot], self.v_cache[layer, slot]


def _copy(own: Tensor, other: Tensor) -> None:
    if own.device.type != "cpu":
        own.copy_(other)
        return
    # Not by torch's threads: they would wait for those of the native back end, which take turns
    # with them in a step. One thread copies as fast as the memory allows.
    np.copyto(own.view(torch.uint8).numpy(), other.view(torch.uint8).numpy())


def kv_bytes_per_token(config: TextConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token, all layers together."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
