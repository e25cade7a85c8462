"""The engine's calls on every kind of request: what comes back, alone and in batches."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ovfast
from ovfast import (
    BackendError,
    CapacityError,
    Engine,
    OptionError,
    PromptError,
    SamplingParams,
    VisualOptions,
)
from tests.support import runtime
from tests.support.checkpoints import CheckpointSpec
from tests.support.engines import REQUESTS, free_slots, logprobs_of, open_engine, plain_greedy
from tests.support.prompts import FORGERIES, clip, picture, user

NUM_TOKENS = 12
GREEDY = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path) -> Iterator[Engine]:
    with open_engine(tiny_checkpoint, max_batch_size=3) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    """Each test leaves all slots free."""
    yield shared
    assert free_slots(shared) == 3


@pytest.mark.parametrize("name", REQUESTS)
def test_greedy_tokens_are_those_of_a_plain_loop(
    engine: Engine, tiny_checkpoint: Path, name: str
) -> None:
    inputs = engine.prepare(**REQUESTS[name])
    expected = plain_greedy(tiny_checkpoint, inputs, NUM_TOKENS, engine)
    output = engine.generate(**REQUESTS[name], sampling=GREEDY)
    assert list(output.token_ids) == expected
    assert output.text == engine._processor.decode(expected)
    assert output.finish_reason == "length"
    assert engine.generate(inputs, sampling=GREEDY).token_ids == output.token_ids


def test_forms_of_one_prompt(engine: Engine) -> None:
    """A question, a chat and a raw prompt that say the same are the same request."""
    image, question = picture(), "What is shown?"
    raw = "<|im_start|>user\n<image>\nWhat is shown?<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    plain = engine.generate(question, images=image, sampling=GREEDY)
    for prompt, options in (
        ("<image>\nWhat is shown?", {"images": [image]}),
        (user("IMAGE", question), {"images": image}),
        (user({"type": "image", "image": image}, question), {}),
        (raw, {"images": image, "raw": True}),
    ):
        inputs = engine.prepare(prompt, **options)
        assert inputs.num_tokens == plain.usage.prompt_tokens, prompt
        assert engine.generate(prompt, sampling=GREEDY, **options).token_ids == plain.token_ids
    told = engine.generate(question, images=image, system="Be brief.", sampling=GREEDY)
    same = engine.generate(system + raw, images=image, raw=True, sampling=GREEDY)
    assert told.token_ids == same.token_ids != plain.token_ids
    assert told.usage == same.usage


def test_chat_keeps_the_order_of_its_parts(engine: Engine) -> None:
    image, video = picture(), clip(2)
    chat = user("a", "IMAGE", "b", "VIDEO", "c")
    raw = "<|im_start|>user\na<image>\nb<video>\nc<|im_end|>\n<|im_start|>assistant\n"
    inputs = engine.prepare(chat, images=image, videos=video)
    assert [span.kind for span in inputs.spans] == ["image", "video"]
    same = engine.prepare(raw, images=image, videos=video, raw=True)
    assert np.array_equal(inputs.input_ids, same.input_ids)
    other = engine.prepare(user("a", "VIDEO", "b", "IMAGE", "c"), images=image, videos=video)
    tokens = [engine.generate(i, sampling=GREEDY).token_ids for i in (inputs, same, other)]
    assert tokens[0] == tokens[1] != tokens[2]


@pytest.mark.parametrize("forgery", FORGERIES[:5])
def test_what_a_user_types_in_a_chat_stays_text(engine: Engine, forgery: str) -> None:
    """No placeholder, no special token, no medium comes from a chat's text."""
    chat = user("IMAGE", f"Say {forgery} now")
    inputs = engine.prepare(chat, images=picture())
    special = [i for i in inputs.input_ids.tolist() if engine._processor._text.is_special(i)]
    plain = engine.prepare(user("IMAGE", "Say now"), images=picture())
    expected = [i for i in plain.input_ids.tolist() if engine._processor._text.is_special(i)]
    assert special == expected
    assert len(inputs.spans) == 1
    text = [i for i in inputs.input_ids.tolist() if not engine._processor._text.is_special(i)]
    assert f"Say {forgery} now" in engine._processor.decode(text)
    assert engine.generate(chat, images=picture(), sampling=GREEDY).usage.views == 5


def test_visual_options_of_engine_and_call(tiny_checkpoint: Path) -> None:
    few, many = VisualOptions(max_views=1), VisualOptions()
    with open_engine(tiny_checkpoint, visual=few) as engine:
        default = engine.generate(**REQUESTS["image"], sampling=GREEDY)
        chosen = engine.generate(**REQUESTS["image"], visual=many, sampling=GREEDY)
    assert (default.usage.views, chosen.usage.views) == (1, 5)
    assert (default.visual, chosen.visual) == (few, many)
    assert default.token_ids != chosen.token_ids


def test_media_limits_of_the_engine(tiny_checkpoint: Path) -> None:
    limits = ovfast.MediaLimits(max_image_pixels=100, max_video_frames=2)
    with open_engine(tiny_checkpoint, media_limits=limits) as engine:
        assert engine.generate("Q", images=picture(10, 10), max_new_tokens=1).usage.views > 0
        with pytest.raises(ovfast.MediaError, match="at most 100 are allowed"):
            engine.generate("Q", images=picture(10, 11))
        with pytest.raises(ovfast.MediaError, match="at most 2 are allowed"):
            engine.generate("Q", videos=clip(3))


def check_timings(output: ovfast.GenerationOutput, *, with_media: bool) -> None:
    t = output.timings
    assert (t.vision_ms > 0) == with_media
    assert min(t.media_ms, t.preprocess_ms, t.prefill_ms, t.decode_ms, t.tpot_ms) > 0
    assert t.media_ms + t.preprocess_ms + t.vision_ms + t.prefill_ms <= t.ttft_ms
    assert t.total_ms == pytest.approx(t.ttft_ms + t.decode_ms, rel=0.01, abs=1.0)
    assert t.tpot_ms * (len(output.token_ids) - 1) == pytest.approx(t.decode_ms)


@pytest.mark.parametrize("name", REQUESTS)
def test_timings_and_usage(engine: Engine, name: str) -> None:
    inputs = engine.prepare(**REQUESTS[name])
    last = list(engine.stream(**REQUESTS[name], sampling=GREEDY))[-1]
    for output in (engine.generate(**REQUESTS[name], sampling=GREEDY), last.output):
        assert output is not None
        check_timings(output, with_media=name != "text")
        usage = output.usage
        assert usage.prompt_tokens == inputs.num_tokens == len(inputs.input_ids)
        assert usage.visual_tokens == sum(plan.num_tokens for plan in inputs.plans)
        assert usage.views == len(inputs.views)
        assert usage.completion_tokens == NUM_TOKENS == len(output.token_ids)
        assert output.as_dict()["usage"]["views"] == usage.views


def test_timings_of_one_token(engine: Engine) -> None:
    timings = engine.generate("Hi", max_new_tokens=1).timings
    assert timings.decode_ms == timings.tpot_ms == 0
    assert timings.total_ms >= timings.ttft_ms > 0


def test_file_and_bytes_are_timed_as_media(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "p.png"
    Image.fromarray(picture(400, 500)).save(file)
    for source in (file, str(file), file.read_bytes()):
        output = engine.generate("Q", images=source, max_new_tokens=1)
        assert output.timings.media_ms > 0.3  # a PNG of 600 kB of noise


def test_a_clip_is_its_frames(engine: Engine, tmp_path: Path) -> None:
    """From a path, from bytes, as the frames that were chosen; cut in two it is an error."""
    av = pytest.importorskip("av")
    file = tmp_path / "clip.mp4"
    with av.open(file, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for seed in range(6):
            pixels = np.full((48, 64, 3), 40 * seed, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    four = VisualOptions(num_frames=4)
    frames = ovfast.media.load_video(file, num_frames=4)
    assert [round(int(frame[0, 0, 0]) / 40) for frame in frames] == [0, 1, 3, 5]
    expected = engine.generate("Q", videos=frames, sampling=GREEDY)
    for source in (file, str(file), file.read_bytes(), [str(file)]):
        output = engine.generate("Q", videos=source, visual=four, sampling=GREEDY)
        assert (output.token_ids, output.usage) == (expected.token_ids, expected.usage)
    data = file.read_bytes()
    with pytest.raises(ovfast.MediaError, match=r"cannot be decoded|no video stream"):
        engine.generate("Q", videos=data[: len(data) // 2])


def columns(names: list[str]) -> dict[str, list[Any]]:
    keys = {"prompts": "prompt", "images": "images", "videos": "videos"}
    return {name: [REQUESTS[n].get(key) for n in names] for name, key in keys.items()}


@pytest.mark.parametrize("max_batch_size", [1, 2, 8])
def test_batch_equals_one_by_one(
    tiny_checkpoint: Path, max_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different media and lengths; smaller batches run in waves."""
    with open_engine(tiny_checkpoint, max_batch_size=max_batch_size) as engine:
        runner, active = engine._scheduler.loaded().runner, []
        launch = runner.launch
        monkeypatch.setattr(
            runner, "launch", lambda n: (active.append(len(runner._active)), launch(n))
        )
        alone = [engine.generate(**request, sampling=GREEDY) for request in REQUESTS.values()]
        assert set(active) == {1}
        given = columns(list(REQUESTS))
        batch = engine.generate(
            given["prompts"], images=given["images"], videos=given["videos"], sampling=GREEDY
        )
        assert max(active) == min(max_batch_size, len(REQUESTS))
        inputs = [engine.prepare(**request) for request in REQUESTS.values()]
        again = engine.generate(inputs, sampling=GREEDY)
        assert free_slots(engine) == max_batch_size
    for one, many, other in zip(alone, batch, again, strict=True):
        assert one.token_ids == many.token_ids == other.token_ids
        assert (one.text, one.usage) == (many.text, many.usage)
        np.testing.assert_allclose(logprobs_of(many), logprobs_of(one), rtol=1e-6)
        check_timings(many, with_media=one.usage.views > 0)


def test_batch_of_chats(engine: Engine) -> None:
    chats = [user("IMAGE", "a"), user("b"), user("VIDEO", "c", "IMAGE")]
    images, videos = [picture(), None, [picture(40, 40)]], [None, [], clip(2)]
    outputs = engine.generate(chats, images=images, videos=videos, sampling=GREEDY)
    for chat, image, video, output in zip(chats, images, videos, outputs, strict=True):
        alone = engine.generate(chat, images=image, videos=video, sampling=GREEDY)
        assert alone.token_ids == output.token_ids
    assert len(engine.generate(["only one"], sampling=GREEDY)) == 1


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([], {}),
        (["a", user("b")], {}),
        (["a", 3], {}),
        (["a", "b"], {"images": picture()}),
        (["a", "b"], {"images": [picture()]}),
        (["a", "b"], {"videos": [None, None, None]}),
        (["a", ""], {}),
        ([user("a"), []], {}),
    ],
)
def test_bad_batches(engine: Engine, prompt: Any, options: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="expected"):
        engine.generate(prompt, **options)


def test_calls_that_take_no_batch(engine: Engine) -> None:
    for call in (engine.stream, lambda prompt: engine.score(prompt, ["x"])):
        with pytest.raises(PromptError, match=r"takes one prompt\. Use generate\(\)"):
            call(["a", "b"])
    with pytest.raises(PromptError, match="expected a dict"):
        engine.prepare(["a", "b"])


@pytest.mark.parametrize("name", ["text", "mixed"])
def test_forward(engine: Engine, tiny_checkpoint: Path, name: str) -> None:
    inputs = engine.prepare(**REQUESTS[name])
    expected = runtime.all_logits(runtime.load_model(tiny_checkpoint), inputs)
    logits = engine.forward(inputs)
    assert logits.dtype == torch.float32
    # The engine's back end adds in another order: 2e-4 of the largest, as against transformers.
    near = {"rtol": 0, "atol": 2e-4 * float(expected.abs().max())}
    torch.testing.assert_close(logits, expected, **near)
    assert bool(torch.isfinite(logits).all())  # nothing is masked, forbidden ids neither
    last = inputs.num_tokens - 1
    for positions in ([last], [3, 0, 3, last], range(2, 7), np.array([5, 1]), torch.tensor([4])):
        some = engine.forward(inputs, positions=positions)
        torch.testing.assert_close(some, expected[torch.tensor(list(positions))], **near)
    assert engine.forward(inputs, positions=[]).shape == (0, expected.shape[1])
    logits[0] = 0  # the caller's own tensor, not one of inference mode
    for bad in ([-1], [inputs.num_tokens], [1.5], 3, ["0"]):
        with pytest.raises(OptionError, match="list of integers from 0 to"):
            engine.forward(inputs, positions=bad)
    with pytest.raises(OptionError, match="expected ModelInputs"):
        engine.forward("What?")


def test_inputs_belong_to_one_kind_of_checkpoint(
    engine: Engine, random_checkpoint: Any, tiny_checkpoint: Path
) -> None:
    inputs = engine.prepare(**REQUESTS["image"])
    for options in ({"images": picture()}, {"raw": True}, {"visual": VisualOptions()}):
        with pytest.raises(OptionError, match=r"already part of.*prepare\(\)"):
            engine.generate(inputs, **options)
    with open_engine(random_checkpoint(CheckpointSpec(image_size=56))) as other:
        for call in (other.generate, other.forward, lambda i: other.score(i, ["a"])):
            with pytest.raises(PromptError, match=r"views of 84×84 .*prepare\(\) of this"):
                call(inputs)
    odd = engine.prepare("Hi")
    odd.input_ids[1] = 608
    with pytest.raises(PromptError, match="from 0 to 607"):
        engine.generate(odd)


def test_max_seq_len_is_prompt_and_answer(tiny_checkpoint: Path) -> None:
    with open_engine(tiny_checkpoint, max_seq_len=64) as engine:
        inputs = engine.prepare("Hello")
        room = 64 - inputs.num_tokens
        whole = engine.generate(inputs, max_new_tokens=room, ignore_eos=True)
        assert len(whole.token_ids) == room
        open_end = engine.generate(inputs, ignore_eos=True)
        assert (open_end.token_ids, open_end.finish_reason) == (whole.token_ids, "length")
        with pytest.raises(CapacityError, match=f"{room + 1} more.*holds 64.*lower"):
            engine.generate(inputs, max_new_tokens=room + 1)
        for call in (engine.generate, engine.stream, lambda p: engine.score(p, ["x"])):
            with pytest.raises(CapacityError, match="holds 64"):
                call("word " * 100)
        with pytest.raises(CapacityError, match="holds 64"):
            engine.forward(engine.prepare("word " * 100))
        assert engine.generate(inputs, max_new_tokens=5).token_ids == whole.token_ids[:5]


def test_the_embedding_decides_the_vocabulary(tmp_path: Path, random_checkpoint: Any) -> None:
    """Rows beyond config.json's vocab_size have no tokenizer entry: never generated, but there."""
    path = Path(shutil.copytree(random_checkpoint(), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["vocab_size"] = 600
    (path / "config.json").write_text(json.dumps(config))
    with open_engine(path) as engine:
        assert engine.forward(engine.prepare("Hi")).shape[1] == 608
        output = engine.generate("Hi", max_new_tokens=200, ignore_eos=True, temperature=50, seed=3)
        assert max(output.token_ids) < 597


def test_warmup(tiny_checkpoint: Path, random_checkpoint: Any) -> None:
    bare = random_checkpoint(CheckpointSpec(chat_template=None))
    for path, length in ((tiny_checkpoint, 1024), (bare, 1024), (tiny_checkpoint, 8)):
        with open_engine(path, max_seq_len=length) as engine:
            engine.warmup()
            assert free_slots(engine) == 1


def test_closed_engine(tiny_checkpoint: Path) -> None:
    engine = open_engine(tiny_checkpoint)
    inputs = engine.prepare("Hi")
    begun, fresh = engine.stream("Hi", ignore_eos=True), engine.stream("Hi")
    next(begun)
    engine.close()
    engine.close()
    assert engine.closed
    assert str(engine.device) == "cpu"
    for call in (
        lambda: engine.generate("Hi"),
        lambda: engine.generate(inputs),
        lambda: engine.stream("Hi"),
        lambda: engine.score("Hi", ["x"]),
        lambda: engine.prepare("Hi"),
        lambda: engine.forward(inputs),
        lambda: engine.estimate("Hi"),
        engine.warmup,
        lambda: next(begun),
        lambda: next(fresh),
    ):
        with pytest.raises(BackendError, match=r"the engine is closed\. Load a new one"):
            call()


def test_two_engines_do_not_meet(tiny_checkpoint: Path, random_checkpoint: Any) -> None:
    other_path = random_checkpoint(CheckpointSpec(seed=7))
    with open_engine(tiny_checkpoint) as one, open_engine(other_path) as two:
        alone = [e.generate(**REQUESTS["image"], sampling=GREEDY) for e in (one, two)]
        streams = [e.stream(**REQUESTS["image"], sampling=GREEDY) for e in (one, two)]
        tokens: list[list[int]] = [[], []]
        for _ in range(NUM_TOKENS):
            for stream, found in zip(streams, tokens, strict=True):
                found += next(stream).token_ids
        one.close()
        assert two.generate(**REQUESTS["image"], sampling=GREEDY).token_ids == tuple(tokens[1])
    assert [list(output.token_ids) for output in alone] == tokens
    assert tokens[0] != tokens[1]
