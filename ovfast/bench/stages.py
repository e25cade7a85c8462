"""Stages by themselves: a decode step at a context, a view of the tower, a prefill, preprocessing.

The first three do not depend on pictures and text; they run on random numbers of the right shapes.
A side that has no such stage to show (llama.cpp has no tower here) is left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovfast.bench.bounds import Bound, Bounds
from ovfast.bench.record import Row
from ovfast.bench.session import Loaded, Session
from ovfast.bench.sides import Parameters, Rounds, SideSpec
from ovfast.bench.targets import Target
from ovfast.bench.workloads import encoded_picture

__all__ = ["CONTEXTS", "STAGES", "run_stages"]

STAGES = ("preprocess", "tower", "prefill", "decode")
CONTEXTS = (3000, 64)  # the longest first: a peer that has filled it can cut it
PROMPT = 2962  # tokens of a 640×480 picture and a short question
STEPS = 16  # of a decode job; its sample is their median
PICTURES_HW = ((480, 640), (768, 1024))


@dataclass(frozen=True, slots=True)
class _Job:
    """One stage at one size.

    Attributes:
        workload: name of its rows.
        name: of `protocol`.
        metric: of its rows.
        arguments: of a round.
        bound: of a side.
        parameters: of its rows.
    """

    workload: str
    name: str
    metric: str
    arguments: Callable[[int], Mapping[str, Any]]
    bound: Callable[[SideSpec], Bound]
    parameters: Parameters


def run_stages(
    session: Session,
    target: Target,
    bounds: Bounds,
    sides: Sequence[Loaded],
    *,
    stages: Sequence[str],
    prompt_tokens: int = PROMPT,
    contexts: Sequence[int] = CONTEXTS,
    rounds: Rounds,
) -> None:
    """Measures stages, all sides in turn.

    Args:
        session: takes the rows.
        target: the checkpoint.
        bounds: floors and predictions.
        sides: to measure.
        stages: some of STAGES.
        prompt_tokens: of a prefill.
        contexts: of decode steps.
        rounds: how often.
    """
    for job in _jobs(bounds, stages, prompt_tokens, contexts):
        outcomes = session.take_turns(
            job.workload, sides, job.name, job.arguments, rounds, lambda ms: f"{ms:.2f} ms"
        )
        for side, outcome in outcomes.items():
            if outcome.unsupported:
                continue
            bound = job.bound(side.spec)
            parameters = target.parameters(**job.parameters)
            session.add(
                Row(
                    **side.spec.head("latency", job.workload, parameters),
                    metric=job.metric,
                    unit="ms",
                    samples=tuple(map(float, outcome.answers)),
                    **bound.fields(),
                    error=outcome.error,
                )
            )


def _jobs(
    bounds: Bounds, stages: Sequence[str], prompt_tokens: int, contexts: Sequence[int]
) -> list[_Job]:
    jobs = {"decode": [_decode(bounds, context) for context in contexts]}
    jobs["tower"] = [_tower(bounds)]
    jobs["prefill"] = [_prefill(bounds, prompt_tokens)]
    jobs["preprocess"] = [
        _preprocess(size_hw, is_new_size=new) for size_hw in PICTURES_HW for new in (False, True)
    ]
    return [job for stage in stages for job in jobs[stage]]


def _decode(bounds: Bounds, context: int) -> _Job:
    return _Job(
        f"decode at {context}",
        "decode",
        "step_ms",
        lambda index: {"context": context, "steps": STEPS},
        lambda spec: bounds.decode(spec, context),
        {"context": context, "rows": 1},
    )


def _tower(bounds: Bounds) -> _Job:
    return _Job(
        "tower, a view",
        "tower",
        "view_ms",
        lambda index: {"num_views": 1},
        bounds.tower,
        {"views": 1},
    )


def _prefill(bounds: Bounds, num_tokens: int) -> _Job:
    return _Job(
        f"prefill of {num_tokens}",
        "prefill",
        "prefill_ms",
        lambda index: {"num_tokens": num_tokens},
        lambda spec: bounds.prefill(spec, num_tokens),
        {"tokens": num_tokens},
    )


def _preprocess(size_hw: tuple[int, int], *, is_new_size: bool) -> _Job:
    """`is_new_size`: as if no picture of that size had come before."""
    size = f"{size_hw[1]}x{size_hw[0]}"

    def arguments(index: int) -> dict[str, Any]:
        picture = encoded_picture(size_hw, index + 1000)
        return {"picture": picture, "is_new_size": is_new_size}

    return _Job(
        f"preprocess {size}" + ", new size" * is_new_size,
        "preprocess",
        "preprocess_ms",
        arguments,
        lambda spec: Bound(None, None),
        {"size": size, "new_size": int(is_new_size)},
    )
