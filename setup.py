"""The one native extension and the package list; everything else is in pyproject.toml.

The extension is optional: where it cannot be compiled the install goes on without it and ovfast
uses its other back ends. OVFAST_REQUIRE_EXT=1 makes any compiler error or warning fatal.
"""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

# Sums keep their order and their roundings: products are fused only where the code says so.
FLAGS = ["-Wall", "-Wextra", "-ffp-contract=off", "-pthread"]
REQUIRE_EXT = os.environ.get("OVFAST_REQUIRE_EXT") == "1"
# setuptools wants paths relative to this file, with forward slashes.
SOURCES = sorted(f"csrc/{path.name}" for path in Path(__file__).parent.glob("csrc/*.cpp"))
HEADERS = sorted(f"csrc/{path.name}" for path in Path(__file__).parent.glob("csrc/*.h"))

extension = Pybind11Extension(
    "ovfast._C",
    sources=SOURCES,
    depends=HEADERS,
    cxx_std=17,
    # CXXFLAGS of the environment may ask for another optimisation.
    extra_compile_args=[
        *([] if "CXXFLAGS" in os.environ else ["-O3"]),
        *FLAGS,
        *(["-Werror"] if REQUIRE_EXT else []),
    ],
    optional=not REQUIRE_EXT,
)

with ParallelCompile("OVFAST_BUILD_JOBS", default=0):
    setup(
        packages=[*find_packages(include=["ovfast", "ovfast.*"]), "ovfast.kernels"],
        ext_modules=[extension],
    )
