"""The layers of the package: a module imports only from lower ones, lazily or not."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Low to high. A unit is a module of ovfast or a whole subpackage, whose modules may import each
# other. A new module takes its place here first.
LAYERS = (
    ("errors", "kernels", "_C"),
    (
        "json_fields",
        "pack_table",
        "media_limits",
        "resize_table",
        "staging",
        "cuda_graphs",
        "home_stream",
        "out_of_memory",
        "clock",
        "cpu_threads",
        "forks",
        "storage",
        "stage_cost",
    ),
    ("config_visual", "video_file", "anyres", "packed_file"),
    ("config", "cpu_linear"),
    ("reference", "reference_pixels", "decode_kernels"),
    ("ops_native", "ops_triton"),
    ("ops",),
    ("image", "media", "sampling", "kv_cache", "quantize", "roofline"),
    (
        "outputs",
        "tensor_names",
        "explain_draw",
        "chat",
        "pixels",
        "device_sampling",
        "encoded_media",
    ),
    ("decode_rows",),
    ("weight_files", "chat_template", "text_tokenizer", "model_inputs", "media_sources"),
    ("models",),
    ("checkpoint", "processor", "runner"),
    ("packed_weights",),
    ("native_runner",),
    ("row_runner",),
    ("options", "request", "call"),  # from here on what engine is made of
    ("scheduler",),
    ("scoring", "encoding"),
    ("choices",),
    ("engine_base",),
    ("engine",),
    ("loading",),
    ("conversion", "engine_cache"),
    ("api", "explain", "verify", "integrations"),
    ("demo_run",),
    ("bench",),
    ("__init__",),
    ("doctor",),
    ("cli",),
    ("__main__",),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}

# Who may import what beyond the order of the layers.
ONLY_IMPORTERS = {
    "kernels": {"kernels", "ops_triton"},
    "_C": {"ops_native"},
    "triton": {"kernels", "ops"},
    "transformers": {"integrations", "verify"},
}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module; kernels by their real path."""
    for path in sorted((ROOT / "ovfast").rglob("*.py")):
        relative = path.relative_to(ROOT).with_suffix("")
        if relative.parts[1] != "kernels":
            yield ".".join(relative.parts), path
    for path in sorted((ROOT / "kernels").glob("*.py")):
        yield f"ovfast.kernels.{path.stem}", path


def unit_of(name: str) -> str:
    """The unit of a dotted ovfast name; of another package its first part."""
    parts = name.split(".")
    if parts[0] != "ovfast":
        return parts[0]
    return parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"


def imported_names(module: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            function = ast.unparse(node.func)
            argument = node.args[0]
            if function in ("importlib.import_module", "import_module", "__import__"):
                known = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
                yield argument.value if known else f"ovfast.<{ast.unparse(argument)}>"


def violations(module: str, source: str) -> list[str]:
    unit = "__init__" if module == "ovfast.__init__" else module.split(".")[1]
    if unit not in RANK:
        return [f"{module} has no layer; give it one in {Path(__file__).name}"]
    found = []
    for name in imported_names(module, source):
        target = unit_of(name)
        if target in ONLY_IMPORTERS and unit not in ONLY_IMPORTERS[target]:
            found.append(f"{module} imports {name}: only {sorted(ONLY_IMPORTERS[target])} may")
        is_ours = name.split(".")[0] == "ovfast"
        is_sibling = target == unit and len(module.split(".")) > 2
        if is_ours and not is_sibling and RANK[target] >= RANK[unit]:
            found.append(f"{module} imports {name}, which is not in a lower layer")
    return found


MODULES = dict(modules())


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    assert violations(module, MODULES[module].read_text()) == []


def test_modules_are_found() -> None:
    assert {"ovfast.errors", "ovfast.ops", "ovfast.kernels.resize"} <= MODULES.keys()
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow a package of that name"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ovfast.config", "from ovfast.engine import Engine"),
        ("ovfast.config", "import ovfast.reference"),
        ("ovfast.config", "def lazily():\n    from ovfast import media"),
        ("ovfast.config", "import ovfast"),
        ("ovfast.config", "from . import api"),
        ("ovfast.models.siglip", "from ..engine import Engine"),
        ("ovfast.models.siglip", "from ovfast.kernels import resize"),
        ("ovfast.engine", "import importlib\nimportlib.import_module('ovfast._C')"),
        ("ovfast.engine", "import importlib\nimportlib.import_module(name)"),
        ("ovfast.reference", "import triton.language as tl"),
        ("ovfast.engine", "from transformers import AutoProcessor"),
        ("ovfast.kernels.resize", "from ovfast.errors import BackendError"),
        ("ovfast.surprise", ""),
        ("ovfast.__init__", "from ovfast.cli import main"),
    ],
)
def test_wrong_imports_are_caught(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ovfast.models.qwen2", "from ovfast.models.rope import rope_table"),
        ("ovfast.models.qwen2", "from .rope import rope_table"),
        ("ovfast.ops_triton", "from ovfast.kernels import resize"),
        ("ovfast.ops", "import importlib\nimportlib.import_module('ovfast.ops_triton')"),
        ("ovfast.kernels.decode_qkv", "from ovfast.kernels.decode_tiles import ROWS"),
        ("ovfast.cli", "import ovfast\nfrom ovfast import load\nimport rich"),
        ("ovfast.kernels.pool", "import triton\nimport torch"),
        ("ovfast.image", "from ovfast import reference"),
    ],
)
def test_right_imports_pass(module: str, source: str) -> None:
    assert violations(module, source) == []
