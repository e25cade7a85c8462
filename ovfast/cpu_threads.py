"""How many threads a process may keep busy: its processors, and the quota of its cgroups."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_threads(root: Path = Path("/")) -> int:
    """The least of the processors that this process may run on and its CPU quota, rounded up.

    A container with `--cpus=1.5` on a large machine gets 2: more threads would share the quota and
    stand still together when it is used up. Of nested cgroups, of version 1 or 2, the strictest
    counts. What cannot be read sets no limit.

    Args:
        root: directory that holds proc/ and sys/.

    Returns:
        At least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    return max(1, min([processors, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The quota, in processors, of every cgroup of this process that has one."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mounts = _mounts(root, "cgroup2", None)
        elif "cpu" in controllers.split(","):
            mounts = _mounts(root, "cgroup", "cpu")
        else:
            continue
        for mount_root, mount_point in mounts:
            for directory in _up_from(path, mount_root, root / mount_point.lstrip("/")):
                quota = _quota(directory)
                if quota is not None:
                    yield quota


def _mounts(root: Path, kind: str, option: str | None) -> Iterator[tuple[str, str]]:
    """(directory of the hierarchy that is mounted, where) of each mount of a kind of cgroup."""
    for line in _lines(root / "proc/self/mountinfo"):
        # 36 35 98:0 /root /mount/point options [optional fields] - type source super-options
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) < 5 or len(kinds) < 3 or kinds[0] != kind:
            continue
        if option is None or option in kinds[2].split(","):
            yield _unescaped(fields[3]), _unescaped(fields[4])


def _up_from(path: str, mount_root: str, mount_point: Path) -> Iterator[Path]:
    """The directories of a cgroup and of those around it, as far as they are mounted.

    In a container the mount shows a part of the hierarchy alone, and `path` may lie outside of it:
    then the directory of the mount is as near as one comes.
    """
    inside = PurePosixPath(path)
    if ".." in inside.parts:
        inside = PurePosixPath()
    else:
        inside = inside.relative_to(mount_root if inside.is_relative_to(mount_root) else "/")
    for part in (inside, *inside.parents):
        yield mount_point / part


def _quota(directory: Path) -> float | None:
    """Processors that one cgroup may use; None without a limit."""
    for words in (
        " ".join(_lines(directory / "cpu.max")).split(),  # version 2: "150000 100000" or "max …"
        [  # version 1; -1 is no limit
            *_lines(directory / "cpu.cfs_quota_us"),
            *_lines(directory / "cpu.cfs_period_us"),
        ],
    ):
        if len(words) == 2 and all(word.strip().isdecimal() for word in words):
            quota_us, period_us = map(int, words)
            if quota_us > 0 and period_us > 0:
                return quota_us / period_us
    return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _unescaped(name: str) -> str:
    """A path of mountinfo, which writes blanks and the like in octal."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        name = name.replace(code, character)
    return name
