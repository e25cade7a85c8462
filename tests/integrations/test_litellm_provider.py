"""LiteLLM, unmodified, over a model in the process; run by `make test-integrations`."""

import asyncio
import base64
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ovfast
from tests.support.engines import run_threads

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network
litellm = pytest.importorskip("litellm", reason="run by make test-integrations")

# Of the types that litellm gives pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:Item.*ReadOnly:UserWarning")

SAMPLES = Path(ovfast.__file__).parent / "demo" / "samples"
QUESTION = "How many shapes are in the picture?"


def data_uri(name: str, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode((SAMPLES / name).read_bytes()).decode()


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


TEXT = {"type": "text", "text": QUESTION}
IMAGE = {"type": "image_url", "image_url": {"url": data_uri("shapes.png")}}
# The same request as clients write it.
SHAPES: dict[str, list[dict[str, Any]]] = {
    "object": user(IMAGE, TEXT),
    "string": user({"type": "image_url", "image_url": data_uri("shapes.png")}, TEXT),
    "extra_keys": user(
        IMAGE
        | {
            "uuid": "7",
            "image_url": {"url": data_uri("shapes.png"), "detail": "low", "format": "image/png"},
        },
        TEXT | {"cache_control": {"type": "ephemeral"}},
    ),
    "named": [{"role": "user", "content": [IMAGE, TEXT], "name": "someone"}],
}


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[ovfast.Engine]:
    from ovfast.integrations import litellm_provider

    with ovfast.load("demo", device="cpu", max_seq_len=1024, max_batch_size=4) as loaded:
        litellm_provider.register(handler=litellm_provider.OVFastLLM(loaded))
        yield loaded
    litellm.custom_provider_map = []


@pytest.fixture
def expected(engine: ovfast.Engine) -> ovfast.GenerationOutput:
    return engine.generate(QUESTION, images=SAMPLES / "shapes.png")


def ask(messages: Any = None, **options: Any) -> Any:
    return litellm.completion("ovfast/demo", messages=messages or SHAPES["object"], **options)


@pytest.mark.parametrize("name", SHAPES)
def test_completion(expected: ovfast.GenerationOutput, name: str) -> None:
    response = ask(SHAPES[name])
    (choice,) = response.choices
    assert choice.message.content == expected.text
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    usage = response.usage
    assert usage.prompt_tokens == expected.usage.prompt_tokens
    assert usage.completion_tokens == expected.usage.completion_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.image_tokens == expected.usage.visual_tokens > 0


def test_acompletion(expected: ovfast.GenerationOutput) -> None:
    async def both() -> list[Any]:
        calls = [
            litellm.acompletion("ovfast/demo", messages=SHAPES[name])
            for name in ("object", "string")
        ]
        return list(await asyncio.gather(*calls))

    texts = [response.choices[0].message.content for response in asyncio.run(both())]
    assert texts == [expected.text] * 2


def test_streaming(expected: ovfast.GenerationOutput, engine: ovfast.Engine) -> None:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == expected.text
    assert sum(bool(text) for text in texts) > 1
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [reason for reason in reasons if reason] == ["stop"]
    usage = next(c.usage for c in reversed(chunks) if getattr(c, "usage", None))
    assert usage.prompt_tokens == expected.usage.prompt_tokens
    assert usage.completion_tokens == expected.usage.completion_tokens
    rebuilt = litellm.stream_chunk_builder(chunks)
    assert rebuilt.choices[0].message.content == expected.text
    assert engine._scheduler.num_free_slots == 4


def test_astreaming(expected: ovfast.GenerationOutput) -> None:
    async def run() -> str:
        stream = await litellm.acompletion("ovfast/demo", messages=SHAPES["object"], stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return "".join(texts)

    async def two() -> list[str]:
        return list(await asyncio.gather(run(), run()))

    assert asyncio.run(two()) == [expected.text] * 2


def wait_for_slots(engine: ovfast.Engine, number: int) -> None:
    for _ in range(200):  # the step under way ends first
        if engine._scheduler.num_free_slots == number:
            return
        time.sleep(0.02)
    raise AssertionError(f"{engine._scheduler.num_free_slots} slots are free")


def test_a_dropped_stream_frees_its_slot(engine: ovfast.Engine) -> None:
    from ovfast.integrations import litellm_provider

    handler = litellm_provider.OVFastLLM(engine)
    options = {"max_tokens": 900, "ignore_eos": True}
    given = {"model": "demo", "messages": SHAPES["object"], "optional_params": options}

    async def first() -> Any:
        stream = handler.astreaming(**given)
        chunk = await anext(stream)
        await stream.aclose()
        return chunk

    assert asyncio.run(first())["is_finished"] is False
    chunks = handler.streaming(**given)
    next(chunks)
    chunks.close()
    wait_for_slots(engine, 4)


def test_a_cancelled_call_frees_its_slot(engine: ovfast.Engine) -> None:
    async def run() -> None:
        call = litellm.acompletion(
            "ovfast/demo", messages=SHAPES["object"], extra_body={"ignore_eos": True}, n=50
        )
        task = asyncio.create_task(call)
        while engine._scheduler.num_free_slots == 4:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    started = time.monotonic()
    asyncio.run(run())  # waits for its threads
    wait_for_slots(engine, 4)
    assert time.monotonic() - started < 5  # 50 answers of 900 tokens take more than 30 s


@pytest.fixture
def busy(engine: ovfast.Engine) -> Iterator[ovfast.Engine]:
    """All slots are taken by streams of this thread; nothing waits at the end."""
    streams = [engine.stream("Hi", ignore_eos=True) for _ in range(4)]
    for stream in streams:
        next(stream)
    yield engine
    for _ in range(150):
        if not engine._scheduler._blocked:
            break
        time.sleep(0.02)
    waiting = len(engine._scheduler._blocked)
    for stream in streams:
        stream.close()
    wait_for_slots(engine, 4)
    assert waiting == 0, "still waits for a slot"


async def await_answer(stream: bool, **options: Any) -> None:
    answer = await litellm.acompletion(
        "ovfast/demo", messages=SHAPES["object"], stream=stream, **options
    )
    if stream:
        async for _ in answer:
            pass


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("stream", [False, True])
def test_a_timeout_while_waiting_for_a_slot(stream: bool) -> None:
    started = time.monotonic()
    with pytest.raises(litellm.Timeout):
        asyncio.run(await_answer(stream, timeout=0.2))
    (error,) = run_threads([lambda: list(ask(stream=stream, timeout=0.2))])
    assert isinstance(error, litellm.Timeout)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_call_stops_waiting(busy: ovfast.Engine, stream: bool) -> None:
    async def run() -> None:
        task = asyncio.create_task(await_answer(stream))
        while not busy._scheduler._blocked:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


@pytest.mark.usefixtures("busy")
def test_waiting_calls_leave_asyncios_threads_alone() -> None:
    async def run() -> None:
        tasks = [asyncio.create_task(await_answer(stream=False)) for _ in range(40)]
        await asyncio.sleep(0.5)
        await asyncio.wait_for(asyncio.to_thread(int), 5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_a_timeout_while_waiting_for_a_thread(
    busy: ovfast.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ovfast.integrations import litellm_provider

    monkeypatch.setattr(litellm_provider, "MAX_THREADS", 1)
    handler = litellm_provider.OVFastLLM(busy)
    given = {"model": "demo", "messages": SHAPES["object"], "optional_params": {}}

    async def run() -> list[Any]:
        calls = [handler.acompletion(**given, timeout=seconds) for seconds in (60, 0.2)]
        tasks = [asyncio.create_task(call) for call in calls]
        done, _ = await asyncio.wait(tasks, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        tasks[0].cancel()
        return [task.exception() for task in done]

    (error,) = asyncio.run(run())
    assert isinstance(error, litellm.Timeout)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # from Python 3.12 on
def test_a_forked_child_loads_its_own() -> None:
    from ovfast.integrations import litellm_provider

    handler = litellm_provider.OVFastLLM(device="cpu", max_seq_len=512)
    options = {"model": "demo", "messages": user(TEXT), "optional_params": {"max_tokens": 2}}

    def answer() -> str:
        call = handler.acompletion(**options, model_response=litellm.ModelResponse())
        return str(asyncio.run(call).choices[0].message.content)

    expected = answer()
    time.sleep(0.1)  # its thread, idle by then, would get the child's call
    child = os.fork()
    if child == 0:  # nothing of pytest may run here
        signal.alarm(30)
        try:
            os._exit(0 if answer() == expected else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    handler.close()


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_lengths_and_stops(expected: ovfast.GenerationOutput, name: str) -> None:
    response = ask(**{name: 2})
    assert response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 2
    word = expected.text.split(" ")[1]
    for stop in (word, [word, "never"]):
        response = ask(stop=stop)
        assert response.choices[0].message.content == expected.text.split(" ")[0] + " "
        assert response.choices[0].finish_reason == "stop"


def test_sampling_and_extras(engine: ovfast.Engine) -> None:
    warm = {"temperature": 3.0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    texts = [ask(**warm, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    several = ask(**warm, seed=1, n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert [choice.message.content for choice in several.choices][:2] == texts[1:]
    assert several.usage.completion_tokens == 36
    only = ask(temperature=3.0, top_k=1, max_tokens=4).choices[0].message.content
    assert only == ask(max_tokens=4).choices[0].message.content
    least = ask(min_tokens=30, max_tokens=30).usage.completion_tokens
    assert least == 30


def test_logprobs(expected: ovfast.GenerationOutput) -> None:
    content = ask(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == len(expected.token_ids)
    for entry in content:
        assert [len(entry.top_logprobs), entry.top_logprobs[0].logprob] == [3, entry.logprob]
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token


def test_several_pictures_and_a_video(engine: ovfast.Engine) -> None:
    question = "Which image shows a star?"
    images = [SAMPLES / f"{name}.png" for name in ("first", "second", "third")]
    parts = [{"type": "image_url", "image_url": data_uri(image.name)} for image in images]
    expected = engine.generate(question, images=images).text
    assert ask(user(*parts, question)).choices[0].message.content == expected
    question = "Which way does the shape move?"
    expected = engine.generate(question, videos=SAMPLES / "clip.mp4").text
    uri = data_uri("clip.mp4", "video/mp4")
    for video_url in (uri, {"url": uri}):
        response = ask(user({"type": "video_url", "video_url": video_url}, question))
        assert response.choices[0].message.content == expected


def test_a_conversation_and_its_continuation(engine: ovfast.Engine) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [system, *SHAPES["object"], {"role": "assistant", "content": "One."}]
    response = ask([*turns, {"role": "user", "content": "Which colour is it?"}])
    chat = [*turns, {"role": "user", "content": "Which colour is it?"}]
    chat[1] = user({"type": "image", "image": SAMPLES / "shapes.png"}, TEXT)[0]
    assert response.choices[0].message.content == engine.generate(chat).text
    continued = ask(turns, extra_body={"continue_final_message": True}, max_tokens=3)
    assert continued.usage.completion_tokens <= 3


ERRORS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "brackets": ("BadRequestError", user({"type": "image_url", "image_url": "http://[a"}), {}),
    "kwargs": ("BadRequestError", None, {"extra_body": {"mm_processor_kwargs": "anyres"}}),
    "url": ("BadRequestError", user({"type": "image_url", "image_url": "http://a.b/c.png"}), {}),
    "path": ("BadRequestError", user({"type": "image_url", "image_url": "/etc/passwd"}), {}),
    "broken": ("BadRequestError", user({"type": "image_url", "image_url": "data:,x"}), {}),
    "audio": ("BadRequestError", user({"type": "input_audio", "input_audio": {}}), {}),
    "role": ("BadRequestError", [{"role": "tool", "content": "x"}], {}),
    "value": ("BadRequestError", None, {"temperature": -1.0}),
    "long": ("ContextWindowExceededError", [{"role": "user", "content": "x" * 3000}], {}),
    "tools": ("UnsupportedParamsError", None, {"tools": [{"type": "function", "function": {}}]}),
    "penalty": ("UnsupportedParamsError", None, {"frequency_penalty": 0.5}),
    "json": ("UnsupportedParamsError", None, {"response_format": {"type": "json_object"}}),
    "unknown": ("UnsupportedParamsError", None, {"extra_body": {"topk": 3}}),
    "timeout": ("Timeout", None, {"timeout": 1e-6}),
    "streamed_logprobs": ("BadRequestError", None, {"stream": True, "logprobs": True}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_litellms(name: str) -> None:
    kind, messages, options = ERRORS[name]
    with pytest.raises(getattr(litellm, kind)) as raised:
        ask(messages, **options)
    assert type(raised.value).__name__ == kind
    assert raised.value.llm_provider == "ovfast"


def test_the_hint_for_urls_and_dropped_parameters(expected: ovfast.GenerationOutput) -> None:
    with pytest.raises(litellm.BadRequestError, match="download it and send"):
        ask(user({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}))
    response = ask(frequency_penalty=0.5, drop_params=True)
    assert response.choices[0].message.content == expected.text
    neutral = {"frequency_penalty": 0.0, "response_format": {"type": "text"}, "user": "me"}
    assert ask(**neutral).choices[0].message.content == expected.text


def test_errors_of_a_stream_and_of_its_loop() -> None:
    with pytest.raises(litellm.BadRequestError):
        list(ask(user({"type": "image_url", "image_url": "http://a.b/c.png"}), stream=True))
    with pytest.raises(litellm.Timeout):
        list(ask(stream=True, timeout=1e-6))

    async def run() -> None:
        messages = user({"type": "image_url", "image_url": "http://a.b/c.png"})
        stream = await litellm.acompletion("ovfast/demo", messages=messages, stream=True)
        async for _ in stream:
            pass

    with pytest.raises(litellm.BadRequestError):
        asyncio.run(run())


def test_models_are_loaded_by_name(expected: ovfast.GenerationOutput, tmp_path: Path) -> None:
    from ovfast.integrations import litellm_provider

    handler = litellm_provider.OVFastLLM(
        device="cpu", max_seq_len=512, allowed_local_media_path=SAMPLES
    )
    litellm_provider.register("ovfast-named", handler)
    part = {"type": "image_url", "image_url": (SAMPLES / "shapes.png").as_uri()}
    for _ in range(2):
        response = litellm.completion("ovfast-named/demo", messages=user(part, TEXT))
        assert response.choices[0].message.content == expected.text
    litellm.completion(f"ovfast-named/{SAMPLES.parent}", messages=user(TEXT), max_tokens=1)
    assert len(handler._engines) == 1
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(f"ovfast-named/{tmp_path}/none", messages=SHAPES["object"])
    handler.close()
    assert not handler._engines
    litellm.custom_provider_map = [
        each for each in litellm.custom_provider_map if each["provider"] != "ovfast-named"
    ]
