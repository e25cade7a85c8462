"""The language half of `benchmarks.gpu`: first token from encoded bytes, decode by rows and length.

Both sides answer the same prompts with the same random weights, greedily and without stopping. The
floor of a decode step is the bytes of weights and cache that it must read over the copy rate.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import ovfast
from benchmarks.device_timing import host_race
from ovfast.bench.workloads import QUESTION, encoded_picture
from ovfast.roofline import decode_bytes

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

SIZES_HW = ((480, 640), (768, 1024))
ROWS = (1, 4, 16)
CONTEXTS = (1024, 5120, 16384)
NEW_TOKENS = 64


def _open(bench: Bench, **options: Any) -> ovfast.Engine:
    return ovfast.load(bench.checkpoint, device="cuda", backend="triton", **options)


def ttft(bench: Bench) -> None:
    """Milliseconds from the call with JPEG bytes to the first token on the host."""
    theirs = bench.theirs()
    processor = bench.processor()
    with _open(bench, max_seq_len=8192) as engine:
        for size_hw in SIZES_HW:
            _race_ttft(bench, engine, theirs, processor, size_hw)


def _race_ttft(
    bench: Bench, engine: ovfast.Engine, theirs: Any, processor: Any, size_hw: tuple[int, int]
) -> None:
    import io

    from PIL import Image

    seed = iter(range(10**6))  # every picture is new to both

    def ours() -> None:
        picture = encoded_picture(size_hw, next(seed))
        start = time.perf_counter()
        stream = engine.stream(QUESTION, images=picture, max_new_tokens=2, ignore_eos=True)
        next(stream)
        times["ovfast"].append(1e3 * (time.perf_counter() - start))
        stream.close()

    @torch.inference_mode()
    def upstream() -> None:
        picture = encoded_picture(size_hw, next(seed))
        start = time.perf_counter()
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        inputs = engine._processor.layout(
            QUESTION, images=[(image.height, image.width)], visual=engine.visual
        )[0]
        pixels = processor([image], return_tensors="pt")
        out = theirs(
            input_ids=torch.from_numpy(inputs)[None].cuda(),
            pixel_values=pixels["pixel_values"].to("cuda", theirs.dtype),
            image_sizes=pixels["image_sizes"].cuda(),
            logits_to_keep=1,
        )
        int(out.logits[0, -1].argmax())
        times["transformers"].append(1e3 * (time.perf_counter() - start))

    times: dict[str, list[float]] = {"ovfast": [], "transformers": []}
    host_race({"ovfast": ours, "transformers": upstream}, repeats=12, warm=3)
    counted = {name: values[3:] for name, values in times.items()}
    bench.records.race("latency", f"{size_hw[1]}x{size_hw[0]}", counted, metric="ttft_ms")


def decode(bench: Bench) -> None:
    """Milliseconds a step by rows and context, and transformers' `generate` for one row."""
    for context in CONTEXTS:
        with _open(bench, max_seq_len=context + 2 * NEW_TOKENS, max_batch_size=16) as engine:
            for num_rows in ROWS:
                _time_decode(bench, engine, context, num_rows)
    _time_upstream(bench, bench.theirs(), CONTEXTS[0])


def _time_decode(bench: Bench, engine: ovfast.Engine, context: int, num_rows: int) -> None:
    prompts = [_random_prompt(engine, context) for _ in range(num_rows)]
    samples = []
    for repeat in range(5):
        outputs = engine.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        if repeat:
            samples.append(max(output.timings.tpot_ms for output in outputs))
    num_bytes = decode_bytes(engine.config.text, context, 2.0, 2.0, num_rows)
    bench.records.race(
        "latency",
        f"decode at {context}",
        {"ovfast": samples},
        metric="step_ms",
        num_bytes=num_bytes,
        parameters={"context": context, "rows": num_rows},
    )


def _random_prompt(engine: ovfast.Engine, length: int) -> Any:
    inputs = engine.prepare("x", raw=True)
    ids = np.random.default_rng().integers(0, 10_000, length)
    return type(inputs)(ids, (), (), (), inputs.visual)


@torch.inference_mode()
def _time_upstream(bench: Bench, theirs: Any, context: int) -> None:
    ids = torch.randint(0, 10_000, (1, context), device="cuda")
    for implementation in ("dynamic", "static"):
        options = {"do_sample": False, "cache_implementation": implementation}
        if implementation == "dynamic":
            del options["cache_implementation"]
        samples = []
        for repeat in range(4):
            times = []
            for count in (1, NEW_TOKENS):
                torch.cuda.synchronize()
                start = time.perf_counter()
                theirs.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
                torch.cuda.synchronize()
                times.append(1e3 * (time.perf_counter() - start))
            if repeat:
                samples.append((times[1] - times[0]) / (NEW_TOKENS - 1))
        bench.records.write(
            "transformers" if implementation == "dynamic" else "transformers-static",
            "step_ms",
            "ms",
            suite="latency",
            workload=f"decode at {context}",
            samples=tuple(samples),
            parameters={"context": context, "rows": 1},
        )
