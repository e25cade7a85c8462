"""Demo scenes as files: the data sets that evaluation kits are tested on.

The scenes are those of `tools/train_demo.py --evaluate`, in its order. Nothing is lost on the way
to the files: pictures are PNG, clips FFV1, and clips are read back and compared.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from ovfast.media import load_video
from tools.demo_scenes import MAKERS, Sample
from tools.evaluate_demo import EVALUATION_SEED, question_form

Document = dict[str, Any]


def held_out(kind: str, count: int) -> list[Sample]:
    """The first samples of a kind that `evaluate` asks about."""
    rng = np.random.default_rng([EVALUATION_SEED, list(MAKERS).index(kind)])
    return [MAKERS[kind](rng) for _ in range(count)]


def write_scenes(folder: Path, samples: Sequence[Sample], name: str) -> list[Document]:
    """Writes media and `name`.jsonl.

    Returns:
        The documents: images, videos (paths below `folder`), questions, answers, answer.
    """
    documents = []
    for number, sample in enumerate(samples):
        stem = f"{name}_{number}"
        frames = [scene.image for scene in sample.scenes]
        is_clip = sample.kind == "video"
        questions, answers = zip(*sample.questions, strict=True)
        documents.append(
            {
                "images": [] if is_clip else _write_pictures(folder, stem, frames),
                "videos": [_write_clip(folder, f"{stem}.mkv", frames)] if is_clip else [],
                "questions": list(questions),
                "answers": list(answers),
                "answer": answers[0],
            }
        )
    write_lines(folder / f"{name}.jsonl", documents)
    return documents


def with_choices(documents: Sequence[Document]) -> list[Document]:
    """Documents with `choices`, up to four answers to questions of the same form, and `gold`."""
    by_form: dict[str, list[str]] = {}
    for document in documents:
        by_form.setdefault(question_form(document["questions"][0]), []).append(document["answer"])
    chosen = []
    for document in documents:
        others = set(by_form[question_form(document["questions"][0])]) - {document["answer"]}
        choices = sorted([document["answer"], *sorted(others)[:3]])
        if len(choices) > 1:
            gold = choices.index(document["answer"])
            chosen.append(document | {"choices": choices, "gold": gold})
    return chosen


def write_lines(path: Path, documents: Sequence[Document]) -> None:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def _write_pictures(folder: Path, stem: str, pictures: Sequence[np.ndarray]) -> list[str]:
    names = [f"{stem}_{index}.png" for index in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        Image.fromarray(picture).save(folder / name)
    return names


def _write_clip(folder: Path, name: str, frames: Sequence[np.ndarray]) -> str:
    height, width = frames[0].shape[:2]
    with av.open(str(folder / name), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture.reformat(format="bgr0")))
        container.mux(stream.encode())
    assert np.array_equal(load_video(folder / name), np.stack(frames))
    return name
