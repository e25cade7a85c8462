"""The side "ovfast": an engine behind `protocol`, started by `COMMAND`.

Whole requests go through the public interface; stages are called as the engine calls them, on its
own model, cache and runner.
"""

import statistics
import sys
import time
from typing import Any

__all__ = ["COMMAND", "Worker"]

TOKEN = 5  # any id that is not special
Reply = dict[str, Any]

# What the imports take is measured here, in a process that has imported nothing of ours.
_START = """
import os, time
start = time.perf_counter()
import torch
imported = {"import_torch_ms": 1e3 * (time.perf_counter() - start), "torch_bytes": 0}
if os.path.exists("/proc/self/statm"):
    pages = int(open("/proc/self/statm").read().split()[1])
    imported["torch_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
from ovfast.bench.protocol import serve
from ovfast.bench.worker import Worker
imported["import_ms"] = 1e3 * (time.perf_counter() - start)
serve(lambda: Worker(imported))
"""
COMMAND = (sys.executable, "-c", _START)


class Worker:
    """One engine and its timed jobs.

    Args:
        imported: what the imports took, for the answer of `load`.
    """

    def __init__(self, imported: Reply) -> None:
        self._imported = imported

    def load(
        self,
        model: str,
        storage: str,
        backend: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        max_batch_size: int = 1,
    ) -> Reply:
        """Loads the engine.

        Args:
            model: as in `ovfast.load`.
            storage: of the weights; a packed directory must hold just that.
            backend: as in `ovfast.load`.
            device: as in `ovfast.load`.
            threads: as in `ovfast.load`.
            max_batch_size: as in `ovfast.load`.
        """
        import torch

        from ovfast import loading
        from ovfast.storage import load_options

        kept: Reply = {} if _is_packed(model) else load_options(storage)
        start = time.perf_counter()
        self._engine = loading.load(
            model,
            device=device,
            backend=backend,
            threads=threads,
            max_batch_size=max_batch_size,
            **kept,
        )
        self._torch = torch
        if self._engine.device.type == "cuda":
            torch.cuda.set_device(self._engine.device)  # stages are called outside of its steps
        return self._imported | {
            "load_ms": 1e3 * (time.perf_counter() - start),
            "weight_bytes": self._weight_bytes(),
            "storage": self._engine.storage,
            "backend": self._engine.ops.backend,
        }

    def answer(self, requests: list[Reply], max_new_tokens: int) -> list[Reply]:
        """Greedy answers to the requests of a batch; a single one is streamed."""
        if len(requests) == 1:
            return [self._stream(requests[0], max_new_tokens)]
        outputs = self._engine.generate(
            [request["prompt"] for request in requests],
            images=[request["images"] or None for request in requests],
            videos=[request["videos"] or None for request in requests],
            raw=True,
            max_new_tokens=max_new_tokens,
            ignore_eos=True,
        )
        return [
            _reply(output, output.timings.ttft_ms, output.timings.total_ms) for output in outputs
        ]

    def decode(self, context: int, steps: int, rows: int = 1) -> float:
        """Milliseconds of a step for so many rows at a context, the median of some steps."""
        loaded = self._engine._scheduler.loaded()
        if hasattr(loaded.runner, "_decoder"):
            return self._native_steps(context, steps, rows)
        prompts = [self._random_prompt(context) for _ in range(rows)]
        outputs = self._engine.generate(prompts, max_new_tokens=steps + 1, ignore_eos=True)
        return max(float(output.timings.tpot_ms) for output in outputs)

    def tower(self, num_views: int) -> float:
        """Milliseconds a view."""
        import numpy as np

        from ovfast.pixels import view_pixels

        model = self._engine._model
        side = model.config.vision.image_size
        views = np.random.default_rng().integers(0, 256, (num_views, side, side, 3), np.uint8)
        pixels = view_pixels(views, model.device)
        with self._torch.inference_mode():
            self._synchronize()
            start = time.perf_counter()
            model.vision_tower.encode(pixels)
            self._synchronize()
            return 1e3 * (time.perf_counter() - start) / num_views

    def prefill(self, num_tokens: int) -> float:
        """Milliseconds of the language model over a prompt of so many rows."""
        loaded, model = self._engine._scheduler.loaded(), self._engine._model
        shape = (num_tokens, model.config.text.hidden_size)
        embeds = 0.02 * self._torch.randn(shape, dtype=model.dtype, device=model.device)
        with self._torch.inference_mode():
            slot = loaded.cache.allocate()
            self._synchronize()
            start = time.perf_counter()
            model.language_model.prefill(embeds, loaded.cache, slot)
            self._synchronize()
            elapsed = time.perf_counter() - start
            loaded.cache.free(slot)
        return 1e3 * elapsed

    def preprocess(self, picture: bytes, is_new_size: bool = False) -> float:
        """Milliseconds from a decoded picture to the packed pixels of its views.

        Args:
            picture: encoded; decoded before the clock starts.
            is_new_size: forgets the sizes seen, so that the tables of the resize are made as well.
        """
        from ovfast.anyres import plan_image
        from ovfast.image import build_media_views
        from ovfast.media import load_image
        from ovfast.pixels import PixelLoader
        from ovfast.resize_table import resize_table

        engine, model = self._engine, self._engine._model
        pixels = load_image(picture)
        if is_new_size:
            resize_table.cache_clear()
            model._pixel_loader = PixelLoader(engine.ops, model.device)
        size_hw = (pixels.shape[0], pixels.shape[1])
        start = time.perf_counter()
        plan = plan_image(size_hw, engine.config.geometry, engine.visual, num_images=1)
        if engine.ops.reads_pictures:
            model._pixel_loader.load([pixels], [plan])
        else:
            build_media_views([pixels], (plan,), pack=engine.ops.pack_views)
        self._synchronize()
        return 1e3 * (time.perf_counter() - start)

    def _stream(self, request: Reply, count: int) -> Reply:
        start = time.perf_counter()
        first, output = 0.0, None
        for chunk in self._engine.stream(
            request["prompt"],
            images=request["images"] or None,
            videos=request["videos"] or None,
            raw=True,
            max_new_tokens=count,
            ignore_eos=True,
        ):
            last = 1e3 * (time.perf_counter() - start)
            first, output = first or last, chunk.output
        return _reply(output, first, last)

    def _native_steps(self, context: int, steps: int, rows: int) -> float:
        """The native step over a cache of random keys: no prompt has to be read first."""
        import numpy as np

        loaded = self._engine._scheduler.loaded()
        cache, runner = loaded.cache, loaded.runner
        cache.k_cache[:, :rows, :, :context].normal_()
        cache.v_cache[:, :rows, :, :context].normal_()
        logits = np.empty((rows, self._engine._model.vocab_size), np.float32)
        tokens, greedy = np.full(rows, TOKEN, np.int32), np.zeros(rows, np.int32)
        times = []
        for step in range(steps):
            start = time.perf_counter()
            runner._decoder.step(  # type: ignore[attr-defined]
                cache.k_cache.numpy(),
                cache.v_cache.numpy(),
                tokens,
                np.arange(rows, dtype=np.int32),
                np.full(rows, context + step, np.int32),
                runner._forbidden_bytes,  # type: ignore[attr-defined]
                logits,
                greedy,
            )
            times.append(1e3 * (time.perf_counter() - start))
            tokens[:] = np.maximum(greedy, 0)
        return statistics.median(times)

    def _random_prompt(self, length: int) -> Any:
        import numpy as np

        from ovfast.model_inputs import ModelInputs

        known = self._engine._processor.num_known_ids // 2  # special ids are the last
        ids = np.random.default_rng().integers(0, known, length)
        return ModelInputs(ids, (), (), (), self._engine.visual)

    def _weight_bytes(self) -> int:
        """All parameters as they are stored."""
        from ovfast.roofline import parameter_bytes
        from ovfast.storage import bytes_per_param

        engine = self._engine
        other = engine.dtype.itemsize if engine.ops.quantization else None
        return parameter_bytes(engine.config, bytes_per_param(engine.storage), other)

    def _synchronize(self) -> None:
        if self._engine.device.type == "cuda":
            self._torch.cuda.synchronize()


def _is_packed(model: str) -> bool:
    from ovfast.checkpoint import resolve_checkpoint
    from ovfast.packed_weights import is_packed

    return is_packed(resolve_checkpoint(model))


def _reply(output: Any, ttft_ms: float, e2e_ms: float) -> Reply:
    timings = output.timings
    names = ("media_ms", "preprocess_ms", "vision_ms", "prefill_ms")
    return {
        "ttft_ms": ttft_ms,
        "e2e_ms": e2e_ms,
        "prompt_tokens": output.usage.prompt_tokens,
        "token_ids": list(output.token_ids),
        "stages": {name: getattr(timings, name) for name in names},
    }
