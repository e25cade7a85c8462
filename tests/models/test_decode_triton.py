"""The language model by the Triton kernels: prefill and decode steps, against plain torch.

In the interpreter on tiny models; on a device also the real head sizes, in bfloat16, with graphs.
"""

import pytest
import torch

from ovfast.cuda_graphs import CudaCapture, GraphCache
from ovfast.decode_rows import RowState
from ovfast.models.qwen2_rows import Qwen2Rows
from tests.support import runtime
from tests.support.checkpoints import CheckpointSpec
from tests.support.devices import quick_first, quick_kernel_params, requires_cuda
from tests.support.engines import REQUESTS, open_engine
from tests.support.interpreter import INTERPRETING
from tests.support.requests import Image, Text, make_request

pytest.importorskip("triton", reason="needs triton")

VISION = {"image_size": 28, "vision_layers": 1, "vision_mlp": 64, "grid": (1, 1)}
# The groupings of 0.5B and 7B (7 queries a key) and of 72B (8), small.
SPECS = {
    "7_to_1": CheckpointSpec(**VISION, hidden=96, heads=7, kv_heads=1, head_dim=16, mlp=80),
    "8_to_1": CheckpointSpec(
        **VISION, hidden=64, heads=8, kv_heads=1, head_dim=16, mlp=64, layers=1, tie=False
    ),
}
REAL = CheckpointSpec(
    **VISION, hidden=896, heads=14, kv_heads=2, head_dim=64, mlp=4864, layers=3,
    vocab_size=152000, dtype=torch.bfloat16,
)  # fmt: skip
BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # of the largest logit


@torch.inference_mode()
@pytest.mark.parametrize("spec", quick_first("7_to_1", SPECS))
@pytest.mark.parametrize(("device", "dtype"), quick_kernel_params())
def test_prefill_and_steps(random_checkpoint, device, dtype, spec):
    """Logits of prompts, of one in two chunks, and of three steps of two rows."""
    path = random_checkpoint(SPECS[spec])
    ours = runtime.load_model(path, dtype=dtype, device=device, backend="triton")
    plain = runtime.load_model(path, dtype=torch.float32)
    lengths, bound = (9, 300), BOUND[dtype]
    requests = [make_request([Text(n)], plain.config, seed=n) for n in lengths]
    caches = [m.new_cache(num_slots=3, max_positions=320) for m in (ours, plain)]
    rows = RowState(ours.vocab_size, torch.zeros(ours.vocab_size, dtype=torch.bool, device=device))
    decoder = Qwen2Rows(ours.language_model, caches[0], ours._ops.decode)
    tokens = []
    for row, request in zip((0, 2), requests, strict=True):
        slot = 2 - row
        own = ours.prefill(request, caches[0], slot)[0].cpu()
        expected = plain.prefill(request, caches[1], slot)[0]
        assert float((own - expected).abs().max()) <= bound * float(expected.abs().max())
        rows.slots[row], rows.positions[row] = slot, request.num_tokens
        tokens.append(int(expected.argmax()))
        rows.tokens[row] = tokens[-1]
    embeds = ours.build_inputs_embeds(requests[1])
    ours.language_model.prefill(embeds[:170], caches[0], 1)
    chunked = ours.language_model.prefill(embeds[170:], caches[0], 1, 170)[0].cpu()
    assert float((chunked - expected).abs().max()) <= bound * float(expected.abs().max())
    for _ in range(3):
        decoder.decode(rows, 4, 2)
        rows.positions += rows.slots >= 0
        for index, row in enumerate((0, 2)):
            expected = plain.decode(tokens[index], caches[1], 2 - row)
            error = float((rows.logits[row].cpu() - expected).abs().max())
            assert error <= bound * float(expected.abs().max())
            assert int(rows.greedy[row]) == int(rows.logits[row].argmax())
            tokens[index] = int(expected.argmax())
            rows.tokens[row] = tokens[index]


@pytest.mark.interpreter
def test_an_engine_in_the_interpreter(random_checkpoint):
    """Tokens, log-probabilities and stops of the reference, through the public calls."""
    if not INTERPRETING:
        pytest.fail("runs in the child alone")
    path = random_checkpoint(SPECS["7_to_1"])
    options = {"max_seq_len": 320, "max_batch_size": 2}
    with (
        open_engine(path, backend="triton", attention="triton", **options) as ours,
        open_engine(path, backend="reference", **options) as plain,
    ):
        assert ours.ops.where["rope_and_store"] == "triton"
        asks = [
            {"prompt": "How many?", "max_new_tokens": 5},
            {**REQUESTS["image"], "max_new_tokens": 4, "logprobs": 2},
            {"prompt": "Go on.", "max_new_tokens": 5, "temperature": 1.0, "top_p": 0.9, "seed": 4},
        ]
        for ask in asks:
            got, expected = ours.generate(**ask), plain.generate(**ask)
            assert got.token_ids == expected.token_ids
            assert got.text == expected.text
        both = ours.generate(["One", "Another one"], max_new_tokens=4)
        assert [out.token_ids for out in both] == [
            plain.generate(prompt, max_new_tokens=4).token_ids for prompt in ("One", "Another one")
        ]
        scores = [e.score("Is it?", ["yes", "no no"])[1].logprob for e in (ours, plain)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        ask, options = REQUESTS["image"], ["yes", "no no"]
        with ours.encode(images=ask["images"], keep="prefix") as handle:
            held = ours.generate(ask["prompt"], media=handle, max_new_tokens=2)
            assert held.token_ids == plain.generate(**ask, max_new_tokens=2).token_ids
            assert held.usage.cached_tokens == handle.num_prefix_tokens
            found = ours.choose(ask["prompt"], options, media=handle)
        expected = plain.choose(options=options, **ask)
        assert found.choice == expected.choice
        assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-4)


@requires_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_rows_on_a_device(random_checkpoint, graphs):
    """Alone, in a batch, twice, with graphs and without: the same tokens."""
    path = random_checkpoint(REAL)
    options = {"device": "cuda", "max_seq_len": 2048, "max_batch_size": 16}
    with open_engine(path, cuda_graphs=graphs, **options) as engine:
        prompts = [f"Number {index} of many" * (1 + index % 5) for index in range(16)]
        ask = {"max_new_tokens": 40, "ignore_eos": True}
        alone = [engine.generate(prompt, **ask).token_ids for prompt in prompts]
        for _ in range(2):
            assert [out.token_ids for out in engine.generate(prompts, **ask)] == alone
        sampled = {**ask, "temperature": 1.0, "top_p": 0.9, "seed": 7, "logprobs": 2}
        first = engine.generate(prompts[3], **sampled)
        assert engine.generate(prompts, **sampled)[3].token_ids == first.token_ids


@requires_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_handles_and_choices_on_a_device(random_checkpoint, graphs):
    """Greedy tokens of a question over a handle are those over the picture; all memory comes free.

    Numbers differ as products of other row counts do: in bfloat16 by a few of its spacings.
    """
    options = {"device": "cuda", "max_seq_len": 2048, "max_batch_size": 2}
    with open_engine(random_checkpoint(REAL), cuda_graphs=graphs, **options) as engine:
        media, texts = {"images": REQUESTS["image"]["images"]}, ["yes", "no no", "no other"]
        alone = [engine.score("Is it?", [text], **media)[0].logprob for text in texts]
        ask = {"max_new_tokens": 1, "ignore_eos": True}
        expected = [engine.generate(f"Number {n}?", **media, **ask).token_ids for n in range(4)]
        for keep in ("features", "prefix"):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            with engine.encode(**media, keep=keep) as handle:
                assert torch.cuda.memory_allocated() - before >= handle.nbytes
                prompts = [f"Number {n}?" for n in range(4)]
                outputs = engine.generate(prompts, media=handle, **ask)
                assert [output.token_ids for output in outputs] == expected
                found = engine.choose("Is it?", texts, media=handle)
                assert [s.logprob for s in found.scores] == pytest.approx(alone, rel=0.05)
            assert torch.cuda.memory_allocated() <= before + (1 << 20)


@requires_cuda
@pytest.mark.gpu
@torch.inference_mode()
def test_a_captured_step_equals_an_eager_one(random_checkpoint):
    ours = runtime.load_model(
        random_checkpoint(REAL), dtype=torch.bfloat16, device="cuda", backend="triton"
    )
    request = make_request([Text(700)], ours.config)
    cache = ours.new_cache(num_slots=1, max_positions=1024)
    ours.prefill(request, cache, 0)
    rows = RowState(ours.vocab_size, torch.zeros(ours.vocab_size, dtype=torch.bool, device="cuda"))
    decoder = Qwen2Rows(ours.language_model, cache, ours._ops.decode)
    rows.slots[0], rows.positions[0], rows.tokens[0] = 0, 700, 17
    graphs, seen = GraphCache(CudaCapture(torch.device("cuda")), 1 << 30), []
    for _ in range(3):
        graphs.run("step", lambda: decoder.decode(rows, 1, 4))
        seen.append(rows.logits[0].clone())
    assert graphs.keys == ("step",)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@requires_cuda
@pytest.mark.gpu
def test_ten_thousand_steps_leak_nothing(random_checkpoint):
    path = random_checkpoint(REAL)
    with open_engine(path, device="cuda", max_seq_len=4096) as engine:
        ask = {"max_new_tokens": 1000, "ignore_eos": True}
        first = engine.generate("Go on and on", **ask).token_ids
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(10):
            assert engine.generate("Go on and on", **ask).token_ids == first
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before


@requires_cuda
@pytest.mark.gpu
def test_pictures_end_to_end_on_a_device(random_checkpoint):
    path = random_checkpoint(REAL)
    with open_engine(path, device="cuda", max_seq_len=2048) as engine:
        request = make_request([Text(3), Image(30, 40)], engine.config)
        assert request.num_tokens > 3
        one = engine.generate(**REQUESTS["three_images"], max_new_tokens=8)
        assert engine.generate(**REQUESTS["three_images"], max_new_tokens=8).token_ids == (
            one.token_ids
        )
        assert one.timings.vision_ms > 0
