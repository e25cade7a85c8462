"""What a record says of where it was made: hardware, versions, commit, and how quiet it was."""

import datetime as dt
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ovfast.bench.calibration import Calibration
from ovfast.bench.record import Header
from ovfast.cpu_threads import available_threads
from ovfast.ops import native_isa

__all__ = ["hardware", "make_header", "quiet_check", "versions"]

PACKAGES = ("ovfast", "torch", "transformers", "triton", "numpy", "pillow", "tokenizers")
ROOT = Path("/")
PACKAGE = Path(__file__).resolve().parents[1]
BUSY_SHARE = 0.10  # of the processors, taken by others before a run, from which on it is noisy
WATCH_S = 1.0
COMMAND_S = 20.0


def make_header(
    command: str,
    calibration: Calibration,
    quiet: Mapping[str, Any],
    extra_versions: Mapping[str, str | None] | None = None,
) -> Header:
    """The header of a run that starts now.

    Args:
        command: that makes the file again.
        calibration: of this machine.
        quiet: of `quiet_check`, before the calibration.
        extra_versions: of peers in environments of their own.
    """
    commit, dirty = _commit()
    return Header(
        command=command,
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        commit=commit,
        dirty=dirty,
        hardware=hardware(),
        versions=versions() | dict(extra_versions or {}),
        threads=calibration.threads,
        machine=calibration.as_dict(),
        quiet=quiet,
    )


def hardware(root: Path = ROOT) -> dict[str, Any]:
    """One entry for each of `record.HARDWARE`; None where it cannot be read.

    Args:
        root: directory that holds proc/ and sys/.
    """
    info = _fields(root / "proc/cpuinfo")
    governor = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    clock, memory = info.get("cpu MHz"), _fields(root / "proc/meminfo").get("MemTotal")
    has_gpu = torch.cuda.is_available()
    return {
        "cpu": info.get("model name") or platform.machine(),
        "isa": native_isa() or torch.backends.cpu.get_cpu_capability(),
        "num_cpus": os.cpu_count(),
        "affinity": available_threads(root),
        "governor": governor or None,
        "clock_mhz": float(clock) if clock else None,
        "memory_bytes": 1024 * int(memory.split()[0]) if memory else None,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "driver": _gpu_driver() if has_gpu else None,
    }


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that a figure may depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def quiet_check(watch_s: float = WATCH_S, root: Path = ROOT) -> dict[str, Any]:
    """Watches the processors while this process sleeps.

    Args:
        watch_s: for how long.
        root: directory that holds proc/.

    Returns:
        load_average of the last minute; busy_share, the share of all processors that others took,
        and stolen_share, of it what the host gave to other machines; the verdict, "quiet" or
        "noisy". Shares are None, and the verdict "unknown", where the system does not tell.
    """
    before = _jiffies(root)
    time.sleep(watch_s)
    after = _jiffies(root)
    words = _read(root / "proc/loadavg").split()
    busy = stolen = None
    if before is not None and after is not None and after[0] > before[0]:
        total, idle, steal = (b - a for a, b in zip(before, after, strict=True))
        busy, stolen = 1 - idle / total, steal / total
    verdict = "unknown" if busy is None else "noisy" if busy > BUSY_SHARE else "quiet"
    return {
        "load_average": float(words[0]) if words else None,
        "busy_share": busy,
        "stolen_share": stolen,
        "verdict": verdict,
    }


def _jiffies(root: Path) -> tuple[int, int, int] | None:
    """All ticks of all processors so far, those idle, those stolen by the host."""
    lines = _read(root / "proc/stat").splitlines()
    if not lines or not lines[0].startswith("cpu "):
        return None
    # user nice system idle iowait irq softirq steal; guest times are part of user's.
    ticks = [int(word) for word in lines[0].split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4], ticks[7] if len(ticks) > 7 else 0


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout that this package is part of, and whether it was changed."""
    tracked = _run("git", "-C", str(PACKAGE), "ls-files", "__init__.py")
    if not tracked:
        return None, None
    commit = _run("git", "-C", str(PACKAGE), "rev-parse", "--short", "HEAD")
    changed = _run("git", "-C", str(PACKAGE), "status", "--porcelain", "--untracked-files=no")
    return commit or None, bool(changed)


def _gpu_driver() -> str | None:
    lines = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0] if lines else None


def _run(*command: str) -> str:
    """What a command prints; nothing where it fails or is not there."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _fields(file: Path) -> dict[str, str]:
    """The first value of each `name : value` line."""
    fields: dict[str, str] = {}
    for line in _read(file).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
