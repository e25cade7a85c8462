"""Lets torchvision be imported beside a CPU build of torch, where package indexes have none for it.

PyPI's torchvision is linked with CUDA's torch: its operators do not load, and it fails to import
because it describes two of them. Their names are enough for what is used here, its Python parts.

    python tests/integrations/torchvision_cpu.py MODULE ARGUMENTS   # as python -m MODULE ARGUMENTS
"""

import runpy
import sys

OPERATORS = ("nms", "qnms")
_library: object = None  # goes with its definitions


def define_operators() -> None:
    """Names the operators, where torchvision cannot be imported without."""
    global _library  # noqa: PLW0603
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if __name__ == "__main__":
    define_operators()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
