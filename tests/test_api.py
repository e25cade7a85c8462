"""The public names are exactly the contract, and `import ovfast` stays light."""

import subprocess
import sys

import ovfast

PUBLIC_NAMES = [
    "BackendError",
    "CapacityError",
    "CheckpointError",
    "ChoiceOutput",
    "ConfigError",
    "EncodedMedia",
    "Engine",
    "Estimate",
    "GenerationOutput",
    "MediaError",
    "MediaLimits",
    "ModelInputs",
    "OVFastError",
    "OptionError",
    "PromptError",
    "QuantizationError",
    "SamplingParams",
    "ScoreOutput",
    "StreamChunk",
    "VisualOptions",
    "__version__",
    "convert",
    "generate",
    "load",
    "stream",
]

# Heavy or optional; each is imported where it is first needed.
LAZY_MODULES = ("av", "huggingface_hub", "rich", "transformers", "triton", "typer")


def run_python(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_all_is_the_contract() -> None:
    assert sorted(PUBLIC_NAMES) == PUBLIC_NAMES
    assert ovfast.__all__ == PUBLIC_NAMES


def test_every_name_is_there() -> None:
    missing = [name for name in PUBLIC_NAMES if not hasattr(ovfast, name)]
    assert missing == []


def test_errors_form_one_tree() -> None:
    errors = [name for name in PUBLIC_NAMES if name.endswith("Error")]
    assert all(issubclass(getattr(ovfast, name), ovfast.OVFastError) for name in errors)
    assert issubclass(ovfast.OptionError, ValueError)


def test_import_needs_none_of_the_heavy_modules() -> None:
    code = f"import sys, ovfast; print([m for m in {LAZY_MODULES} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_import_touches_no_device_and_no_threads() -> None:
    code = (
        "import torch; before = torch.get_num_threads(); import ovfast;"
        "print(torch.cuda.is_initialized(), torch.get_num_threads() == before)"
    )
    assert run_python(code) == "False True"


def test_import_reads_no_environment_of_its_own() -> None:
    code = (
        "import os, torch, numpy, tokenizers, safetensors, PIL.Image, jinja2.sandbox; seen = [];"
        "read = type(os.environ).__getitem__;"
        "type(os.environ).__getitem__ = lambda self, key: (seen.append(key), read(self, key))[1];"
        "import ovfast; print([key for key in seen if 'OVFAST' in key])"
    )
    assert run_python(code) == "[]"
