"""What the engine hands back: outputs of generation, chunks of a stream, scores. Plain data, no
logic.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ovfast.anyres import VisualOptions
from ovfast.sampling import TokenLogprob

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request.

    Attributes:
        prompt_tokens: all positions before the first generated token, visual ones included.
        visual_tokens: positions filled from pictures and videos, newlines included.
        completion_tokens: generated tokens, the stop token included.
        views: tower inputs of this request; none where a handle holds the media.
        cached_tokens: positions of the prompt whose keys and values a handle held.
    """

    prompt_tokens: int
    visual_tokens: int
    completion_tokens: int
    views: int
    cached_tokens: int = 0


@dataclass(slots=True)
class Timings:
    """Wall-clock times of one request in milliseconds.

    Attributes:
        media_ms: reading and decoding pictures and videos.
        preprocess_ms: resizing, padding, cropping and tokenising.
        vision_ms: tower, projector and packing.
        prefill_ms: the prompt through the language model, up to its logits.
        decode_ms: from the first token to the last.
        ttft_ms: from the call to the first token on the host, waiting for a slot included.
        tpot_ms: decode_ms / (completion_tokens - 1); 0 for a single token.
        total_ms: from the call to the last token.
    """

    media_ms: float = 0.0
    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """One answer.

    Attributes:
        text: the answer without its stop.
        token_ids: the generated ids, the stop token included.
        finish_reason: "stop" (a stop token or string) or "length".
        usage: token counts.
        logprobs: one entry a token if asked for, else None.
        timings: milliseconds by stage.
        seed: of the random numbers; the one drawn if none was given.
        visual: the options the pictures were laid out with.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None
    timings: Timings
    seed: int
    visual: VisualOptions

    def as_dict(self) -> dict[str, Any]:
        """The output as JSON-ready dicts, lists, strings and numbers."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One generated token of a stream.

    Attributes:
        text: newly finished text; may be empty while a character or a stop string is incomplete.
        token_ids: the ids behind this chunk.
        logprobs: one entry a token if asked for, else None.
        output: the whole output, on the last chunk only.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    output: GenerationOutput | None = None


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """The likelihood of one continuation.

    Attributes:
        logprob: sum over the continuation's tokens, natural logarithm.
        mean_logprob: logprob / number of tokens.
        token_ids: the continuation's tokens as they follow the prompt, the terminator included if
            asked for.
        token_logprobs: one a token.
        is_greedy: whether every token is the most likely one.
    """

    logprob: float
    mean_logprob: float
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...] = field(repr=False)
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """The likeliest of several answers.

    Attributes:
        choice: the option with the highest probability, the first of equals.
        index: its place among the options.
        probabilities: one an option, adding up to 1.
        label_mass: how likely the model is to begin with any of the options, before normalising;
            an option that begins with another one counts as a part of that one.
        scores: the likelihood of each option.
    """

    choice: str
    index: int
    probabilities: tuple[float, ...]
    label_mass: float
    scores: tuple[ScoreOutput, ...] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The output as JSON-ready dicts, lists, strings and numbers."""
        return asdict(self)
