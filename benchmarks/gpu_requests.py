"""The first token from encoded bytes in memory, by the host's clock, against transformers (sdpa).

Every request has new pictures or frames, a text of its own length and sizes of its own, as in real
life: what either side caches by shape is missed. The variant "same size" repeats sizes and text.
Transformers decodes with Pillow as we do, resizes by its Pillow processor, and gets our token ids.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import ovfast
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_vision import clip_pixels, sizes
from ovfast.bench.workloads import FRAME_HW, QUESTION, WORKLOADS, Workload, encoded_picture
from ovfast.roofline import request_stages

NAMES = ("640x480", "1024x768", "four-pictures", "32-frames")
MAX_SEQ_LEN = 8192
REPEATS, WARM = 8, 2


class Encoded(NamedTuple):
    """One request: a complete prompt and encoded media."""

    prompt: str
    images: list[bytes]
    frames: list[bytes]


def make_request(workload: Workload, seed: int, index: int) -> Encoded:
    """A request of a workload.

    Args:
        workload: kind and number of media, and about their sizes.
        seed: of what the pictures show.
        index: how many pixels a side and words a text differ by.
    """
    first = 64 * seed  # more than the media of any request
    images = [
        encoded_picture(sizes(size_hw, index), first + i)
        for i, size_hw in enumerate(workload.sizes_hw)
    ]
    frame_hw = sizes(FRAME_HW, index)
    frames = [encoded_picture(frame_hw, first + i) for i in range(workload.num_frames)]
    prompt = workload.prompt.replace(QUESTION, QUESTION + " please" * index)
    return Encoded(prompt, images, frames)


@torch.inference_mode()
def ttft(bench: Bench) -> None:
    """Milliseconds from the call to the first token on the host."""
    with bench.open_engine(MAX_SEQ_LEN) as engine:
        for name in NAMES:
            bench.each(f"first token, {name}", _race_ttft, engine, WORKLOADS[name])


def _race_ttft(bench: Bench, engine: ovfast.Engine, workload: Workload) -> None:
    seeds = itertools.count()

    def timed(answer: Callable[[Encoded], Any], is_new: bool) -> Callable[[], float]:
        indices = itertools.count(1) if is_new else itertools.repeat(0)

        def work() -> float:
            request = make_request(workload, next(seeds), next(indices))
            start = time.perf_counter()
            stream = answer(request)
            elapsed_ms = 1e3 * (time.perf_counter() - start)
            if stream is not None:
                stream.close()
            return elapsed_ms

        return work

    works = {
        "ovfast": timed(lambda request: _our_token(engine, request), True),
        "same size": timed(lambda request: _our_token(engine, request), False),
        "transformers": timed(lambda request: _their_token(bench, engine, request), True),
    }
    samples = bench.time_host(workload.name, works, repeats=REPEATS, warm=WARM)
    plans, num_text = _plans(engine, workload)
    stages = request_stages(bench.config, plans, num_text, float(bench.dtype.itemsize))
    bench.race(
        "latency",
        workload.name,
        samples,
        metric="ttft_ms",
        flop=float(sum(stage.flops for stage in stages)),
        num_bytes=float(sum(stage.weight_bytes for stage in stages)),
        parameters={"tokens": num_text + sum(plan.num_tokens for plan in plans)},
    )


def _plans(engine: ovfast.Engine, workload: Workload) -> tuple[Any, int]:
    ids, _, plans = engine._processor.layout(
        workload.prompt,
        images=workload.sizes_hw,
        videos=workload.videos,
        visual=engine.visual,
        raw=True,
    )
    return plans, len(ids) - sum(plan.num_tokens for plan in plans)


def _our_token(engine: ovfast.Engine, request: Encoded) -> Any:
    """The stream behind its first token."""
    stream = engine.stream(
        request.prompt,
        images=request.images or None,
        videos=[request.frames] if request.frames else None,
        raw=True,
        max_new_tokens=2,  # an answer that is not over with its first token
        ignore_eos=True,
    )
    next(stream)
    return stream


def _their_token(bench: Bench, engine: ovfast.Engine, request: Encoded) -> None:
    images, frames = (
        [_open(data) for data in encoded] for encoded in (request.images, request.frames)
    )
    first_hw = (frames[0].height, frames[0].width) if frames else (0, 0)
    ids, _, _ = engine._processor.layout(
        request.prompt,
        images=[(image.height, image.width) for image in images],
        videos=[(len(frames), first_hw)] if frames else (),
        visual=engine.visual,
        raw=True,
    )
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(ids)[None].to(bench.device)}
    if images:
        made = bench.pil_processor([images], return_tensors="pt")
        inputs["pixel_values"] = made["pixel_values"].to(bench.device, bench.dtype)
        inputs["image_sizes"] = made["image_sizes"].to(bench.device)
        inputs["batch_num_images"] = torch.tensor([len(images)])
    if frames:
        inputs["pixel_values_videos"] = clip_pixels(bench, frames)
    out = bench.theirs(**inputs, use_cache=True, logits_to_keep=1)
    int(out.logits[0, -1].argmax())


def _open(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")
