"""vLLM's output classes, filled from what an engine hands back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ovfast.engine import Engine
from ovfast.integrations.vllm_params import SamplingParams
from ovfast.outputs import GenerationOutput
from ovfast.sampling import TokenLogprob

__all__ = ["CompletionOutput", "Logprob", "RequestOutput", "completion"]


@dataclass
class Logprob:
    """Log-probability of a token at its position.

    Attributes:
        logprob: natural logarithm, before any masking.
        rank: 1 for the most likely token; None for a chosen token beyond the reported ones.
        decoded_token: its text.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One answer.

    Attributes:
        index: among the answers to one prompt.
        text: the answer without its stop.
        token_ids: the generated ids, the stop token included.
        cumulative_logprob: sum over the chosen tokens; None without logprobs.
        logprobs: for each token the chosen and the most likely ones; None if not asked for.
        routed_experts: None.
        finish_reason: "stop" or "length".
        stop_reason: the stop string or the id of stop_token_ids that ended it; None at the end of a
            turn.
        lora_request: None.
        kv_transfer_params: None.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    routed_experts: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None
    kv_transfer_params: dict[str, Any] | None = None

    def finished(self) -> bool:
        """Whether the answer is complete; here always."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """The answers to one prompt.

    Attributes:
        request_id: a running number.
        prompt: the prompt's text, with one placeholder a picture; None for a prompt of ids.
        prompt_token_ids: as the model read them, placeholders repeated once a visual token.
        prompt_logprobs: None.
        outputs: one a wanted answer.
        finished: True.
        metrics: the Timings of the first answer.
        lora_request, encoder_prompt, encoder_prompt_token_ids: None.
        num_cached_tokens: 0.
        kv_transfer_params: None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: Any = None
    lora_request: Any = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None
    kv_transfer_params: dict[str, Any] | None = None


def completion(
    engine: Engine, output: GenerationOutput, params: SamplingParams, index: int
) -> CompletionOutput:
    """An answer in vLLM's form."""
    logprobs = None
    if output.logprobs is not None:
        logprobs = [_position(engine, entry) for entry in output.logprobs]
    reason = _stop_reason(engine, output, params) if output.finish_reason == "stop" else None
    text = output.text
    if params.include_stop_str_in_output and output.finish_reason == "stop":
        last = engine._processor.decode(output.token_ids[-1:])
        text += reason if isinstance(reason, str) else last
    return CompletionOutput(
        index=index,
        text=text if params.detokenize else "",
        token_ids=list(output.token_ids),
        cumulative_logprob=(
            None if output.logprobs is None else sum(each.logprob for each in output.logprobs)
        ),
        logprobs=logprobs,
        finish_reason=output.finish_reason,
        stop_reason=reason,
    )


def _position(engine: Engine, entry: TokenLogprob) -> dict[int, Logprob]:
    """The chosen token first, then the most likely ones, as vLLM orders them."""
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(entry.top, 1)}
    values = {entry.token_id: entry.logprob} | dict(entry.top)
    return {
        token_id: Logprob(logprob, ranks.get(token_id), engine._processor.decode([token_id]))
        for token_id, logprob in values.items()
    }


def _stop_reason(
    engine: Engine, output: GenerationOutput, params: SamplingParams
) -> int | str | None:
    last = output.token_ids[-1]
    ends_turn = () if params.ignore_eos else engine.config.stop_token_ids
    if last in ends_turn or last in (params.stop_token_ids or ()):
        return None if last in ends_turn[:1] else last
    rest = engine._processor.decode(output.token_ids)[len(output.text) :]
    found = [stop for stop in params.stop or () if rest.startswith(stop)]
    return max(found, key=len, default=None)
