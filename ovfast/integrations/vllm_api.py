"""vLLM's offline interface: a script needs no change but its import line.

    from ovfast.integrations.vllm_api import LLM, SamplingParams

in place of `from vllm import LLM, SamplingParams`. Sampled tokens come from other random numbers;
several pictures in a prompt cost what the model was trained with (vLLM cuts each into crops, as
`mm_processor_kwargs={"token_policy": "anyres"}` does here).
"""

import itertools
import json
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypedDict

from ovfast.anyres import VisualOptions
from ovfast.checkpoint import resolve_checkpoint
from ovfast.errors import BackendError, OptionError
from ovfast.integrations.arguments import refuse_given, visual_with
from ovfast.integrations.chats import prepare_chat, prompt_text
from ovfast.integrations.openai_messages import parse_messages
from ovfast.integrations.together import answer_all
from ovfast.integrations.vllm_arguments import load_options, media_limits
from ovfast.integrations.vllm_outputs import CompletionOutput, Logprob, RequestOutput, completion
from ovfast.integrations.vllm_params import RequestOutputKind, SamplingParams, engine_params
from ovfast.integrations.vllm_prompts import as_prompts, check_counts, prepare_prompt
from ovfast.loading import load
from ovfast.model_inputs import ModelInputs

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
]

HINT = "Leave it out."


class TextPrompt(TypedDict, total=False):
    """A prompt of text; special tokens in it are special."""

    prompt: str
    multi_modal_data: dict[str, Any]
    mm_processor_kwargs: dict[str, Any]


class TokensPrompt(TypedDict, total=False):
    """A prompt of ids, with one placeholder a picture or video."""

    prompt_token_ids: list[int]
    multi_modal_data: dict[str, Any]
    mm_processor_kwargs: dict[str, Any]


class LLM:
    """A loaded model with vLLM's calls.

    Args:
        model: as `ovfast.load` takes it.
        tokenizer: the model itself, or None.
        seed: of the seeds of requests that have none; None draws them.
        enforce_eager: without CUDA graphs.
        allowed_local_media_path: below which `chat` may read files.
        limit_mm_per_prompt: most pictures ("image") and videos ("video") of a prompt.
        mm_processor_kwargs: fields of VisualOptions.
        generation_config: "auto" takes default sampling from the checkpoint's file, "vllm" does
            not.
        **kwargs: of HONOURED, NO_EFFECT and ONLY in `vllm_arguments`.

    Raises:
        OVFastError: as `ovfast.load`; OptionError for an argument that has no meaning here.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        seed: int | None = 0,
        enforce_eager: bool = False,
        allowed_local_media_path: str = "",
        limit_mm_per_prompt: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        generation_config: str = "auto",
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None and str(tokenizer) != str(model):
            raise OptionError(f"tokenizer={tokenizer!r}; expected the model's own. Leave it out.")
        if generation_config not in ("auto", "vllm"):
            raise OptionError(
                f"generation_config={generation_config!r}; expected 'auto' or 'vllm'."
            )
        options = load_options(kwargs)
        hub = {name: options.pop(name, None) for name in ("revision", "token", "cache_dir")}
        visual = options.pop("visual", None) or VisualOptions()
        self._visual = visual_with(visual, mm_processor_kwargs)
        self._limits = media_limits(limit_mm_per_prompt)
        self._path = resolve_checkpoint(model, **hub)
        self.engine = load(self._path, cuda_graphs=not enforce_eager, **options)
        self._media_path = allowed_local_media_path or None
        self._seeds = random.Random(seed)
        self._request_ids = itertools.count()
        self._use_file = generation_config == "auto"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Frees weights and cache."""
        self.engine.close()

    def get_tokenizer(self, lora_request: None = None) -> Any:
        """Transformers' tokenizer of the checkpoint.

        Raises:
            BackendError: transformers is not installed.
        """
        refuse_given(HINT, lora_request=lora_request)
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise BackendError(
                "get_tokenizer() needs transformers, as in vLLM. Install it with: pip install"
                " transformers"
            ) from error
        return AutoTokenizer.from_pretrained(self._path)

    def get_default_sampling_params(self) -> SamplingParams:
        """VLLM's defaults, with what the checkpoint's generation_config.json sets."""
        file = self._path / "generation_config.json"
        if not self._use_file or not file.is_file():
            return SamplingParams()
        config = json.loads(file.read_text(encoding="utf-8"))
        names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
        values = {name: config[name] for name in names if config.get(name) is not None}
        if config.get("max_new_tokens") is not None:
            values["max_tokens"] = config["max_new_tokens"]
        return SamplingParams(**values)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Any = True,
        lora_request: None = None,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers complete prompts; a text's special tokens are special.

        Args:
            prompts: a text, a list of ids, a dict with "prompt" or "prompt_token_ids" and
                "multi_modal_data" ({"image": one or a list, "video": one or a list}), or a list of
                these.
            sampling_params: one for all, or one for each; None takes
                `get_default_sampling_params`.
            use_tqdm: accepted without effect: no progress is shown.
            lora_request: None.
            priority: accepted without effect: requests run in their order.
            tokenization_kwargs: None.
            mm_processor_kwargs: fields of VisualOptions for this call.

        Returns:
            One RequestOutput a prompt, in order.

        Raises:
            OVFastError: see `ovfast.errors`; what is wrong with a prompt is raised before any runs.
        """
        del use_tqdm, priority
        refuse_given(HINT, lora_request=lora_request, tokenization_kwargs=tokenization_kwargs)
        visual = visual_with(self._visual, mm_processor_kwargs)
        laid_out = [
            prepare_prompt(self.engine, each, visual, self._limits) for each in as_prompts(prompts)
        ]
        return self._answer(laid_out, sampling_params)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Any = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a chat in OpenAI's message shape, or a list of chats.

        Args:
            messages: see `openai_messages`.
            sampling_params: as in `generate`.
            use_tqdm: as in `generate`.
            lora_request: None.
            chat_template: None: the checkpoint's own is used.
            chat_template_content_format: accepted without effect.
            add_generation_prompt: True, unless the final message is continued.
            continue_final_message: go on with the last message, which is the assistant's.
            tools: None.
            chat_template_kwargs: None.
            tokenization_kwargs: None.
            mm_processor_kwargs: as in `generate`.

        Returns:
            One RequestOutput a chat, in order.

        Raises:
            OVFastError: as `generate`.
        """
        del use_tqdm, chat_template_content_format
        refuse_given(
            HINT,
            lora_request=lora_request,
            chat_template=chat_template,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            tokenization_kwargs=tokenization_kwargs,
        )
        if add_generation_prompt == continue_final_message:
            raise OptionError(
                f"add_generation_prompt={add_generation_prompt} with continue_final_message="
                f"{continue_final_message}; expected one of them. Set the other to False."
            )
        visual = visual_with(self._visual, mm_processor_kwargs)
        first = next(iter(messages), None) if isinstance(messages, list | tuple) else None
        laid_out = []
        for chat in messages if isinstance(first, list | tuple) else [messages]:
            parsed = parse_messages(chat, allowed_path=self._media_path)
            check_counts(_media_counts(parsed), self._limits)
            inputs = prepare_chat(
                self.engine, parsed, continue_final=continue_final_message, visual=visual
            )
            laid_out.append((prompt_text(self.engine, inputs), inputs))
        return self._answer(laid_out, sampling_params)

    def _answer(
        self, laid_out: Sequence[tuple[str | None, ModelInputs]], sampling_params: Any
    ) -> list[RequestOutput]:
        given = self.get_default_sampling_params() if sampling_params is None else sampling_params
        wanted = given if isinstance(given, list | tuple) else [given] * len(laid_out)
        known = all(isinstance(each, SamplingParams) for each in wanted)
        if not known or len(wanted) != len(laid_out):
            raise OptionError(
                f"sampling_params={given!r:.100} for {len(laid_out)} prompts; expected one"
                " SamplingParams of this module for all, or a list with one for each."
            )
        inputs, params = [], []
        for (_, prompt), each in zip(laid_out, wanted, strict=True):
            each.check()
            own = engine_params(
                each,
                vocab_size=self.engine.config.text.vocab_size,
                room=self.engine.max_seq_len - prompt.num_tokens,
                seed=self._seeds.getrandbits(63),
            )
            assert own.seed is not None
            inputs += [prompt] * each.n
            params += [replace(own, seed=(own.seed + i) % 2**64) for i in range(each.n)]
        answers = iter(answer_all(self.engine, inputs, params))
        outputs = []
        for (text, prompt), each in zip(laid_out, wanted, strict=True):
            own_answers = [next(answers) for _ in range(each.n)]
            outputs.append(
                RequestOutput(
                    request_id=str(next(self._request_ids)),
                    prompt=text,
                    prompt_token_ids=prompt.input_ids.tolist(),
                    prompt_logprobs=None,
                    outputs=[
                        completion(self.engine, answer, each, index)
                        for index, answer in enumerate(own_answers)
                    ],
                    finished=True,
                    metrics=own_answers[0].timings,
                    num_cached_tokens=0,
                )
            )
        return outputs


def _media_counts(messages: list[dict[str, Any]]) -> dict[str, int]:
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    return {kind: sum(part["type"] == kind for part in parts) for kind in ("image", "video")}
