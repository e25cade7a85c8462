"""Fixtures shared by all tests: random checkpoints, made once a session."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ovfast
from tests.support import interpreter
from tests.support.checkpoints import CheckpointSpec, make_checkpoint

MakeCheckpoint = Callable[..., Path]


def pytest_configure(config: pytest.Config) -> None:
    interpreter.register(config)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """random_checkpoint(spec=CheckpointSpec(), layout="v5") -> its directory; never write there."""
    made: dict[tuple[CheckpointSpec, str], Path] = {}

    def make(spec: CheckpointSpec | None = None, layout: str = "v5") -> Path:
        key = (spec or CheckpointSpec(), layout)
        if key not in made:
            made[key] = make_checkpoint(
                tmp_path_factory.mktemp("checkpoint") / "random", key[0], layout=layout
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(random_checkpoint: MakeCheckpoint) -> Path:
    """Directory of the default random checkpoint."""
    return random_checkpoint()


@pytest.fixture(scope="session")
def packed_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default random checkpoint packed as int8; never write there."""
    out = tmp_path_factory.mktemp("packed") / "packed"
    return ovfast.convert(tiny_checkpoint, out, quantization="int8")


@pytest.fixture
def packed(packed_checkpoint: Path, tmp_path: Path) -> Path:
    """A packed directory that a test may damage."""
    return Path(shutil.copytree(packed_checkpoint, tmp_path / "packed"))
