"""The language half of `benchmarks.gpu`: decode by rows and context, prefill by length.

Both sides have the same random weights and decode greedily without stopping. The floor of a decode
step is the bytes of weights and cache that it must read over the copy rate. What a row's time is of
stands in its parameter "timed": "device", a captured step by itself; "host", as a caller waits for
it; "request", by the tokens of whole answers.
"""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import ovfast
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_steps import Steps
from ovfast import ops_triton
from ovfast.roofline import decode_bytes, prefill_stage

ROWS = (1, 4, 16)
CONTEXTS = (1024, 5120, 16384)
PROMPTS = (1024, 4096, 7300)  # 7300: the longest prompt of one picture
NEW_TOKENS = 64
STEP_REPEATS, STEP_WARM = 8, 2  # transformers takes 30 ms and more
ANSWER_REPEATS = 4


@torch.inference_mode()
def decode(bench: Bench) -> None:
    """A step by rows and context; a step of transformers' modules over a dynamic cache beside it.

    Contexts are random keys and values: a step does not depend on what they are.
    """
    bench.each(f"decode at {CONTEXTS[0]}, answers", answers)
    for context in CONTEXTS:
        for num_rows in ROWS:
            name = f"decode at {context}, {num_rows} rows"
            bench.each(name, _race_steps, context, num_rows)


def _race_steps(bench: Bench, context: int, num_rows: int) -> None:
    step = Steps(bench, context, num_rows)
    text, width = bench.config.text, float(bench.dtype.itemsize)
    name = f"decode at {context}"
    given: dict[str, Any] = {
        "metric": "step_ms",
        "num_bytes": decode_bytes(text, context, width, width, num_rows),
    }
    parameters = {"context": context, "rows": num_rows}
    alone = bench.time_device(name, {"ovfast": step})
    step.check()
    bench.race("latency", name, alone, parameters=parameters | {"timed": "device"}, **given)
    theirs = _their_step(bench, context, num_rows)
    works = {"ovfast": bench.timer.captured(step), "transformers": theirs}
    samples = bench.time_host(name, works, repeats=STEP_REPEATS, warm=STEP_WARM)
    step.check()
    bench.race("latency", name, samples, parameters=parameters | {"timed": "host"}, **given)


def _their_step(bench: Bench, context: int, num_rows: int) -> Callable[[], Any]:
    """A step of transformers' model; its cache grows by a position each time, as it does."""
    from transformers import DynamicCache

    theirs, text = bench.theirs, bench.config.text
    cache = DynamicCache(config=theirs.config.text_config)
    shape = (num_rows, text.num_kv_heads, context, text.head_dim)
    for layer in range(text.num_layers):
        cache.update(bench.random(*shape), bench.random(*shape), layer)
    tokens = torch.full((num_rows, 1), 5, device=bench.device)
    # "cache" from transformers 5.24 on, "past_key_values" before.
    names = inspect.signature(theirs.forward).parameters
    options = {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}

    def step() -> None:
        theirs(input_ids=tokens, **options).logits[:, -1].argmax(-1)

    return step


def answers(bench: Bench) -> None:
    """Milliseconds a token of whole answers, against transformers' `generate`, one row."""
    context = CONTEXTS[0]
    with bench.open_engine(context + 2 * NEW_TOKENS) as engine:
        prompt = _random_prompt(engine, context)
        ids = torch.from_numpy(prompt.input_ids)[None].to(bench.device)

        def ours() -> float:
            output = engine.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True)
            return float(output.timings.tpot_ms)

        works = {"ovfast": ours, "transformers": lambda: _their_answer(bench, ids)}
        name = f"decode at {context}, answers"
        _race_answers(bench, bench.time_host(name, works, repeats=ANSWER_REPEATS, warm=2))


def _race_answers(bench: Bench, samples: dict[str, list[float]]) -> None:
    context, width = CONTEXTS[0], float(bench.dtype.itemsize)
    bench.race(
        "latency",
        f"decode at {context}",
        samples,
        metric="step_ms",
        num_bytes=decode_bytes(bench.config.text, context, width, width),
        parameters={"context": context, "rows": 1, "timed": "request"},
    )


def _random_prompt(engine: ovfast.Engine, length: int) -> Any:
    inputs = engine.prepare("x", raw=True)
    ids = np.random.default_rng().integers(0, min(10_000, engine._vocab_size // 2), length)
    return type(inputs)(ids, (), (), (), inputs.visual)


def _their_answer(bench: Bench, ids: torch.Tensor, **options: Any) -> float:
    """Milliseconds a token of `generate`: a long answer less an answer of one token."""
    times = []
    for count in (1, NEW_TOKENS):
        start = time.perf_counter()
        out = bench.theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            **options,
        )
        out[0, -1].item()
        times.append(1e3 * (time.perf_counter() - start))
    return (times[1] - times[0]) / (NEW_TOKENS - 1)


def compiled(bench: Bench) -> None:
    """Transformers' `generate` over a static cache, which compiles its step by itself; one row."""
    ids = torch.randint(0, bench.spec.tokenizer_base, (1, CONTEXTS[0]), device=bench.device)

    def upstream() -> float:
        return _their_answer(bench, ids, cache_implementation="static")

    with torch.no_grad():
        samples = bench.timer.host(
            {"transformers-static": upstream}, repeats=ANSWER_REPEATS, warm=2
        )
    _race_answers(bench, samples)


@torch.inference_mode()
def prefill(bench: Bench) -> None:
    """A prompt's rows through the language model to the last one's logits, by the host's clock.

    The variants are the attentions that `ovfast.load` takes; "ovfast" is what "auto" chooses.
    """
    for num_tokens in PROMPTS:
        bench.each(f"prefill of {num_tokens}", _race_prefill, num_tokens)


def _race_prefill(bench: Bench, num_tokens: int) -> None:
    model = bench.model.language_model
    embeds = bench.random(num_tokens, bench.config.text.hidden_size, scale=0.02)
    cache = bench.model.new_cache(num_slots=1, max_positions=num_tokens)

    def run(ops: Any) -> torch.Tensor:
        model._ops = ops
        slot = cache.allocate()
        logits = model.prefill(embeds, cache, slot)
        cache.free(slot)
        return logits

    def upstream() -> Any:
        return bench.theirs(inputs_embeds=embeds[None], use_cache=True, logits_to_keep=1)

    name = f"prefill of {num_tokens}"
    kinds = ("triton", "flash") if importlib.util.find_spec("flash_attn") else ("triton",)
    works: dict[str, Callable[[], Any]] = {"ovfast": lambda: run(bench.ops)}
    for kind in kinds:
        own = replace(bench.ops, causal_attention=ops_triton._causal_attention(kind))
        works[f"attention={kind}"] = lambda own=own: run(own)
    works["transformers"] = upstream
    try:
        samples = bench.time_host(name, works, repeats=STEP_REPEATS, warm=STEP_WARM)
    finally:
        model._ops = bench.ops
    stage = prefill_stage(bench.config.text, num_tokens, float(bench.dtype.itemsize))
    bench.race(
        "latency",
        name,
        samples,
        metric="prefill_ms",
        flop=float(stage.flops),
        num_bytes=float(stage.weight_bytes),
        parameters={"tokens": num_tokens},
    )
