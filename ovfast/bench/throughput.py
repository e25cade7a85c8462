"""Tokens a second by batch size: whole requests together, each with pictures of its own."""

from collections.abc import Sequence
from typing import Any

from ovfast.bench.limits import Limits
from ovfast.bench.record import Row
from ovfast.bench.session import Loaded, Rounds, Session
from ovfast.bench.sides import Outcome, SideSpec
from ovfast.bench.targets import Target
from ovfast.bench.workloads import Workload

__all__ = ["run_throughput"]


def run_throughput(
    session: Session,
    target: Target,
    limits: Limits,
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
        limits: floors.
        sides: loaded for the largest batch.
        workloads: one after the other.
        batches: numbers of requests.
        new_tokens: of each answer.
        rounds: how often.
    """
    for workload in workloads:
        for batch in batches:

            def arguments(
                index: int, workload: Workload = workload, batch: int = batch
            ) -> dict[str, Any]:
                first = (index + rounds.warmup) * batch
                media = [workload.media(first + i) for i in range(batch)]
                requests = [target.request(workload, one) for one in media]
                return {"requests": requests, "max_new_tokens": new_tokens}

            title = f"{workload.name}, batch of {batch}"
            outcomes = session.take_turns(title, sides, "answer", arguments, rounds, _brief)
            expected = len(target.layout(workload)[0])
            parameters = {
                "model": target.name,
                "threads": target.threads,
                "new_tokens": new_tokens,
                "batch": batch,
            }
            for side, outcome in outcomes.items():
                for row in _rows(workload, side.spec, outcome, limits, expected, parameters):
                    session.add(row)


def _rows(
    workload: Workload,
    spec: SideSpec,
    outcome: Outcome,
    limits: Limits,
    expected_tokens: int,
    parameters: dict[str, int | str],
) -> list[Row]:
    if outcome.unsupported:
        return []
    given: dict[str, Any] = {
        "suite": "throughput",
        "workload": workload.name,
        "side": spec.side,
        "storage": spec.storage,
        "parameters": parameters | {"device": spec.device},
    }
    rate = {"metric": "tokens_per_s", "unit": "tokens/s"}
    if outcome.error is not None:
        return [Row(**given, **rate, samples=(), error=outcome.error)]
    counts = {answer["prompt_tokens"] for answers in outcome.answers for answer in answers}
    given |= {"prompt_tokens": max(counts), "comparable": counts == {expected_tokens}}
    batch, count = int(parameters["batch"]), int(parameters["new_tokens"])
    floor_ms = limits.batch_ms(workload, spec, count, batch)
    num_tokens = batch * count
    return [
        Row(
            **given,
            **rate,
            samples=tuple(map(_tokens_per_s, outcome.answers)),
            floor=None if floor_ms is None else 1e3 * num_tokens / floor_ms,
        ),
        Row(
            **given,
            metric="batch_ms",
            unit="ms",
            samples=tuple(map(_elapsed_ms, outcome.answers)),
            floor=floor_ms,
        ),
    ]


def _elapsed_ms(answers: Sequence[dict[str, Any]]) -> float:
    return float(max(answer["e2e_ms"] for answer in answers))


def _tokens_per_s(answers: Sequence[dict[str, Any]]) -> float:
    num_tokens = sum(len(answer["token_ids"]) for answer in answers)
    return 1e3 * num_tokens / _elapsed_ms(answers)


def _brief(answers: Sequence[dict[str, Any]]) -> str:
    return f"{_tokens_per_s(answers):.1f} tokens/s"
