"""The VLMEvalKit model, through the real VLMEvalKit; `make test-integrations` has it.

VLMEvalKit is not on PyPI under its own name; here it is as ModelScope publishes it (ms-vlmeval),
the same package with its runner inside.
"""

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovfast
from ovfast.errors import OptionError
from tests.integrations.scene_files import held_out, write_scenes
from tests.integrations.torchvision_cpu import define_operators
from tools.evaluate_demo import ask

if importlib.util.find_spec("vlmeval") is None:
    pytest.skip("VLMEvalKit is not installed; make test-integrations", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's are not ours to mend

COUNT = 8
KINDS = ("single", "several")
EVERYTHING = ovfast.VisualOptions()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def engine() -> Iterator[ovfast.Engine]:
    with ovfast.load("demo") as engine:
        yield engine


@pytest.fixture(scope="module")
def adapter() -> Any:
    define_operators()
    import ovfast.integrations.vlmevalkit as adapter

    return adapter


@pytest.fixture(scope="module")
def model(adapter: Any) -> Any:
    return adapter.OVFast("demo")


def encoded(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def choices(number: int, answer: str) -> dict[str, str]:
    """Two options; the right one is A for even rows."""
    return dict(zip("AB" if number % 2 == 0 else "BA", (answer, "Nothing of that."), strict=True))


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LMUData with two TSV files: open questions, and the same with options."""
    import pandas as pd

    root = tmp_path_factory.mktemp("LMUData")
    rows = []
    for sample in [sample for kind in KINDS for sample in held_out(kind, COUNT)]:
        pictures = [encoded(scene.image) for scene in sample.scenes]
        question, answer = sample.questions[0]
        rows.append(
            {
                "index": len(rows),
                "image": pictures[0] if len(pictures) == 1 else str(pictures),
                "question": question,
                "answer": answer,
            }
        )
    pd.DataFrame(rows).to_csv(root / "demo_scenes.tsv", sep="\t", index=False)
    with_options = [
        row | choices(row["index"], row["answer"]) | {"answer": "AB"[row["index"] % 2]}
        for row in rows
    ]
    pd.DataFrame(with_options).to_csv(root / "demo_choices.tsv", sep="\t", index=False)
    return root


@pytest.fixture
def in_data_root(data_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working directory, with LMUData set and this process's arguments kept."""
    monkeypatch.setenv("LMUData", str(data_root))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    return tmp_path


def predictions(folder: Path, name: str) -> list[str]:
    import pandas as pd

    (path,) = (path for path in folder.rglob(f"{name}.xlsx") if "T2" not in path.parent.name)
    return [str(text) for text in pd.read_excel(path)["prediction"]]


def expected_answers(engine: ovfast.Engine, **visual: Any) -> list[str]:
    options = ovfast.VisualOptions(**visual)
    return [ask(engine, sample, options) for kind in KINDS for sample in held_out(kind, COUNT)]


def test_the_runner_on_a_local_file(data_root: Path, tmp_path: Path, engine: ovfast.Engine):
    """The command line: open questions, one and several pictures."""
    command = [sys.executable, str(Path(__file__).parent / "torchvision_cpu.py")]
    command += ["ovfast.integrations.vlmevalkit", "--checkpoint", "demo", "--name", "ovfast-demo"]
    command += ["--data", "demo_scenes", "--mode", "infer", "--work-dir", str(tmp_path / "out")]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ
        | {"LMUData": str(data_root), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answers = predictions(tmp_path / "out", "ovfast-demo_demo_scenes")
    assert answers == expected_answers(engine)


def test_the_runner_scores(
    adapter: Any, in_data_root: Path, engine: ovfast.Engine, monkeypatch: pytest.MonkeyPatch
):
    """Options, VLMEvalKit's exact matching and its score; the demo is asked in words it knows."""
    import pandas as pd
    from vlmeval.config import supported_VLM

    class AsksAlone(adapter.OVFast):
        def use_custom_prompt(self, dataset: str) -> bool:
            return dataset == "demo_choices"

        def build_prompt(self, line: Any, dataset: str) -> list[dict[str, str]]:
            pictures = [{"type": "image", "value": p} for p in self.dump_image(line, dataset)]
            return [*pictures, {"type": "text", "value": line["question"]}]

    monkeypatch.setitem(supported_VLM, "alone", AsksAlone)
    arguments = ["--model", "alone", "--data", "demo_choices", "--judge", "exact_matching"]
    adapter._run([*arguments, "--work-dir", "out"])
    answers = predictions(in_data_root / "out", "alone_demo_choices")
    assert answers == expected_answers(engine)
    right = [sample.questions[0][1] for kind in KINDS for sample in held_out(kind, COUNT)]
    (score,) = pd.read_csv(in_data_root / "out" / "alone" / "alone_demo_choices_acc.csv")["Overall"]
    share = np.mean([answer == text for answer, text in zip(answers, right, strict=True)])
    assert score == pytest.approx(share)
    assert share > 0.8


def test_the_prompt_of_a_data_set(adapter: Any, in_data_root: Path, engine: ovfast.Engine):
    """VLMEvalKit's own words around question and options reach the model."""
    from vlmeval.dataset import build_dataset

    arguments = ["--checkpoint", "demo", "--name", "brief", "--option", "max_new_tokens=5"]
    arguments += ["--data", "demo_choices", "--limit", "4", "--mode", "infer"]
    adapter.main([*arguments, "--work-dir", "out"])
    dataset = build_dataset("demo_choices")
    expected = []
    for row in range(4):
        picture, words = dataset.build_prompt(row)
        assert "Options:\nA. " in words["value"]
        output = engine.generate(words["value"], images=picture["value"], max_new_tokens=5)
        expected.append(output.text)
    assert predictions(in_data_root / "out", "brief_demo_choices") == expected


def test_a_config_file(adapter: Any, in_data_root: Path, engine: ovfast.Engine):
    config = {
        "model": {"one-view": {"class": "OVFast", "model_path": "demo", "max_views": 1}},
        "data": {"demo_scenes": {"class": "CustomVQADataset", "dataset": "demo_scenes"}},
    }
    (in_data_root / "config.json").write_text(json.dumps(config))
    adapter.main(["--config", "config.json", "--mode", "infer", "--work-dir", "out"])
    answers = predictions(in_data_root / "out", "one-view_demo_scenes")
    assert answers == expected_answers(engine, max_views=1)


def local_clips(folder: Path, **frames: Any) -> Any:
    """A video data set of VLMEvalKit's over four clips in `folder`."""
    import pandas as pd
    from vlmeval.dataset.video_base import VideoBaseDataset

    class LocalClips(VideoBaseDataset):
        TYPE = "Video-VQA"

        def prepare_dataset(self, dataset_name: str) -> dict[str, str]:
            return {"root": str(folder), "data_file": str(folder / "clips.tsv")}

        def build_prompt(self, line: int, video_llm: bool) -> list[dict[str, str]]:
            assert video_llm
            row = self.data.iloc[line]
            clip = {"type": "video", "value": str(folder / row["video"])}
            return [clip, {"type": "text", "value": row["question"]}]

        def evaluate(self, eval_file: str, **judge: Any) -> None:
            raise NotImplementedError

        @classmethod
        def supported_datasets(cls) -> list[str]:
            return ["clips"]

    documents = write_scenes(folder, held_out("video", 4), "clips")
    rows = [{"video": d["videos"][0], "question": d["questions"][0]} for d in documents]
    pd.DataFrame(rows).to_csv(folder / "clips.tsv", sep="\t", index=False)
    return LocalClips(dataset="clips", **frames)


@pytest.mark.parametrize(
    ("frames", "visual"),
    [({"nframe": 3}, {"num_frames": 3}), ({"fps": 4}, {"fps": 4.0}), ({}, {})],
    ids=["nframe", "fps", "file"],
)
def test_videos(
    frames: dict[str, Any],
    visual: dict[str, Any],
    adapter: Any,
    in_data_root: Path,
    engine: ovfast.Engine,
):
    """The runner's loop for videos sets nframe or fps, and the engine takes those frames."""
    from vlmeval.inference_video import infer_data_job_video

    dataset = local_clips(in_data_root, **frames)
    model = adapter.OVFast("demo")
    infer_data_job_video(model, str(in_data_root), "ovfast", dataset)
    options = ovfast.VisualOptions(**visual)
    expected, numbers_of_frames = [], []
    for number, sample in enumerate(held_out("video", 4)):
        inputs = engine.prepare(
            sample.questions[0][0], videos=in_data_root / f"clips_{number}.mkv", visual=options
        )
        expected.append(engine.generate(inputs).text)
        in_file = len(sample.scenes)  # written at 8 frames a second
        by_rule = {"nframe": 3, "fps": -(-in_file // 2)}
        numbers_of_frames.append(
            (inputs.num_views, by_rule[next(iter(frames))] if frames else in_file)
        )
    assert predictions(in_data_root, "ovfast_clips") == expected
    assert model._visual_now() == options
    assert all(views == frames for views, frames in numbers_of_frames)


def test_frames_set_by_hand(adapter: Any):
    model = adapter.OVFast("demo", num_frames=16)
    assert (model.nframe, model._visual_now().num_frames) == (16, 16)
    model.nframe = 5
    assert model._visual_now() == ovfast.VisualOptions(num_frames=5)
    model.nframe, model.fps = None, 2.0
    assert model._visual_now() == ovfast.VisualOptions(num_frames=16, fps=2.0)
    model.nframe = model.fps = None
    assert model._visual_now() == ovfast.VisualOptions(num_frames=16)


def test_messages_of_every_kind(model: Any, engine: ovfast.Engine, tmp_path: Path):
    """A str, a list of them, items with further keys: interleaved parts keep their order."""
    sample = held_out("several", 1)[0]
    paths = [str(tmp_path / f"{number}.png") for number in range(len(sample.scenes))]
    for path, scene in zip(paths, sample.scenes, strict=True):
        Image.fromarray(scene.image).save(path)
    question = sample.questions[0][0]
    assert model.generate("Hi") == engine.generate("Hi").text
    assert model.generate([*paths, question]) == ask(engine, sample, EVERYTHING)
    first, second, *_ = paths
    items = [
        {"type": "text", "value": "Here ", "role": "user"},
        {"type": "image", "value": first, "min_pixels": 1},
        {"type": "text", "value": " and there "},
        {"type": "image", "value": second},
        {"type": "text", "value": question},
    ]
    content = [
        {"type": "text", "text": "Here "},
        {"type": "image", "image": first},
        {"type": "text", "text": " and there "},
        {"type": "image", "image": second},
        {"type": "text", "text": question},
    ]
    expected = engine.generate([{"role": "user", "content": content}])
    assert model.generate(items, dataset="any") == expected.text


def test_turns(model: Any, engine: ovfast.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """VLMEvalKit's loop over turns hands every answer on, as the assistant's."""
    from vlmeval.inference_mt import chat_mt

    prompts: list[list[int]] = []
    generate = model._engine.generate

    def watched(inputs: Any, **options: Any) -> Any:
        prompts.append(inputs.input_ids.tolist())
        return generate(inputs, **options)

    monkeypatch.setattr(model._engine, "generate", watched)

    scene = held_out("single", 1)[0].scenes[0]
    path = str(tmp_path / "scene.png")
    Image.fromarray(scene.image).save(path)
    questions = ["Describe the picture.", "How many shapes are there?"]
    first = [{"type": "image", "value": path}, {"type": "text", "value": questions[0]}]
    user = [{"role": "user", "content": first}, {"role": "user", "content": questions[1]}]
    unused = {"role": "assistant", "content": ""}
    answers = chat_mt(model, [user[0], unused, user[1], unused], "any")
    image = {"type": "image", "image": path}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [image, {"type": "text", "text": questions[0]}]}
    ]
    expected = [engine.generate(turns).text]
    turns += [
        {"role": "assistant", "content": expected[0]},
        {"role": "user", "content": questions[1]},
    ]
    expected.append(engine.generate(turns).text)
    assert answers == expected
    assert prompts[1] == engine.prepare(turns).input_ids.tolist()


def test_arguments(adapter: Any, engine: ovfast.Engine):
    model = adapter.OVFast("demo", system_prompt="Be brief.", max_new_tokens=2, max_seq_len=64)
    expected = engine.generate("Hi", system="Be brief.", max_new_tokens=2)
    assert model.generate("Hi") == expected.text
    for wrong in ({"max_frame": 3}, {"temperature": "hot"}, {"token_policy": "any"}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            adapter.OVFast("demo", **wrong)
    with pytest.raises(OptionError, match="items of type \\['audio'\\]"):
        model.generate_inner([{"type": "audio", "value": "a.wav"}])


def test_registration(adapter: Any):
    import vlmeval.vlm
    from vlmeval.config import supported_VLM

    adapter.register("ovfast-small", model_path="demo", max_views=1)
    adapter.register("ovfast-small", model_path="demo", max_views=1)  # repeatable
    assert vlmeval.vlm.OVFast is adapter.OVFast
    assert supported_VLM["ovfast-small"]()._visual == ovfast.VisualOptions(max_views=1)
    taken = "llava-onevision-qwen2-0.5b-ov-hf"
    with pytest.raises(OptionError, match=f"{taken}.* already"):
        adapter.register(taken, model_path="demo")
    with pytest.raises(SystemExit):
        adapter.main(["--data", "demo_scenes"])
    with pytest.raises(OptionError, match="expected NAME=VALUE"):
        adapter.main(["--checkpoint", "demo", "--option", "int8"])
