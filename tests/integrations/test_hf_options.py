"""What the transformers shape refuses, and the bytes behind pixel values."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ovfast import BackendError, ConfigError, MediaError, OptionError, PromptError
from ovfast.integrations.hf import OVFastForConditionalGeneration
from ovfast.integrations.hf_options import HONOURED, NEUTRAL, NO_EFFECT
from ovfast.integrations.hf_tensors import prompt_rows, recover_bytes, requests

transformers = pytest.importorskip("transformers", minversion="5.10")

IDS = {"input_ids": torch.tensor([[40, 41, 42]])}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Iterator[OVFastForConditionalGeneration]:
    loaded = OVFastForConditionalGeneration.from_pretrained(
        tiny_checkpoint,
        torch_dtype="float32",
        device_map={"": "cpu"},
        low_cpu_mem_usage=True,
        attn_implementation="sdpa",
        max_seq_len=512,
    )
    yield loaded
    loaded.close()


REFUSED: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"no_repeat_ngram_size": 3},
    {"logits_processor": [lambda ids, scores: scores]},
    {"prefix_allowed_tokens_fn": lambda batch, ids: [1]},
    {"synced_gpus": True},
    {"assistant_model": object()},
    {"negative_prompt_ids": IDS["input_ids"]},
    {"negative_prompt_attention_mask": IDS["input_ids"]},
    {"custom_generate": "someone/something"},
    {"typical_p": 0.5},
    {"guidance_scale": 1.5},
    {"bad_words_ids": [[3]]},
    {"sequence_bias": {(3,): 1.0}},
    {"suppress_tokens": [5]},
    {"output_attentions": True},
    {"output_hidden_states": True},
    {"prompt_lookup_num_tokens": 3},
    {"watermarking_config": {"bias": 2.0}},
    {"position_ids": torch.arange(3)[None]},
    {"inputs_embeds": torch.zeros(1, 3, 128)},
    {"past_key_values": object()},
    {"labels": IDS["input_ids"]},
    {"logits_to_keep": 1},
    {"vision_feature_layer": -2},
    {"vision_aspect_ratio": "anyres_max_4"},
    {"num_return_sequences": 2},
    {"num_return_sequences": 0, "do_sample": True},
    {"num_return_sequences": "2", "do_sample": True},
    {"do_sample": True, "temperature": "hot"},
    {"max_new_tokens": 2.5},
    {"min_new_tokens": "2"},
    {"min_length": "2"},
    {"max_length": "9"},
    {"pad_token_id": "x"},
    {"suppress_tokens": 5},
    {"generation_config": {"max_new_tokens": 3}},
    {"stopping_criteria": 5},
    {"do_sample": True, "temperature": 0.0},
    {"return_dict_in_generate": True, "output_scores": True, "repetition_penalty": 1.2},
    {"stop_strings": ["x"]},
    {"max_length": 3},
    {"max_new_token": 3},
    {"eos_token_id": "x"},
    {"inputs": IDS["input_ids"]},
]


def test_ids_beyond_the_vocabulary_are_refused(model: OVFastForConditionalGeneration) -> None:
    for wrong in (10**6, -200):
        with pytest.raises(PromptError, match="0 to"):
            model.generate(torch.tensor([[40, wrong]]), max_new_tokens=3)


def test_wrong_arguments_of_forward(model: OVFastForConditionalGeneration) -> None:
    for options in (
        {"return_dict": False},
        {"logits_to_keep": "x"},
        {"logits_to_keep": torch.tensor([7])},
    ):
        with pytest.raises(OptionError):
            model(**IDS, **options)


@pytest.mark.parametrize("options", REFUSED, ids=lambda options: next(iter(options)))
def test_what_is_not_computed_raises(
    model: OVFastForConditionalGeneration, options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError):
        model.generate(**IDS, **options)


def test_a_misspelt_name_is_answered_with_the_right_one(
    model: OVFastForConditionalGeneration,
) -> None:
    with pytest.raises(OptionError, match="max_new_tokens"):
        model.generate(**IDS, max_new_token=3)


def test_every_field_of_a_generation_config_is_in_one_table(
    model: OVFastForConditionalGeneration,
) -> None:
    """A field that no table names is refused once it has a value."""
    fields = {name for name in vars(transformers.GenerationConfig()) if name[0] != "_"}
    assert not set(HONOURED) & set(NO_EFFECT)
    assert set(HONOURED) <= fields
    expected = model.generate(**IDS, max_new_tokens=4)
    for name in sorted(fields - set(HONOURED)):
        if name in NO_EFFECT or name in NEUTRAL:
            given = {name: NEUTRAL.get(name, 1)}
            assert torch.equal(model.generate(**IDS, max_new_tokens=4, **given), expected)
        else:
            with pytest.raises(OptionError, match=name):
                model.generate(**IDS, max_new_tokens=4, **{name: 3})


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True},
        {"device_map": {"vision_tower": 0, "language_model": 1}},
        {"dtype": "int3"},
        {"max_sequence_length": 4},
    ],
)
def test_loading_refuses_too(tiny_checkpoint: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        OVFastForConditionalGeneration.from_pretrained(tiny_checkpoint, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device 0 here")
@pytest.mark.parametrize("device_map", [0, "cuda:0", {"": 0}, {"": torch.device("cuda", 0)}])
def test_devices_are_named_as_transformers_names_them(
    tiny_checkpoint: Path, device_map: Any
) -> None:
    with pytest.raises(BackendError, match="CUDA devices were found"):
        OVFastForConditionalGeneration.from_pretrained(tiny_checkpoint, device_map=device_map)


def test_sampling_starts_from_transformers_defaults(model: OVFastForConditionalGeneration) -> None:
    options = model.plan({"do_sample": True}, 3).options
    assert (options["temperature"], options["top_k"], options["top_p"]) == (1.0, 50, 1.0)
    assert options["max_new_tokens"] == 20
    options = model.plan(
        {"do_sample": True, "top_k": 0, "min_p": 0.1, "temperature": None}, 3
    ).options
    assert (options["temperature"], options["top_k"], options["min_p"]) == (1.0, None, 0.1)
    assert model.plan({"temperature": 0.5}, 3).is_greedy


def test_the_original_layout_is_refused(random_checkpoint: Any) -> None:
    with pytest.raises(ConfigError, match="original layout"):
        OVFastForConditionalGeneration.from_pretrained(random_checkpoint(layout="orig"))


def test_moving_raises_where_it_would_move(model: OVFastForConditionalGeneration) -> None:
    assert model.to(device="cpu") is model
    assert model.to("cpu", None, non_blocking=True) is model
    with pytest.raises(BackendError, match="device_map"):
        model.to("cuda:0")
    with pytest.raises(BackendError, match="dtype"):
        model.to(torch.float16)


def levels() -> torch.Tensor:
    every = np.arange(256, dtype=np.uint8)
    return torch.from_numpy(np.stack([every, every[::-1], every]).reshape(1, 3, 16, 16))


def formulas() -> dict[str, torch.Tensor]:
    """Pixel values by the arithmetic of transformers' Pillow and fast processors."""
    x = levels()
    rescaled = torch.from_numpy((x.numpy().astype(np.float64) * (1 / 255)).astype(np.float32))
    return {
        "pil": (rescaled - 0.5) / 0.5,
        "float32": (x.float() * np.float32(1 / 255) - 0.5) / 0.5,
        "fused": (x.float() - 0.5 * 255) / (0.5 * 255),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("formula", ["pil", "float32", "fused"])
def test_every_byte_is_recovered(formula: str, dtype: torch.dtype) -> None:
    recovered = recover_bytes(formulas()[formula].to(dtype))
    assert recovered.dtype == np.uint8
    assert np.array_equal(recovered, levels().permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 1e-6,
        lambda x: x * 0.5,
        lambda x: x.clamp(max=0.99),
        lambda x: x * torch.nan,
        lambda x: x + 1,
        lambda x: x.to(torch.uint8),
        lambda x: torch.cat([x, torch.zeros_like(x)]),
        lambda x: (x * 0.5 + 0.5 - torch.tensor([0.48, 0.46, 0.41])[:, None, None]) / 0.27,
    ],
)
def test_values_that_come_from_no_bytes_are_refused(change: Any) -> None:
    with pytest.raises(MediaError, match="pixel values"):
        recover_bytes(change(formulas()["pil"]))


def test_masks_with_holes_are_refused() -> None:
    ids = torch.arange(4)[None]
    with pytest.raises(OptionError, match="zeros between ones"):
        prompt_rows(ids, torch.tensor([[1, 0, 1, 1]]), None)
    with pytest.raises(OptionError, match="padding alone"):
        prompt_rows(ids, torch.zeros(1, 4), None)
    with pytest.raises(OptionError, match="same shape"):
        prompt_rows(ids, torch.ones(1, 3), None)
    for wrong in ([[1, 2]], ids[0], ids[:0], ids.float()):
        with pytest.raises(OptionError, match="return_tensors='pt'"):
            prompt_rows(wrong, None, None)
    (row,) = prompt_rows(ids, torch.tensor([[False, True, True, False]]), None)
    assert (row.first, row.ids.tolist()) == (1, [1, 2])


@pytest.mark.parametrize(
    "tensors",
    [
        {"image_sizes": torch.tensor([[20, 30]])},
        {"pixel_values": [[1.0]], "image_sizes": [[20, 30]]},
        {"pixel_values": -torch.ones(1, 2, 3, 84, 84)},
        {"pixel_values": -torch.ones(1, 2, 3, 84, 84), "image_sizes": [[20, 30], [20, 30]]},
        {"pixel_values": -torch.ones(1, 2, 3, 84, 84), "image_sizes": [[20.0, 30.0]]},
        {"pixel_values": -torch.ones(1, 2, 3, 84, 84), "image_sizes": [[90, 90]]},
        {"pixel_values": torch.zeros(1, 2, 3, 56, 56), "image_sizes": [[20, 30]]},
        {"pixel_values": -torch.ones(3, 3, 84, 84), "image_sizes": [[20, 30]]},
        {
            "pixel_values": -torch.ones(1, 2, 3, 84, 84),
            "image_sizes": [[20, 30]],
            "batch_num_images": [2],
        },
        {
            "pixel_values": -torch.ones(1, 2, 3, 84, 84),
            "image_sizes": [[20, 30]],
            "batch_num_images": [-1, 2],
        },
        {"pixel_values_videos": torch.zeros(2, 3, 84, 84)},
        {"pixel_values_videos": torch.zeros(1, 2, 3, 56, 56)},
    ],
)
def test_tensors_of_other_shapes_are_refused(
    model: OVFastForConditionalGeneration, tensors: dict[str, Any]
) -> None:
    placeholders = [596] * 19 if "pixel_values_videos" in tensors else [595] * 72
    rows = prompt_rows(torch.tensor([[40, *placeholders]]), None, None)
    with pytest.raises((OptionError, MediaError), match=r"expected|at this checkpoint|pass both"):
        requests(rows, model.engine.config, **tensors)
