"""Several requests in one go, each with sampling parameters of its own."""

import time
from collections.abc import Sequence

from ovfast.engine import Engine
from ovfast.model_inputs import ModelInputs
from ovfast.outputs import GenerationOutput
from ovfast.sampling import SamplingParams

__all__ = ["answer_all"]


def answer_all(
    engine: Engine, inputs: Sequence[ModelInputs], params: Sequence[SamplingParams]
) -> list[GenerationOutput]:
    """Answers requests side by side, as `Engine.generate` does with one set of parameters.

    Args:
        engine: whose slots are shared by as many requests as there are.
        inputs: laid-out requests.
        params: one for each.

    Returns:
        One output a request, in order.

    Raises:
        OVFastError: see `ovfast.errors`.
    """
    started = time.perf_counter()
    for each in inputs:
        engine._check_inputs(each)
    return engine._answer(inputs, params, started)
