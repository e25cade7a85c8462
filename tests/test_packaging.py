"""What is built from the tree holds everything at its right place."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "demo-out", "shared")


def project() -> dict[str, object]:
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def build(kind: str, source: Path, target: Path, **environment: str) -> Path:
    """Builds "sdist" or "wheel" of the tree `source` as a front end would, without isolation."""
    code = (
        "import sys; from setuptools import build_meta;"
        f"build_meta.build_{kind}(sys.argv[1])"  # prints its own log; the file is found below
    )
    target.mkdir()
    # What the compiler makes is tested elsewhere; here it need not be fast.
    unoptimised = {"CFLAGS": "-O0", "CXXFLAGS": "-O0"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=source,
        env=os.environ | unoptimised | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout as git holds it, with the symlink."""
    copy = tmp_path_factory.mktemp("checkout") / "ovfast"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copy


@pytest.fixture(scope="module")
def unpacked_sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sdist")
    archive = build("sdist", tree, directory / "dist")
    with tarfile.open(archive) as stream:
        stream.extractall(directory, filter="data")
    (source,) = (path for path in directory.iterdir() if path.name != "dist")
    return source


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return set(archive.namelist())


def expected_files() -> set[str]:
    """Every Python file and every file of the demo, by its place in a wheel."""
    files = {f"ovfast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    for path in (ROOT / "ovfast").rglob("*"):
        relative = path.relative_to(ROOT)
        is_demo = relative.parts[1] == "demo" and path.is_file()
        if "__pycache__" not in relative.parts and (path.suffix == ".py" or is_demo):
            files.add(relative.as_posix())
    return files | {"ovfast/py.typed", "ovfast/_C.pyi"}


@pytest.mark.slow
@pytest.mark.parametrize("origin", [pytest.param("tree", marks=pytest.mark.long), "unpacked_sdist"])
def test_wheel_holds_everything(
    origin: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(origin)
    wheel = build("wheel", source, tmp_path / "dist", OVFAST_REQUIRE_EXT="1")
    names = wheel_names(wheel)
    assert expected_files() - names == set()
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"ovfast"}
    assert any(name.startswith("ovfast/_C.") and name.endswith(".so") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_no_compiler_gives_a_wheel_without_the_extension(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns("build"))
    missing = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    names = wheel_names(build("wheel", copy, tmp_path / "dist", OVFAST_REQUIRE_EXT="0", **missing))
    assert not any(name.endswith(".so") for name in names)
    assert expected_files() - names == set()


@pytest.mark.long
@pytest.mark.slow
def test_required_extension_makes_a_compile_error_fatal(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns("build"))
    broken = copy / "csrc" / "pack_views.cpp"
    broken.write_text(broken.read_text() + "\n#error broken on purpose\n")
    with pytest.raises(AssertionError, match="broken on purpose"):
        build("wheel", copy, tmp_path / "dist", OVFAST_REQUIRE_EXT="1")


def test_symlink_is_relative() -> None:
    link = ROOT / "ovfast" / "kernels"
    if not link.is_symlink():
        pytest.skip("this checkout has no symbolic links")
    assert os.readlink(link) == "../kernels"
    assert (link / "resize.py").is_file()


def test_version_is_said_once() -> None:
    import ovfast

    assert ovfast.__version__ == project()["version"]
