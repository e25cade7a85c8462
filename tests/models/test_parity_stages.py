"""Stages against transformers, so that a failure names its stage: tower, projector, packed rows."""

import pytest
import torch

from tests.support import hf, runtime
from tests.support.checkpoints import POST_LAYERNORM, CheckpointSpec
from tests.support.requests import Image, Text, Video, make_request
from tests.support.runtime import embed, encode

PATCH_BOUND = 1e-5  # absolute, on values of the order of 1
# Float32 rounding relative to the largest magnitude; tower and rows run through all layers.
TOWER_BOUND, PROJECTOR_BOUND, ROWS_BOUND = 1e-5, 1e-6, 1e-5

MEDIA = {
    "image": [Image(165, 240)],
    "shrunk_image": [Image(245, 415)],  # 16 views, more than anyres_max_9 keeps
    "narrow_image": [Image(11, 400)],
    "three_images": [Image(150, 60), Image(40, 300), Image(84, 84)],
    "video": [Video(3)],
}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, bound: float) -> None:
    assert ours.shape == theirs.shape
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= bound, f"differs by {error:.2e} of the largest magnitude"


@pytest.fixture(scope="module", params=["tiny", "real_views"])
def path(request, random_checkpoint):
    return random_checkpoint(
        CheckpointSpec() if request.param == "tiny" else CheckpointSpec(image_size=384, layers=1)
    )


def test_patch_embedding(path):
    ours, theirs = runtime.load_model(path), hf.load_model(path)
    request = make_request([Image(150, 160)], ours.config)
    with torch.no_grad():
        expected = theirs.model.vision_tower.embeddings(hf.normalise(request.views))
    embedded = embed(ours, request.views)
    assert float((embedded - expected).abs().max()) <= PATCH_BOUND


def test_patch_embedding_of_constant_views(path):
    """Gray 127 and black views: the pixel term and Σ w all but cancel, or add up."""
    ours, theirs = runtime.load_model(path), hf.load_model(path)
    side = ours.config.vision.image_size
    views = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    views = views.expand(4, side, side, 3).contiguous()
    with torch.no_grad():
        expected = theirs.model.vision_tower.embeddings(hf.normalise(views.numpy()))
    embedded = embed(ours, views.numpy())
    assert float((embedded - expected).abs().max()) <= PATCH_BOUND


def test_tower(path):
    ours, theirs = runtime.load_model(path), hf.load_model(path)
    request = make_request([Image(150, 160)], ours.config)
    features = encode(ours, request.views)
    assert_close(features, hf.tower_features(theirs, hf.normalise(request.views)), TOWER_BOUND)


def test_post_layernorm_is_not_applied(tiny_checkpoint):
    """The random checkpoints set it to odd constants, under which applied features would show."""
    theirs = hf.load_model(tiny_checkpoint)
    tower = theirs.model.vision_tower
    assert float(tower.post_layernorm.weight.detach()[0]) == POST_LAYERNORM["weight"]
    ours = runtime.load_model(tiny_checkpoint)
    request = make_request([Image(84, 84)], ours.config)
    features = encode(ours, request.views)
    with torch.no_grad():
        normed = tower.post_layernorm(features)
    assert float((normed - features).abs().max()) > 10
    assert_close(features, hf.tower_features(theirs, hf.normalise(request.views)), TOWER_BOUND)


def test_projector(path):
    ours, theirs = runtime.load_model(path), hf.load_model(path)
    features = torch.randn(50, ours.config.vision.hidden_size, generator=torch.manual_seed(0))
    with torch.no_grad():
        expected = theirs.model.multi_modal_projector(features)
    assert_close(ours.multi_modal_projector.project(features), expected, PROJECTOR_BOUND)


@pytest.mark.parametrize("media", MEDIA)
def test_packed_rows(path, media):
    ours, theirs = runtime.load_model(path), hf.load_model(path)
    request = make_request(MEDIA[media], ours.config)
    expected = hf.packed_rows(theirs, hf.make_inputs(path, request))
    inputs_embeds = ours.build_inputs_embeds(request)
    for span, rows in zip(request.spans, expected, strict=True):
        assert_close(inputs_embeds[span.start : span.end], rows, ROWS_BOUND)


def test_text_rows_are_copied(tiny_checkpoint):
    ours, theirs = runtime.load_model(tiny_checkpoint), hf.load_model(tiny_checkpoint)
    parts = [Text(3), Image(84, 84), Image(50, 90), Text(4), Video(1), Text(1)]
    request = make_request(parts, ours.config)
    inputs_embeds = ours.build_inputs_embeds(request)
    visual = torch.zeros(request.num_tokens, dtype=torch.bool)
    for span in request.spans:
        visual[span.start : span.end] = True
    ids = torch.from_numpy(request.input_ids)[~visual]
    assert torch.equal(inputs_embeds[~visual], theirs.get_input_embeddings().weight[ids])
