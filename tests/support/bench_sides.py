"""Sides of a benchmark for tests: a few lines of Python behind the suite's own protocol."""

import sys
import textwrap
from pathlib import Path
from typing import Any

from ovfast.bench import protocol
from ovfast.bench.sides import SideSpec

LOAD = """
class Peer:
    def load(self, **options):
        return {"load_ms": 1.0, "weight_bytes": 1, "torch_bytes": 1, **options}
"""


def scripted_side(
    path: Path, name: str, methods: str = "", *, storage: str = "float32", **options: Any
) -> SideSpec:
    """A side whose class has the given methods beside `load`, which answers its options."""
    file = path / f"{name}.py"
    file.write_text(LOAD + textwrap.indent(textwrap.dedent(methods), "    "))
    command = (sys.executable, "-P", protocol.__file__, str(file))
    return SideSpec(name, storage, command, {"device": "cpu"} | options)
