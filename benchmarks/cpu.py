"""The native CPU back end beside its rivals, stage by stage, in turn within one run.

    python -m tests.support.checkpoints DIR --size 0.5b      makes a full-size random checkpoint
    python -m benchmarks.cpu --checkpoint DIR [--parts decode,tower,prefill,first_token,load]
        [--sides bfloat16,int8,int4,transformers,llama.cpp] [--threads 2] [--repeats 5]
        [--llama-python VENV/bin/python --gguf Q8_0.gguf,Q4_0.gguf] [--out FILE.json]

Each side is a process of its own that waits while the others work: ovfast with the weights in the
checkpoint's type or quantised, transformers in float32 (its fastest type on a CPU without bf16
products), llama.cpp through llama-cpp-python in another environment, for the language model alone.
Every repeat measures each side once, so that the machine's noise meets all. Printed are medians,
the range, ratios pair by pair, and the floor: bytes that must be read over the measured read rate,
or operations over the measured rate of float32 sums of products.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import (
    QUESTION,
    commit,
    cpu_name,
    encoded_picture,
    memory_bytes,
    start_transformers,
    summary,
    write_record,
)
from ovfast.storage import STORAGES, bytes_per_param

PROMPT = 2962  # tokens of a 640×480 picture and a short question
CONTEXTS = (64, 3000)
STEPS = 16  # tokens of a decode measurement
PARTS = ("decode", "tower", "prefill", "first_token", "load")


class OvfastSide:
    """ovfast on the native back end; `kind` is how it keeps its weights."""

    def __init__(self, checkpoint: str, kind: str, threads: int) -> None:
        import torch

        import ovfast

        start = time.perf_counter()
        quantized = kind in ("int8", "int4")
        packed = (Path(checkpoint) / "packed.safetensors").exists()
        self._engine = ovfast.load(
            checkpoint,
            device="cpu",
            backend="native",
            dtype="auto" if quantized or packed else kind,
            quantization=kind if quantized and not packed else None,
            threads=threads,
            max_seq_len=4096,
        )
        self.load_s = time.perf_counter() - start
        self._model = self._engine._model
        loaded = self._engine._scheduler.loaded()
        self._cache, self._runner = loaded.cache, loaded.runner
        self._torch = torch

    def decode(self, context: int) -> float:
        """Seconds a token at a context."""
        import numpy as np

        cache, runner = self._cache, self._runner
        self._cache.k_cache[:, 0, :, :context].normal_()
        self._cache.v_cache[:, 0, :, :context].normal_()
        slots, greedy = np.zeros(1, np.int32), np.zeros(1, np.int32)
        token = np.full(1, 5, np.int32)
        times = []
        for step in range(STEPS):
            start = time.perf_counter()
            runner._decoder.step(
                cache.k_cache.numpy(),
                cache.v_cache.numpy(),
                token,
                slots,
                np.full(1, context + step, np.int32),
                runner._forbidden_bytes,
                runner._logits.numpy(),
                greedy,
            )
            times.append(time.perf_counter() - start)
            token[0] = max(0, greedy[0])
        return statistics.median(times)

    def tower(self, num_views: int) -> float:
        """Seconds a view."""
        import numpy as np

        from ovfast.pixels import view_pixels

        side = self._model.config.vision.image_size
        views = np.random.default_rng(0).integers(0, 256, (num_views, side, side, 3), np.uint8)
        with self._torch.inference_mode():
            start = time.perf_counter()
            self._model.vision_tower.encode(view_pixels(views, self._torch.device("cpu")))
            return (time.perf_counter() - start) / num_views

    def prefill(self, num_tokens: int) -> float:
        """Seconds of the language model over a prompt."""
        embeds = self._torch.randn(num_tokens, self._model.config.text.hidden_size) * 0.02
        with self._torch.inference_mode():
            slot = self._cache.allocate()
            start = time.perf_counter()
            self._model.language_model.prefill(embeds, self._cache, slot)
            seconds = time.perf_counter() - start
            self._cache.free(slot)
        return seconds

    def first_token(self, picture: bytes) -> float:
        """Seconds from an encoded picture to the first token."""
        start = time.perf_counter()
        self._engine.generate(QUESTION, images=picture, max_new_tokens=1, ignore_eos=True)
        return time.perf_counter() - start

    def text_token(self) -> float:
        """Seconds of a short text prompt."""
        start = time.perf_counter()
        self._engine.generate("Hello", max_new_tokens=1, ignore_eos=True)
        return time.perf_counter() - start


class TransformersSide:
    """transformers' modules in float32, SDPA attention, dynamic cache."""

    def __init__(self, checkpoint: str, kind: str, threads: int) -> None:
        import torch
        from transformers import LlavaOnevisionForConditionalGeneration

        start = time.perf_counter()
        torch.set_num_threads(threads)
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32
        )
        self._model = model.eval()
        self.load_s = time.perf_counter() - start
        self._torch, self._checkpoint, self._threads = torch, checkpoint, threads
        self._answer: Callable[..., Any] | None = None

    def decode(self, context: int) -> float:
        from transformers import DynamicCache

        from ovfast.verify.oracle import cache_argument

        torch, text = self._torch, self._model.model.language_model
        config = text.config
        shape = (
            1,
            config.num_key_value_heads,
            context,
            config.hidden_size // config.num_attention_heads,
        )
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            cache.update(torch.randn(shape), torch.randn(shape), layer)
        token, times = 5, []
        with torch.inference_mode():
            for _ in range(STEPS):
                start = time.perf_counter()
                ids = torch.tensor([[token]])
                out = self._model(input_ids=ids, **cache_argument(self._model, cache))
                token = int(out.logits[0, -1].argmax())
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def tower(self, num_views: int) -> float:
        torch = self._torch
        side = self._model.config.vision_config.image_size
        pixels = torch.rand(num_views, 3, side, side) * 2 - 1
        with torch.inference_mode():
            start = time.perf_counter()
            self._model.model.vision_tower(pixels, output_hidden_states=True)
            return (time.perf_counter() - start) / num_views

    def prefill(self, num_tokens: int) -> float:
        torch = self._torch
        width = self._model.config.text_config.hidden_size
        embeds = torch.randn(1, num_tokens, width) * 0.02
        with torch.inference_mode():
            start = time.perf_counter()
            self._model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - start

    def first_token(self, picture: bytes) -> float:
        if self._answer is None:
            del self._model
            self._answer = start_transformers(self._checkpoint, "float32", self._threads)
        start = time.perf_counter()
        next(self._answer(picture, 1))
        return time.perf_counter() - start


# A side in another environment: llama.cpp's language model, as its own Python module calls it.
LLAMA = """
import json, sys, time, statistics
import numpy as np
import llama_cpp
path, threads, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = llama_cpp.Llama(path, n_ctx=4096, n_batch=4096, n_ubatch=512, n_threads=threads,
                        n_threads_batch=threads, verbose=False, logits_all=False)
filled = 0
print("ready", flush=True)
for line in sys.stdin:
    name, value = json.loads(line)
    rng = np.random.default_rng(value)
    if name == "prefill":
        model.reset()
        start = time.perf_counter()
        model.eval(rng.integers(0, 1000, value).tolist())
        result, filled = time.perf_counter() - start, value
    else:
        model.n_tokens = 0
        model.reset()
        model.eval(rng.integers(0, 1000, value).tolist())
        times = []
        for step in range(steps):
            start = time.perf_counter()
            model.eval([5 + step])
            times.append(time.perf_counter() - start)
        result = statistics.median(times)
    print(json.dumps(result), flush=True)
"""


class LlamaSide:
    """llama.cpp on a GGUF file of the same sizes."""

    def __init__(self, python: str, gguf: str, threads: int) -> None:
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [python, "-c", LLAMA, gguf, str(threads), str(STEPS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "ready"
        self.load_s = time.perf_counter() - start

    def _ask(self, name: str, value: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, value]) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline()))

    def decode(self, context: int) -> float:
        return self._ask("decode", context)

    def prefill(self, num_tokens: int) -> float:
        return self._ask("prefill", num_tokens)


def serve(name: str, args: argparse.Namespace, pipe: Connection) -> None:
    """A side's process: loads, then measures what it is asked for."""
    import torch

    torch.set_num_threads(args.threads)
    before = memory_bytes("VmRSS")
    side: Any
    if name in STORAGES:
        side = OvfastSide(args.packed.get(name, args.checkpoint), name, args.threads)
    elif name == "transformers":
        side = TransformersSide(args.checkpoint, name, args.threads)
    else:
        side = LlamaSide(args.llama_python, name, args.threads)
    pipe.send({"load_s": side.load_s, "import_torch_bytes": before})
    while (job := pipe.recv()) is not None:
        part, value = job
        function = getattr(side, part, None)
        seconds = None if function is None else function(*value)
        pipe.send({"seconds": seconds, "peak_bytes": memory_bytes("VmHWM")})


def jobs_of(part: str, repeat: int) -> list[tuple[str, str, tuple[Any, ...]]]:
    """(label, method, arguments) of a part."""
    if part == "decode":
        return [(f"decode at {context}", "decode", (context,)) for context in CONTEXTS]
    if part == "tower":
        return [("tower, a view", "tower", (1,))]
    if part == "prefill":
        return [(f"prefill of {PROMPT}", "prefill", (PROMPT,))]
    if part == "first_token":
        return [
            ("first token, 640×480", "first_token", (encoded_picture((640, 480), repeat),)),
        ]
    return [("first token, short text", "text_token", ())]


def run(args: argparse.Namespace) -> dict[str, Any]:
    context = mp.get_context("spawn")
    machine = measure_machine(args.threads)
    sides: dict[str, Connection] = {}
    loads: dict[str, Any] = {}
    for name in args.sides:
        here, there = context.Pipe()
        context.Process(target=serve, args=(name, args, there), daemon=True).start()
        sides[name] = here
        loads[name] = here.recv()
        print(f"{name}: loaded in {loads[name]['load_s']:.2f} s", flush=True)
    samples: dict[str, dict[str, list[float]]] = {}
    peaks: dict[str, int] = {}
    for part in args.parts:
        for repeat in range(args.repeats + 1):  # the first warms up
            for label, method, value in jobs_of(part, repeat):
                for name, pipe in sides.items():
                    pipe.send((method, value))
                    answer = pipe.recv()
                    peaks[name] = answer["peak_bytes"]
                    if answer["seconds"] is None or not repeat:
                        continue
                    rows = samples.setdefault(label, {}).setdefault(name, [])
                    rows.append(answer["seconds"])
                    print(f"{label:24} {name:14} {1e3 * answer['seconds']:9.1f} ms", flush=True)
    for pipe in sides.values():
        pipe.send(None)
    return {
        "command": "python -m benchmarks.cpu " + " ".join(args.given),
        "machine": machine,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "commit": commit(),
        "load": loads,
        "peak_bytes": peaks,
        "milliseconds": {
            label: {name: summary([1e3 * t for t in times]) for name, times in rows.items()}
            for label, rows in samples.items()
        },
        "ratios": {label: ratios_of(rows) for label, rows in samples.items()},
        "floors": floors(args, machine),
        "samples": samples,
    }


def ratios_of(rows: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How many times faster each ovfast side is than each rival, pair by pair."""
    rivals = [name for name in rows if name not in STORAGES]
    return {
        f"{name} against {Path(rival).name}": summary(
            [b / a for a, b in zip(rows[name], rows[rival], strict=True)]
        )
        for name in rows
        if name in STORAGES
        for rival in rivals
    }


def measure_machine(threads: int) -> dict[str, Any]:
    """The CPU, and its rates with so many threads."""
    import torch

    from ovfast import ops_native

    native = ops_native.native_module()
    torch.set_num_threads(threads)
    pool = native.ThreadPool(threads)
    a, b = torch.randn(768, 1024), torch.randn(4096, 1024)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        a @ b.t()
        best = max(best, 2 * 768 * 1024 * 4096 / (time.perf_counter() - start))
    return {
        "cpu": cpu_name(),
        "isa": native.isa(),
        "threads": threads,
        "python": platform.python_version(),
        "read_gb_per_s": native.read_bandwidth(pool, 1 << 30) / 1e9,
        "torch_float32_gflops": best / 1e9,
    }


def floors(args: argparse.Namespace, machine: dict[str, Any]) -> dict[str, float]:
    """Milliseconds that no program can beat: of a token by its bytes."""
    from ovfast.config import ModelConfig
    from ovfast.roofline import decode_bytes

    text = ModelConfig.from_checkpoint(Path(args.checkpoint)).text
    rate = 1e9 * machine["read_gb_per_s"]
    return {
        f"decode at {context}, {name}": 1e3
        * decode_bytes(text, context, bytes_per_param(name), 4.0)
        / rate
        for context in CONTEXTS
        for name in args.sides
        if name in STORAGES
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--sides", default="bfloat16,int8,int4,transformers")
    parser.add_argument("--packed", nargs="*", default=[], help="int8=DIR of `ovfast convert`")
    parser.add_argument("--llama-python", help="interpreter that has llama_cpp")
    parser.add_argument("--gguf", default="", help="GGUF files, each a side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the record")
    args = parser.parse_args()
    args.given = [
        f"--parts {args.parts}",
        f"--sides {args.sides}",
        f"--threads {args.threads} --repeats {args.repeats}",
    ]
    args.parts = args.parts.split(",")
    args.sides = args.sides.split(",") + [name for name in args.gguf.split(",") if name]
    args.packed = dict(entry.split("=", 1) for entry in args.packed)
    record = run(args)
    write_record(record, args.out)
    print(json.dumps({k: v for k, v in record.items() if k != "samples"}, indent=1))


if __name__ == "__main__":
    main()
