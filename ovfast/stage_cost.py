"""What a stage costs on a machine: its work, the machine's limits, and what ovfast attains of them.

Plain numbers: `roofline` counts the work, `ovfast.bench` measures the machine.
"""

import math
from dataclasses import dataclass

__all__ = ["Machine", "Rates", "Stage", "StageRates"]


@dataclass(frozen=True, slots=True)
class StageRates:
    """What ovfast attains in one stage.

    Attributes:
        gflops: of products of many rows with weights.
        attention_gflops: of attention.
        layer_ms: what a layer costs whatever its size, once for each group of views.
    """

    gflops: float
    attention_gflops: float
    layer_ms: float


@dataclass(frozen=True, slots=True)
class Rates:
    """What ovfast attains on a machine with weights in one storage; medians, not bests.

    Attributes:
        tower, prefill: of the two stages of many rows.
        weights_gb_per_s: of the weights that a decode step reads.
        cache_gb_per_s: of the keys and values that it reads.
        step_layer_ms: what a layer of a decode step costs whatever its size.
        request_ms: what a request costs besides.
        picture_ms_per_megapixel: decoding a JPEG and laying it out.
        views_a_step: views that the tower encodes together.
    """

    tower: StageRates
    prefill: StageRates
    weights_gb_per_s: float
    cache_gb_per_s: float
    step_layer_ms: float
    request_ms: float
    picture_ms_per_megapixel: float
    views_a_step: int = 1


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine at the precision that is used; measured by `ovfast.bench.calibration`.

    Args:
        read_gb_per_s: memory read rate in 10⁹ bytes per second.
        gflops: matrix product rate in 10⁹ FLOPs per second.
        attention_gflops: that of attention, where its precision is another; None: the same.
        rates: what ovfast attains of it; None gives floors without predictions.
    """

    read_gb_per_s: float
    gflops: float
    attention_gflops: float | None = None
    rates: Rates | None = None

    def floor_ms(self, flops: float, num_bytes: float) -> float:
        """The least time for so much arithmetic and so many bytes, done at the same time."""
        return max(flops / (self.gflops * 1e6), num_bytes / (self.read_gb_per_s * 1e6))


@dataclass(frozen=True, slots=True)
class Stage:
    """The work of one stage of a request, or of one decode step.

    Attributes:
        name: "tower", "projector", "prefill" or "decode".
        product_flops: multiplications with weights.
        attention_flops: queries with keys, and weights with values.
        weight_bytes, cache_bytes: read at least once.
        num_layers: layers that run.
        num_views: of the tower; else 1.
    """

    name: str
    product_flops: int
    attention_flops: int
    weight_bytes: int
    cache_bytes: int = 0
    num_layers: int = 0
    num_views: int = 1

    @property
    def flops(self) -> int:
        """All arithmetic that is counted."""
        return self.product_flops + self.attention_flops

    @property
    def num_bytes(self) -> int:
        """All bytes that are counted."""
        return self.weight_bytes + self.cache_bytes

    def floor_ms(self, machine: Machine) -> float:
        """The least time on a machine."""
        attention_gflops = machine.attention_gflops or machine.gflops
        scaled = self.attention_flops * machine.gflops / attention_gflops
        return machine.floor_ms(self.product_flops + scaled, self.num_bytes)

    def predicted_ms(self, rates: Rates) -> float:
        """The time that ovfast will take at its own rates."""
        weights_ms = self.weight_bytes / (rates.weights_gb_per_s * 1e6)
        if self.name == "decode":
            products_ms = self.product_flops / (rates.prefill.gflops * 1e6)
            cache_ms = self.cache_bytes / (rates.cache_gb_per_s * 1e6)
            return max(weights_ms, products_ms) + cache_ms + self.num_layers * rates.step_layer_ms
        own = rates.prefill if self.name == "prefill" else rates.tower
        groups = math.ceil(self.num_views / rates.views_a_step)
        products_ms = self.product_flops / (own.gflops * 1e6)
        attention_ms = self.attention_flops / (own.attention_gflops * 1e6)
        # Few rows read the weights before they multiply; with many that is next to nothing.
        return weights_ms + products_ms + attention_ms + groups * self.num_layers * own.layer_ms
