"""The plain model behind the interface of the row runner: its logic on a CPU, without kernels."""

from typing import Any

import ovfast
from ovfast import Engine
from ovfast.cuda_graphs import GraphCache
from ovfast.decode_rows import RowState
from ovfast.kv_cache import KVCache
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.row_runner import RowRunner
from ovfast.scheduler import Loaded

SPLIT = 200  # not that of the kernels: the runner takes the decoder's


class PlainDecoder:
    """Decodes row by row with the eager model, and checks what the runner promises."""

    def __init__(self, model: LlavaOnevision, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self.calls: list[tuple[int, int]] = []

    def decode(self, rows: RowState, num_rows: int, num_splits: int) -> None:
        self.calls.append((num_rows, num_splits))
        assert (rows.slots[num_rows:] < 0).all(), "a row that the step does not look at is in use"
        for row in range(num_rows):
            slot, position = int(rows.slots[row]), int(rows.positions[row])
            if slot < 0:
                continue
            assert position < num_splits * SPLIT, "the step does not look at the whole context"
            lengths = list(self._cache.lengths)
            self._cache.lengths[slot] = position
            rows.logits[row] = self._model.decode(int(rows.tokens[row]), self._cache, slot)
            self._cache.lengths[:] = lengths


class ReplayedGraph:
    """A stand-in for a graph: calls the body."""

    nbytes = 1
    pool_bytes = 0

    def __init__(self, body: Any) -> None:
        self._body = body

    def replay(self, tensor: Any) -> None:
        self._body()

    def release(self) -> None:
        del self._body


def use_rows(engine: Engine, graph_bytes: int = 1 << 20) -> RowRunner:
    """Replaces an engine's runner by the row runner over the plain model, each graph of a byte."""
    loaded = engine._scheduler.loaded()
    graphs = GraphCache(lambda body, tensor: ReplayedGraph(body), graph_bytes)
    decoder = PlainDecoder(loaded.model, loaded.cache)
    runner = RowRunner(loaded.cache, engine._forbidden, decoder, graphs, split=SPLIT)
    engine._scheduler._loaded = Loaded(loaded.model, loaded.cache, runner)
    return runner


def open_rows(path: Any, **options: Any) -> Engine:
    """An engine whose requests decode in rows."""
    engine = ovfast.load(path, **({"device": "cpu", "max_seq_len": 1024} | options))
    use_rows(engine)
    return engine
