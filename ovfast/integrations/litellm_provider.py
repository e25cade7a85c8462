"""LiteLLM's CustomLLM: a model in the process for everything that speaks to LiteLLM.

    import litellm
    from ovfast.integrations import litellm_provider

    litellm_provider.register()
    litellm.completion("ovfast/demo", messages=[...])

The part of the model's name behind "ovfast/" is what `ovfast.load` takes. Answers are greedy where
no temperature is given. A proxy names `ovfast.integrations.litellm_provider.ovfast_llm` as its
custom_handler.
"""

import asyncio
import importlib
import math
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from ovfast.engine import Engine
from ovfast.engine_cache import EngineCache
from ovfast.errors import (
    BackendError,
    CapacityError,
    CheckpointError,
    MediaError,
    OptionError,
    OVFastError,
    PromptError,
)
from ovfast.forks import after_fork
from ovfast.integrations.arguments import visual_with
from ovfast.integrations.chats import prepare_chat
from ovfast.integrations.openai_messages import parse_messages
from ovfast.integrations.openai_options import parse_options, unsupported
from ovfast.model_inputs import ModelInputs
from ovfast.outputs import GenerationOutput, StreamChunk
from ovfast.sampling import SamplingParams

__all__ = ["OVFastLLM", "ovfast_llm", "register"]

PROVIDER = "ovfast"
MAX_THREADS = 64  # of acompletion; calls beyond them wait for one

try:
    litellm: Any = importlib.import_module("litellm")
except ImportError as error:
    raise BackendError(
        f"litellm cannot be imported ({error}). Install it with: pip install 'ovfast[litellm]'"
    ) from error


class Call(NamedTuple):
    """A request, laid out."""

    model: str
    engine: Engine
    inputs: ModelInputs
    params: list[SamplingParams]
    deadline: float  # of time.monotonic
    cancelled: threading.Event  # nobody waits for the answer any more

    def seconds_left(self) -> float:
        """Until the deadline; raises Timeout where it is over or nobody waits any more."""
        left = self.deadline - time.monotonic()
        if left <= 0 or self.cancelled.is_set():
            raise _timeout(self.model)
        return left


class OVFastLLM(litellm.CustomLLM):
    """Answers LiteLLM's calls; models are loaded when first named and kept.

    Args:
        engine: answers for every model name; None loads by name.
        allowed_local_media_path: the directory below which messages may name files; None for none.
        **load_options: of `ovfast.load`, for models loaded by name.
    """

    def __init__(
        self,
        engine: Engine | None = None,
        *,
        allowed_local_media_path: str | os.PathLike[str] | None = None,
        **load_options: Any,
    ) -> None:
        super().__init__()
        self._engine, self._media_path = engine, allowed_local_media_path
        self._load_options = load_options
        self._engines = EngineCache()
        self._renew_threads()
        after_fork(self._renew_threads)

    def close(self) -> None:
        """Frees the models that were loaded by name."""
        self._engines.close()

    def completion(
        self, *args: Any, cancelled: threading.Event | None = None, **kwargs: Any
    ) -> Any:
        """LiteLLM's call; arguments as CustomLLM.completion.

        Raises:
            BadRequestError, ContextWindowExceededError, UnsupportedParamsError, NotFoundError,
            Timeout, InternalServerError: of litellm.
        """
        del args
        with _mapped(kwargs["model"]):
            call = self._call(kwargs, cancelled or threading.Event())
            outputs = [_collect(call, params) for params in call.params]
        return _response(call, outputs, kwargs["model_response"])

    async def acompletion(self, *args: Any, **kwargs: Any) -> Any:
        """`completion` in a thread, which ends at its next token once this is cancelled or late."""
        cancelled = threading.Event()
        run = partial(self.completion, *args, cancelled=cancelled, **kwargs)
        answer = asyncio.get_running_loop().run_in_executor(self._threads, run)
        try:
            return await asyncio.wait_for(answer, _seconds(kwargs.get("timeout")))
        except TimeoutError as error:
            raise _timeout(kwargs["model"]) from error
        finally:
            cancelled.set()

    def streaming(
        self, *args: Any, cancelled: threading.Event | None = None, **kwargs: Any
    ) -> Iterator[dict[str, Any]]:
        """LiteLLM's generic chunks, one a token; arguments as CustomLLM.streaming.

        Raises:
            As `completion`; what is wrong with the request at the call.
        """
        del args
        with _mapped(kwargs["model"]):
            call = self._call(kwargs, cancelled or threading.Event())
            (params, *more) = call.params
            if more or params.logprobs is not None:
                raise OptionError(
                    "a stream with n above 1 or with logprobs; LiteLLM's chunks hold neither. Leave"
                    " them out, or do not stream."
                )
        return _chunks(call, params)

    async def astreaming(self, *args: Any, **kwargs: Any) -> AsyncIterator[dict[str, Any]]:
        """`streaming`, each step in the one thread that belongs to the stream."""
        loop = asyncio.get_running_loop()
        pool = ThreadPoolExecutor(1, thread_name_prefix="ovfast-stream")
        chunks: Any = iter(())
        cancelled = threading.Event()
        try:
            start = partial(self.streaming, *args, cancelled=cancelled, **kwargs)
            chunks = await loop.run_in_executor(pool, start)
            while (chunk := await loop.run_in_executor(pool, next, chunks, None)) is not None:
                yield chunk
        finally:
            cancelled.set()
            # Behind the step that may still be running; it must not keep the loop waiting.
            pool.submit(getattr(chunks, "close", int))
            pool.shutdown(wait=False)

    def _renew_threads(self) -> None:
        """Not asyncio's, which others need; anew in a forked child, where the old ones are gone."""
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="ovfast-call")

    def _call(self, kwargs: Mapping[str, Any], cancelled: threading.Event) -> Call:
        seconds = _seconds(kwargs.get("timeout"))
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        options = parse_options(_parameters(kwargs))
        messages = parse_messages(kwargs["messages"], allowed_path=self._media_path)
        engine = self._engine_of(kwargs["model"])
        inputs = prepare_chat(
            engine,
            messages,
            continue_final=options.continue_final,
            visual=visual_with(engine.visual, options.visual),
        )
        return Call(
            kwargs["model"],
            engine,
            inputs,
            options.seeded(secrets.randbits(63)),
            deadline,
            cancelled,
        )

    def _engine_of(self, model: str) -> Engine:
        if self._engine is not None:
            return self._engine
        try:
            return self._engines.get(model, **self._load_options)
        except CapacityError as error:  # of the machine, not of a prompt's length
            raise BackendError(str(error)) from error


def register(provider: str = PROVIDER, handler: OVFastLLM | None = None) -> OVFastLLM:
    """Makes LiteLLM send models named "<provider>/…" to a handler.

    Args:
        provider: what stands before the model's name.
        handler: None takes the module's own.

    Returns:
        The handler.
    """
    handler = ovfast_llm if handler is None else handler
    others = [each for each in litellm.custom_provider_map if each["provider"] != provider]
    litellm.custom_provider_map = [*others, {"provider": provider, "custom_handler": handler}]
    litellm.utils.custom_llm_setup()
    return handler


def _parameters(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a call; those that are not supported raise, or go where LiteLLM drops them."""
    params = dict(kwargs.get("optional_params") or {})
    params |= params.pop("extra_body", None) or {}
    refused = unsupported(params)
    drops = litellm.drop_params or (kwargs.get("litellm_params") or {}).get("drop_params")
    if refused and not drops:
        given = ", ".join(f"{name}={params[name]!r:.60}" for name in refused)
        raise litellm.UnsupportedParamsError(
            f"{given}: ovfast does not compute this. Leave it out, or set litellm.drop_params.",
            llm_provider=PROVIDER,
            model=kwargs["model"],
        )
    return {name: value for name, value in params.items() if name not in refused}


def _seconds(timeout: Any) -> float | None:
    """How long a call may take; an httpx timeout counts by its read timeout."""
    seconds = getattr(timeout, "read", timeout)
    return seconds if isinstance(seconds, int | float) else None


def _timeout(model: str) -> Exception:
    error: Exception = litellm.Timeout(
        "the answer was not complete in time; raise timeout, or lower max_tokens.",
        model=model,
        llm_provider=PROVIDER,
    )
    return error


def _steps(call: Call, params: SamplingParams) -> Iterator[StreamChunk]:
    """Chunks of one answer, until the deadline or the end of who waits for it."""
    request = call.engine._request(call.inputs, params, time.perf_counter())
    chunks = call.engine._scheduler.stream(request, call.seconds_left)
    try:
        for chunk in chunks:
            yield chunk
            if chunk.output is None:
                call.seconds_left()
    finally:
        chunks.close()


def _collect(call: Call, params: SamplingParams) -> GenerationOutput:
    *_, last = _steps(call, params)
    assert last.output is not None
    return last.output


def _chunks(call: Call, params: SamplingParams) -> Iterator[dict[str, Any]]:
    with _mapped(call.model):
        for chunk in _steps(call, params):
            output = chunk.output
            yield {
                "text": chunk.text,
                "is_finished": output is not None,
                "finish_reason": "" if output is None else output.finish_reason,
                "usage": None if output is None else _usage([output]),
                "index": 0,
                "tool_use": None,
            }


def _usage(outputs: list[GenerationOutput]) -> dict[str, Any]:
    first, completion = outputs[0].usage, sum(each.usage.completion_tokens for each in outputs)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "prompt_tokens_details": {
            "image_tokens": first.visual_tokens,
            "text_tokens": first.prompt_tokens - first.visual_tokens,
        },
    }


def _response(call: Call, outputs: list[GenerationOutput], response: Any) -> Any:
    """LiteLLM's ModelResponse, filled."""
    response.choices = [
        litellm.Choices(
            index=index,
            finish_reason=output.finish_reason,
            message=litellm.Message(content=output.text, role="assistant"),
            logprobs=_logprobs(call.engine, output),
        )
        for index, output in enumerate(outputs)
    ]
    response.created, response.model = int(time.time()), call.model
    response.usage = litellm.Usage(**_usage(outputs))
    return response


def _logprobs(engine: Engine, output: GenerationOutput) -> Any:
    if output.logprobs is None:
        return None
    types = litellm.types.utils
    content = []
    for entry in output.logprobs:
        top = [types.TopLogprob(**_token(engine, *pair)) for pair in entry.top]
        chosen = _token(engine, entry.token_id, entry.logprob)
        content.append(types.ChatCompletionTokenLogprob(**chosen, top_logprobs=top))
    return types.ChoiceLogprobs(content=content)


def _token(engine: Engine, token_id: int, logprob: float) -> dict[str, Any]:
    text = engine._processor.decode([token_id])
    own = engine._processor._text.token_bytes(token_id)
    return {"token": text, "logprob": logprob, "bytes": list(own)}


@contextmanager
def _mapped(model: str) -> Iterator[None]:
    """Errors of ovfast as LiteLLM's."""
    try:
        yield
    except OVFastError as error:
        kind = litellm.InternalServerError
        if isinstance(error, PromptError | MediaError | OptionError):
            kind = litellm.BadRequestError
        elif isinstance(error, CapacityError):
            kind = litellm.ContextWindowExceededError
        elif isinstance(error, CheckpointError):
            kind = litellm.NotFoundError
        raise kind(str(error), model=model, llm_provider=PROVIDER) from error


ovfast_llm = OVFastLLM()
