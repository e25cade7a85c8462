"""The peer llama.cpp, through llama-cpp-python: the language model alone, as Q8_0 or Q4_0.

It answers text, decodes and prefills; pictures it does not do here. The GGUF file is made from the
same checkpoint, once, by `gguf_file`. Prompts come as ids: the file has no tokenizer.
"""

import json
import statistics
import time
from pathlib import Path

from gguf_file import KINDS, write_gguf

POSITIONS = 4096


class Peer:
    """A checkpoint's language model in llama.cpp."""

    def load(self, model, storage, threads, cache_dir, device="cpu"):
        if device != "cpu":
            raise ValueError("this peer is for the CPU")
        if storage not in KINDS:
            raise ValueError(f"storage {storage!r}; llama.cpp runs here as {', '.join(KINDS)}")
        file = Path(cache_dir) / f"{Path(model).resolve().name}-{KINDS[storage]}.gguf"
        if not file.exists():
            write_gguf(Path(model), file, storage)
        start = time.perf_counter()
        import llama_cpp

        imported = time.perf_counter()
        self.model = llama_cpp.Llama(
            str(file),
            n_ctx=POSITIONS,
            n_batch=POSITIONS,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        config = json.loads((Path(model) / "config.json").read_text())
        self.num_known = min(config["image_token_index"], config["text_config"]["vocab_size"])
        self.rows = llama_cpp.llama_get_logits
        self.filled = 0
        return {
            "import_torch_ms": 0.0,
            "import_ms": 1e3 * (imported - start),
            "load_ms": 1e3 * (time.perf_counter() - imported),
            "torch_bytes": 0,
            "weight_bytes": file.stat().st_size,
            "version": llama_cpp.__version__,
        }

    def answer(self, requests, max_new_tokens):
        if len(requests) != 1 or requests[0]["input_ids"] is None:
            return None  # one request at a time, of text alone
        ids = requests[0]["input_ids"]
        start = time.perf_counter()
        self._restart()
        self.model.eval(ids)
        token_ids = [self._greedy()]
        first = time.perf_counter()
        for _ in range(max_new_tokens - 1):
            self.model.eval(token_ids[-1:])
            token_ids.append(self._greedy())
        last = time.perf_counter()
        return [
            {
                "ttft_ms": 1e3 * (first - start),
                "e2e_ms": 1e3 * (last - start),
                "prompt_tokens": len(ids),
                "token_ids": token_ids,
                "stages": {},
            }
        ]

    def decode(self, context, steps, rows=1):
        """Milliseconds of a step at a context, of which only what is missing is filled."""
        if rows != 1:
            return None
        if self.filled < context:
            self.model.n_tokens = self.filled
            self.model.eval(self._random_ids(context - self.filled))
        self.model.n_tokens, times = context, []  # what lies behind is dropped by `eval`
        for step in range(steps):
            start = time.perf_counter()
            self.model.eval([5 + step])
            times.append(1e3 * (time.perf_counter() - start))
        self.filled = context
        return statistics.median(times)

    def prefill(self, num_tokens):
        """Milliseconds over a prompt of so many ids."""
        self._restart()
        ids = self._random_ids(num_tokens)
        start = time.perf_counter()
        self.model.eval(ids)
        self.filled = num_tokens
        return 1e3 * (time.perf_counter() - start)

    def _random_ids(self, count):
        import numpy as np

        return np.random.default_rng(count).integers(0, self.num_known, count).tolist()

    def _restart(self):
        self.model.n_tokens = 0
        self.model.reset()
        self.filled = 0

    def _greedy(self):
        import numpy as np

        logits = np.ctypeslib.as_array(self.rows(self.model.ctx), shape=(self.num_known,))
        return int(logits.argmax())
