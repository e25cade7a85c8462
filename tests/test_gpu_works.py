"""Every work of `make gpu` called once: the vision half, the language half, both models' weights.

Tiny models; ours by the Triton kernels in the interpreter, whose checks of arguments are those of a
device. What is timed there and how is `test_gpu_benchmark`.
"""

from types import SimpleNamespace

import pytest
import torch

from ovfast.bench.record import read
from tests.bench.records import header
from tests.support.checkpoints import CheckpointSpec
from tests.test_gpu_benchmark import MACHINE

gpu_bench = pytest.importorskip("benchmarks.gpu_bench", reason="needs triton")
pytest.importorskip("transformers")

from benchmarks import (  # noqa: E402 - behind the check for triton
    device_records,
    device_timing,
    gpu_kernels,
    gpu_language,
    gpu_launches,
    gpu_profile,
    gpu_requests,
    gpu_vision,
)
from ovfast.bench.workloads import Workload  # noqa: E402

TINY = CheckpointSpec(
    image_size=28, vision_layers=1, vision_mlp=64, grid=(2, 2), anyres_max=1,
    hidden=96, heads=7, kv_heads=1, head_dim=16, mlp=80, layers=1,
)  # fmt: skip


class OnceTimer:
    """In place of `CudaTimer`: calls each work once more, as the bench has called it before."""

    def device(self, works, **options):
        return self.host(works)

    def captured(self, work):
        return work

    def host(self, works, **options):
        return device_timing.host_samples(works, 1, 0, lambda: None)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    for module in (gpu_vision, gpu_kernels):
        monkeypatch.setattr(module, "VIEWS", (2,))
        monkeypatch.setattr(module, "PICTURES_HW", ((30, 26),))
        monkeypatch.setattr(module, "FRAME_HW", (20, 40))
        monkeypatch.setattr(module, "NUM_FRAMES", 2)
    monkeypatch.setattr(gpu_language, "ROWS", (1, 3))
    monkeypatch.setattr(gpu_language, "CONTEXTS", (9,))
    monkeypatch.setattr(gpu_language, "PROMPTS", (9,))
    monkeypatch.setattr(gpu_language, "NEW_TOKENS", 3)
    monkeypatch.setattr(gpu_launches, "ROWS", (3,))
    monkeypatch.setattr(gpu_launches, "CONTEXT", 9)
    monkeypatch.setattr(gpu_launches, "CHAINS", 1)
    monkeypatch.setattr(gpu_launches, "TINY_WIDTH", 32)
    monkeypatch.setattr(gpu_profile, "NUM_VIEWS", 1)
    monkeypatch.setattr(gpu_profile, "PROMPT", 9)
    monkeypatch.setattr(gpu_profile, "CONTEXT", 9)
    monkeypatch.setattr(gpu_requests, "MAX_SEQ_LEN", 256)
    monkeypatch.setattr(gpu_requests, "FRAME_HW", (20, 40))
    names = {
        "two": Workload("two", ((30, 26), (28, 30))),
        "clip": Workload("clip", num_frames=2),
    }
    monkeypatch.setattr(gpu_requests, "WORKLOADS", names)
    monkeypatch.setattr(gpu_requests, "NAMES", tuple(names))
    path = tmp_path / "rows.jsonl"
    return gpu_bench.Bench(
        "tiny",
        TINY,
        records=device_records.Records(path, 600.0, header(gpu="A GPU", machine=MACHINE)),
        timer=OnceTimer(),
        out=tmp_path,
        directory=tmp_path / "files",
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def rows_of(bench):
    """(workload, side or variant) of every row; none may have failed."""
    rows = read(bench.out / "rows.jsonl").rows
    assert [row for row in rows if row.error] == []
    assert {row.parameters["model"] for row in rows} == {"tiny"}
    read(bench.out / "rows.jsonl").by_key()  # raises if two rows have one key
    return [(row.workload, row.parameters.get("variant", row.side)) for row in rows]


@pytest.mark.slow
@pytest.mark.interpreter
def test_both_sides_have_the_same_weights(bench):
    """The logits of a prompt, as its rows stand between the tower and the language model."""
    ids = torch.arange(5, 14)
    with torch.inference_mode():
        cache = bench.model.new_cache(num_slots=1, max_positions=9)
        embeds = bench.model.language_model.embed(ids.int())
        ours = bench.model.language_model.prefill(embeds, cache, cache.allocate(), 0, range(9))
        theirs = bench.theirs(input_ids=ids[None]).logits[0]
        assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())
        assert float(theirs.abs().max()) > 1
        pixels = gpu_bench.random_pixels(50, 54)
        rows = bench.model.build_inputs_embeds(bench.request(pixels))
        features = gpu_vision._picture_features(bench, pixels)
        features = getattr(features, "pooler_output", features)[0]
        assert float((rows - features).abs().max()) < 1e-4 * float(features.abs().max())


@pytest.mark.slow
@pytest.mark.interpreter
def test_vision_works(bench, monkeypatch):
    gpu_vision.tower(bench)
    gpu_vision.vision(bench)
    monkeypatch.setattr(gpu_vision.gpu_models, "fast_processor", lambda files: stand_in(bench))
    gpu_vision.preprocess(bench)
    found = rows_of(bench)
    assert [side for name, side in found if name == "tower, 2 views"] == [
        "ovfast", "eager", "transformers",
    ]  # fmt: skip
    sides = ["ovfast", "same size", "transformers"]
    assert [side for name, side in found if name.startswith("vision, 2 frames")] == sides
    assert [side for name, side in found if name == "preprocess 26x30"] == [
        *sides, "transformers-fast",
    ]  # fmt: skip
    assert [side for name, side in found if name == "preprocess 2 frames"] == sides


def stand_in(bench):
    """The Pillow processor in place of the fast one, which needs torchvision."""

    def process(pictures, return_tensors, device):
        assert device == "cpu"
        return bench.pil_processor(pictures, return_tensors=return_tensors)

    return process


@pytest.mark.interpreter
def test_kernel_works(bench):
    gpu_kernels.kernels(bench)
    found = rows_of(bench)
    names = {name.partition(",")[0] for name, _ in found}
    assert names == {
        "layer_norm", "view_attention", "patch_embed", "fused_linear qkv", "fused_linear out",
        "fused_linear fc1", "fused_linear fc2", "fused_linear projector", "pool_rows",
        "project_and_place", "resample 26x30",
    }  # fmt: skip
    assert ("fused_linear fc1, 2 views", "cublas") in found
    assert ("pool_rows, 2 frames", "torch") in found


@pytest.mark.interpreter
def test_peers_of_kernels_do_the_same(bench, monkeypatch):
    """What stands beside a kernel computes what the kernel does."""
    compared = []

    def compare(name, works):
        peer = next((side for side in works if side in ("torch", "cublas", "sdpa")), None)
        if peer is None or name.startswith(("patch_embed", "resample")):
            return
        ours, theirs = works["ovfast"](), works[peer]()
        if name.startswith("view_attention"):
            theirs = theirs.transpose(1, 2).reshape(ours.shape)
        errors = (ours - theirs).abs().amax(1)
        # Of rows that are newlines pooling writes nothing.
        error = errors.median() if name.startswith("pool_rows") else errors.max()
        assert float(error) < 1e-4, name
        compared.append(name)

    monkeypatch.setattr(gpu_kernels, "_race", lambda _, *given, **work: compare(*given))
    bench.each = lambda name, function, *arguments: function(bench, *arguments)
    gpu_kernels.kernels(bench)
    assert len(compared) == 11  # the tower's six, and of a picture and a clip the projector's


@pytest.mark.interpreter
def test_tile_works(bench, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "VIEWS", (1,))
    gpu_kernels.tiles(bench)
    found = rows_of(bench)
    tiles = len(gpu_kernels.fused_linear._HALF_TILES)
    of_fc2 = [side for name, side in found if name == "tiles of fused_linear fc2, 1 views"]
    assert len(of_fc2) == 1 + 2 + tiles  # whether bits are the same, both sides, tiles


@pytest.mark.slow
@pytest.mark.interpreter
def test_decode_works(bench):
    gpu_language.decode(bench)
    rows = read(bench.out / "rows.jsonl").rows
    timed = {(row.side, row.parameters["rows"], row.parameters["timed"]) for row in rows}
    assert timed == {
        ("ovfast", 1, "request"), ("transformers", 1, "request"),
        ("ovfast", 1, "device"), ("ovfast", 1, "host"), ("transformers", 1, "host"),
        ("ovfast", 3, "device"), ("ovfast", 3, "host"), ("transformers", 3, "host"),
    }  # fmt: skip
    rows_of(bench)


@pytest.mark.interpreter
def test_prefill_and_answers_of_a_static_cache(bench, monkeypatch):
    gpu_language.prefill(bench)
    sides = [side for _, side in rows_of(bench)]
    assert sides == ["ovfast", "attention=triton", "transformers"]
    asked, clock = [], [0.0]
    monkeypatch.setattr(gpu_language.time, "perf_counter", lambda: clock[0])

    def generate(ids, **options):
        asked.append(options)
        clock[0] += 1e-3 * options["max_new_tokens"]
        return ids

    bench.theirs = SimpleNamespace(generate=generate)
    gpu_language.compiled(bench)
    assert {options["cache_implementation"] for options in asked} == {"static"}
    assert rows_of(bench)[-1] == ("decode at 9", "transformers-static")


@pytest.mark.slow
@pytest.mark.interpreter
def test_first_tokens(bench):
    gpu_requests.ttft(bench)
    sides = ["ovfast", "same size", "transformers"]
    assert rows_of(bench) == [(name, side) for name in ("two", "clip") for side in sides]


@pytest.mark.slow
@pytest.mark.interpreter
def test_launch_works(bench):
    gpu_launches.gemv(bench)
    gpu_launches.launches(bench)
    found = rows_of(bench)
    for name in ("qkv", "out", "gate_up", "down", "head"):
        assert (f"decode_{name}, 3 rows", "cublas") in found
    assert ("decode_attention, 3 rows", "ovfast") in found
    assert ("launches of a step at 9", "without PDL") in found


@pytest.mark.interpreter
def test_products_of_a_layer_do_the_same(bench):
    """cuBLAS's side of `gemv` reads the weight that the kernel reads, and multiplies alike."""
    layer = gpu_launches._layer(bench, bench.ops.decode, 3)
    down, head = layer.down(), layer.head()
    for work in (down, head):
        assert work.num_bytes > 0
        work.run()
    summed = layer._down_partials.sum(0)[:3]
    assert float((summed - down.product()).abs().max()) < 1e-4


@pytest.mark.slow
@pytest.mark.interpreter
def test_profiles(bench):
    gpu_profile.write_tables(bench)
    for stage in ("tower", "prefill", "step"):
        assert "Self CPU" in (bench.out / f"profile-tiny-{stage}.txt").read_text()


@pytest.mark.interpreter
def test_a_row_that_ends_is_noticed(bench):
    steps = gpu_launches.Steps(bench, 9, 2)
    steps()
    steps.check()
    steps._state.slots[1] = -1
    with pytest.raises(RuntimeError, match="rows ended"):
        steps.check()


@pytest.mark.interpreter
def test_a_side_that_fails_leaves_a_row_and_the_others_race(bench):
    def fail():
        raise ValueError("no such tile")

    works = {"ovfast": lambda: 1.0, "64x64": fail, "torch": fail, "eager": lambda: 2.0}
    assert bench.time_host("a kernel", works) == {"ovfast": [1.0], "eager": [2.0]}
    rows = read(bench.out / "rows.jsonl").rows
    assert [(row.side, row.parameters.get("variant")) for row in rows] == [
        ("ovfast", "64x64"),
        ("torch", None),
    ]
    assert {row.error for row in rows} == {"ValueError: no such tile"}


@pytest.mark.interpreter
def test_what_fails_leaves_a_row(bench, capsys):
    def fail(_, what):
        raise ValueError(what)

    bench.each("a kernel", fail, "no such tile")
    (row,) = read(bench.out / "rows.jsonl").rows
    assert (row.workload, row.error) == ("a kernel", "ValueError: no such tile")
    bench.records._deadline = 0.0
    with pytest.raises(device_records.OutOfTime):
        bench.race("kernels", "one", {"ovfast": [1.0]})
    assert len(read(bench.out / "rows.jsonl").rows) == 2  # it is written all the same
