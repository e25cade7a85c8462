"""What a decode step is made of, over random weights and caches: one layer's kernels, or a step.

For `gpu_language` and `gpu_launches`; nothing here is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_bench import Bench
from ovfast.config import TextConfig
from ovfast.decode_kernels import DecodeKernels
from ovfast.decode_rows import ROWS, RowState, StepPlan, run_step
from ovfast.device_sampling import SamplerKind
from ovfast.models.qwen2_rows import Qwen2Rows

EPS = 1e-6


class KernelWork(NamedTuple):
    """One launch, torch's product of the same weight, and the bytes that must be read."""

    run: Callable[[], Any]
    product: Callable[[], Tensor] | None
    num_bytes: float


class DecodeLayer:
    """The kernels of one layer and of the head, on buffers as `models.qwen2_rows` has them.

    Args:
        text: sizes.
        kernels: of the device.
        num_rows: that decode together.
        context: positions in the cache of each.
        dtype: of weights and cache.
        device: of everything.
    """

    def __init__(
        self,
        text: TextConfig,
        kernels: DecodeKernels,
        *,
        num_rows: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._text, self._kernels, self._num_rows = text, kernels, num_rows
        self._dtype, self._device, self._context = dtype, device, context
        hidden, heads, head_dim = text.hidden_size, text.num_heads, text.head_dim
        self._splits = context // kernels.split + 1
        self._residual, self._other = self._wide(ROWS, hidden), self._wide(ROWS, hidden)
        self._slots = torch.arange(ROWS, dtype=torch.int32, device=device)
        self._slots[num_rows:] = -1
        self._positions = torch.full((ROWS,), context, dtype=torch.int32, device=device)
        cache = (num_rows, text.num_kv_heads, context + 1, head_dim)
        self._k_cache, self._v_cache = self._narrow(*cache), self._narrow(*cache)
        self._cos, self._sin = (self._narrow(context + 1, head_dim // 2) for _ in range(2))
        self._q = self._narrow(ROWS, heads * head_dim)
        self._acc = self._wide(ROWS, heads, self._splits, head_dim)
        self._m, self._l = (self._wide(ROWS, heads, self._splits) for _ in range(2))
        self._mlp = self._narrow(ROWS, text.intermediate_size)
        out_splits = kernels.out_splits(hidden, heads * head_dim)
        down_splits = kernels.down_splits(hidden, text.intermediate_size)
        self._out_partials = self._wide(out_splits, ROWS, hidden)
        self._down_partials = self._wide(down_splits, ROWS, hidden)
        self._norm = self._narrow(hidden)

    def _wide(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._device)

    def _narrow(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self._dtype, device=self._device)

    def _weight(self, rows: int, cols: int) -> Tensor:
        return self._narrow(rows, cols) * cols**-0.5

    def _work(self, run: Callable[[], Any], weight: Tensor, x: Tensor) -> KernelWork:
        rows = x[: self._num_rows].to(self._dtype)
        return KernelWork(run, lambda: F.linear(rows, weight), float(weight.nbytes))

    def works(self) -> dict[str, KernelWork]:
        """The five launches of a layer, in order."""
        return {
            "decode_qkv": self.qkv(),
            "decode_attention": self.attention(),
            "decode_out": self.out(),
            "decode_gate_up": self.gate_up(),
            "decode_down": self.down(),
        }

    def qkv(self) -> KernelWork:
        text = self._text
        num_weights = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
        weight, bias = self._weight(num_weights, text.hidden_size), self._narrow(num_weights)

        def run() -> None:
            self._kernels.decode_qkv(
                self._residual,
                self._down_partials,
                self._other,
                self._norm,
                EPS,
                weight,
                bias,
                self._cos,
                self._sin,
                self._slots,
                self._positions,
                self._q,
                self._k_cache,
                self._v_cache,
                num_heads=text.num_heads,
                num_kv_heads=text.num_kv_heads,
                num_rows=self._num_rows,
            )

        return self._work(run, weight, self._residual)

    def attention(self) -> KernelWork:
        text = self._text

        def run() -> None:
            self._kernels.decode_attention(
                self._q.view(ROWS, text.num_heads, text.head_dim),
                self._k_cache,
                self._v_cache,
                self._slots,
                self._positions,
                self._acc,
                self._m,
                self._l,
                num_splits=self._splits,
                num_rows=self._num_rows,
            )

        return KernelWork(run, None, float(self._k_cache.nbytes + self._v_cache.nbytes))

    def out(self) -> KernelWork:
        weight = self._weight(self._text.hidden_size, self._q.shape[1])

        def run() -> None:
            self._kernels.decode_out(
                self._acc,
                self._m,
                self._l,
                self._slots,
                self._positions,
                weight,
                self._out_partials,
                num_rows=self._num_rows,
            )

        return self._work(run, weight, self._q)

    def gate_up(self) -> KernelWork:
        weight = self._weight(2 * self._text.intermediate_size, self._text.hidden_size)

        def run() -> None:
            self._kernels.decode_gate_up(
                self._other,
                self._out_partials,
                self._residual,
                self._norm,
                EPS,
                weight,
                self._mlp,
                num_rows=self._num_rows,
            )

        return self._work(run, weight, self._residual)

    def down(self) -> KernelWork:
        weight = self._weight(self._text.hidden_size, self._text.intermediate_size)

        def run() -> None:
            self._kernels.decode_down(
                self._mlp, weight, self._down_partials, num_rows=self._num_rows
            )

        return self._work(run, weight, self._mlp)

    def head(self) -> KernelWork:
        """Logits and the best id of each block."""
        vocab_size = self._text.vocab_size
        weight = self._weight(vocab_size, self._text.hidden_size)
        logits = self._wide(ROWS, vocab_size)
        forbidden = torch.zeros(vocab_size, dtype=torch.int8, device=self._device)
        best = self._wide(ROWS, self._kernels.head_blocks(vocab_size))
        ids = torch.zeros(best.shape, dtype=torch.int32, device=self._device)

        def run() -> None:
            self._kernels.decode_head(
                self._residual,
                self._down_partials,
                self._norm,
                EPS,
                weight,
                logits,
                forbidden,
                best,
                ids,
                num_rows=self._num_rows,
            )

        return self._work(run, weight, self._residual)


class Steps:
    """Greedy steps of rows at one context, each of them the same again: a work without arguments.

    As the engine's runner launches them, and one launch more, which takes the positions back.

    Args:
        bench: gives the model.
        context: positions in the cache of each row, with random keys and values.
        num_rows: that decode together.
        kernels: of the steps; None takes the model's.
    """

    def __init__(
        self, bench: Bench, context: int, num_rows: int, kernels: DecodeKernels | None = None
    ) -> None:
        model = bench.model
        kernels = kernels or bench.ops.decode
        assert kernels is not None
        cache = model.new_cache(num_slots=num_rows, max_positions=context + 1)
        for tensor in (cache.k_cache, cache.v_cache):
            tensor.normal_()
        forbidden = torch.zeros(model.vocab_size, dtype=torch.bool, device=bench.device)
        self._state = state = RowState(model.vocab_size, forbidden, kernels=kernels)
        state.slots[:num_rows] = torch.arange(num_rows, dtype=torch.int32, device=bench.device)
        state.max_new_tokens.fill_(1 << 40)
        self._decoder = Qwen2Rows(model.language_model, cache, kernels)
        self._positions = torch.full_like(state.positions, context)
        num_splits = context // kernels.split + 1
        self._plan = StepPlan(
            num_rows=1 << (num_rows - 1).bit_length(),
            num_splits=1 << (num_splits - 1).bit_length(),
            kind=SamplerKind(),
            num_top=None,
        )
        self._num_rows = num_rows

    def __call__(self) -> None:
        self._state.positions.copy_(self._positions)
        run_step(self._state, self._decoder, self._plan)

    def check(self) -> None:
        """Raises if a row has ended: steps of rows that are over take no time."""
        slots = self._state.slots[: self._num_rows].tolist()
        if slots != list(range(self._num_rows)):
            raise RuntimeError(f"rows ended while they were timed: slots {slots}")
