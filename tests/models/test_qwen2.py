"""What the language model promises beside parity: continuing, choosing rows, giving up, bits."""

from dataclasses import replace

import pytest
import torch

from ovfast.errors import CapacityError
from tests.support import runtime
from tests.support.checkpoints import CheckpointSpec
from tests.support.requests import Image, Text, make_request
from tests.support.runtime import encode

NUM_TOKENS = 300  # more than one block of the explicit mask
# Attention over a prefix sums in another order than in one go; float32 rounding.
CLOSE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(scope="module")
def model(random_checkpoint):
    spec = CheckpointSpec(layers=3, heads=7, kv_heads=1, head_dim=10, hidden=64, seed=5)
    return runtime.load_model(random_checkpoint(spec))


@pytest.fixture(scope="module")
def embeds(model):
    request = make_request([Text(NUM_TOKENS)], model.config)
    return model.build_inputs_embeds(request)


@pytest.fixture
def cache(model):
    return model.new_cache(num_slots=3, max_positions=NUM_TOKENS + 4)


@pytest.fixture(scope="module")
def logits(model, embeds):
    """Of every position, in one prefill."""
    cache = model.new_cache(num_slots=1, max_positions=NUM_TOKENS)
    return model.language_model.prefill(embeds, cache, cache.allocate(), 0, range(NUM_TOKENS))


def test_last_row_is_the_default(model, embeds, cache, logits):
    out = model.language_model.prefill(embeds, cache, cache.allocate())
    assert out.shape == (1, model.vocab_size)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, logits[-1:], **CLOSE)


@pytest.mark.parametrize(
    "wanted", [[0], [5, 6, 299], torch.tensor([1, 298]), list(range(10, 300)), []]
)
def test_wanted_rows(model, embeds, cache, logits, wanted):
    out = model.language_model.prefill(embeds, cache, cache.allocate(), 0, wanted)
    torch.testing.assert_close(out, logits[wanted if len(wanted) else slice(0)], **CLOSE)


@pytest.mark.parametrize("split", [1, 150, 298, 299])
@pytest.mark.parametrize("wanted", ["all", "last"])
def test_continuing_a_prefix(model, embeds, cache, logits, split, wanted):
    language_model, slot = model.language_model, cache.allocate()
    language_model.prefill(embeds[:split], cache, slot)
    rows = range(NUM_TOKENS - split) if wanted == "all" else None
    out = language_model.prefill(embeds[split:], cache, slot, split, rows)
    torch.testing.assert_close(out, logits[split:] if rows is not None else logits[-1:], **CLOSE)
    assert cache.lengths[slot] == NUM_TOKENS


def test_several_continuations_of_one_prefix(model, embeds, cache, logits):
    """As scoring does it: truncate to the prefix, continue again."""
    language_model, slot = model.language_model, cache.allocate()
    language_model.prefill(embeds[:200], cache, slot)
    for _ in range(2):
        language_model.prefill(embeds[:50], cache, slot, 200)
        cache.truncate(slot, 200)
    out = language_model.prefill(embeds[200:250], cache, slot, 200, range(50))
    torch.testing.assert_close(out, logits[200:250], **CLOSE)


@pytest.mark.parametrize("sizes", [[1], [3], [1, 1], [4, 1, 70], [2, 2, 2]])
def test_branches_side_by_side(model, embeds, cache, sizes):
    """Each sees the prefix and itself, as if it alone followed; the slot stays as it was."""
    language_model, slot = model.language_model, cache.allocate()
    language_model.prefill(embeds[:200], cache, slot)
    starts = [210, 230, 200][: len(sizes)]
    branches = [embeds[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    hidden = language_model.branch_hidden(branches, cache, slot)
    assert cache.lengths[slot] == 200
    together = language_model.logits(hidden).split(sizes)
    for branch, logits in zip(branches, together, strict=True):
        alone = language_model.prefill(branch, cache, slot, 200, range(len(branch)))
        torch.testing.assert_close(logits, alone, **CLOSE)
        cache.truncate(slot, 200)


def test_branches_that_do_not_fit(model, embeds, cache):
    language_model, slot = model.language_model, cache.allocate()
    language_model.prefill(embeds, cache, slot)
    language_model.branch_hidden([embeds[:4], embeds[:2]], cache, slot)
    with pytest.raises(CapacityError, match="5 more tokens"):
        language_model.branch_hidden([embeds[:2], embeds[:5]], cache, slot)


def test_decoding_equals_prefill(model, cache, logits):
    request = make_request([Text(NUM_TOKENS)], model.config)
    slot = cache.allocate()
    model.language_model.prefill(model.build_inputs_embeds(request)[:290], cache, slot)
    for position in range(290, NUM_TOKENS):
        out = model.decode(int(request.input_ids[position]), cache, slot)
        torch.testing.assert_close(out, logits[position], **CLOSE)


@pytest.mark.parametrize("mlp_rows", [1, 7, 299, 300])
def test_an_mlp_takes_some_rows_at_a_time(model, embeds, cache, logits, monkeypatch, mlp_rows):
    language_model = model.language_model
    monkeypatch.setattr(language_model, "_ops", replace(language_model._ops, mlp_rows=mlp_rows))
    out = language_model.prefill(embeds, cache, cache.allocate(), 0, range(NUM_TOKENS))
    torch.testing.assert_close(out, logits, **CLOSE)


def test_inputs_are_not_written(model, embeds, cache):
    before = embeds.clone()
    model.language_model.prefill(embeds, cache, cache.allocate())
    assert torch.equal(embeds, before)


def test_bits_do_not_depend_on_the_slot_or_its_neighbours(model, embeds, cache):
    outputs = []
    for _ in range(3):
        slot = cache.allocate()
        first = model.language_model.prefill(embeds, cache, slot)[0]
        outputs.append((first, model.decode(7, cache, slot)))
    for first, second in outputs[1:]:
        assert torch.equal(first, outputs[0][0])
        assert torch.equal(second, outputs[0][1])


class GivenUpError(Exception):
    pass


def test_giving_up_leaves_the_slot_as_it_was(model, embeds, cache, logits):
    slot, calls = cache.allocate(), []

    def poll() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise GivenUpError

    with pytest.raises(GivenUpError):
        model.language_model.prefill(embeds, cache, slot, poll=poll)
    assert cache.lengths[slot] == 0
    out = model.language_model.prefill(embeds, cache, slot)
    torch.testing.assert_close(out, logits[-1:], **CLOSE)


def test_poll_is_called_between_views_and_layers(model):
    request = make_request([Text(2), Image(84, 150)], model.config)
    cache, calls = model.new_cache(num_slots=1, max_positions=request.num_tokens), []
    model.prefill(request, cache, cache.allocate(), poll=lambda: calls.append(1))
    assert len(calls) == request.plans[0].num_views + model.config.text.num_layers


def test_no_room(model, embeds):
    cache = model.new_cache(num_slots=1, max_positions=4)
    slot = cache.allocate()
    with pytest.raises(CapacityError, match="5 more tokens"):
        model.language_model.prefill(embeds[:5], cache, slot)
    model.language_model.prefill(embeds[:4], cache, slot)
    with pytest.raises(CapacityError, match="1 more tokens"):
        model.decode(3, cache, slot)
    assert cache.lengths[slot] == 4


def test_views_do_not_depend_on_the_views_beside_them(model):
    request = make_request([Image(150, 160)], model.config)
    features = encode(model, request.views)
    assert torch.equal(encode(model, request.views[2:3])[0], features[2])
