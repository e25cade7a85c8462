"""ovfast beside transformers on one CPU: time to first token, time per token, resident memory,
token agreement.

    python -m benchmarks.side_by_side --checkpoint DIR [--size 640x480] [--new 16] [--repeats 5]
    [--threads 2] python -m tests.support.checkpoints DIR --size 0.5b          makes a full-size
    random checkpoint first

Each side runs in a process of its own, so that memory is its own; the parent starts them in turn (A
B A B), so that the machine's noise meets both. The clock starts with an encoded picture in memory
and stops at the first token; every request has a new picture, the same for both sides. transformers
runs its modules directly, without the overhead of ``generate``: SDPA attention, dynamic cache, its
Pillow image processor. Printed are medians with the range, the ratio of every pair, and the floor:
the bytes of weights and cache a decoded token must read over the read rate measured here.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing as mp
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

QUESTION = "What is shown in this picture?"
Answer = Callable[[bytes, int], Iterator[int]]


def encoded_picture(size_wh: tuple[int, int], seed: int) -> bytes:
    """A JPEG of smooth random colours."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size_wh, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def start_ovfast(checkpoint: str, dtype: str, threads: int) -> Answer:
    import ovfast

    engine = ovfast.load(checkpoint, device="cpu", dtype=dtype, threads=threads)

    def answer(picture: bytes, count: int) -> Iterator[int]:
        for chunk in engine.stream(QUESTION, images=picture, max_new_tokens=count, ignore_eos=True):
            yield chunk.token_ids[0]

    return answer


def start_transformers(checkpoint: str, dtype: str, threads: int) -> Answer:
    import torch
    from PIL import Image
    from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessorPil

    from ovfast.anyres import VisualOptions
    from ovfast.config import ModelConfig
    from ovfast.processor import Processor
    from ovfast.verify.oracle import cache_argument

    torch.set_num_threads(threads)
    ours = Processor(
        Path(checkpoint), ModelConfig.from_checkpoint(Path(checkpoint))
    )  # lays out the ids, nothing else
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype)
    ).eval()
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(checkpoint)
    forbidden = torch.from_numpy(ours.forbidden_ids)

    @torch.inference_mode()
    def answer(picture: bytes, count: int) -> Iterator[int]:
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        ids, _, _ = ours.layout(
            QUESTION, images=[(image.height, image.width)], visual=VisualOptions()
        )
        pixels = processor([image], return_tensors="pt")
        out = model(
            input_ids=torch.from_numpy(ids)[None],
            pixel_values=pixels["pixel_values"].to(model.dtype),
            image_sizes=pixels["image_sizes"],
            use_cache=True,
            logits_to_keep=1,
        )
        for step in range(count):
            logits = out.logits[0, -1]
            logits[forbidden] = float("-inf")
            token = int(logits.argmax())
            yield token
            if step + 1 < count:
                out = model(
                    input_ids=torch.tensor([[token]]),
                    **cache_argument(model, out.past_key_values),
                )

    return answer


def weight_bytes(checkpoint: str, dtype: str) -> tuple[int, int]:
    """Bytes of all weights, and of those a decoded token reads."""
    import torch

    from ovfast.checkpoint import CheckpointWeights
    from ovfast.config import ModelConfig

    config, kind = ModelConfig.from_checkpoint(Path(checkpoint)), getattr(torch, dtype)
    weights = CheckpointWeights(Path(checkpoint), config)
    names = [n for n in weights.names if n.startswith(("language_model", "lm_head"))]
    decoded = sum(math.prod(weights.shape(n)) for n in names) * kind.itemsize
    return weights.total_bytes(kind), decoded


STARTERS = {"ovfast": start_ovfast, "transformers": start_transformers}


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes: VmHWM is the peak of resident memory, VmRSS its
    present.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def serve(name: str, checkpoint: str, dtype: str, threads: int, pipe: Connection) -> None:
    """A side's process: loads, then answers pictures one by one with their times."""
    import torch

    torch.set_num_threads(threads)
    before = memory_bytes("VmRSS")
    answer = STARTERS[name](checkpoint, dtype, threads)
    pipe.send(before)
    while (job := pipe.recv()) is not None:
        picture, count = job
        times, tokens, start = [], [], time.perf_counter()
        for token in answer(picture, count):
            times.append(time.perf_counter() - start)
            tokens.append(token)
        tpot = 1e3 * (times[-1] - times[0]) / max(1, count - 1)
        peak = memory_bytes("VmHWM")
        pipe.send(
            {"ttft_ms": 1e3 * times[0], "tpot_ms": tpot, "tokens": tokens, "peak_bytes": peak}
        )


def read_rate(threads: int) -> float:
    """Bytes a second of the best of several sums over 1 GB."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(256 * 1024 * 1024)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    size = tuple(int(side) for side in args.size.split("x"))
    context = mp.get_context("spawn")
    rate = read_rate(args.threads)
    sides: dict[str, Connection] = {}
    torch_bytes = {}
    all_bytes, decoded_bytes = weight_bytes(args.checkpoint, args.dtype)
    for name in STARTERS:
        here, there = context.Pipe()
        context.Process(
            target=serve, args=(name, args.checkpoint, args.dtype, args.threads, there), daemon=True
        ).start()
        sides[name], torch_bytes[name] = here, here.recv()
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for repeat in range(args.repeats + 1):  # the first pair warms up
        picture = encoded_picture((size[0], size[1]), repeat)
        for name, pipe in sides.items():
            pipe.send((picture, args.new))
            sample = pipe.recv()
            if repeat:
                samples[name].append(sample)
            print(
                f"{repeat} {name:13} first token {sample['ttft_ms']:8.0f} ms,"
                f" then {sample['tpot_ms']:6.1f} ms a token",
                flush=True,
            )
    for pipe in sides.values():
        pipe.send(None)
    ours, theirs = samples["ovfast"], samples["transformers"]
    ratios = {
        key: summary([a[key] / b[key] for a, b in zip(ours, theirs, strict=True)])
        for key in ("ttft_ms", "tpot_ms")
    }
    return {
        "command": f"python -m benchmarks.side_by_side --size {args.size} --new {args.new}"
        f" --repeats {args.repeats} --threads {args.threads} --dtype {args.dtype}",
        "machine": {
            "cpu": cpu_name(),
            "python": platform.python_version(),
            "read_gb_per_s": rate / 1e9,
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "pillow")},
        "commit": commit(),
        "sides": {
            name: {
                "ttft_ms": summary([s["ttft_ms"] for s in samples[name]]),
                "tpot_ms": summary([s["tpot_ms"] for s in samples[name]]),
                "peak_gb": max(s["peak_bytes"] for s in samples[name]) / 1e9,
                "import_torch_gb": torch_bytes[name] / 1e9,
            }
            for name in samples
        },
        "weight_gb": all_bytes / 1e9,
        "tpot_floor_ms": 1e3 * decoded_bytes / rate,
        "ratios ovfast / transformers": ratios,
        "tokens agree": all(a["tokens"] == b["tokens"] for a, b in zip(ours, theirs, strict=True)),
        "samples": samples,
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """The checkout's commit, short."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def write_record(record: dict[str, Any], file: Path | None) -> None:
    """Writes a record as JSON where a file was named."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--size", default="640x480", help="width x height of the picture")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="a JSON file for the record")
    args = parser.parse_args()
    record = run(args)
    write_record(record, args.out)
    shown = {key: value for key, value in record.items() if key != "samples"}
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
