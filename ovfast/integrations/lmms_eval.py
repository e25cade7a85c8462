"""lmms-eval's models: a chat class and a simple class over one engine.

    lmms-eval --model ovfast --model_args pretrained=DIR,token_policy=lmms_eval --tasks mme

Each document runs in a thread of its own, `batch_size` at a time: the engine decodes them side by
side whatever their generation arguments, and pictures are prepared while others decode. Importing
this module imports lmms-eval; its registry does so by name (lmms_eval_manifest.py).
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from ovfast.errors import OptionError, OVFastError
from ovfast.integrations.evaluation import sort_options, within_context
from ovfast.integrations.lmms_eval_requests import (
    WITHOUT_EFFECT,
    Prompt,
    sampling_params,
    simple_prompt,
)
from ovfast.loading import load
from ovfast.model_inputs import ModelInputs
from ovfast.outputs import GenerationOutput
from ovfast.sampling import SamplingParams

__all__ = ["OVFastChat", "OVFastSimple"]

T = TypeVar("T")
# The next prompt or None, the texts so far or None, and what the task wants back.
FollowUp = tuple[Prompt | None, Sequence[str] | None, Any]

logger = logging.getLogger("ovfast")


class Answer(NamedTuple):
    """What a request gets, and the engine's outputs behind it."""

    value: Any
    outputs: list[GenerationOutput]


class Loss(tuple[float, bool], GenerationResult):  # noqa: SLOT001  (the base has a __dict__)
    """(loss, whether every token is the most likely one), as lmms-eval's tasks unpack it.

    The evaluator of 0.7 makes a str of every result but a GenerationResult, whose text it hands to
    the task: a plain pair reaches no task. Its response cache cannot give a pair back either, so
    `--use_cache` and likelihoods do not go together.
    """

    def __init__(self, pair: tuple[float, bool]) -> None:
        self.text, self.token_counts = pair, None


class _OVFast(lmms):
    """What both kinds of model share: the engine, batches, metrics.

    Args:
        pretrained: a directory, a Hub id, or "demo".
        batch_size: documents at a time.
        max_batch_size: refused; lmms-eval passes it for `--batch_size auto`.
        device: as in `ovfast.load`; None takes this process's, or "auto".
        system_prompt: a system turn's text, or a file that holds it.
        max_new_tokens: of tasks that name no number.
        **kwargs: further arguments of `ovfast.load` and fields of `ovfast.VisualOptions`;
            `max_frames_num` is another name of `num_frames`.

    Raises:
        OptionError: an unknown name or a wrong value; else as `ovfast.load`.
    """

    _gen_kwargs_at: ClassVar[int]  # where a request's arguments have the generation arguments

    def __init__(
        self,
        pretrained: str = "demo",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.batch_size = _batch_size(batch_size, max_batch_size)
        options = sort_options(kwargs)
        self._visual, self._max_new_tokens = options.visual, max_new_tokens
        self._system = self._resolve_system_prompt(system_prompt)
        self._warned: set[str] = set()
        self.accelerator = Accelerator()
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        if device is None:
            device = str(self.accelerator.device) if self._world_size > 1 else "auto"
        self._engine = load(
            pretrained, device=device, max_batch_size=self.batch_size, **options.load
        )
        self.device = self._engine.device

    @property
    def eot_token_id(self) -> int:
        return self._engine.config.stop_token_ids[0]

    @property
    def chat_template(self) -> str:
        """Asked for by `--apply_chat_template` alone, which would apply it a second time."""
        raise OptionError(
            "--apply_chat_template with ovfast, which applies the checkpoint's chat template"
            " itself. Leave the flag out."
        )

    def clean(self) -> None:
        """Frees weights and cache; called by lmms-eval after the last request."""
        self._engine.close()
        super().clean()

    def _document(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _generate(
        self,
        kind: str,
        requests: Sequence[Instance],
        work: Callable[[Instance, SamplingParams], Answer],
    ) -> list[Any]:
        """Answers requests, reports them to the cache and logs the metrics."""
        params = [self._params(request) for request in requests]
        started = time.perf_counter()
        answers: list[Answer] = []
        for request, answer in zip(
            requests, self._side_by_side(work, requests, params), strict=True
        ):
            answers.append(answer)
            context, gen_kwargs = request.args[0], request.args[self._gen_kwargs_at]
            value = getattr(answer.value, "text", answer.value)
            self.cache_hook.add_partial(kind, (context, gen_kwargs), value)
        self._log_metrics(answers, time.perf_counter() - started)
        return [answer.value for answer in answers]

    def _side_by_side(
        self, work: Callable[..., T], requests: Sequence[Instance], *columns: Sequence[Any]
    ) -> Iterator[T]:
        """Results of `work` in the order of the requests; errors name their document."""

        def named(request: Instance, *rest: Any) -> T:
            try:
                return work(request, *rest)
            except OVFastError as error:
                error.add_note(f"document {request.doc_id} of task {request.task_name}")
                raise

        with ThreadPoolExecutor(self.batch_size) as pool:
            results = pool.map(named, requests, *columns)
            yield from tqdm(
                results, total=len(requests), disable=self.rank != 0, desc="Model Responding"
            )

    def _params(self, request: Instance) -> SamplingParams:
        gen_kwargs = request.args[self._gen_kwargs_at]
        for name in sorted(WITHOUT_EFFECT & gen_kwargs.keys()):
            self._warn_once(
                f"{name}={gen_kwargs[name]!r} of {request.task_name} has no effect, as in"
                " lmms-eval's llava_onevision; token_policy and max_views choose the views"
            )
        params = sampling_params(gen_kwargs, self._max_new_tokens)
        if params.is_greedy or params.seed is not None:
            return params
        # Of the generator that lmms-eval seeds, one for each repeat.
        return replace(params, seed=int(torch.randint(2**62, ())))

    def _one_round(self, prompt: Prompt, params: SamplingParams) -> Answer:
        output = self._ask(prompt, params)
        counts = TokenCounts(output.usage.prompt_tokens, output.usage.completion_tokens)
        return Answer(GenerationResult(output.text, counts), [output])

    def _many_rounds(
        self, prompt: Prompt | None, params: SamplingParams, follow: Callable[..., FollowUp]
    ) -> Answer:
        """Rounds until the task gives no further prompt; it may rewrite the texts so far."""
        texts: list[str] = []
        outputs: list[GenerationOutput] = []
        info = None
        while prompt is not None:
            outputs.append(self._ask(prompt, params))
            texts.append(outputs[-1].text)
            prompt, previous, info = follow(
                previous_output=list(texts), round_idx=len(outputs), previous_round_info=info
            )
            texts = texts if previous is None else list(previous)
        return Answer(texts, outputs)

    def _ask(self, prompt: Prompt, params: SamplingParams) -> GenerationOutput:
        inputs = self._prepare(prompt)
        params = within_context(params, inputs.num_tokens, self._engine.max_seq_len)
        output: GenerationOutput = self._engine.generate(inputs, sampling=params)
        return output

    def _prepare(self, prompt: Prompt) -> ModelInputs:
        text, images, videos = prompt
        return self._engine.prepare(
            text, images=images, videos=videos, visual=self._visual, system=self._system
        )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s", message)

    def _log_metrics(self, answers: Sequence[Answer], elapsed_s: float) -> None:
        """Seconds, as lmms-eval's other back ends; latencies are means over answers."""
        outputs = [output for answer in answers for output in answer.outputs]
        timings = [output.timings for output in outputs]
        num_tokens = sum(output.usage.completion_tokens for output in outputs)
        tpots = [timing.tpot_ms for timing in timings if timing.tpot_ms]
        log_metrics(
            total_elapsed_time=elapsed_s,
            total_gen_tokens=num_tokens,
            avg_speed=num_tokens / elapsed_s,
            additional_metrics={
                "ttft": _mean_s([timing.ttft_ms for timing in timings]),
                "tpot": _mean_s(tpots),
                "rank": self.rank,
            },
        )


class OVFastChat(_OVFast):
    """Generation from messages; what `--model ovfast` takes."""

    is_simple = False
    _gen_kwargs_at = 2

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        return self._generate("generate_until", requests, self._respond)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        return self._generate("generate_until_multi_round", requests, self._converse)

    def loglikelihood(self, requests: list[Instance]) -> list[Loss]:
        raise OptionError(
            "log-likelihoods of a chat model; lmms-eval's chat tasks only generate. Add"
            " --force_simple."
        )

    def _respond(self, request: Instance, params: SamplingParams) -> Answer:
        _, doc_to_messages, _, *place = request.args
        return self._one_round(_chat(doc_to_messages(self._document(*place))), params)

    def _converse(self, request: Instance, params: SamplingParams) -> Answer:
        _, doc_to_messages, _, *place = request.args
        document = self._document(*place)

        def follow(**state: Any) -> FollowUp:
            turn = doc_to_messages(document, **state)
            if not (isinstance(turn, tuple) and len(turn) == 4):
                return None, None, None  # a task without further rounds
            messages, over, previous, info = turn
            return None if over else _chat(messages), previous, info

        return self._many_rounds(_chat(doc_to_messages(document)), params, follow)


class OVFastSimple(_OVFast):
    """Generation and log-likelihoods from a context and media; `--force_simple` takes it."""

    is_simple = True
    _gen_kwargs_at = 1

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        return self._generate("generate_until", requests, self._respond)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        return self._generate("generate_until_multi_round", requests, self._converse)

    def loglikelihood(self, requests: list[Instance]) -> list[Loss]:
        """The mean negative log-likelihood of each continuation and the end of its turn.

        lmms-eval takes the smallest as the best. Continuations of one document and context share
        one prefill.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            _check_has_document(request)
            context, _, _, *document = request.args
            groups.setdefault((context, *document), []).append(index)
        members = [[requests[index] for index in indices] for indices in groups.values()]
        results: dict[int, Loss] = {}
        scored = self._side_by_side(self._score, [group[0] for group in members], members)
        for indices, scores in zip(groups.values(), scored, strict=True):
            for index, score in zip(indices, scores, strict=True):
                results[index] = score
                self.cache_hook.add_partial("loglikelihood", requests[index].args[:2], score)
        return [results[index] for index in range(len(requests))]

    def _score(self, first: Instance, group: Sequence[Instance]) -> list[Loss]:
        context, _, doc_to_visual, *place = first.args
        document = self._document(*place)
        targets = [request.args[1] for request in group]
        texts = [target if isinstance(target, str) else target(document) for target in targets]
        inputs = self._prepare(simple_prompt(context, doc_to_visual(document), first.metadata))
        scores = self._engine.score(inputs, texts, include_terminator=True)
        return [Loss((-score.mean_logprob, score.is_greedy)) for score in scores]

    def _respond(self, request: Instance, params: SamplingParams) -> Answer:
        context, _, doc_to_visual, *place = request.args
        visuals = doc_to_visual(self._document(*place))
        return self._one_round(simple_prompt(context, visuals, request.metadata), params)

    def _converse(self, request: Instance, params: SamplingParams) -> Answer:
        context, _, doc_to_visual, doc_to_text, *place = request.args
        document = self._document(*place)

        def follow(**state: Any) -> FollowUp:
            visuals, text, over, previous, info = doc_to_text(document, **state)
            prompt = None if over else simple_prompt(text, visuals, request.metadata)
            return prompt, previous, info

        first = simple_prompt(context, doc_to_visual(document), request.metadata)
        return self._many_rounds(first, params, follow)


def _batch_size(batch_size: int | str, max_batch_size: int | None) -> int:
    try:
        number = int(batch_size)
    except ValueError:
        number = 0
    if number < 1 or max_batch_size is not None:
        raise OptionError(
            f"batch_size={batch_size!r}, max_batch_size={max_batch_size!r}; ovfast does not search"
            " for a batch size. Pass --batch_size N."
        )
    return number


def _check_has_document(request: Instance) -> None:
    if len(request.args) != 6:
        raise OptionError(
            f"a log-likelihood of {len(request.args)} arguments; expected 6, with a document."
            " lmms-eval's acc_mutual_info asks for likelihoods without one and reads their signs"
            " the other way round: take it out of the task's metric_list."
        )


def _chat(messages: Any) -> Prompt:
    """lmms-eval's messages as a chat; what ovfast does not know in them is refused there."""
    return Prompt(ChatMessages(messages=messages).to_hf_messages())


def _mean_s(milliseconds: Sequence[float]) -> float:
    return 1e-3 * sum(milliseconds) / max(1, len(milliseconds))
