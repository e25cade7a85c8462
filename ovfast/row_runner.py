"""The decode runner that keeps the device ahead of the host.

Requests stand in rows, up to 16 of which decode together (`decode_rows`). A step is enqueued with
what it will tell the host, and the host reads an earlier one meanwhile: the device is never asked
whether a request is over before the next step begins, for rows that are over stop by themselves.
Steps are replayed from graphs where there are any, by rows, length and rules of sampling.

Admitting, cancelling and stepping are ordered by the stream alone: a request is written into a row
that steps under way do not look at, and a cancelled row is emptied for the steps after them.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ovfast.cuda_graphs import GraphCache
from ovfast.decode_kernels import DecodeKernels
from ovfast.decode_rows import (
    ERROR,
    FINISHED,
    ROWS,
    RowDecoder,
    RowState,
    StepOutput,
    StepPlan,
    run_step,
)
from ovfast.device_sampling import SamplerKind
from ovfast.errors import BackendError
from ovfast.home_stream import HomeStream
from ovfast.kv_cache import KVCache
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.models.qwen2_rows import Qwen2Rows
from ovfast.native_runner import NativeRunner
from ovfast.ops import Ops
from ovfast.out_of_memory import capacity_error
from ovfast.runner import DecodeRunner, EagerRunner, SlotState, StepResult
from ovfast.sampling import TokenLogprob
from ovfast.staging import to_device

__all__ = ["RowRunner", "make_runner"]

AHEAD = 1  # steps given to the device beyond the one the host waits for


@dataclass(slots=True, eq=False)
class _Row:
    """The host's side of one row."""

    row: int
    slot: int
    state: SlotState
    num_prompt: int
    num_enqueued: int = 0
    is_over: bool = False
    ended_by: "_Step | None" = None


@dataclass(slots=True, eq=False)
class _Step:
    """One step under way: who was in it, and what it will have told.

    `is_enqueued` is set last: a step without it was cut in two, by `error` or by an interrupt.
    Reading can be repeated: `results` are made once.
    """

    rows: list[_Row]
    num_top: int | None
    counts: list[int] = field(default_factory=list)
    output: StepOutput | None = None
    event: torch.cuda.Event | None = None
    is_enqueued: bool = False
    error: Exception | None = None
    results: list[StepResult] | None = None


@dataclass(slots=True, eq=False)
class _Group:
    """Rows that decode together."""

    state: RowState
    rows: list[_Row | None] = field(default_factory=lambda: [None] * ROWS)
    steps: deque[_Step] = field(default_factory=deque)

    def active(self) -> list[_Row]:
        return [row for row in self.rows if row is not None and not row.is_over]


class RowRunner:
    """Decodes all admitted slots side by side.

    Args:
        cache: whose slots are decoded.
        forbidden: (vocab_size,) bool, ids never generated.
        decoder: computes the logits of rows.
        graphs: replays steps; None launches them one by one.
        kernels: of the decoder, to choose tokens by; None chooses by plain torch.
        split: positions of a part of the context, as the decoder cuts it.
    """

    def __init__(
        self,
        cache: KVCache,
        forbidden: Tensor,
        decoder: RowDecoder,
        graphs: GraphCache | None = None,
        kernels: DecodeKernels | None = None,
        *,
        split: int,
    ) -> None:
        self._cache, self._forbidden, self._decoder = cache, forbidden, decoder
        self._graphs, self._kernels, self._split = graphs, kernels, split
        self._device = forbidden.device
        self._home = HomeStream(self._device)
        self._groups: list[_Group] = []
        self._owed = 0
        self._results: list[StepResult] = []

    def admit(self, slot: int, state: SlotState) -> None:
        assert state.logits is not None
        group, row = self._free_row(state)
        state.num_prompt = self._cache.lengths[slot]
        entry = _Row(row, slot, state, state.num_prompt)
        stop_ids = to_device(torch.tensor(sorted(state.stop_ids), dtype=torch.int64), self._device)
        group.rows[row] = entry  # first: whatever fails below, `cancel` finds the row
        group.state.admit(
            row,
            slot,
            state.num_prompt,
            state.logits,
            state.params,
            seed=state.seed,
            stop_ids=stop_ids,
            max_new_tokens=state.max_new_tokens,
            seen=state.seen,
        )
        state.logits = None
        # The first token comes from the prompt's logits: sampled now, without decoding.
        kind, num_top = SamplerKind.of(state.params), state.params.logprobs
        step = _Step([entry], num_top)
        group.steps.append(step)
        group.state.choose(row, row + 1, kind, num_top)
        entry.num_enqueued = 1
        step.counts = [1]
        self._close(group, step)

    def launch(self, n_steps: int) -> None:
        self._owed = max(self._owed, n_steps)
        for group in self._groups:
            self._drop_cut_steps(group)
            while len(group.steps) < self._owed + AHEAD and self._enqueue(group):
                pass

    def poll(self) -> list[StepResult]:
        for group in self._groups:
            for _ in range(min(self._owed, len(group.steps))):
                step = group.steps[0]
                if step.results is None:
                    step.results = self._read(group, step)
                self._results += step.results
                group.steps.popleft()
        self._owed = 0
        results, self._results = self._results, []
        return results

    @torch.inference_mode()  # a call may end outside of a step
    def cancel(self, slot: int) -> None:
        for group in self._groups:
            for entry in group.rows:
                if entry is not None and entry.slot == slot:
                    self._home.run(partial(group.state.release, entry.row))
                    entry.is_over = True
                    group.rows[entry.row] = None
            for step in group.steps:  # also of one whose row is free already
                for entry in step.rows:
                    if entry.slot == slot:
                        entry.is_over, entry.ended_by = True, None
                if step.results:
                    step.results = [result for result in step.results if result.slot != slot]
        self._results = [result for result in self._results if result.slot != slot]

    def warmup(self) -> None:
        """Compiles what draws tokens, and captures greedy steps of any number of rows and length.

        As far as graphs have room, of the first group, on rows without a request: nothing where a
        request decodes, which captures its own.
        """
        if not self._groups:
            self._groups.append(self._new_group(0))
        group = self._groups[0]
        if any(row is not None for row in group.rows):
            return
        for sorts in (False, True):
            group.state.choose(0, 1, SamplerKind(random=True, sorts=sorts), None)
        if self._graphs is not None:
            self._capture_greedy(group, self._graphs)

    def _capture_greedy(self, group: _Group, graphs: GraphCache) -> None:
        most_rows = _next_power_of_2(min(self._cache.num_slots, ROWS))
        most_splits = _next_power_of_2(-(-self._cache.max_positions // self._split))
        for num_splits in _powers_of_2(most_splits):
            for num_rows in _powers_of_2(most_rows):
                plan = StepPlan(num_rows, num_splits, SamplerKind(), None)
                key = (self._groups.index(group), plan)
                while key not in graphs.keys:  # once to compile, once to capture
                    if not graphs.has_room() or graphs.is_refused(key):
                        return
                    graphs.run(key, partial(run_step, group.state, self._decoder, plan))

    def _free_row(self, state: SlotState) -> tuple[_Group, int]:
        """A row for a request, in the first group that has one and can report what it wants."""
        num_top = min(state.params.logprobs or 0, len(self._forbidden))
        for group in self._groups:
            if None in group.rows and num_top <= group.state.output.top_ids.shape[1]:
                return group, group.rows.index(None)
        self._groups.append(self._new_group(num_top))
        return self._groups[-1], 0

    def _new_group(self, num_top: int) -> _Group:
        vocab_size = len(self._forbidden)
        wide = 0 if num_top == 0 else min(vocab_size, max(8, _next_power_of_2(num_top)))
        return _Group(RowState(vocab_size, self._forbidden, wide, self._kernels))

    def _enqueue(self, group: _Group) -> bool:
        """Gives the device one more step of a group; False if no row can need it.

        An error ends the requests in it: those of other groups go on, whoever drives the step.
        """
        rows = [row for row in group.active() if row.num_enqueued < row.state.max_new_tokens]
        if not rows:
            return False
        plan = _plan(group.active(), self._split)
        step = _Step(rows, plan.num_top)
        group.steps.append(step)
        try:
            self._run(group, plan)
            for row in rows:
                row.num_enqueued += 1
            step.counts = [row.num_enqueued for row in rows]
            self._close(group, step)
        except Exception as error:  # noqa: BLE001 - told to all that were in the step
            step.error = error
            self._drop_cut_steps(group)
        return step.is_enqueued

    def _run(self, group: _Group, plan: StepPlan) -> None:
        state, decoder = group.state, self._decoder
        if self._graphs is None:
            run_step(state, decoder, plan)
        else:
            key = (self._groups.index(group), plan)
            self._graphs.run(key, lambda: run_step(state, decoder, plan))

    def _close(self, group: _Group, step: _Step) -> None:
        """Copies what a step tells to the host, behind it in the stream."""
        output = group.state.output
        wanted = output if step.num_top is not None else None
        step.output = StepOutput(
            _to_host(output.tokens),
            _to_host(output.logprobs) if wanted else output.logprobs,
            _to_host(output.top_ids) if wanted else output.top_ids,
        )
        if self._device.type == "cuda":
            step.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            step.event.record(torch.cuda.current_stream(self._device))
        step.is_enqueued = True

    def _drop_cut_steps(self, group: _Group) -> None:
        """Ends the requests of a step that was cut in two: what it did cannot be known."""
        for step in [step for step in group.steps if not step.is_enqueued]:
            group.steps.remove(step)
            for entry in step.rows:
                if not entry.is_over:
                    error = _cut_error(step.error)
                    self._results.append(self._end(group, entry, -1, None, None, error))

    def _read(self, group: _Group, step: _Step) -> list[StepResult]:
        if not step.is_enqueued:
            return []
        if step.event is not None:
            step.event.synchronize()
        assert step.output is not None
        tokens = step.output.tokens.tolist()
        results = []
        for entry, count in zip(step.rows, step.counts, strict=True):
            token, code = tokens[entry.row]
            if token == -1 or (entry.is_over and entry.ended_by is not step):
                continue
            entry.ended_by = step  # of the last of its steps this stays true
            if code == ERROR:
                error = BackendError(
                    "the logits of this request are not finite, or every token is forbidden;"
                    " expected finite logits and at least one allowed token. Try"
                    " dtype='float32' or backend='reference', and check min_new_tokens."
                )
                results.append(self._end(group, entry, -1, None, None, error))
                continue
            entry.state.num_tokens = count
            self._cache.lengths[entry.slot] = entry.num_prompt + count - 1
            logprob = _logprob(step.output, entry, token)
            if code in FINISHED:
                results.append(self._end(group, entry, token, logprob, FINISHED[code], None))
            else:
                results.append(StepResult(entry.slot, token, logprob, None))
        return results

    def _end(
        self,
        group: _Group,
        entry: _Row,
        token: int,
        logprob: TokenLogprob | None,
        finished: str | None,
        error: Exception | None,
    ) -> StepResult:
        if group.rows[entry.row] is entry:
            group.state.release(entry.row)
            group.rows[entry.row] = None
        entry.is_over = entry.state.is_over = True
        return StepResult(entry.slot, token, logprob, finished, error)  # type: ignore[arg-type]


def make_runner(
    model: LlavaOnevision,
    cache: KVCache,
    forbidden: Tensor,
    ops: Ops,
    graphs: GraphCache | None = None,
) -> DecodeRunner:
    """The runner of a back end: rows of fused kernels where it has them for the model's heads."""
    if ops.native is not None:
        return NativeRunner(model, cache, forbidden, ops)
    if ops.decode is None or not ops.decode.supports(model.config.text.head_dim):
        return EagerRunner(model, cache, forbidden)
    decoder = Qwen2Rows(model.language_model, cache, ops.decode)
    return RowRunner(cache, forbidden, decoder, graphs, ops.decode, split=ops.decode.split)


def _plan(rows: list[_Row], split: int) -> StepPlan:
    """The smallest of a few shapes that holds the rows: each shape is a graph."""
    kind = SamplerKind()
    for row in rows:
        kind = kind | SamplerKind.of(row.state.params)
    last = max(row.row for row in rows)
    length = max(row.num_prompt + row.num_enqueued for row in rows)
    wanted = [row.state.params.logprobs for row in rows if row.state.params.logprobs is not None]
    return StepPlan(
        num_rows=_next_power_of_2(last + 1),
        num_splits=_next_power_of_2(-(-length // split)),
        kind=kind,
        num_top=max(wanted) if wanted else None,
    )


def _cut_error(cause: Exception | None) -> Exception:
    """What a request is told of a step that was cut: by an error, or by an interrupt."""
    if cause is None:
        return BackendError(
            "an interrupt (Ctrl-C) cut a step of this request in two; its text cannot be"
            " continued. Repeat the request."
        )
    if (full := capacity_error(cause)) is not None:
        return full
    error = BackendError(
        f"a step of this request and of those that decode beside it failed ({cause}); its text"
        " cannot be continued. Repeat the request."
    )
    error.__cause__ = cause
    return error


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _powers_of_2(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length())]


def _to_host(tensor: Tensor) -> Tensor:
    """A copy that the device makes when it comes to it."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _logprob(output: StepOutput, entry: _Row, token: int) -> TokenLogprob | None:
    num_top = entry.state.params.logprobs
    if num_top is None:
        return None
    values = output.logprobs[entry.row].tolist()
    ids = output.top_ids[entry.row, :num_top].tolist()
    top = tuple(zip(ids, values[1 : 1 + num_top], strict=True))
    return TokenLogprob(token, values[0], top)
