"""Pictures to rows of the language model's input by the Triton kernels, against plain torch.

In the interpreter on a tiny tower; on a device also at the real sizes, in bfloat16, with graphs.
"""

import dataclasses

import pytest
import torch

from ovfast.cuda_graphs import CudaCapture, GraphCache
from ovfast.pixels import view_pixels
from tests.support import runtime
from tests.support.accuracy import assert_two_times_rule
from tests.support.checkpoints import CheckpointSpec
from tests.support.devices import (
    host_never_waits,
    quick_first,
    quick_kernel_params,
    requires_cuda,
)
from tests.support.engines import open_engine
from tests.support.prompts import picture
from tests.support.requests import Image, Request, Span, Text, Video, make_request

pytest.importorskip("triton", reason="needs triton")

# 16 tokens a view, an MLP of odd blocks; canvases up to 2 × 2, as the interpreter is slow.
TINY = CheckpointSpec(
    image_size=56, vision_mlp=200, vision_layers=1, hidden=64, heads=2, grid=(2, 2), anyres_max=1
)
REAL = CheckpointSpec(
    vision_hidden=1152, vision_mlp=4304, vision_heads=16, image_size=384, hidden=896, heads=14,
    head_dim=64, dtype=torch.bfloat16,
)  # fmt: skip
WIDE = dataclasses.replace(REAL, hidden=3584, heads=28, head_dim=128)
# Every kind of row: kept, shrunk and pooled tokens, newlines, text at both ends and between.
REQUESTS = {
    "text": [Text(5)],
    "kept_image": [Text(3), Image(50, 100), Text(2)],
    "shrunk_image": [Image(110, 110)],
    "two_images": [Image(50, 90), Text(2), Image(56, 56), Text(1)],
    "mixed": [Text(2), Video(2), Text(1), Image(8, 110)],
}
REAL_REQUEST = [Text(5), Image(700, 1000), Text(3), Video(3, 240, 320), Text(2)]
REAL_SIZES_HW = [(480, 640), (768, 1024), (300, 900), (1000, 200)]
FLOAT32_BOUND = 1e-5  # of the largest magnitude: rounding of two layers, as in test_parity_stages


def load(path, device, dtype, backend="triton"):
    return runtime.load_model(path, dtype=dtype, device=device, backend=backend)


def assert_as_exact(out, same_dtype, truth):
    """float32 within its rounding; 16 bits by the rule of kernels, over the whole of the stage."""
    assert out.shape == same_dtype.shape == truth.shape
    if out.dtype == torch.float32:
        assert float((out - truth).abs().max()) <= FLOAT32_BOUND * float(truth.abs().max())
    else:
        assert_two_times_rule(out, same_dtype, truth.double())


def assert_same(out, expected):
    """Bit for bit on a device.

    The interpreter's products are those of a BLAS, whose order of sums depends on where a row
    stands in a tile: there a neighbour that leaks is what can be seen.
    """
    if out.device.type == "cuda":
        assert torch.equal(out, expected)
    else:
        bound = 4 * torch.finfo(out.dtype).eps * float(expected.abs().max())
        assert float((out.float() - expected.float()).abs().max()) <= bound


def check_rows(path, device, dtype, parts, oracle_device="cpu"):
    ours = load(path, device, dtype)
    assert ours.vision_tower._ops.where["view_attention"] == "triton"
    request = make_request(parts, ours.config)
    rows = ours.build_inputs_embeds(request).cpu()
    plain = load(path, oracle_device, dtype, "reference").build_inputs_embeds(request)
    exact = load(path, oracle_device, torch.float32, "reference").build_inputs_embeds(request)
    assert_as_exact(rows, plain.cpu(), exact.cpu())
    if device == "cuda":
        for _ in range(3):
            assert torch.equal(ours.build_inputs_embeds(request).cpu(), rows), "not the same twice"


@torch.inference_mode()
@pytest.mark.parametrize("name", quick_first("mixed", REQUESTS))
@pytest.mark.parametrize(("device", "dtype"), quick_kernel_params())
def test_rows_of_inputs_embeds(random_checkpoint, device, dtype, name):
    check_rows(random_checkpoint(TINY), device, dtype, REQUESTS[name])


@requires_cuda
@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("spec", [REAL, WIDE], ids=["896", "3584"])
def test_real_rows_of_inputs_embeds(random_checkpoint, spec):
    check_rows(random_checkpoint(spec), "cuda", torch.bfloat16, REAL_REQUEST, "cuda")


def only(request, index):
    """One picture or video of a request, without any text."""
    span, plan = request.spans[index], request.plans[index]
    first = sum(plan.num_views for plan in request.plans[:index])
    return Request(
        input_ids=request.input_ids[span.start : span.end],
        spans=(Span(0, plan.num_tokens, 0),),
        plans=(plan,),
        views=request.views[first : first + plan.num_views],
        images=(),
        media=request.media[index : index + 1],
    )


def check_rows_alone(ours, parts):
    """A picture's tiles are others beside a video, and its kept rows pass through the pooling."""
    request = make_request(parts, ours.config)
    rows = ours.build_inputs_embeds(request)
    for index, span in enumerate(request.spans):
        alone = ours.build_inputs_embeds(only(request, index))
        assert_same(alone, rows[span.start : span.end])


@torch.inference_mode()
@pytest.mark.parametrize(("device", "dtype"), quick_kernel_params())
def test_rows_do_not_depend_on_what_is_beside_them(random_checkpoint, device, dtype):
    parts = [Text(2), Video(1), Text(1), Image(56, 50)]
    check_rows_alone(load(random_checkpoint(TINY), device, dtype), parts)


@requires_cuda
@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("spec", [REAL, WIDE], ids=["896", "3584"])
def test_real_rows_do_not_depend_on_what_is_beside_them(random_checkpoint, spec):
    check_rows_alone(load(random_checkpoint(spec), "cuda", torch.bfloat16), REAL_REQUEST)


@torch.inference_mode()
@pytest.mark.parametrize(("device", "dtype"), quick_kernel_params())
def test_a_view_does_not_depend_on_its_neighbours(random_checkpoint, device, dtype):
    ours = load(random_checkpoint(TINY), device, dtype)
    views = make_request([Image(50, 100)], ours.config).views
    together = runtime.encode(ours, views)
    for index in (0, len(views) - 1):
        assert_same(runtime.encode(ours, views[index : index + 1])[0], together[index])


@torch.inference_mode()
@pytest.mark.parametrize(("device", "dtype"), quick_kernel_params())
def test_groups_of_views_and_parts_do_not_change_the_result(
    random_checkpoint, device, dtype, monkeypatch
):
    """As when a request has more views than are encoded at once."""
    ours = load(random_checkpoint(TINY), device, dtype)
    request = make_request(REQUESTS["two_images"], ours.config)
    whole = ours.build_inputs_embeds(request)
    few = dataclasses.replace(ours._ops, views_a_step=1)
    monkeypatch.setattr(ours, "_ops", few)
    monkeypatch.setattr(ours.vision_tower, "_ops", few)
    assert len(ours.parts(request)) == 2
    assert_same(ours.build_inputs_embeds(request), whole)


@torch.inference_mode()
@pytest.mark.parametrize(("device", "dtype"), quick_kernel_params())
def test_requests_together_are_requests_alone(random_checkpoint, device, dtype):
    ours = load(random_checkpoint(TINY), device, dtype)
    parts = [Text(2), Image(56, 50), Text(1)], [Video(1)], [Image(28, 50), Text(3), Image(50, 28)]
    requests = [make_request(each, ours.config) for each in parts]
    together = ours.build_together(requests)
    for request, rows in zip(requests, together, strict=True):
        assert_same(rows, ours.build_inputs_embeds(request))


# 1 and 2: tiles of few views; 5, 7: common pictures; 37: the most.
@requires_cuda
@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("num_views", [1, 2, 5, 7, 37])
def test_real_tower(random_checkpoint, num_views):
    path = random_checkpoint(REAL)
    views = torch.randint(0, 256, (num_views, 384, 384, 3), dtype=torch.uint8).numpy()
    features = runtime.encode(load(path, "cuda", torch.bfloat16), views)
    plain = runtime.encode(load(path, "cuda", torch.bfloat16, "reference"), views)
    exact = runtime.encode(load(path, "cuda", torch.float32, "reference"), views)
    error, torch_error = (float((x - exact).square().mean().sqrt()) for x in (features, plain))
    assert error <= 2 * torch_error
    for index in {0, num_views - 1}:
        alone = runtime.encode(load(path, "cuda", torch.bfloat16), views[index : index + 1])
        assert torch.equal(alone[0], features[index])


@requires_cuda
@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("num_views", [1, 3, 7])
def test_graph_equals_eager(random_checkpoint, num_views, monkeypatch):
    ours = load(random_checkpoint(REAL), "cuda", torch.bfloat16)
    tower, device = ours.vision_tower, torch.device("cuda")
    views = torch.randint(0, 256, (num_views, 384, 384, 3), dtype=torch.uint8).numpy()
    eager = runtime.encode(ours, views)
    graphs = GraphCache(CudaCapture(device), 1 << 30)
    monkeypatch.setattr(tower, "_graphs", graphs)
    for _ in range(3):
        assert torch.equal(runtime.encode(ours, views), eager)
    assert graphs.keys == (num_views,)
    assert 0 < graphs.nbytes <= 1 << 30
    graphs.clear()


@requires_cuda
@pytest.mark.gpu
@torch.inference_mode()
def test_a_hundred_pictures_leak_nothing(random_checkpoint):
    ours = load(random_checkpoint(REAL), "cuda", torch.bfloat16)

    def run(count: int) -> int:
        for index in range(count):
            request = make_request([Text(4), Image(*REAL_SIZES_HW[index % 4])], ours.config)
            ours.build_inputs_embeds(request)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = run(20)
    assert run(100) <= before


@requires_cuda
@pytest.mark.gpu
def test_graphs_that_come_and_go_leak_nothing(random_checkpoint):
    """Under a ceiling a little below what all take, some go each time that all have come."""
    pictures = [picture(*size_hw) for size_hw in REAL_SIZES_HW]
    with open_engine(random_checkpoint(REAL), device="cuda", max_seq_len=8192) as engine:
        graphs = engine._model._graphs

        def ask_all(times: int) -> None:
            for pixels in pictures * times:
                for _ in range(2):  # what comes again is captured
                    engine.generate("What?", images=pixels, max_new_tokens=4, ignore_eos=True)
                assert graphs.nbytes <= graphs._max_bytes

        def held_bytes() -> tuple[int, int]:
            graphs.clear()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

        ask_all(2)
        num_graphs, graphs._max_bytes = len(graphs.keys), graphs.nbytes - (1 << 20)
        held_bytes()
        ask_all(2)
        assert 0 < len(graphs.keys) < num_graphs
        allocated, reserved = held_bytes()
        ask_all(10)
        after = held_bytes()
        assert after[0] <= allocated
        assert after[1] <= reserved


@requires_cuda
@pytest.mark.gpu
@torch.inference_mode()
def test_views_built_on_the_host_or_the_device_are_the_same(random_checkpoint):
    ours = load(random_checkpoint(REAL), "cuda", torch.bfloat16)
    request = make_request([Image(480, 640)], ours.config)
    pixels = ours._pixel_loader.load(request.media, request.plans)
    host = view_pixels(request.views, torch.device("cuda"))
    assert torch.equal(ours.vision_tower.embed(pixels), ours.vision_tower.embed(host))


@requires_cuda
@pytest.mark.gpu
@torch.inference_mode()
def test_the_host_does_not_wait_for_a_prefill(random_checkpoint):
    """Not even where question, picture and clip have sizes that come for the first time."""
    ours = load(random_checkpoint(REAL), "cuda", torch.bfloat16)
    cache = ours.new_cache(num_slots=1, max_positions=8192)
    first = make_request([Text(4), Image(480, 640), Text(3)], ours.config)
    new = make_request([Text(9), Image(500, 900), Text(2), Video(2), Text(1)], ours.config)
    ours.prefill(first, cache, 0)
    cache.truncate(0, 0)
    with host_never_waits():
        logits = ours.prefill(new, cache, 0)
    assert bool(torch.isfinite(logits).all())


@requires_cuda
@pytest.mark.gpu
def test_the_host_waits_for_tokens_alone(random_checkpoint):
    """The same through an engine, with all that admits a request and samples."""
    options = {"device": "cuda", "max_seq_len": 8192, "cuda_graphs": False}
    with open_engine(random_checkpoint(REAL), **options) as engine:
        ask = {"max_new_tokens": 3, "ignore_eos": True, "repetition_penalty": 1.2}
        engine.generate("What is it?", images=picture(480, 640), **ask)
        with host_never_waits():
            output = engine.generate("And what is this here?", images=picture(500, 900), **ask)
    assert len(output.token_ids) == 3
