"""Tokens a second by batch size: whole requests together, each with pictures of its own."""

from collections.abc import Sequence
from typing import Any

from ovfast.bench.bounds import Bounds
from ovfast.bench.record import Row
from ovfast.bench.session import Loaded, Session
from ovfast.bench.sides import Outcome, Rounds
from ovfast.bench.targets import Target
from ovfast.bench.workloads import Workload

__all__ = ["run_throughput"]


def run_throughput(
    session: Session,
    target: Target,
    bounds: Bounds,
    sides: Sequence[Loaded],
    workloads: Sequence[Workload],
    *,
    batches: Sequence[int],
    new_tokens: int,
    rounds: Rounds,
) -> None:
    """Measures each workload at each batch size, all sides in turn.

    Args:
        session: takes the rows.
        target: the checkpoint.
        bounds: floors.
        sides: loaded for the largest batch.
        workloads: one after the other.
        batches: numbers of requests.
        new_tokens: of each answer.
        rounds: how often.
    """
    for workload in workloads:
        for batch in batches:
            job = target.answer_job(workload, new_tokens, batch)
            title = f"{workload.name}, batch of {batch}"
            outcomes = session.take_turns(title, sides, "answer", job, rounds, _brief)
            expected = len(target.layout(workload)[0])
            parameters = target.parameters(new_tokens=new_tokens, batch=batch)
            for side, outcome in outcomes.items():
                head = side.spec.head("throughput", workload.name, parameters)
                floor_ms = bounds.batch_ms(workload, side.spec, new_tokens, batch)
                for row in _rows(head, outcome, floor_ms, expected, batch * new_tokens):
                    session.add(row)


def _rows(
    head: dict[str, Any],
    outcome: Outcome,
    floor_ms: float,
    expected_tokens: int,
    new_tokens: int,
) -> list[Row]:
    """Rows of one side: the rate and the time, or its error."""
    if outcome.unsupported:
        return []
    rate = head | {"metric": "tokens_per_s", "unit": "tokens/s"}
    if outcome.error is not None:
        return [Row(**rate, samples=(), error=outcome.error)]
    counts = {answer["prompt_tokens"] for answers in outcome.answers for answer in answers}
    known: dict[str, Any] = {
        "prompt_tokens": max(counts),
        "comparable": counts == {expected_tokens},
    }
    rates = tuple(map(_tokens_per_s, outcome.answers))
    times = tuple(map(_elapsed_ms, outcome.answers))
    return [
        Row(**rate, **known, samples=rates, floor=1e3 * new_tokens / floor_ms),
        Row(**head, **known, metric="batch_ms", unit="ms", samples=times, floor=floor_ms),
    ]


def _elapsed_ms(answers: Sequence[dict[str, Any]]) -> float:
    return float(max(answer["e2e_ms"] for answer in answers))


def _tokens_per_s(answers: Sequence[dict[str, Any]]) -> float:
    num_tokens = sum(len(answer["token_ids"]) for answer in answers)
    return 1e3 * num_tokens / _elapsed_ms(answers)


def _brief(answers: Sequence[dict[str, Any]]) -> str:
    return f"{_tokens_per_s(answers):.1f} tokens/s"
