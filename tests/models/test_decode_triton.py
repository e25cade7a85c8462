"""The language model by the Triton kernels: prefill and decode steps, against plain torch.

In the interpreter on tiny models; on a device also the real head sizes, in bfloat16, with graphs.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ovfast import reference
from ovfast.checkpoint import CheckpointWeights
from ovfast.config import ModelConfig
from ovfast.cuda_graphs import CudaCapture, GraphCache
from ovfast.decode_rows import RowState
from ovfast.models.llava_onevision import LlavaOnevision
from ovfast.models.qwen2_rows import Qwen2Rows
from ovfast.ops import PackedLinear, make_ops
from ovfast.quantize import fake_float8
from ovfast.roofline import text_body_params, text_head_params
from tests.support import runtime
from tests.support.checkpoints import CheckpointSpec
from tests.support.devices import quick_first, quick_kernel_params, requires_cuda
from tests.support.engines import REQUESTS, open_engine, run_threads
from tests.support.interpreter import INTERPRETING
from tests.support.requests import Image, Text, make_request
from tests.support.runners import OPTIONS

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


def empty_rows(model):
    """No id is forbidden."""
    forbidden = torch.zeros(model.vocab_size, dtype=torch.bool, device=model.device)
    return RowState(model.vocab_size, forbidden, kernels=model._ops.decode)


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
    rows = empty_rows(ours)
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
            best = int(rows.block_argmax[row, rows.block_max[row].argmax()])
            assert best == int(rows.logits[row].argmax())
            tokens[index] = int(expected.argmax())
            rows.tokens[row] = tokens[index]


def fake_float8_models(path: Path, dtype: torch.dtype) -> tuple[LlavaOnevision, LlavaOnevision]:
    """Plain torch with the language model's weights as float8 keeps them: one that rounds the rows
    it multiplies too, as a prefill does, and one that does not, as a decode step. `dtype` is
    what the weights are rounded to before.
    """

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return fake_float8(x).float()

    def linear(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        return reference.packed_linear(rounded(x), packed)

    prefill = replace(
        make_ops(torch.device("cpu"), "reference"),
        linear=linear,
        head=linear,
        add_linear=partial(reference.add_linear, apply_linear=linear),
        gate_up=partial(reference.gate_up, apply_linear=linear),
    )

    def pack(weight: torch.Tensor, bias: torch.Tensor | None = None, *_: int) -> PackedLinear:
        return PackedLinear(rounded(weight.to(dtype)), bias)

    models = []
    for ops in (prefill, make_ops(torch.device("cpu"), "reference")):
        ops = replace(
            ops,
            pack_qkv=pack,
            pack_gate_up=pack,
            pack_output=pack,
            tie_head=lambda embedding: pack(embedding.weight),
        )
        config, cpu = ModelConfig.from_checkpoint(path), torch.device("cpu")
        weights = CheckpointWeights(path, config)
        models.append(LlavaOnevision(config, weights, ops, torch.float32, cpu))
    return models[0], models[1]


@torch.inference_mode()
@pytest.mark.parametrize("spec", quick_first("7_to_1", SPECS))
@pytest.mark.parametrize(("device", "dtype"), quick_kernel_params())
def test_float8_prefill_and_steps(random_checkpoint, device, dtype, spec):
    """A prompt's logits and three steps of two rows over its cache, against float8 in plain torch.

    What differs in the last bit may round to the next float8, a 16th away: the logits of a prompt
    in 16 bits are near those of float32 as a whole alone.
    """
    path, where = random_checkpoint(SPECS[spec]), torch.device(device)
    config = ModelConfig.from_checkpoint(path)
    ops = make_ops(where, "triton", quantization="fp8")
    ours = LlavaOnevision(config, CheckpointWeights(path, config), ops, dtype, where)
    prefill, plain = fake_float8_models(path, dtype)
    caches = [m.new_cache(num_slots=2, max_positions=320) for m in (ours, plain)]
    rows = empty_rows(ours)
    decoder = Qwen2Rows(ours.language_model, caches[0], ours._ops.decode)
    tokens = []
    for row, length in enumerate((9, 40)):
        request = make_request([Text(length)], plain.config, seed=length)
        own = ours.prefill(request, caches[0], row)[0].cpu()
        expected = prefill.prefill(request, caches[1], row)[0]
        if dtype == torch.float32:
            assert float((own - expected).abs().max()) <= 2e-2 * float(expected.abs().max())
        assert float(F.cosine_similarity(own, expected, dim=0)) >= 0.99
        rows.slots[row], rows.positions[row] = row, request.num_tokens
        tokens.append(int(expected.argmax()))
        rows.tokens[row] = tokens[-1]
    caches[1].k_cache.copy_(caches[0].k_cache)
    caches[1].v_cache.copy_(caches[0].v_cache)
    for _ in range(3):
        decoder.decode(rows, 2, 1)
        rows.positions += rows.slots >= 0
        for row in range(2):
            expected = plain.decode(tokens[row], caches[1], row)
            error = float((rows.logits[row].cpu() - expected).abs().max())
            assert error <= BOUND[dtype] * float(expected.abs().max())
            tokens[row] = int(expected.argmax())
            rows.tokens[row] = tokens[row]


@pytest.mark.slow
@pytest.mark.interpreter
def test_an_engine_with_float8_in_the_interpreter(random_checkpoint):
    """Its weights are float8, its bytes are counted, and a request does not know its neighbours."""
    path = random_checkpoint(SPECS["7_to_1"])
    options = {"max_seq_len": 320, "max_batch_size": 2, "backend": "triton", "quantization": "fp8"}
    with open_engine(path, **options) as engine:
        language_model = engine._model.language_model
        layer, text = language_model.layers[0], engine.config.text
        for packed in (layer.qkv_proj, layer.o_proj, layer.down_proj, language_model.lm_head):
            assert packed.weight.dtype == torch.float8_e4m3fn
            assert packed.scales.shape == (len(packed.weight),)
        assert language_model.embedding.weight.dtype == torch.float32
        assert engine.storage == "fp8"
        float8 = text_body_params(text) + text_head_params(text)
        rest = engine.config.num_parameters - text_body_params(text)  # the embedding is tied
        assert engine.estimate("Q").weight_bytes == float8 + 4 * rest
        ask = {"max_new_tokens": 3, "ignore_eos": True}
        alone = [engine.generate(prompt, **ask).token_ids for prompt in ("One", "Another one")]
        both = engine.generate(["One", "Another one"], **ask)
        assert [output.token_ids for output in both] == alone
        pictures = engine.generate(**REQUESTS["image"], max_new_tokens=2, ignore_eos=True)
        assert len(pictures.token_ids) == 2


@requires_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_float8_on_a_device(random_checkpoint, graphs):
    """In half the memory; alone, in a batch and twice the same tokens."""
    path = random_checkpoint(REAL)
    options = {"device": "cuda", "max_seq_len": 2048, "max_batch_size": 16, "quantization": "fp8"}
    with open_engine(path, cuda_graphs=graphs, **options) as engine:
        prompts = [f"Number {index} of many" * (1 + index % 5) for index in range(16)]
        ask = {"max_new_tokens": 20, "ignore_eos": True}
        alone = [engine.generate(prompt, **ask).token_ids for prompt in prompts]
        for _ in range(2):
            assert [out.token_ids for out in engine.generate(prompts, **ask)] == alone


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
            {"prompt": "Go on.", "max_new_tokens": 4, "temperature": 1.3, "min_p": 0.01, "seed": 2},
            {"prompt": "Go on.", "max_new_tokens": 4, "repetition_penalty": 1.5, "logprobs": 0},
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
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_graphs_change_no_token_of_any_kind(random_checkpoint, options):
    """Nor do graphs that the second request replays."""
    path, tokens = random_checkpoint(REAL), []
    for graphs in (True, False):
        with open_engine(
            path, cuda_graphs=graphs, device="cuda", max_seq_len=1024, max_batch_size=4
        ) as engine:
            for prompts in (["One"] * 3, ["One", "Another", "Number three"]) * 2:
                answers = engine.generate(prompts, **options)
                tokens.append([answer.token_ids for answer in answers])
    assert tokens[:4] == tokens[4:]
    assert tokens[:2] == tokens[2:4]


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
    rows = empty_rows(ours)
    decoder = Qwen2Rows(ours.language_model, cache, ours._ops.decode)
    rows.slots[0], rows.positions[0], rows.tokens[0] = 0, 700, 17
    graphs, seen = GraphCache(CudaCapture(torch.device("cuda")), 1 << 30), []
    for _ in range(3):
        graphs.run("step", lambda: decoder.decode(rows, 1, 4))
        seen.append(rows.logits[0].clone())
    assert graphs.keys == ("step",)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


SLEEP_CYCLES = 20_000_000  # some 10 ms: a step that does not wait for its caller comes before


@requires_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("loads_on", ["the default stream", "a stream of its own"])
def test_callers_on_streams_of_their_own(random_checkpoint, loads_on, graphs):
    """Their streams are busy when they call; prefills, steps and cancelled rows stay in order."""
    path = random_checkpoint(REAL)
    options = {"device": "cuda", "max_seq_len": 1024, "max_batch_size": 4, "cuda_graphs": graphs}
    stream = torch.cuda.Stream() if loads_on == "a stream of its own" else None
    with torch.cuda.stream(stream):
        engine = open_engine(path, **options)
    with engine:
        ask = {"max_new_tokens": 20, "ignore_eos": True}
        prompts = [f"Number {index} of many" for index in range(4)]
        alone = [engine.generate(prompt, **ask).token_ids for prompt in prompts]
        inputs = [engine.prepare(prompt) for prompt in prompts]
        logits = [engine.forward(each).clone() for each in inputs]
        torch.cuda.synchronize()

        def work(index: int) -> list[bool]:
            right = []
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(4):
                    torch.cuda._sleep(SLEEP_CYCLES)
                    left = engine.stream("Leave.", **ask)
                    next(left)
                    torch.cuda._sleep(SLEEP_CYCLES)
                    left.close()
                    right.append(engine.generate(prompts[index], **ask).token_ids == alone[index])
                    torch.cuda._sleep(SLEEP_CYCLES)
                    right.append(torch.equal(engine.forward(inputs[index]), logits[index]))
            return right

        results = run_threads([partial(work, index) for index in range(4)])
        assert results == [[True] * 8] * 4


@requires_cuda
@pytest.mark.gpu
def test_ten_thousand_steps_leak_nothing(random_checkpoint):
    path = random_checkpoint(REAL)
    with open_engine(path, device="cuda", max_seq_len=4096) as engine:
        ask = {"max_new_tokens": 1000, "ignore_eos": True}
        first = engine.generate("Go on and on", **ask).token_ids
        engine.generate("Go on and on", **ask)  # captures what came once
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for _ in range(10):
            assert engine.generate("Go on and on", **ask).token_ids == first
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before[0]
        assert torch.cuda.memory_reserved() <= before[1]


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
