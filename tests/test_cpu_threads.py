"""Threads by affinity and by the CPU quota of cgroups, over made-up trees of files."""

import os
from pathlib import Path

import pytest

from ovfast.cpu_threads import available_threads

V2_MOUNT = "30 24 0:26 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = (
    "33 30 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw shared:11 - cgroup cgroup rw,cpu,cpuacct\n"
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(path: str, limits: dict[str, str], mount_root: str = "/") -> dict[str, str]:
    files = {f"sys/fs/cgroup/{name}/cpu.max": text for name, text in limits.items()}
    return files | {
        "proc/self/cgroup": f"0::{path}\n",
        "proc/self/mountinfo": "21 1 8:1 / / rw - ext4 /dev/sda rw\n"
        + V2_MOUNT.format(root=mount_root),
    }


def v1(path: str, limits: dict[str, tuple[int, int]], mount_root: str = "/") -> dict[str, str]:
    files = {
        "proc/self/cgroup": f"12:memory:/x\n4:cpu,cpuacct:{path}\n1:name=systemd:/x\n0::/\n",
        "proc/self/mountinfo": "34 30 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        + V1_MOUNT.format(root=mount_root),
    }
    for name, (quota, period) in limits.items():
        files[f"sys/fs/cgroup/cpu,cpuacct/{name}/cpu.cfs_quota_us"] = f"{quota}\n"
        files[f"sys/fs/cgroup/cpu,cpuacct/{name}/cpu.cfs_period_us"] = f"{period}\n"
    return files


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 8, id="no cgroups"),
        pytest.param(v2("/a", {"a": "max 100000\n"}), 8, id="v2 without a limit"),
        pytest.param(v2("/a", {"a": "200000 100000\n"}), 2, id="v2"),
        pytest.param(v2("/a", {"a": "150000 100000\n"}), 2, id="v2 rounds up"),
        pytest.param(v2("/a", {"a": "1000 100000\n"}), 1, id="v2 at least one"),
        pytest.param(v2("/a", {"a": "1600000 100000\n"}), 8, id="v2 above the affinity"),
        pytest.param(v2("/a/b/c", {"a": "300000 100000", "a/b": "max 100000"}), 3, id="v2 outer"),
        pytest.param(v2("/a/b", {"a": "300000 100000", "a/b": "500000 100000"}), 3, id="v2 least"),
        pytest.param(v2("/a/b", {"a": "500000 100000", "a/b": "300000 100000"}), 3, id="v2 inner"),
        pytest.param(v2("/", {".": "400000 100000"}), 4, id="v2 in a namespace"),
        pytest.param(v2("/a/b", {"b": "400000 100000"}, "/a"), 4, id="v2 part mounted"),
        pytest.param(v2("/../x", {".": "400000 100000"}), 4, id="v2 outside of the namespace"),
        pytest.param(v2("/x", {".": "400000 100000"}, "/a"), 4, id="v2 outside of the mount"),
        pytest.param(v2("/a", {"a": "rubbish\n"}), 8, id="v2 rubbish"),
        pytest.param(v2("/a", {"a": "0 0\n"}), 8, id="v2 zero"),
        pytest.param(v1("/a", {"a": (-1, 100000)}), 8, id="v1 without a limit"),
        pytest.param(v1("/a", {"a": (250000, 100000)}), 3, id="v1 rounds up"),
        pytest.param(v1("/a/b", {"a": (300000, 100000), "a/b": (-1, 100000)}), 3, id="v1 outer"),
        pytest.param(v1("/docker/a", {".": (50000, 50000)}, "/docker/a"), 1, id="v1 container"),
        pytest.param({"proc/self/cgroup": "nonsense\n0\n::\n"}, 8, id="unreadable lines"),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_threads(write(tmp_path, files)) == expected


def test_quota_of_memory_does_not_count(tmp_path: Path) -> None:
    files = v1("/a", {})
    files["sys/fs/cgroup/memory/x/cpu.cfs_quota_us"] = "100000"
    files["sys/fs/cgroup/memory/x/cpu.cfs_period_us"] = "100000"
    assert available_threads(write(tmp_path, files)) == 8


def test_mount_point_with_a_blank(tmp_path: Path) -> None:
    files = v2("/a", {})
    files["proc/self/mountinfo"] = "30 24 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw\n"
    files["my groups/a/cpu.max"] = "100000 100000"
    assert available_threads(write(tmp_path, files)) == 1


def test_this_process() -> None:
    assert 1 <= available_threads() <= 8


def test_system_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_threads(tmp_path) == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert available_threads(tmp_path) == 3
