"""Logits of the whole model by the Triton kernels on a device, against transformers in bfloat16.

At the real sizes, with few layers. The truth is transformers in float32 on the CPU, from the same
weights; ours may be wrong by twice what transformers is on the device.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from ovfast.decode_rows import RowState
from ovfast.models.qwen2_rows import Qwen2Rows
from tests.support import hf, runtime
from tests.support.accuracy import assert_two_times_rule
from tests.support.checkpoints import CheckpointSpec
from tests.support.devices import requires_cuda
from tests.support.requests import Image, Request, Text, Video, make_request

pytest.importorskip("triton", reason="needs triton")

pytestmark = [requires_cuda, pytest.mark.gpu]

DEVICE, BACKEND, DTYPE = "cuda", "triton", torch.bfloat16
TOWER = {"vision_hidden": 1152, "vision_mlp": 4304, "vision_heads": 16, "image_size": 384}
SPECS = {
    "0.5b": CheckpointSpec(
        **TOWER, hidden=896, mlp=4864, layers=3, heads=14, kv_heads=2, head_dim=64,
        vocab_size=152000, dtype=DTYPE,
    ),
    # A small vocabulary: the head is that of 0.5B but for its width.
    "7b": CheckpointSpec(
        **TOWER, hidden=3584, mlp=18944, layers=2, heads=28, kv_heads=4, head_dim=128, tie=False,
        dtype=DTYPE,
    ),
}  # fmt: skip
# A text beyond one split of the context; pictures of 2 and of 5 views; frames.
MEDIA = {
    "text": [Text(300)],
    "square": [Text(5), Image(384, 384), Text(9)],
    "wide": [Text(5), Image(480, 640), Text(9)],
    "video": [Text(3), Video(3), Text(9)],
}
NUM_STEPS = 8


@cache
def expected_logits(path: Path, media: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of transformers: in bfloat16 on the device, and in float32 on the CPU."""
    request = request_of(path, media)
    theirs = hf.load_model(path, DTYPE, DEVICE)
    logits = hf.all_logits(theirs, hf.make_inputs(path, request, DTYPE, DEVICE)).cpu()
    return logits, hf.all_logits(hf.load_model(path), hf.make_inputs(path, request))


def request_of(path: Path, media: str) -> Request:
    model = runtime.load_model(path, DTYPE, DEVICE, BACKEND)
    return make_request(MEDIA[media], model.config)


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def assert_as_exact(out: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> None:
    """The rule of kernels for all logits together, and for the worst of them."""
    assert out.shape == theirs.shape == truth.shape
    error, their_error = rms(out - truth), rms(theirs - truth)
    assert error <= 2 * their_error, f"error {error:.3e}, of transformers {their_error:.3e}"
    assert_two_times_rule(out.to(DTYPE), theirs.to(DTYPE), truth.double())


@torch.inference_mode()
@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize("spec", SPECS)
def test_logits_of_a_prompt(random_checkpoint, spec, media):
    path = random_checkpoint(SPECS[spec])
    ours = runtime.load_model(path, DTYPE, DEVICE, BACKEND)
    logits = runtime.all_logits(ours, request_of(path, media)).cpu()
    assert_as_exact(logits, *expected_logits(path, media))


@torch.inference_mode()
@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize("spec", SPECS)
def test_logits_of_steps(random_checkpoint, spec, media):
    """The same prompt, its last tokens decoded one by one."""
    path = random_checkpoint(SPECS[spec])
    ours = runtime.load_model(path, DTYPE, DEVICE, BACKEND)
    request = request_of(path, media)
    num_tokens, start = request.num_tokens, request.num_tokens - NUM_STEPS
    cache = ours.new_cache(num_slots=1, max_positions=num_tokens)
    ours.language_model.prefill(ours.build_inputs_embeds(request)[:start], cache, 0)
    kernels, found = ours._ops.decode, []
    forbidden = torch.zeros(ours.vocab_size, dtype=torch.bool, device=DEVICE)
    rows = RowState(ours.vocab_size, forbidden, kernels=kernels)
    decoder = Qwen2Rows(ours.language_model, cache, kernels)
    rows.slots[0] = 0
    for position in range(start, num_tokens):
        rows.positions[0], rows.tokens[0] = position, int(request.input_ids[position])
        decoder.decode(rows, 1, -(-num_tokens // kernels.split))
        found.append(rows.logits[0].clone())
    theirs, truth = expected_logits(path, media)
    assert_as_exact(torch.stack(found).cpu(), theirs[start:], truth[start:])
