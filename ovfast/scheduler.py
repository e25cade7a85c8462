"""The step loop: slots, admission, prefill and decoding, driven by whichever threads want tokens.

A step is what runs under the lock: one picture, one chunk of a prefill, or one token of every
active request.
Each thread steps for itself and finds what other threads' steps have made for it.

Ctrl-C may raise in the main thread between any two instructions, also while it steps for others;
a dropped stream may be finalised in the middle of a step. So nothing has to be undone: a call
marks itself ended by one store, and the next step collects its slots; a runner's step can be
repeated; the lock is only taken by `with` on the bare lock, which no signal can cut in two.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from ovfast.call import Call, always_wanted, check_wait_ends
from ovfast.clock import Mark, mark
from ovfast.errors import BackendError, CapacityError
from ovfast.home_stream import HomeStream
from ovfast.kv_cache import KVCache
from ovfast.model_inputs import ModelInputs, common_length
from ovfast.models.llava_onevision import LlavaOnevision, Part
from ovfast.out_of_memory import capacity_error
from ovfast.outputs import StreamChunk
from ovfast.request import Request, side_by_side
from ovfast.runner import DecodeRunner, StepResult

# A waiting thread looks again after so long: an interrupt may have cut the call that wakes it.
WAIT_S = 1.0

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Loaded(NamedTuple):
    """What closing an engine frees."""

    model: LlavaOnevision
    cache: KVCache
    runner: DecodeRunner


class Scheduler:
    """Runs requests over the slots of one cache; any number of threads may call it."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded: Loaded | None = loaded
        self._home = HomeStream(loaded.model.device)
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._stepping = False
        # By slot; a slot is free where there is no call.
        self._calls: list[Call | None] = [None] * loaded.cache.num_slots
        self._requests: list[Request | None] = [None] * loaded.cache.num_slots
        self._results: deque[StepResult] = deque()
        self._blocked: set[int] = set()  # threads that wait for a slot

    @property
    def closed(self) -> bool:
        return self._loaded is None

    @property
    def num_free_slots(self) -> int:
        return self._calls.count(None)

    @property
    def _inherited(self) -> bool:
        """Whether a fork brought this here: the lock may then be a copy of a held one."""
        return self._process != os.getpid()

    def loaded(self) -> Loaded:
        """The model, its cache and its runner.

        Raises:
            BackendError: they have been freed, or belong to the parent of this process.
        """
        if self._inherited:
            # Threads of torch and of a driver, and locks in use, do not survive a fork.
            raise BackendError(
                "the engine was loaded before this process was forked; expected one of this"
                " process. Load it after the fork, or start processes by 'spawn' or 'forkserver'."
            )
        if self._loaded is None:
            raise BackendError("the engine is closed. Load a new one with ovfast.load(...).")
        return self._loaded

    def close(self) -> None:
        """Frees the model; a step that another thread is in ends first."""
        self._loaded = None
        if self._inherited:
            return
        with self._lock:
            self._changed.notify_all()

    def step(self, work: Callable[[Loaded], T]) -> T:
        """Runs one step.

        Args:
            work: called under the lock, in inference mode, on the engine's own stream.

        Returns:
            What `work` returns.

        Raises:
            BackendError: the engine is closed, or this thread is inside a step already.
            CapacityError: the device ran out of memory.
        """
        self.loaded()  # before the lock
        with self._lock:
            self._check_not_stepping()
            loaded = self.loaded()
            return self._home.run(lambda: self._step(loaded, work))

    def _step(self, loaded: Loaded, work: Callable[[Loaded], T]) -> T:
        self._collect(loaded)
        try:
            self._stepping = True
            with torch.inference_mode():
                return work(loaded)
        except (RuntimeError, MemoryError) as error:
            if (full := capacity_error(error)) is not None:
                raise full from error
            raise
        finally:
            self._stepping = False
            self._collect(loaded)

    def reuse(self, inputs: ModelInputs, slot: int, limit: int) -> int:
        """Puts the beginning of a request into a slot of its own, as far as its handle holds it.

        Args:
            inputs: a laid-out request.
            slot: holds nothing else.
            limit: positions wanted at most.

        Returns:
            The number of positions that the slot then holds.
        """
        if inputs.encoded is None:
            return 0
        held = inputs.encoded.held()
        if held.prefix is None:
            return 0
        prefix, same = held.prefix, common_length(held.sources, inputs.sources)
        length = min(same, limit)
        self.step(lambda loaded: loaded.cache.copy_prefix(slot, prefix, length))
        return length

    def embed(self, inputs: ModelInputs, start: int = 0) -> torch.Tensor:
        """Text and visual rows of a request, a step for each part: others' tokens pass between.

        Args:
            inputs: a laid-out request.
            start: position of the first row wanted; 0 unless a handle holds those before.

        Returns:
            (num_tokens - start, hidden_size).
        """
        if inputs.encoded is not None:
            ids, placed = inputs.input_ids[start:], inputs.held_rows(start)
            return self.step(lambda loaded: loaded.model.place(ids, placed))
        assert start == 0
        model = self.loaded().model
        embeds = self.step(lambda loaded: loaded.model.new_inputs_embeds(inputs))
        for part in model.parts(inputs):
            self.step(_encoding(inputs, part, embeds))
        return embeds

    def prefill(
        self,
        embeds: torch.Tensor,
        cache: KVCache,
        slot: int,
        start: int,
        finish: Callable[[Loaded, torch.Tensor], T],
        positions_wanted: Sequence[int] | None = None,
    ) -> T:
        """Fills a slot with rows, a step for each chunk of them: others' tokens pass between.

        Args:
            embeds: (num_tokens, hidden_size), at least one row.
            cache: the engine's, or that of a handle.
            slot: the caller's own; what it holds from `start` on is forgotten.
            start: position of the first row.
            finish: called in the last step with the rows for the head, (rows wanted, hidden_size).
            positions_wanted: rows of embeds, ascending; None means the last one.

        Returns:
            What `finish` returns.

        Raises:
            CapacityError: the slot is too short; nothing has run.
        """
        num_tokens = len(embeds)
        wanted = [num_tokens - 1] if positions_wanted is None else positions_wanted
        hidden: list[torch.Tensor] = []

        def fill(loaded: Loaded, rows: range) -> None:
            own = [row - rows.start for row in wanted if row in rows]
            part, first = embeds[rows.start : rows.stop], start + rows.start
            language_model = loaded.model.language_model
            hidden.append(language_model.prefill_hidden(part, cache, slot, first, own))

        def fill_last(loaded: Loaded) -> T:
            fill(loaded, chunks[-1])
            return finish(loaded, hidden[0] if len(hidden) == 1 else torch.cat(hidden))

        chunks = self.loaded().model.language_model.chunks(start, num_tokens)
        cache.truncate(slot, start)
        cache.check_room(slot, num_tokens)
        for rows in chunks[:-1]:
            self.step(partial(fill, rows=rows))
            # The lock is not fair: without a step for them others might wait for several chunks.
            if any(self._requests):
                self.step(self._advance)
        return self.step(fill_last)

    def run(self, requests: Sequence[Request]) -> None:
        """Runs requests to their ends, as many at a time as slots are free."""
        call = Call(threading.get_ident())
        waiting, active = deque(requests), list[Request]()
        try:
            num_views = self.loaded().model.views_a_step
            while waiting or active:
                while num := self._admit(side_by_side(waiting, num_views), call, wait=not active):
                    active += [waiting.popleft() for _ in range(num)]
                active = [r for r in active if self._next_chunk(r).output is None]
        finally:
            call.ended = True
            self._collect_now()

    def stream(
        self, request: Request, give_up: Callable[[], float] = always_wanted
    ) -> Generator[StreamChunk, None, None]:
        """Runs one request, a chunk at a time; closing or dropping the generator frees its slot.

        Args:
            request: not run yet.
            give_up: of `Call`; what it raises ends the stream.
        """
        call = Call(threading.get_ident(), give_up)
        try:
            self._admit([request], call, wait=True)
            chunk = None
            while chunk is None or chunk.output is None:
                chunk = self._next_chunk(request)
                yield chunk
                if threading.get_ident() != call.owner:
                    call.owner = None
        finally:
            call.ended = True
            self._collect_now()

    @contextmanager
    def hold_slot(self, inputs: ModelInputs) -> Iterator[int]:
        """A slot for one request for the length of a `with`, for calls that do not decode."""
        call = Call(threading.get_ident())
        try:
            slot = self._take_slot(call, inputs, wait=True)
            assert slot is not None
            yield slot
        finally:
            call.ended = True
            self._collect_now()

    def _admit(self, requests: Sequence[Request], call: Call, *, wait: bool) -> int:
        """Gives requests slots, encodes their views together and prefills them.

        Returns how many there were slots for: 0 only if `wait` is not set.
        """
        slots = list[int]()
        for request in requests:
            slot = self._take_slot(call, request.inputs, wait=wait and not slots)
            if slot is None:
                break
            slots.append(slot)
        if not slots:
            return 0
        device, cache = self.loaded().model.device, self.loaded().cache
        started = mark(device)
        several = [request.inputs for request in requests[: len(slots)]]
        if len(several) > 1:
            embeds = self._embed_together(several)
        else:
            cached = self.reuse(several[0], slots[0], several[0].num_tokens - 1)
            requests[0].cached_tokens = cached
            embeds = [self.embed(several[0], cached)]
        embedded = mark(device)
        call.give_up()
        for request, slot, rows in zip(requests, slots, embeds, strict=False):
            begin = partial(self._begin, request, slot, (started, embedded, mark(device)))
            self.prefill(rows, cache, slot, request.cached_tokens, begin)
        return len(slots)

    def _embed_together(self, several: Sequence[ModelInputs]) -> list[torch.Tensor]:
        """As `embed` of each, with one pass of the tower; one by one where that takes too much."""
        try:
            return self.step(lambda loaded: loaded.model.build_together(several))
        except CapacityError:
            logger.info("no memory for the views of %d requests at a time", len(several))
        return [self.embed(inputs) for inputs in several]

    def _begin(
        self,
        request: Request,
        slot: int,
        marks: tuple[Mark, Mark, Mark],
        loaded: Loaded,
        hidden: torch.Tensor,
    ) -> None:
        """Lets a request decode whose prompt is in the cache."""
        logits = loaded.model.language_model.logits(hidden)[0]
        request.stages = (*marks, mark(loaded.model.device))
        loaded.runner.admit(slot, request.slot_state(logits))
        self._requests[slot] = request

    def _next_chunk(self, request: Request) -> StreamChunk:
        """The request's next chunk; steps all active requests if there is none yet."""
        while not request.pending:
            if request.error is not None:
                raise request.error
            self.step(lambda loaded: self._decode(loaded, request))
        return request.pending.popleft()

    def _decode(self, loaded: Loaded, wanted: Request) -> None:
        if wanted.pending or wanted.error is not None:
            return  # made by another thread's step while this one waited for the lock
        self._advance(loaded)

    def _advance(self, loaded: Loaded) -> None:
        """One token for each request that decodes."""
        loaded.runner.launch(1)
        self._results.extend(loaded.runner.poll())
        while self._results:
            result = self._results[0]
            request = self._requests[result.slot]
            if request is not None:
                request.accept(result)
            self._results.popleft()

    def _take_slot(self, call: Call, inputs: ModelInputs, *, wait: bool) -> int | None:
        """A slot, empty but for what it still has of the request's handle; None if none is free,
        unless `wait` is set: that blocks until there is one.
        """
        self.loaded()  # before the lock, and before the handle: closing released it
        prefix = None if inputs.encoded is None else inputs.encoded.held().prefix
        with self._lock:
            while True:
                self._check_not_stepping()
                loaded = self.loaded()
                self._collect(loaded)
                patience_s = call.give_up()
                free = [slot for slot, taken in enumerate(self._calls) if taken is None]
                if free:
                    slot = max(free, key=lambda slot: loaded.cache.num_copied(slot, prefix))
                    loaded.cache.truncate(slot, loaded.cache.num_copied(slot, prefix))
                    self._calls[slot] = call
                    return slot
                if not wait:
                    return None
                check_wait_ends(self._calls, self._blocked | {threading.get_ident()})
                self._wait(min(WAIT_S, patience_s))

    def _wait(self, seconds: float) -> None:
        thread = threading.get_ident()
        try:
            self._blocked.add(thread)
            self._changed.wait(seconds)
        finally:
            self._blocked.discard(thread)

    def _check_not_stepping(self) -> None:
        if self._stepping:
            raise BackendError(
                "the engine was called from inside one of its own steps, by a signal handler or a"
                " finaliser; expected a call from ordinary code. Set a flag there and call later."
            )

    def _collect_now(self) -> None:
        if self._inherited:
            return
        with self._lock:
            # Inside a step of this thread the step's end will do it.
            if not self._stepping and self._loaded is not None:
                self._collect(self._loaded)

    def _collect(self, loaded: Loaded) -> None:
        """Frees the slots of ended calls and of requests that are over. Needs the lock."""
        freed = False
        for slot, call in enumerate(self._calls):
            request = self._requests[slot]
            if call is None or not (call.ended or (request is not None and request.is_over)):
                continue
            loaded.runner.cancel(slot)
            self._results = deque(result for result in self._results if result.slot != slot)
            self._requests[slot] = None
            self._calls[slot] = None
            freed = True
        if freed:
            self._changed.notify_all()


def _encoding(inputs: ModelInputs, part: Part, embeds: torch.Tensor) -> Callable[[Loaded], object]:
    return lambda loaded: loaded.model.encode(inputs, part, embeds)
