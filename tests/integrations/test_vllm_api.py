"""vLLM's offline interface over the demo model, whose answers are known, and random models."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovfast
from ovfast import CheckpointError, MediaError, OptionError, PromptError
from ovfast.integrations.vllm_api import LLM, Logprob, SamplingParams
from tests.support.prompts import clip, picture

SAMPLES = Path(ovfast.__file__).parent / "demo" / "samples"
QUESTION = "How many shapes are in the picture?"
TURN = "<|im_start|>user\n<image>\n{}<|im_end|>\n<|im_start|>assistant\n"
# As vLLM's own examples are written; only the first line is another in a script for ovfast.
SCRIPT = """
from vllm import LLM, SamplingParams
from PIL import Image

llm = LLM(model=MODEL, max_model_len=1024, max_num_seqs=2, gpu_memory_utilization=0.8,
          limit_mm_per_prompt={"image": 1}, trust_remote_code=True, seed=0)
sampling_params = SamplingParams(temperature=0.0, max_tokens=64, stop_token_ids=None)
prompt = "<|im_start|>user\\n<image>\\n" + QUESTION + "<|im_end|>\\n<|im_start|>assistant\\n"
image = Image.open(PICTURE).convert("RGB")
inputs = [{"prompt": prompt, "multi_modal_data": {"image": image}}] * 2
outputs = llm.generate(inputs, sampling_params=sampling_params)
texts = []
for output in outputs:
    texts.append(output.outputs[0].text)
    print(output.request_id, output.prompt, output.outputs[0].finish_reason)
"""
IMPORT = "from vllm import LLM, SamplingParams"


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM("demo", max_model_len=2048, max_num_seqs=4, device="cpu", dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Iterator[LLM]:
    path = str(tiny_checkpoint)
    with LLM(path, tokenizer=path, max_model_len=1024, device="cpu", max_num_seqs=999) as llm:
        yield llm


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 24} | options))


def data_uri(name: str) -> str:
    encoded = base64.b64encode((SAMPLES / name).read_bytes()).decode()
    return f"data:image/png;base64,{encoded}"


def test_a_script_with_another_import_line_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert SCRIPT.count(IMPORT) == 1
    script = SCRIPT.replace(IMPORT, "from ovfast.integrations.vllm_api import LLM, SamplingParams")
    scope: dict[str, Any] = {
        "MODEL": "demo",
        "QUESTION": QUESTION,
        "PICTURE": SAMPLES / "shapes.png",
    }
    exec(compile(script, "script", "exec"), scope)
    expected = ovfast.generate(QUESTION, images=SAMPLES / "shapes.png", device="cpu").text
    assert scope["texts"] == [expected, expected]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("0 <|im_start|>user")
    assert printed[-1].endswith("stop")
    scope["llm"].shutdown()


def test_outputs_are_the_engines(demo: LLM) -> None:
    image = Image.open(SAMPLES / "shapes.png")
    prompt = {"prompt": TURN.format(QUESTION), "multi_modal_data": {"image": image}}
    (output,) = demo.generate(prompt, greedy(logprobs=3))
    inputs = demo.engine.prepare(TURN.format(QUESTION), images=image, raw=True)
    expected = demo.engine.generate(inputs, max_new_tokens=24, logprobs=3)
    assert output.prompt_token_ids == inputs.input_ids.tolist()
    assert output.prompt == TURN.format(QUESTION)
    (answer,) = output.outputs
    assert (answer.index, answer.text) == (0, expected.text)
    assert answer.token_ids == list(expected.token_ids)
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    assert answer.finished()
    assert answer.logprobs is not None
    assert expected.logprobs is not None
    for position, entry in zip(answer.logprobs, expected.logprobs, strict=True):
        assert position[entry.token_id] == Logprob(
            entry.logprob, 1, demo.engine._processor.decode([entry.token_id])
        )
        assert [(key, value.logprob) for key, value in position.items()] == list(entry.top)
        assert [value.rank for value in position.values()] == [1, 2, 3]
    total = sum(entry.logprob for entry in expected.logprobs)
    assert answer.cumulative_logprob == pytest.approx(total)


FRAMES = [Image.fromarray(frame) for frame in clip(3)]
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("What?", {}),
    "image": ("<image> What?", {"image": picture(90, 120)}),
    "images": ("<image> or <image>", {"image": [picture(60, 90), FRAMES[0]]}),
    "video": ("Look: <video>", {"video": clip(3)}),
    "described": ("Look: <video>", {"video": (clip(3), {"fps": 2.0})}),
    "frames": ("Look: <video>", {"video": FRAMES}),
    "stacked": ("<video><video>", {"video": np.stack([clip(3), clip(3)])}),
    "mixed": ("<video><image><video>", {"image": [picture(60, 90)], "video": [clip(2), FRAMES]}),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_ids_are_prompts_of_text(tiny: LLM, name: str) -> None:
    """Ids with one placeholder a medium, as a tokenizer makes them, become the same request."""
    text, media = PROMPTS[name]
    (expected,) = tiny.generate({"prompt": text, "multi_modal_data": media}, greedy(max_tokens=4))
    ids = tiny.get_tokenizer()(text)["input_ids"]
    prompt = {"prompt_token_ids": ids, "multi_modal_data": media, "multi_modal_uuids": None}
    (output,) = tiny.generate(prompt, greedy(max_tokens=4))
    assert output.prompt is None
    assert output.prompt_token_ids == expected.prompt_token_ids
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    if not media:
        (plain,) = tiny.generate(ids, greedy(max_tokens=4))
        assert plain.outputs == output.outputs


def test_chat_takes_openais_messages(demo: LLM) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": data_uri("shapes.png"), "detail": "high"}},
        {"type": "text", "text": QUESTION},
    ]
    (output,) = demo.chat([{"role": "user", "content": content}], greedy())
    expected = demo.engine.generate(QUESTION, images=SAMPLES / "shapes.png", max_new_tokens=24)
    assert output.outputs[0].text == expected.text
    assert output.prompt == TURN.format(QUESTION)
    chats = [[{"role": "user", "content": content}], [{"role": "user", "content": "How many?"}]]
    first, _ = demo.chat(chats, greedy(), use_tqdm=False)
    assert first.outputs == output.outputs
    said = demo.engine._processor.decode(expected.token_ids[:2])
    rest = expected.text.removeprefix(said)
    continued = [*chats[0], {"role": "assistant", "content": said}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    (output,) = demo.chat(continued, greedy(), **options)
    assert output.outputs[0].text == rest


def test_a_continued_message_may_merge_with_the_template(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Where two newlines are one token, as Qwen2's tokenizer has it, the template's goes."""
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["ĊĊ"] = vocab.pop(max(vocab, key=lambda word: (word.startswith("Ġw"), vocab[word])))
    tokenizer["model"]["merges"].append(["Ċ", "Ċ"])
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "\nA"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    with LLM(tmp_path, device="cpu", max_model_len=64) as llm:
        (output,) = llm.chat(turns, greedy(max_tokens=1), **options)
        assert output.prompt is not None
        assert output.prompt.endswith("assistant\n\nA")
        expected = llm.engine.prepare(output.prompt, raw=True)
    assert output.prompt_token_ids == expected.input_ids.tolist()
    assert vocab["ĊĊ"] in output.prompt_token_ids


def test_local_files_need_a_directory(demo: LLM) -> None:
    url = (SAMPLES / "shapes.png").as_uri()
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": url}, "What?"]}]
    with pytest.raises(MediaError, match="allowed_local_media_path"):
        demo.chat(chat)
    with LLM("demo", allowed_local_media_path=str(SAMPLES), device="cpu") as llm:
        assert llm.chat(chat, greedy())[0].outputs[0].text


def test_stops_and_their_reasons(demo: LLM) -> None:
    prompt = {"prompt": TURN.format(QUESTION), "multi_modal_data": {"image": picture(90, 90)}}
    (free,) = demo.generate(prompt, greedy())[0].outputs
    words = free.text.split(" ")
    (output,) = demo.generate(prompt, greedy(stop=[words[1], "never"]))[0].outputs
    assert (output.text, output.stop_reason) == (words[0] + " ", words[1])
    (output,) = demo.generate(prompt, greedy(stop=words[1], include_stop_str_in_output=True))[
        0
    ].outputs
    assert (output.text, output.finish_reason) == (" ".join(words[:2]), "stop")
    token = free.token_ids[2]
    (output,) = demo.generate(prompt, greedy(stop_token_ids=[token]))[0].outputs
    assert (output.token_ids, output.stop_reason) == (free.token_ids[:3], token)
    (output,) = demo.generate(prompt, greedy(max_tokens=2))[0].outputs
    assert (output.finish_reason, output.stop_reason) == ("length", None)
    (output,) = demo.generate(prompt, greedy(ignore_eos=True, min_tokens=24))[0].outputs
    assert len(output.token_ids) == 24
    assert [demo.engine._processor.decode([t]) for t in free.token_ids[:2]] == [" shapes", ":"]
    (output,) = demo.generate(prompt, greedy(stop="shapes: ", min_tokens=2))[0].outputs
    assert (output.text, output.stop_reason) == (" ", "shapes: "), "begins within the least"
    (output,) = demo.generate(prompt, greedy(stop="shapes", min_tokens=2))[0].outputs
    assert (output.text, output.stop_reason) == (free.text, None), "complete within them"
    (output,) = demo.generate(prompt, greedy(detokenize=False))[0].outputs
    assert (output.text, output.token_ids) == ("", free.token_ids)


def test_sampling_seeds_and_several_answers(tiny: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.5, seed=5, max_tokens=6)
    first = [answer.token_ids for answer in tiny.generate("How many?", params)[0].outputs]
    again = [answer.token_ids for answer in tiny.generate("How many?", params)[0].outputs]
    assert first == again
    assert len({tuple(ids) for ids in first}) == 3
    second = SamplingParams(temperature=1.5, seed=6, max_tokens=6)
    both = tiny.generate(["How many?", "How many?"], [second, greedy(max_tokens=6)])
    assert both[0].outputs[0].token_ids == first[1]
    loose = SamplingParams(temperature=1.5, max_tokens=6)
    drawn = [each.outputs[0].token_ids for each in tiny.generate(["How many?"] * 2, loose)]
    assert drawn[0] != drawn[1]


def test_the_seed_of_the_model_fixes_requests_without_one(tiny_checkpoint: Path) -> None:
    def run(seed: int | None) -> Any:
        with LLM(tiny_checkpoint, seed=seed, max_model_len=128, device="cpu") as llm:
            outputs = llm.generate(["How?", "What?"], SamplingParams(max_tokens=8))
            return [each.outputs[0].token_ids for each in outputs]

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_max_tokens_end_at_the_model(tiny: LLM) -> None:
    params = greedy(max_tokens=5000, min_tokens=2000, ignore_eos=True)
    (output,) = tiny.generate("How many?", params)
    assert output.prompt_token_ids is not None
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 1024
    assert output.outputs[0].finish_reason == "length"


def test_all_logprobs(tiny: LLM) -> None:
    (output,) = tiny.generate("How many?", greedy(max_tokens=1, logprobs=-1))
    assert output.outputs[0].logprobs is not None
    assert len(output.outputs[0].logprobs[0]) == tiny.engine.config.text.vocab_size


def test_default_sampling_comes_from_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    settings = '{"temperature": 0.7, "top_k": 20, "max_new_tokens": 9, "eos_token_id": 594}'
    (tmp_path / "generation_config.json").write_text(settings)
    with LLM(tmp_path, device="cpu") as llm:
        expected = SamplingParams(temperature=0.7, top_k=20, max_tokens=9)
        assert llm.get_default_sampling_params() == expected
        assert len(llm.generate("How?")[0].outputs[0].token_ids) <= 9
    with LLM(tmp_path, device="cpu", generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize(
    "arguments",
    [
        {"tensor_parallel_size": 2},
        {"tokenizer": "other/model"},
        {"tokenizer": 5},
        {"quantization": "awq"},
        {"enable_lora": True},
        {"hf_overrides": {"x": 1}},
        {"generation_config": "other"},
        {"mm_processor_kwargs": {"num_crops": 4}},
        {"mm_processor_kwargs": "anyres"},
        {"limit_mm_per_prompt": {"image": "four"}},
        {"limit_mm_per_prompt": 4},
        {"max_num_seqs": "4"},
        {"max_model_length": 4},
    ],
)
def test_refused_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ovfast.OVFastError):
        LLM("demo", device="cpu", **arguments)


def test_other_refusals(demo: LLM) -> None:
    image = picture(40, 50)
    for error, prompt in (
        (PromptError, {"prompt": "x", "prompt_token_ids": [1]}),
        (PromptError, {"prompt": "x", "prompt_embeds": image}),
        (PromptError, {"prompt": "<image> x"}),
        (PromptError, {"prompt_token_ids": [1], "multi_modal_data": {"image": image}}),
        (PromptError, {"prompt": "x", "multi_modal_data": {"audio": image}}),
        (PromptError, {"prompt": "x", "multi_modal_data": {"image": {"image_embeds": image}}}),
        (OptionError, {"prompt": "x", "mm_processor_kwargs": {"num_crops": 1}}),
        (PromptError, []),
        (PromptError, [10**6]),
        (PromptError, [10**30]),
        (PromptError, [[3, -5]]),
    ):
        with pytest.raises(error):
            demo.generate(prompt)
    for options in (
        {"lora_request": object()},
        {"tokenization_kwargs": {"truncate_prompt_tokens": 3}},
        {"sampling_params": [greedy(), greedy()]},
        {"sampling_params": ovfast.SamplingParams()},
        {"sampling_params": {"temperature": 0.0}},
    ):
        with pytest.raises(OptionError):
            demo.generate("x", **options)
    chat = [{"role": "user", "content": "x"}]
    for options in (
        {"tools": [{}]},
        {"chat_template": "x"},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
    ):
        with pytest.raises(OptionError):
            demo.chat(chat, **options)
    with pytest.raises(OptionError, match="bad_words=5"):
        SamplingParams(bad_words=5)
    for messages in ([], {"role": "user", "content": "x"}, None):
        with pytest.raises(PromptError):
            demo.chat(messages)
    with pytest.raises(CheckpointError):
        LLM("/nowhere/at/all")


def test_limits_of_media(tiny_checkpoint: Path) -> None:
    limits = {"image": {"count": 1}, "video": 0}
    with LLM(tiny_checkpoint, limit_mm_per_prompt=limits, device="cpu") as llm:
        images = {"image": [picture(40, 50)] * 2}
        with pytest.raises(PromptError, match="2 images"):
            llm.generate({"prompt": "<image><image>", "multi_modal_data": images})
        buffer = io.BytesIO()
        Image.fromarray(picture(40, 50)).save(buffer, "PNG")
        uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        part = {"type": "image_url", "image_url": uri}
        with pytest.raises(PromptError, match="2 images"):
            llm.chat([{"role": "user", "content": [part, part, "x"]}])


def test_visual_options_of_a_call(tiny: LLM) -> None:
    prompt = {"prompt": "<image> x", "multi_modal_data": {"image": picture(90, 300)}}
    (full,) = tiny.generate(prompt, greedy(max_tokens=1))
    (base,) = tiny.generate(prompt, greedy(max_tokens=1), mm_processor_kwargs={"max_views": 1})
    prompt["mm_processor_kwargs"] = {"max_views": 1}
    (own,) = tiny.generate(prompt, greedy(max_tokens=1))
    assert full.prompt_token_ids is not None
    assert base.prompt_token_ids is not None
    assert len(full.prompt_token_ids) > len(base.prompt_token_ids)
    assert own.prompt_token_ids == base.prompt_token_ids
