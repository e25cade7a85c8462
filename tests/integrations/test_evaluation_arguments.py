"""What the adapters of evaluation kits make of arguments; needs no kit."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ovfast
from ovfast.errors import OptionError
from ovfast.integrations.evaluation import sort_options, within_context
from ovfast.integrations.lmms_eval_requests import Prompt, sampling_params, simple_prompt
from ovfast.sampling import SamplingParams

PICTURES = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]


def test_options_are_sorted():
    given = {"max_frames_num": 8, "token_policy": "lmms_eval", "dtype": "float32"}
    options = sort_options(given | {"top_k": 3}, sampling=True)
    assert options.load == {"dtype": "float32"}
    assert options.visual == ovfast.VisualOptions(num_frames=8, token_policy="lmms_eval")
    assert options.sampling == {"top_k": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token_polcy": "paper"}, "Did you mean 'token_policy'"),
        ({"conv_template": "qwen_1_5"}, "expected one of .*num_frames"),
        ({"top_k": 3}, "unknown model argument 'top_k'"),
        ({"max_batch_size": 3}, "unknown model argument 'max_batch_size'"),
        ({"num_frames": 4, "max_frames_num": 8}, "given twice"),
        ({"token_policy": "any"}, "token_policy='any'"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        sort_options(given)


@pytest.mark.parametrize(
    ("gen_kwargs", "expected"),
    [
        ({}, SamplingParams(max_new_tokens=7)),
        ({"max_new_tokens": 5, "until": []}, SamplingParams(max_new_tokens=5)),
        ({"until": None}, SamplingParams(max_new_tokens=7)),
        ({"until": "\n"}, SamplingParams(max_new_tokens=7, stop="\n")),
        ({"until": ["a", "b"]}, SamplingParams(max_new_tokens=7, stop=["a", "b"])),
        # Greedy: what shapes sampling means nothing, a top_p of 0 neither.
        ({"temperature": 0, "top_p": 0, "num_beams": 1}, SamplingParams(max_new_tokens=7)),
        ({"do_sample": False, "temperature": 0.7, "top_k": 3}, SamplingParams(max_new_tokens=7)),
        ({"do_sample": True, "temperature": 0.0}, SamplingParams(max_new_tokens=7)),
        ({"do_sample": True}, SamplingParams(max_new_tokens=7, temperature=1.0)),
        ({"temperature": 0.2}, SamplingParams(max_new_tokens=7, temperature=0.2)),
        (
            {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0},
            SamplingParams(max_new_tokens=7, temperature=0.5, top_p=0.9),
        ),
        (
            {"repetition_penalty": 1.2, "min_new_tokens": 2, "seed": 0},
            SamplingParams(max_new_tokens=7, repetition_penalty=1.2, min_new_tokens=2, seed=0),
        ),
        ({"image_aspect_ratio": "original"}, SamplingParams(max_new_tokens=7)),
    ],
)
def test_generation_arguments(gen_kwargs: dict[str, Any], expected: SamplingParams):
    assert sampling_params(gen_kwargs, 7) == expected


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"num_beams": 5}, "num_beams=5; ovfast has no beam search"),
        ({"stop_sequences": ["\n"]}, r"\['stop_sequences'\]; expected max_new_tokens"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"do_sample": True, "top_p": 0}, "top_p=0"),
        ({"until": [""]}, "stop"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_wrong_generation_arguments_are_refused(gen_kwargs: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        sampling_params(gen_kwargs, 7)


def chat(*parts: dict[str, Any]) -> Prompt:
    return Prompt([{"role": "user", "content": list(parts)}])


SHOWN = [{"type": "image", "image": each} for each in PICTURES]
LITERAL = ("What does <image> show?", "<image>, <image>", "A <video> tag")
SAYS = {text: {"type": "text", "text": text} for text in LITERAL}


@pytest.mark.parametrize(
    ("context", "visuals", "expected"),
    [
        # Without media a marker is text.
        ("What is <image>?", None, chat({"type": "text", "text": "What is <image>?"})),
        ("", [PICTURES[0]], chat({"type": "image", "image": PICTURES[0]})),
        ("Q", PICTURES, Prompt("Q", PICTURES, None)),
        ("<image> or <image>?", PICTURES, Prompt("<image> or <image>?", PICTURES, None)),
        # Other markers than media are text, too.
        ("What does <image> show?", PICTURES, chat(*SHOWN, SAYS["What does <image> show?"])),
        ("<image>, <image>", PICTURES[:1], chat(SHOWN[0], SAYS["<image>, <image>"])),
        ("A <video> tag", PICTURES[:1], chat(SHOWN[0], SAYS["A <video> tag"])),
        ("<image> <video>", ["a.png", "b.mp4"], Prompt("<image> <video>", ["a.png"], ["b.mp4"])),
        ("Q", ["a.mp4"], Prompt("Q", None, ["a.mp4"])),
        ("Q", ["a.PNG", "b.webm"], Prompt("Q", ["a.PNG"], ["b.webm"])),
    ],
)
def test_simple_prompts(context: str, visuals: Any, expected: Prompt):
    assert simple_prompt(context, visuals, {}) == expected


def test_frames_of_a_video_task():
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(9)]
    metadata = {"task_type": "video", "sample_frames": 3}
    assert simple_prompt("Q", frames, metadata) == Prompt("Q", None, [frames[::4]])
    expected = chat({"type": "video", "video": frames[::4]}, SAYS["<image>, <image>"])
    assert simple_prompt("<image>, <image>", frames, metadata) == expected


def test_answers_end_with_the_context():
    params = SamplingParams(max_new_tokens=1024, min_new_tokens=30)
    assert within_context(params, 100, 2048) is params
    assert within_context(params, 100, 120) == SamplingParams(max_new_tokens=20, min_new_tokens=20)
    assert within_context(params, 120, 120) is params  # the engine says what is wrong


def test_the_manifest_names_classes_that_are_there():
    """As text: the classes need lmms-eval."""
    folder = Path(ovfast.__file__).parent / "integrations"
    source = (folder / "lmms_eval.py").read_text()
    manifest = (folder / "lmms_eval_manifest.py").read_text()
    for name in ("OVFastSimple", "OVFastChat"):
        assert f"class {name}(" in source
        assert f"{{CLASSES}}.{name}" in manifest
