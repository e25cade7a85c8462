"""The extension as any other CPU gets it: without x86, in plain C++."""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pybind11 = pytest.importorskip("pybind11", reason="needs pybind11")

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import importlib.machinery, importlib.util, sys
import numpy as np
loader = importlib.machinery.ExtensionFileLoader("_C", sys.argv[1])
native = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(native)
assert (native.isa(), native.isas()) == ("scalar", ["scalar"]), native.isas()
pool, rng = native.ThreadPool(2), np.random.default_rng(0)
x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((41, 100), (33, 100)))
for kind, tolerance in (("float32", 1e-4), ("float16", 0.05), ("bfloat16", 0.3)):
    out = np.empty((41, 33), np.float32)
    native.linear(pool, x, native.pack(pool, kind, [w]), None, "none", False, out)
    assert np.allclose(out, x @ w.T, atol=tolerance), kind
q, out = rng.standard_normal((50, 1, 24), np.float32), np.empty((50, 24), np.float32)
native.causal_attention(pool, q, q.swapaxes(0, 1).copy(), q.swapaxes(0, 1).copy(), 0, out)
scores = q[:, 0] @ q[:, 0].T / np.sqrt(24) + np.triu(np.full((50, 50), -np.inf), 1)
shares = np.exp(scores - scores.max(1, keepdims=True))
assert np.allclose(out, shares / shares.sum(1, keepdims=True) @ q[:, 0], atol=1e-5)
print("ok")
"""


@pytest.mark.long
@pytest.mark.slow
def test_scalar_kernels_alone(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = ["-O0", "-g0", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", "-fPIC"]
    flags += ["-fvisibility=hidden", "-ffp-contract=off", "-DOVFAST_NO_X86", *includes]

    def compile_one(source: Path) -> Path:
        built = tmp_path / f"{source.stem}.o"
        subprocess.run([compiler, *flags, "-c", source, "-o", built], check=True)
        return built

    with ThreadPoolExecutor(2) as threads:
        objects = list(threads.map(compile_one, sorted((ROOT / "csrc").glob("*.cpp"))))
    extension = tmp_path / "_C.so"
    subprocess.run([compiler, "-shared", "-pthread", *objects, "-o", extension], check=True)
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, extension], capture_output=True, text=True
    )
    assert (finished.returncode, finished.stdout) == (0, "ok\n"), finished.stderr
