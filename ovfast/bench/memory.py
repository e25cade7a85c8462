"""Resident memory of a request: the peak, and what of it is neither weights nor `import torch`."""

from collections.abc import Mapping, Sequence

from ovfast.bench.record import Row
from ovfast.bench.session import Loaded, Session
from ovfast.bench.sides import Outcome, Parameters, Rounds, Side, SideSpec
from ovfast.bench.targets import Target
from ovfast.bench.workloads import Workload

__all__ = ["add_memory_rows", "run_memory"]


def run_memory(
    session: Session,
    target: Target,
    specs: Sequence[SideSpec],
    workloads: Sequence[Workload],
    *,
    new_tokens: int,
    rounds: Rounds,
) -> None:
    """Measures each side alone: a process that has answered nothing but this workload.

    Args:
        session: takes the rows.
        target: the checkpoint.
        specs: one after the other, so that only one model is in memory.
        workloads: each in a new process.
        new_tokens: of each answer.
        rounds: how often.
    """
    parameters = target.parameters(new_tokens=new_tokens, batch=1)
    for workload in workloads:
        for spec in specs:
            with session.open([spec]) as sides:
                outcomes = session.take_turns(
                    f"memory, {workload.name}",
                    sides,
                    "answer",
                    target.answer_job(workload, new_tokens),
                    rounds,
                    lambda answers: f"{answers[0]['e2e_ms']:.0f} ms",
                )
                add_memory_rows(session, workload, sides, outcomes, parameters)


def add_memory_rows(
    session: Session,
    workload: Workload,
    sides: Sequence[Loaded],
    outcomes: Mapping[Side, Outcome],
    parameters: Parameters,
) -> None:
    """Adds the peaks of a workload's jobs.

    Args:
        session: takes the rows.
        workload: what was asked.
        sides: with what they said of their weights.
        outcomes: of their jobs.
        parameters: of every row, beside the device.
    """
    for loaded in sides:
        spec, outcome = loaded.side.spec, outcomes[loaded.side]
        if outcome.unsupported or (outcome.error is None and not any(outcome.peaks)):
            continue  # no /proc here
        given = spec.head("memory", workload.name, parameters) | {"unit": "bytes"}
        if outcome.error is not None:
            session.add(Row(**given, metric="peak_bytes", samples=(), error=outcome.error))
            continue
        session.add(Row(**given, metric="peak_bytes", samples=tuple(map(float, outcome.peaks))))
        base = loaded.answer["weight_bytes"] + loaded.answer["torch_bytes"]
        if loaded.answer["weight_bytes"] and loaded.answer["torch_bytes"]:
            above = tuple(float(max(0, peak - base)) for peak in outcome.peaks)
            session.add(Row(**given, metric="above_weights_and_torch_bytes", samples=above))
