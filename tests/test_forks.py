"""Forked children of a process that has engines load and ask engines of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# With threads of OpenMP in the parent, and with the cache's lock held at the fork.
FORK = """
import os, signal, sys, warnings
import numpy, torch, ovfast
from ovfast import api
from ovfast.engine_cache import EngineCache
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: it is the point
torch.set_num_threads(2)
request = {"prompt": "What is shown?", "images": numpy.zeros((90, 120, 3), numpy.uint8)}
options = {"backend": sys.argv[1], "device": "cpu"}

def answers():
    return (
        ovfast.generate(**request, device="cpu", max_new_tokens=4).token_ids,
        cache.get("demo", **options).generate(**request, max_new_tokens=4).token_ids,
        ovfast.load("demo", **options).generate(**request, max_new_tokens=4).token_ids,
    )

cache = EngineCache()
torch.ones(1 << 20).add_(1)
expected = answers()
with api._engines._lock, cache._lock:
    child = os.fork()
if child == 0:
    signal.alarm(60)
    found = answers()
    grandchild = os.fork()
    if grandchild == 0:
        signal.alarm(60)
        found = answers()
    elif os.waitpid(grandchild, 0)[1]:
        os._exit(2)
    os._exit(0 if found == expected and len(cache) == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
assert answers() == expected
assert len(cache) == 1
"""


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_forked_child_loads_its_own(backend: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", FORK, backend],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert finished.returncode == 0, finished.stderr
