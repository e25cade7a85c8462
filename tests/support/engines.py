"""Engines over random checkpoints: opening one, a plain greedy loop as oracle, scripted tokens."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ovfast
from ovfast import Engine, ModelInputs
from ovfast.native_runner import NativeRunner
from ovfast.runner import EagerRunner
from ovfast.sampling import sample
from tests.support import runtime
from tests.support.prompts import clip, picture

DEADLINE_S = 30.0  # a thread that takes longer hangs

# Prompts and media of every kind, as arguments of `generate`.
REQUESTS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "How many shapes?"},
    "image": {"prompt": "What is shown?", "images": picture(90, 120)},
    "wide": {"prompt": "Describe it.", "images": picture(60, 300, 1)},
    "three_images": {"prompt": "Which one?", "images": [picture(50, 70, s) for s in (2, 3, 4)]},
    "video": {"prompt": "Which way?", "videos": clip(3)},
    "mixed": {
        "prompt": "First <video> then <image> and?",
        "images": picture(70, 70, 5),
        "videos": clip(2, 1),
    },
}


def open_engine(path: Path, **options: Any) -> Engine:
    options = {"device": "cpu", "max_seq_len": 1024} | options
    return ovfast.load(path, **options)


def free_slots(engine: Engine) -> int:
    return engine._scheduler.num_free_slots


def plain_greedy(path: Path, inputs: ModelInputs, num_tokens: int, engine: Engine) -> list[int]:
    """Greedy tokens by a loop over the model, never a forbidden id: no engine code runs."""
    model = runtime.load_model(path)
    cache = model.new_cache(num_slots=1, max_positions=inputs.num_tokens + num_tokens)
    slot = cache.allocate()
    forbidden = torch.from_numpy(engine._processor.forbidden_ids)
    tokens: list[int] = []
    with torch.inference_mode():
        logits = model.prefill(inputs, cache, slot)[0]
        while True:
            logits[forbidden] = -torch.inf
            tokens.append(int(logits.argmax()))
            if len(tokens) == num_tokens:
                return tokens
            logits = model.decode(tokens[-1], cache, slot)


def script_tokens(monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int]) -> None:
    """Makes every request generate these tokens; after the last it goes on by itself."""

    def scripted(logits: torch.Tensor, params: Any, *, index: int, **options: Any) -> int:
        if index < len(tokens):
            return tokens[index]
        return sample(logits, params, index=index, **options)

    monkeypatch.setattr("ovfast.runner.sample", scripted)
    # The native runner has a sampler of its own; here it takes that of the eager one.
    monkeypatch.setattr(NativeRunner, "_sample", EagerRunner._sample)


def run_threads(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs each work in a thread of its own; what they return, or the error they raised."""
    results: list[Any] = [None] * len(works)

    def run(index: int) -> None:
        try:
            results[index] = works[index]()
        except BaseException as error:  # noqa: BLE001
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return results


def logprobs_of(output: ovfast.GenerationOutput) -> np.ndarray:
    assert output.logprobs is not None
    return np.array([entry.logprob for entry in output.logprobs])
