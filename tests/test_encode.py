"""Handles: answers over them are answers over their media; they skip work, and free memory."""

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ovfast import (
    BackendError,
    CapacityError,
    EncodedMedia,
    Engine,
    GenerationOutput,
    MediaError,
    OptionError,
    PromptError,
    VisualOptions,
)
from ovfast.kv_cache import KVCache
from ovfast.models.qwen2 import Qwen2
from ovfast.models.siglip import SiglipTower
from tests.support.calls import note_calls
from tests.support.engines import REQUESTS, free_slots, open_engine, run_threads
from tests.support.interrupts import FILES, InterruptAtLine
from tests.support.prompts import clip, picture, user
from tests.support.row_decoder import open_rows

OPENERS: dict[str, Callable[..., Engine]] = {
    "native": open_engine,
    "reference": lambda path, **options: open_engine(path, backend="reference", **options),
    "rows": open_rows,
}
# Another number of rows is another order of sums in a matrix product of torch; ours have one.
BOUND = {"native": 0.0, "rows": 0.0, "reference": 1e-4}
KEEPS = ["features", "prefix"]
MEDIA = {
    name: {key: value for key, value in request.items() if key != "prompt"}
    for name, request in REQUESTS.items()
    if name != "text"
}
QUESTIONS = {
    "mixed": ["First <video> then <image> and?", "<video> or <image>?", "First <video>, <image>."],
}
PLAIN_QUESTIONS = ["What is shown?", "How many?", "Why is it so?\n\nSay it in one word."]
GREEDY = {"max_new_tokens": 8, "ignore_eos": True, "logprobs": 2}
LINE_STEP = 7  # every line takes two minutes
HOT = {**GREEDY, "temperature": 1.5, "seed": 3, "repetition_penalty": 1.2}


@pytest.fixture(scope="module")
def engines(tiny_checkpoint: Path) -> Iterator[dict[str, Engine]]:
    opened = {name: opener(tiny_checkpoint) for name, opener in OPENERS.items()}
    yield opened
    for engine in opened.values():
        engine.close()


@pytest.fixture
def engine(engines: dict[str, Engine]) -> Iterator[Engine]:
    engine = engines["native"]
    yield engine
    assert free_slots(engine) == 1
    assert engine._encoded.nbytes == 0


def encode(engine: Engine, name: str, keep: str) -> EncodedMedia:
    prompt = QUESTIONS[name][0] if name in QUESTIONS else None
    return engine.encode(prompt, **MEDIA[name], keep=keep)


def assert_same(got: GenerationOutput, expected: GenerationOutput, bound: float) -> None:
    assert (got.text, got.token_ids) == (expected.text, expected.token_ids)
    assert (got.finish_reason, got.visual) == (expected.finish_reason, expected.visual)
    assert got.usage.prompt_tokens == expected.usage.prompt_tokens
    assert got.usage.visual_tokens == expected.usage.visual_tokens
    assert got.logprobs is not None
    assert expected.logprobs is not None
    for ours, theirs in zip(got.logprobs, expected.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=bound, rel=0)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(("native", name) for name in MEDIA),
        *((backend, name) for backend in ("reference", "rows") for name in ("image", "mixed")),
    ],
)
def test_answers_are_those_over_the_media(
    engines: dict[str, Engine], backend: str, name: str, keep: str
) -> None:
    engine = engines[backend]
    with encode(engine, name, keep) as handle:
        for index, prompt in enumerate(QUESTIONS.get(name, PLAIN_QUESTIONS)):
            for options in (GREEDY, HOT):
                expected = engine.generate(prompt, **MEDIA[name], **options)
                got = engine.generate(prompt, media=handle, **options)
                assert_same(got, expected, BOUND[backend])
                begins_alike = index == 0 or name not in QUESTIONS
                whole = got.usage.cached_tokens == handle.num_prefix_tokens
                assert whole == (begins_alike or keep == "features")
                assert got.usage.views == 0 < expected.usage.views
                assert expected.usage.cached_tokens == 0
                assert got.timings.media_ms == got.timings.vision_ms == 0
    assert free_slots(engine) == 1


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", ["image", "mixed"])
def test_every_call_takes_a_handle(engine: Engine, name: str, keep: str) -> None:
    prompt = REQUESTS[name]["prompt"]
    texts = ["yes", "no way", "yes please"]
    with encode(engine, name, keep) as handle:
        inputs = engine.prepare(prompt, media=handle)
        plain = engine.prepare(**REQUESTS[name])
        assert inputs.input_ids.tolist() == plain.input_ids.tolist()
        assert (inputs.spans, inputs.plans, inputs.media) == (plain.spans, plain.plans, ())
        assert inputs.views.shape == (0, *plain.views.shape[1:])
        for ask in ({"prompt": prompt, "media": handle}, {"prompt": inputs}):
            expected = engine.generate(**REQUESTS[name], **GREEDY)
            chunks = list(engine.stream(**ask, **GREEDY))
            assert chunks[-1].output is not None
            assert_same(chunks[-1].output, expected, 0)
            both = engine.score(continuations=texts, **ask)
            assert both == engine.score(continuations=texts, **REQUESTS[name])
            chosen = engine.choose(options=texts, **ask)
            assert chosen == engine.choose(options=texts, **REQUESTS[name])
        last = inputs.num_tokens - 1
        for positions in ([last], [last, 3, 0, last], [inputs.spans[0].end], [], None):
            found = engine.forward(inputs, positions=positions)
            assert torch.equal(found, engine.forward(plain, positions=positions)), positions


def test_batches(engine: Engine) -> None:
    expected = [
        engine.generate(prompt, **MEDIA["image"], **GREEDY).token_ids for prompt in PLAIN_QUESTIONS
    ]
    alone = engine.generate("Hi", **GREEDY).token_ids
    with encode(engine, "image", "prefix") as handle, encode(engine, "video", "features") as other:
        outputs = engine.generate(PLAIN_QUESTIONS, media=handle, **GREEDY)
        assert [output.token_ids for output in outputs] == expected
        outputs = engine.generate(
            [PLAIN_QUESTIONS[0], "Hi", PLAIN_QUESTIONS[1]], media=[handle, None, other], **GREEDY
        )
        video = engine.generate(PLAIN_QUESTIONS[1], **MEDIA["video"], **GREEDY)
        assert [o.token_ids for o in outputs] == [expected[0], alone, video.token_ids]
        with pytest.raises(PromptError, match="3 prompts and media of 2"):
            engine.generate(PLAIN_QUESTIONS, media=[handle, handle])


def rows_run(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Views, rows of prefills and positions copied, as they come."""

    def copied(cache: KVCache, slot: int, source: KVCache, length: int) -> int:
        return max(0, length - cache.lengths[slot])

    return {
        "views": note_calls(monkeypatch, SiglipTower, "encode", lambda self, v, *_: v.num_views),
        "rows": note_calls(monkeypatch, Qwen2, "prefill_hidden", lambda self, e, *_: len(e)),
        "copied": note_calls(monkeypatch, KVCache, "copy_prefix", copied),
    }


@pytest.mark.parametrize("keep", KEEPS)
def test_what_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch, keep: str) -> None:
    """No tower; the text behind the media alone; the prefix copied once while the slot keeps it."""
    seen = rows_run(monkeypatch)
    with encode(engine, "image", keep) as handle:
        assert seen["views"] == [5]
        length = handle.num_prefix_tokens
        assert seen["rows"] == ([length] if keep == "prefix" else [])
        seen["views"].clear()
        seen["rows"].clear()
        for prompt in PLAIN_QUESTIONS:
            output = engine.generate(prompt, media=handle, max_new_tokens=3, ignore_eos=True)
            assert seen["rows"].pop() == output.usage.prompt_tokens - length
        engine.choose("Is it?", ["yes", "no"], media=handle)
        assert seen["views"] == []
        assert seen["copied"] == ([length, 0, 0, 0] if keep == "prefix" else [])
        engine.generate("Hi", max_new_tokens=1)  # takes the slot
        engine.generate("What?", media=handle, max_new_tokens=1)
        assert seen["copied"][4:] == ([length] if keep == "prefix" else [])


def test_slots_keep_the_prefix_they_have(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two handles in turn, two slots: each goes to the slot that has it; a third takes one over."""
    with open_engine(tiny_checkpoint, max_batch_size=2) as engine:
        first, second = encode(engine, "image", "prefix"), encode(engine, "wide", "prefix")
        expected = [
            engine.generate("Why?", **MEDIA[name], **GREEDY).token_ids for name in ("image", "wide")
        ]
        streams = [engine.stream("Why?", media=handle, **GREEDY) for handle in (first, second)]
        for stream in streams:
            next(stream)
        for stream in streams:
            stream.close()
        seen = rows_run(monkeypatch)
        for _ in range(2):
            for handle, tokens in ((second, expected[1]), (first, expected[0])):
                assert engine.generate("Why?", media=handle, **GREEDY).token_ids == tokens
        assert seen["copied"] == [0, 0, 0, 0]
        with encode(engine, "video", "prefix") as third:
            engine.generate("Why?", media=third, **GREEDY)
        assert engine.generate("Why?", media=first, **GREEDY).token_ids == expected[0]
        assert engine.generate("Why?", media=second, **GREEDY).token_ids == expected[1]
        assert sorted(seen["copied"][5:])[0] == 0 < sorted(seen["copied"][5:])[1]


def test_a_prompt_that_begins_otherwise(engine: Engine) -> None:
    """Only what both have in common is reused: the KV of a prefix depends on all before it."""
    asks: list[tuple[dict[str, Any], bool]] = [
        ({"prompt": "Why?"}, True),
        ({"prompt": "Why?", "system": "Be brief."}, False),
        ({"prompt": "In <image> why?"}, False),
        ({"prompt": user("Before", "IMAGE", "after")}, False),
        ({"prompt": "<image>", "raw": True}, False),
    ]
    with encode(engine, "image", "prefix") as handle:
        for ask, whole in asks:
            expected = engine.generate(**ask, **MEDIA["image"], **GREEDY)
            got = engine.generate(**ask, media=handle, **GREEDY)
            assert_same(got, expected, 0)
            assert (got.usage.cached_tokens == handle.num_prefix_tokens) == whole
            ids = engine.prepare(**ask, media=handle).sources
            own = engine.prepare("Why?", media=handle).sources
            same = int(np.argmin(np.append(ids[: len(own)] == own[: len(ids)], False)))
            assert got.usage.cached_tokens == min(same, handle.num_prefix_tokens, len(ids) - 1)
        again = engine.generate("Why?", media=handle, **GREEDY)
        assert_same(again, engine.generate("Why?", **MEDIA["image"], **GREEDY), 0)
        assert again.usage.cached_tokens == handle.num_prefix_tokens


def test_a_prefix_with_a_system_turn_and_text(engine: Engine) -> None:
    opening = {"prompt": "Look at <image> closely.", "system": "Be brief."}
    with engine.encode(**opening, **MEDIA["image"], keep="prefix") as handle:
        for text in ("Look at <image> closely.", "Look at <image>: why?"):
            ask = {"prompt": text, "system": "Be brief."}
            got = engine.generate(**ask, media=handle, **GREEDY)
            assert got.usage.cached_tokens == handle.num_prefix_tokens
            assert_same(got, engine.generate(**ask, **MEDIA["image"], **GREEDY), 0)


def test_a_prompt_that_ends_with_the_picture(engine: Engine) -> None:
    """One position is left to be computed, or there would be no logits."""
    ask = {"prompt": "See <image>", "raw": True}
    with engine.encode(**ask, **MEDIA["image"], keep="prefix") as handle:
        got = engine.generate(**ask, media=handle, **GREEDY)
        assert got.usage.cached_tokens == handle.num_prefix_tokens - 1
        assert_same(got, engine.generate(**ask, **MEDIA["image"], **GREEDY), 0)
        assert engine.score(continuations=[" a"], **ask, media=handle) == engine.score(
            continuations=[" a"], **ask, **MEDIA["image"]
        )
        assert engine.choose(options=[" a", " the b"], **ask, media=handle) == engine.choose(
            options=[" a", " the b"], **ask, **MEDIA["image"]
        )


@pytest.mark.parametrize("keep", KEEPS)
def test_media_in_another_order(engine: Engine, keep: str) -> None:
    """Pictures go to pictures and videos to videos, in their own order, wherever they stand."""
    media = {"images": [picture(50, 70, s) for s in (2, 3)], "videos": clip(2)}
    prompts = [
        "<image> <video> <image>?",
        "<video> <image><image>?",
        "<image><image> then <video>?",
    ]
    with engine.encode(prompts[0], **media, keep=keep) as handle:
        assert handle.image_sizes_hw == ((50, 70), (50, 70))
        assert handle.video_sizes == ((2, (40, 50)),)
        for prompt in prompts:
            got = engine.generate(prompt, media=handle, **GREEDY)
            assert_same(got, engine.generate(prompt, **media, **GREEDY), 0)


def test_chats_and_options_of_a_handle(engine: Engine) -> None:
    visual = VisualOptions(max_views=1)
    chat = user({"type": "image", "image": picture()}, "What?")
    with engine.encode(chat, keep="prefix", visual=visual) as handle:
        assert handle.visual == visual
        got = engine.generate(user("IMAGE", "Why?"), media=handle, **GREEDY)
        expected = engine.generate("Why?", images=picture(), visual=visual, **GREEDY)
        assert_same(got, expected, 0)
        with pytest.raises(PromptError, match=r"bring pictures or videos of their own.*Write"):
            engine.generate(user("IMAGE", {"type": "image", "image": picture()}, "?"), media=handle)
    inputs = engine.prepare("What?", images=picture())
    with engine.encode(inputs) as handle:
        assert_same(
            engine.generate("Why?", media=handle, **GREEDY),
            engine.generate("Why?", images=picture(), **GREEDY),
            0,
        )


def test_wrong_use(engine: Engine, tiny_checkpoint: Path) -> None:
    with encode(engine, "image", "features") as handle:
        for given in ({"images": picture()}, {"videos": clip()}, {"visual": VisualOptions()}):
            with pytest.raises(OptionError, match=r"media= a handle with images.*one or the other"):
                engine.generate("Q", media=handle, **given)
        for bad in (picture(), "a.png", 3, [handle]):
            with pytest.raises(OptionError, match=r"expected a handle that encode\(\) returned"):
                engine.generate("Q", media=bad)
        inputs = engine.prepare("Q", media=handle)
        with pytest.raises(OptionError, match="ModelInputs with images, videos, media"):
            engine.generate(inputs, media=handle)
        with pytest.raises(OptionError, match=r"ModelInputs over a handle.*Use the handle"):
            engine.encode(inputs)
        for prompt in ("<image> and <image>?", user("IMAGE", "IMAGE", "?"), user("none")):
            with pytest.raises(PromptError, match=r"expected as many"):
                engine.generate(prompt, media=handle)
        with open_engine(tiny_checkpoint) as other:
            for call in (
                lambda: other.generate("Q", media=handle),
                lambda: other.generate(inputs),
                lambda: other.forward(inputs),
            ):
                with pytest.raises(OptionError, match=r"handle of another engine.*that is asked"):
                    call()
    for call in (
        lambda: engine.generate("Q", media=handle),
        lambda: engine.score(inputs, ["a"]),
        lambda: engine.forward(inputs),
    ):
        with pytest.raises(OptionError, match=r"was released.*Call engine.encode\(\) again"):
            call()
    for arguments, error, match in (
        ({"images": picture(), "keep": "all"}, OptionError, "keep='all'; expected 'features' or"),
        ({"images": picture(), "system": "S"}, OptionError, "only a prefix keeps text"),
        ({}, PromptError, "no pictures and no videos"),
        ({"images": []}, PromptError, "no pictures and no videos"),
        ({"images": picture(), "raw": True}, PromptError, "raw=True and no prompt"),
        ({"prompt": "text"}, PromptError, "without pictures and videos"),
        ({"prompt": ["a", "b"]}, PromptError, "got a batch"),
        ({"images": "missing.png"}, MediaError, "missing.png"),
        ({"videos": clip(9), "images": [picture(300, 300, s) for s in range(99)]}, CapacityError,
         "max_seq_len"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            engine.encode(**arguments)


def test_a_closed_engine(tiny_checkpoint: Path) -> None:
    engine = open_engine(tiny_checkpoint)
    handle = encode(engine, "image", "prefix")
    inputs, stream = engine.prepare("Q", media=handle), engine.stream("Q", media=handle)
    features = weakref.ref(handle.held().features)
    cache = weakref.ref(handle.held().prefix)
    engine.close()
    gc.collect()
    assert features() is cache() is None, "closing frees what a handle holds"
    assert (handle.released, handle.nbytes) == (True, 0)
    handle.release()
    for call in (
        lambda: engine.generate("Q", media=handle),
        lambda: engine.generate(inputs),
        lambda: engine.encode(images=picture()),
        lambda: engine.choose("Q", ["a", "b"], media=handle),
        lambda: engine.prepare("Q", media=handle),
        lambda: next(stream),
    ):
        with pytest.raises(BackendError, match="the engine is closed"):
            call()


@pytest.mark.parametrize("keep", KEEPS)
def test_bytes(engine: Engine, keep: str) -> None:
    """What the handle says is what its tensors take, and what comes free, however it ends."""
    handle = encode(engine, "three_images", keep)
    held = handle.held()
    text = engine.config.text
    expected = handle.num_visual_tokens * text.hidden_size * 4
    expected += (
        handle.num_prefix_tokens * 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
    )
    tensors = [held.features]
    if held.prefix is not None:
        tensors += [held.prefix.k_cache, held.prefix.v_cache]
    assert handle.nbytes == expected == sum(t.untyped_storage().nbytes() for t in tensors)
    assert engine._encoded.nbytes == handle.nbytes
    assert str(handle.nbytes) in repr(handle)
    engine.generate("Q", media=handle, max_new_tokens=2)  # the slot keeps a copy, no reference
    alive = [weakref.ref(tensor) for tensor in tensors]
    del held, tensors
    handle.release()
    assert [ref() for ref in alive] == [None] * len(alive)
    assert (handle.nbytes, handle.released, engine._encoded.nbytes) == (0, True, 0)
    dropped = weakref.ref(encode(engine, "image", keep))
    gc.collect()
    assert dropped() is None
    with pytest.raises(ValueError, match="mine"), encode(engine, "image", keep) as handle:
        raise ValueError("mine")
    assert handle.released


def test_the_ceiling(tiny_checkpoint: Path) -> None:
    with open_engine(tiny_checkpoint) as engine:
        sizes = {}
        for keep in KEEPS:
            with encode(engine, "image", keep) as handle:
                sizes[keep] = handle.nbytes
    limit = sizes["prefix"] + sizes["features"]
    with open_engine(tiny_checkpoint, encoded_memory_bytes=limit) as engine:
        prefix, features = (encode(engine, "image", keep) for keep in ("prefix", "features"))
        with pytest.raises(CapacityError) as caught:
            encode(engine, "image", "features")
        said = str(caught.value)
        assert f"needs {sizes['features']} bytes" in said
        assert f"{limit} of {limit} are held" in said
        assert "Release handles" in said
        features.release()
        with pytest.raises(CapacityError, match=f"needs {sizes['prefix']} bytes"):
            encode(engine, "image", "prefix")
        again = encode(engine, "image", "features")
        assert engine.generate("Q", media=again, max_new_tokens=1).usage.views == 0
        assert not prefix.released
    with open_engine(tiny_checkpoint, encoded_memory_bytes=0) as engine:
        with pytest.raises(CapacityError, match="of 0 are held"):
            encode(engine, "image", "features")
        engine.generate("Q", images=picture(), max_new_tokens=1)
    for bad in (-1, 1.5, "1 GB", True):
        with pytest.raises(OptionError, match=r"encoded_memory_bytes=.*expected a number of bytes"):
            open_engine(tiny_checkpoint, encoded_memory_bytes=bad)


def test_memory_that_cannot_be_reserved(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(KVCache, "__init__", fail)
    with pytest.raises(CapacityError, match=r"needs \d+ bytes.*cannot reserve.*Release handles"):
        encode(engine, "image", "prefix")
    assert engine._encoded.nbytes == 0


@pytest.mark.parametrize("owner", [SiglipTower, Qwen2])
def test_an_encoding_that_fails_holds_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, owner: Any
) -> None:
    name = "encode" if owner is SiglipTower else "prefill_hidden"

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(CapacityError, match="no memory left") as kept:
            encode(engine, "image", "prefix")
    assert engine._encoded.nbytes == 0, kept
    encode(engine, "image", "prefix").release()


def test_encoding_needs_no_slot_and_questions_do(engine: Engine) -> None:
    stream = engine.stream("Hi", ignore_eos=True)
    next(stream)
    with encode(engine, "image", "prefix") as handle:
        for call in (
            lambda: engine.generate("Q", media=handle),
            lambda: engine.choose("Q", ["a", "b"], media=handle),
            lambda: next(engine.stream("Q", media=handle)),
        ):
            with pytest.raises(CapacityError, match="this thread has left open"):
                call()
        stream.close()
        cancelled = engine.stream("Why?", media=handle, ignore_eos=True)
        for _ in range(3):
            next(cancelled)
        cancelled.close()
        got = engine.generate("Why?", media=handle, **GREEDY)
        assert_same(got, engine.generate("Why?", **MEDIA["image"], **GREEDY), 0)


def test_released_in_the_middle(engine: Engine) -> None:
    """A request that has begun goes on; one that has not says so."""
    expected = engine.generate("Why?", **MEDIA["image"], **GREEDY)
    handle = encode(engine, "image", "prefix")
    begun, waiting = (engine.stream("Why?", media=handle, **GREEDY) for _ in range(2))
    chunks = [next(begun)]
    handle.release()
    chunks += begun
    assert chunks[-1].output is not None
    assert_same(chunks[-1].output, expected, 0)
    with pytest.raises(OptionError, match="was released"):
        next(waiting)


def test_released_while_a_thread_waits_for_its_slot(engine: Engine) -> None:
    handle = encode(engine, "image", "prefix")
    stream = engine.stream("Hi", ignore_eos=True)
    next(stream)
    begun = threading.Event()

    def ask() -> Any:
        begun.set()
        return engine.generate("Why?", media=handle, **GREEDY)

    def end() -> None:
        begun.wait()
        threading.Event().wait(0.1)
        handle.release()
        stream.close()

    answer, _ = run_threads([ask, end])
    assert isinstance(answer, OptionError)


def test_many_threads(tiny_checkpoint: Path) -> None:
    """Handles are made, asked and released by threads side by side, over two slots."""
    names = ["image", "wide", "video", "three_images"]
    with open_engine(tiny_checkpoint, max_batch_size=2) as engine:
        expected = {
            (name, prompt): engine.generate(prompt, **MEDIA[name], **GREEDY).token_ids
            for name in names
            for prompt in PLAIN_QUESTIONS
        }
        chosen = {name: engine.choose("Q", ["yes", "no way"], **MEDIA[name]) for name in names}
        shared = {name: encode(engine, name, "prefix") for name in names}

        def work(seed: int) -> list[Any]:
            rng, wrong = random.Random(seed), []
            for _ in range(8):
                name, prompt = rng.choice(list(expected))
                if rng.random() < 0.3:
                    handle = encode(engine, name, rng.choice(KEEPS))
                else:
                    handle = shared[name]
                if (
                    rng.random() < 0.3
                    and engine.choose("Q", ["yes", "no way"], media=handle) != chosen[name]
                ):
                    wrong.append(name)
                got = engine.generate(prompt, media=handle, **GREEDY).token_ids
                if got != expected[name, prompt]:
                    wrong.append((name, prompt))
                if handle is not shared[name]:
                    handle.release()
            return wrong

        assert run_threads([lambda seed=seed: work(seed) for seed in range(6)]) == [[]] * 6
        assert engine._encoded.nbytes == sum(handle.nbytes for handle in shared.values())
        for handle in shared.values():
            handle.release()
        assert (engine._encoded.nbytes, free_slots(engine)) == (0, 2)


def test_calls_leave_nothing_behind(engine: Engine) -> None:
    """As many tensors after the calls as before them."""

    def count() -> int:
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    def call(keep: str) -> None:
        with encode(engine, "image", keep) as handle:
            engine.generate("Why?", media=handle, max_new_tokens=2)
            engine.choose("Why?", ["yes", "no way"], media=handle)
            next(engine.stream("Why?", media=handle))

    call("prefix")
    before = count()
    for keep in KEEPS * 3:
        call(keep)
    assert count() <= before


@pytest.mark.slow
@pytest.mark.parametrize("keep", KEEPS)
def test_ctrl_c_at_many_lines(engine: Engine, keep: str) -> None:
    """Wherever it strikes: nothing is held, the slot is free, and the next answer is right."""
    files = (*FILES, "encoding.py", "encoded_media.py", "kv_cache.py")
    media, few = {"images": picture(30, 30)}, {"max_new_tokens": 2, "ignore_eos": True}
    expected = engine.generate("Why?", **media, **few).token_ids
    kept = engine.encode(**media, keep="prefix")
    line, own = KEEPS.index(keep), None
    while True:
        line += LINE_STEP
        if line % 2:
            engine.generate("Hi", max_new_tokens=1)  # the slot loses its prefix
        try:
            with InterruptAtLine(line, files):
                own = engine.encode(**media, keep=keep)
                engine.generate("Why?", media=own, **few)
                engine.generate("Why?", media=kept, **few)
            break
        except KeyboardInterrupt as interrupt:
            where = str(interrupt)
        if own is not None:
            own.release()
        own = None
        assert engine.generate("Why?", media=kept, **few).token_ids == expected, where
        assert free_slots(engine) == 1, where
        assert engine._encoded.nbytes == kept.nbytes, where
    own.release()
    kept.release()
    assert line > 150
