"""Latency of whole requests: first token, time per token, end to end, and the stages inside.

TTFT is measured from the call with encoded pictures in memory to the first token on the host; TPOT
is (E2E − TTFT) / (new tokens − 1). Every round has new pictures, the same for all sides.
"""

from collections.abc import Sequence
from typing import Any

from ovfast.bench.bounds import Bound, Bounds
from ovfast.bench.memory import add_memory_rows
from ovfast.bench.record import Row
from ovfast.bench.session import Loaded, Session
from ovfast.bench.sides import Outcome, Parameters, Rounds, Side
from ovfast.bench.targets import Target
from ovfast.bench.workloads import Workload

__all__ = ["DEFINITIONS", "run_latency"]

DEFINITIONS = (
    "TTFT: from the call with encoded pictures in memory to the first token on the host.",
    "TPOT: (E2E - TTFT) / (new tokens - 1).",
)


def run_latency(
    session: Session,
    target: Target,
    bounds: Bounds,
    sides: Sequence[Loaded],
    workloads: Sequence[Workload],
    *,
    new_tokens: int,
    rounds: Rounds,
) -> None:
    """Measures requests of each workload, all sides in turn.

    Args:
        session: takes the rows.
        target: the checkpoint.
        bounds: floors and predictions.
        sides: ovfast's first.
        workloads: one after the other.
        new_tokens: of each answer.
        rounds: how often.
    """
    for workload in workloads:
        job = target.answer_job(workload, new_tokens)
        outcomes = session.take_turns(
            workload.name, sides, "answer", job, rounds, lambda a: _brief(a[0])
        )
        expected = len(target.layout(workload)[0])
        parameters = target.parameters(new_tokens=new_tokens, batch=1)
        for side, outcome in outcomes.items():
            bound = bounds.request(workload, side.spec, new_tokens)
            head = side.spec.head("latency", workload.name, parameters) | {"unit": "ms"}
            for row in latency_rows(head, outcome, bound, expected, new_tokens):
                session.add(row)
        for row in _agreement_rows(workload, outcomes, parameters):
            session.add(row)
        add_memory_rows(session, workload, sides, outcomes, parameters)


def latency_rows(
    head: dict[str, Any],
    outcome: Outcome,
    bounds: dict[str, Bound],
    expected_tokens: int,
    new_tokens: int,
) -> list[Row]:
    """Rows of one side: one a metric, or one with its error.

    Args:
        head: what they have in common.
        outcome: what the side answered.
        bounds: by metric.
        expected_tokens: of our prompt; a side with another count is not comparable.
        new_tokens: of each answer.
    """
    if outcome.error is not None:
        return [Row(**head, metric="ttft_ms", samples=(), error=outcome.error)]
    if outcome.unsupported:
        return []
    answers = [answer[0] for answer in outcome.answers]
    unknown = Bound()
    return [
        Row(
            **head,
            metric=metric,
            samples=samples,
            prompt_tokens=answers[0]["prompt_tokens"],
            comparable=all(answer["prompt_tokens"] == expected_tokens for answer in answers),
            **bounds.get(metric, unknown).fields(),
        )
        for metric, samples in _metrics(answers, new_tokens).items()
    ]


def _metrics(answers: Sequence[dict[str, Any]], count: int) -> dict[str, tuple[float, ...]]:
    """Samples by metric."""
    metrics = {name: tuple(answer[name] for answer in answers) for name in ("ttft_ms", "e2e_ms")}
    if count > 1:
        metrics["tpot_ms"] = tuple(
            (answer["e2e_ms"] - answer["ttft_ms"]) / (count - 1) for answer in answers
        )
    for stage in answers[0]["stages"]:
        samples = tuple(answer["stages"][stage] for answer in answers)
        if any(samples):  # text alone has no vision
            metrics[stage] = samples
    return metrics


def _agreement_rows(
    workload: Workload, outcomes: dict[Side, Outcome], parameters: Parameters
) -> list[Row]:
    """How far each ovfast side's tokens are those of transformers, in the same rounds."""
    theirs = next((o for side, o in outcomes.items() if side.spec.side == "transformers"), None)
    rows = []
    for side, outcome in outcomes.items():
        if side.spec.side != "ovfast" or theirs is None or not outcome.answers:
            continue
        if len(theirs.answers) != len(outcome.answers):
            continue
        samples = tuple(
            _agreement(ours[0]["token_ids"], other[0]["token_ids"])
            for ours, other in zip(outcome.answers, theirs.answers, strict=True)
        )
        head = side.spec.head("latency", workload.name, parameters)
        rows.append(Row(**head, metric="tokens_as_transformers", unit="%", samples=samples))
    return rows


def _agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Per cent of tokens before the first that differs."""
    same = next(
        (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
        min(len(ours), len(theirs)),
    )
    return 100.0 * same / max(len(ours), len(theirs))


def _brief(answer: dict[str, Any]) -> str:
    return f"first token {answer['ttft_ms']:.0f} ms, all {answer['e2e_ms']:.0f} ms"
