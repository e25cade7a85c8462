"""Floors of what the suites time, and what `Estimate` predicts of ovfast, by workload and side.

A side's floor counts its own storage: fewer bits are a lower floor. Where all weights may stay in a
processor's cache, as the demo model's do, reading them is no limit and only arithmetic counts.
Predictions are of ovfast only.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ovfast.bench.calibration import Calibration
from ovfast.bench.sides import SideSpec
from ovfast.bench.targets import Target
from ovfast.bench.workloads import Workload
from ovfast.roofline import (
    Machine,
    Stage,
    decode_stage,
    estimate_request,
    prefill_stage,
    request_stages,
    tower_stage,
)
from ovfast.storage import BFLOAT16_MATMUL, bytes_per_param

__all__ = ["Bound", "Bounds"]

CACHE_BYTES = 64 << 20  # weights of at most so much may stay in a cache
HALF_CACHES = ("llama.cpp",)  # keep keys and values in 16 bits on a CPU


@dataclass(frozen=True, slots=True)
class Bound:
    """Of one figure, in milliseconds, and the work in it; None where nothing is known."""

    floor: float | None = None
    predicted: float | None = None
    flops: float | None = None
    num_bytes: float | None = None

    def fields(self) -> dict[str, Any]:
        """For `record.Row`."""
        return asdict(self)


class Bounds:
    """Bounds of a checkpoint on a measured machine.

    Args:
        target: the checkpoint.
        calibration: of the machine.
    """

    def __init__(self, target: Target, calibration: Calibration) -> None:
        self._target, self._config = target, target.config
        self._calibration = calibration

    def request(self, workload: Workload, spec: SideSpec, new_tokens: int) -> dict[str, Bound]:
        """By metric of a whole request."""
        ids, plans = self._target.layout(workload)
        machine, per_param = self._machine(spec), bytes_per_param(spec.storage)
        text_tokens = len(ids) - sum(plan.num_tokens for plan in plans)
        sizes = per_param, self._kv_bytes(spec)
        estimate = estimate_request(self._config, plans, text_tokens, new_tokens, *sizes, machine)
        later = new_tokens - 1
        stages = request_stages(self._config, plans, text_tokens, per_param)
        bounds = [self._bound(stage, machine) for stage in stages]
        ttft = replace(_sum(bounds), predicted=estimate.ttft_ms)
        step_work = estimate.decode_flops_per_token, estimate.decode_bytes_per_token
        tpot = Bound(estimate.tpot_floor_ms, estimate.tpot_ms, *step_work)
        return {
            "ttft_ms": ttft,
            "tpot_ms": tpot,
            "e2e_ms": Bound(
                _plus(ttft.floor, later, tpot.floor),
                _plus(ttft.predicted, later, tpot.predicted),
                _plus(ttft.flops, later, tpot.flops),
                _plus(ttft.num_bytes, later, tpot.num_bytes),
            ),
            "vision_ms": _sum(bounds[:-1]),
            "prefill_ms": bounds[-1],
        }

    def batch_ms(self, workload: Workload, spec: SideSpec, new_tokens: int, batch: int) -> float:
        """The floor of a batch of requests: prompts one by one, steps together."""
        machine = self._machine(spec)
        first = self.request(workload, spec, new_tokens)["ttft_ms"].floor
        context = len(self._target.layout(workload)[0]) + new_tokens // 2
        sizes = bytes_per_param(spec.storage), self._kv_bytes(spec)
        step = decode_stage(self._config.text, context, *sizes, batch)
        assert first is not None
        return batch * first + (new_tokens - 1) * step.floor_ms(machine)

    def decode(self, spec: SideSpec, context: int) -> Bound:
        """Of a decode step for one row."""
        sizes = bytes_per_param(spec.storage), self._kv_bytes(spec)
        stage = decode_stage(self._config.text, context, *sizes)
        return self._bound(stage, self._machine(spec))

    def tower(self, spec: SideSpec) -> Bound:
        """Of one view."""
        stage = tower_stage(self._config.vision, 1, bytes_per_param(spec.storage))
        return self._bound(stage, self._machine(spec))

    def prefill(self, spec: SideSpec, num_tokens: int) -> Bound:
        """Of the language model over a prompt."""
        stage = prefill_stage(self._config.text, num_tokens, bytes_per_param(spec.storage))
        return self._bound(stage, self._machine(spec))

    def work(self, storage: str, flops: float, num_bytes: float) -> Bound:
        """Of an operation."""
        floor = self._calibration.machine(storage).floor_ms(flops, num_bytes) or None
        return Bound(floor, None, flops, num_bytes)

    def _machine(self, spec: SideSpec) -> Machine:
        # On a CPU peers multiply what is bfloat16 as it is, where the CPU can.
        is_peer = spec.side != "ovfast" and self._target.device.type == "cpu"
        multiplies = is_peer and spec.storage == "bfloat16"
        machine = self._calibration.machine(BFLOAT16_MATMUL if multiplies else spec.storage)
        if self._config.num_parameters * bytes_per_param(spec.storage) <= CACHE_BYTES:
            machine = replace(machine, read_gb_per_s=math.inf)
        return machine if spec.side == "ovfast" else replace(machine, rates=None)

    def _bound(self, stage: Stage, machine: Machine) -> Bound:
        rates = machine.rates
        predicted = None if rates is None else stage.predicted_ms(rates)
        return Bound(stage.floor_ms(machine), predicted, stage.flops, stage.num_bytes)

    def _kv_bytes(self, spec: SideSpec) -> float:
        """Bytes of an element of the cache."""
        is_cpu = self._target.device.type == "cpu"
        if spec.side in HALF_CACHES:
            return 2.0
        if spec.side == "ovfast" and is_cpu:
            return 4.0
        return min(4.0, max(2.0, bytes_per_param(spec.storage)))


def _plus(first: float | None, count: int, each: float | None) -> float | None:
    return None if first is None or each is None else first + count * each


def _sum(bounds: list[Bound]) -> Bound:
    """Of stages that run one after the other."""
    if not bounds:
        return Bound()
    totals: dict[str, float | None] = {}
    for name in Bound.__dataclass_fields__:
        values = [getattr(bound, name) for bound in bounds]
        totals[name] = None if None in values else sum(values)
    return Bound(**totals)
