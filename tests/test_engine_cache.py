"""One engine a model, whatever it is called by."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ovfast
from ovfast import OptionError
from ovfast.engine_cache import EngineCache
from ovfast.loading import resolve_device

DEMO = Path(ovfast.__file__).parent / "demo"


@pytest.fixture
def cache() -> Iterator[EngineCache]:
    cache = EngineCache()
    yield cache
    cache.close()
    assert len(cache) == 0


def test_all_names_of_a_model_share_its_engine(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(DEMO)
    monkeypatch.chdir(DEMO.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["demo", str(DEMO), DEMO, f"{DEMO}/", Path("demo"), "./demo", "~/link"]
    devices = [{}, {"device": "auto"}, {"device": resolve_device("auto")}]
    devices.append({"device": str(resolve_device("auto"))})
    engines = {cache.get(name, **device) for name in names for device in devices}
    assert len(engines) == len(cache) == 1


def test_what_differs_has_engines_of_its_own(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(DEMO, tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[Any, dict[str, Any]]] = [
        ("demo", {}),
        ("demo", {"max_seq_len": 100}),
        ("demo", {"max_seq_len": 100, "max_batch_size": 2}),
        ("./demo", {}),  # not the embedded one
    ]
    engines = [cache.get(name, device="cpu", **options) for name, options in calls]
    assert len(set(engines)) == len(cache) == 4
    assert [engine.max_seq_len for engine in engines[1:3]] == [100, 100]
    assert cache.get("demo", device="cpu", max_batch_size=2, max_seq_len=100) is engines[2]


def test_a_closed_engine_is_loaded_again(cache: EngineCache) -> None:
    first = cache.get("demo", device="cpu")
    first.close()
    assert not cache.get("demo", device="cpu").closed
    assert len(cache) == 1


@pytest.mark.parametrize(
    ("model", "options"),
    [(None, {}), (b"demo", {}), ("", {}), ("a\0b", {}), ("demo", {"device": "gpu"})],
)
def test_wrong_arguments_raise_as_in_load(
    cache: EngineCache, model: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError) as expected:
        ovfast.load(model, **options)
    with pytest.raises(OptionError) as raised:
        cache.get(model, **options)
    assert str(raised.value) == str(expected.value)
