"""Every operation on every back end at the real shapes, by pytest-benchmark.

    make bench-kernels PYTEST_ARGS='-k "gate_up and int8"'

The same cases as `ovfast bench kernels` at the sizes of 0.5B, but warm: what lies in a cache is not
flushed.
"""

import pytest
import torch

from ovfast.bench.accuracy import default_variants
from ovfast.bench.kernels import open_bench
from ovfast.bench.op_cases import op_cases
from ovfast.bench.slice_engine import slice_config
from ovfast.bench.targets import Target
from ovfast.cpu_threads import available_threads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = {f"{v.backend}-{v.storage}": v for v in default_variants(DEVICE)}


def make_target():
    """Sizes alone: a layer's are those of the full model."""
    target = Target("demo", DEVICE, available_threads())
    target.config = slice_config()
    return target


TARGET = make_target()
CASES = {case.name: case for case in op_cases(TARGET.config)}


@pytest.fixture(scope="module", params=VARIANTS)
def bench(request):
    torch.set_num_threads(TARGET.threads)
    return open_bench(TARGET, VARIANTS[request.param])


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_operation(benchmark, bench, name):
    case = CASES[name]
    if bench.ops.where[case.operation] != bench.ops.backend:
        pytest.skip(f"{bench.ops.backend} takes {case.operation} from the reference")
    work = case.make(bench)
    if DEVICE == "cuda":
        benchmark(lambda: (work(), torch.cuda.synchronize()))
    else:
        benchmark(work)
