"""OpenAI's messages and parameters, without a host."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ovfast import MediaError, OptionError, PromptError, VisualOptions
from ovfast.integrations.arguments import visual_with
from ovfast.integrations.openai_messages import parse_messages
from ovfast.integrations.openai_options import (
    HONOURED,
    NEUTRAL,
    NO_EFFECT,
    parse_options,
    unsupported,
)
from ovfast.media import load_video
from ovfast.sampling import SamplingParams

URI = "data:image/png;base64,AAAA"
PICTURE = Image.new("RGB", (4, 3))


def parts(*given: Any, **options: Any) -> Any:
    (message,) = parse_messages([{"role": "user", "content": list(given)}], **options)
    return message["content"]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("Hi", {"type": "text", "text": "Hi"}),
        ({"type": "text", "text": "Hi", "id": 1}, {"type": "text", "text": "Hi"}),
        ({"text": "Hi"}, {"type": "text", "text": "Hi"}),
        ({"type": "input_text", "text": "Hi"}, {"type": "text", "text": "Hi"}),
        ({"type": "image_url", "image_url": URI}, {"type": "image", "image": URI}),
        (
            {"type": "image_url", "image_url": {"url": URI, "detail": "auto"}, "uuid": "1"},
            {"type": "image", "image": URI},
        ),
        ({"image_url": URI}, {"type": "image", "image": URI}),
        ({"type": "input_image", "image_url": URI}, {"type": "image", "image": URI}),
        ({"type": "image_pil", "image_pil": PICTURE}, {"type": "image", "image": PICTURE}),
        ({"type": "image", "image": PICTURE}, {"type": "image", "image": PICTURE}),
        (
            {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
            {"type": "video", "video": "data:video/mp4;base64,AAAA"},
        ),
    ],
)
def test_parts(part: Any, expected: dict[str, Any]) -> None:
    assert parts(part) == [expected]


def test_messages_keep_their_order_and_lose_other_keys() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": ["a", {"image_url": URI}, "b"], "name": "x"},
        {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None},
    ]
    parsed = parse_messages(messages)
    assert [message["role"] for message in parsed] == ["system", "user", "assistant"]
    assert [part["type"] for part in parsed[1]["content"]] == ["text", "image", "text"]
    assert all(set(message) == {"role", "content"} for message in parsed)


@pytest.mark.parametrize(
    "messages",
    [
        "Hi",
        [],
        [3],
        [{"content": "x"}],
        [{"role": "tool", "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [3]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 3}]}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": [{"image_url": URI, "video_url": URI}]}],
        [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
    ],
)
def test_other_messages_are_refused(messages: Any) -> None:
    with pytest.raises(PromptError):
        parse_messages(messages)


def test_sources_are_data_or_below_the_allowed_directory(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    file, other = inside / "a b.png", tmp_path / "b.png"
    PICTURE.save(file)
    PICTURE.save(other)
    (inside / "link.png").symlink_to(other)

    def source(url: str, **options: Any) -> Any:
        return parts({"image_url": url}, **options)[0]["image"]

    for url in (str(file), file.as_uri(), str(inside / ".." / "in" / "a b.png")):
        assert source(url, allowed_path=inside) == str(file)
        with pytest.raises(MediaError, match="no directory is allowed"):
            source(url)
    for url in (str(other), other.as_uri(), str(inside / ".." / "b.png"), "link.png"):
        url = str(inside / url) if url == "link.png" else url
        with pytest.raises(MediaError, match="outside"):
            source(url, allowed_path=inside)
    for url in ("http://a.b/c.png", "https://a.b/c.png", "ftp://a/b", "s3://a/b", "http://[a"):
        with pytest.raises(MediaError, match="fetches nothing"):
            source(url, allowed_path="/")
    with pytest.raises(MediaError, match="no directory is allowed"):
        source("a.png", allowed_path="")  # not the working directory
    with pytest.raises(MediaError, match="null byte"):
        source("a\0.png", allowed_path="/")


@pytest.mark.parametrize("wrap", [lambda frames: frames, lambda frames: {"url": frames}])
def test_frames_of_a_video_are_no_way_to_other_files(tmp_path: Path, wrap: Any) -> None:
    PICTURE.save(tmp_path / "a.png")
    part = {"type": "video_url", "video_url": wrap([PICTURE, str(tmp_path / "a.png")])}
    with pytest.raises(MediaError, match="no directory is allowed"):
        parts(part)
    with pytest.raises(MediaError, match="outside"):
        parts(part, allowed_path=tmp_path / "in")
    (allowed,) = parts(part, allowed_path=tmp_path)
    assert load_video(allowed["video"]).shape == (2, 3, 4, 3)


def test_a_video_of_pictures() -> None:
    """vLLM's clients send the frames of a video as pictures, parted by commas."""
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    frame = base64.b64encode(buffer.getvalue()).decode()
    (part,) = parts({"video_url": f"data:video/png;base64,{frame},{frame}"})
    assert load_video(part["video"]).shape == (2, 3, 4, 3)


def test_parameters_become_sampling_parameters() -> None:
    options = parse_options(
        {
            "max_completion_tokens": 5,
            "temperature": 0.5,
            "top_k": 7,
            "stop": "x",
            "seed": 2**64 - 1,
            "n": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "min_tokens": 1,
            "user": "me",
            "mm_processor_kwargs": {"max_views": 1},
            "presence_penalty": None,
        }
    )
    expected = SamplingParams(
        max_new_tokens=5,
        temperature=0.5,
        top_k=7,
        stop="x",
        seed=2**64 - 1,
        logprobs=2,
        min_new_tokens=1,
    )
    assert options.sampling == expected
    assert [params.seed for params in options.seeded(3)] == [2**64 - 1, 0]
    assert visual_with(VisualOptions(), options.visual) == VisualOptions(max_views=1)
    plain = parse_options({"top_k": -1, "logprobs": False})
    assert plain.sampling == SamplingParams()
    assert [params.seed for params in plain.seeded(3)] == [None]


@pytest.mark.parametrize(
    "params",
    [
        {"n": 0},
        {"n": True},
        {"top_logprobs": 2},
        {"logprobs": 5},
        {"temperature": "hot"},
        {"max_tokens": 0},
        {"stop": [""]},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"add_generation_prompt": False},
    ],
)
def test_wrong_values(params: dict[str, Any]) -> None:
    assert not unsupported(params)
    with pytest.raises(OptionError):
        parse_options(params)


def test_what_is_unsupported() -> None:
    assert not set(HONOURED) & set(NO_EFFECT) | set(NEUTRAL) & (set(HONOURED) | set(NO_EFFECT))
    for name, values in NEUTRAL.items():
        assert unsupported({name: None}) == []
        assert all(unsupported({name: value}) == [] for value in values)
        assert unsupported({name: 0.5}) == [name]
    assert unsupported({"tools": [{}], "max_tokens": 3, "top_c": 1, "x": None}) == [
        "tools",
        "top_c",
    ]
