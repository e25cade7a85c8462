"""The thread pool: the C++ stress test, forks from Python, and several Python threads."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.native_norm import norm_is_right

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_stress(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "stress"
    sources = [ROOT / "csrc/thread_pool.cpp", ROOT / "tests/csrc/thread_pool_stress.cpp"]
    flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
    finished = subprocess.run([program, "3"], capture_output=True, text=True, timeout=300)
    assert (finished.returncode, finished.stdout) == (0, "ok\n"), finished.stderr


FORK = """
import os, warnings
from tests.support.native_arguments import native
from tests.support.native_norm import norm_is_right
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: it is the point
pool = native.ThreadPool(3)
assert norm_is_right(native, pool, 0)
for seed in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(norm_is_right(native, pool, seed + i) for i in range(20)) else 1)
    assert norm_is_right(native, pool, seed)
    assert os.waitpid(child, 0)[1] == 0
del pool
"""


def test_forked_child_uses_a_pool_of_before() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 0, finished.stderr


EXIT = """
import threading, time
from tests.support.native_arguments import native
from tests.support.native_norm import norm_is_right
pool = native.ThreadPool(3)
asleep = native.ThreadPool(2)
norm_is_right(native, asleep, 0)
def work():
    while True:
        norm_is_right(native, pool, 0)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
"""


@pytest.mark.slow
def test_interpreter_ends_while_a_daemon_thread_works() -> None:
    for _ in range(5):
        finished = subprocess.run(
            [sys.executable, "-c", EXIT], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_callers_on_several_threads(num_threads: int) -> None:
    pool = native.ThreadPool(num_threads)
    results: list[bool] = []

    def work(seed: int) -> None:
        results.extend(norm_is_right(native, pool, seed + i) for i in range(30))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 120


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_idle_workers_use_no_processor() -> None:
    pool = native.ThreadPool(4)
    assert norm_is_right(native, pool, 0)
    time.sleep(0.05)  # they look out for a while
    before = time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)
    time.sleep(0.5)
    assert time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID) - before < 0.01


@pytest.mark.parametrize("num_threads", [0, -1, 1025, 2**40])
def test_number_of_threads_out_of_range(num_threads: int) -> None:
    with pytest.raises(ValueError, match=f"num_threads is {num_threads}; expected 1 to 1024"):
        native.ThreadPool(num_threads)


def test_destroyed_while_workers_are_awake() -> None:
    for seed in range(20):
        assert norm_is_right(native, native.ThreadPool(4), seed)
