"""The embedded demo: questions about the sample pictures and clip, with the answers that are
right.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ovfast.anyres import plan_image
from ovfast.checkpoint import resolve_checkpoint
from ovfast.engine import Engine
from ovfast.explain import explain_png
from ovfast.loading import load
from ovfast.media import load_image


@dataclass(frozen=True, slots=True)
class DemoResult:
    """One question of the demo.

    Attributes:
        media: file names asked about.
        question: what was asked.
        expected: the right answer.
        answer: the model's.
        total_ms: from the call to the last token.
    """

    media: tuple[str, ...]
    question: str
    expected: str
    answer: str
    total_ms: float

    @property
    def correct(self) -> bool:
        return self.answer == self.expected


def demo_questions() -> list[dict[str, object]]:
    """The questions of ``samples/questions.json``: images, videos, question, answer."""
    text = (samples_path() / "questions.json").read_text(encoding="utf-8")
    questions: list[dict[str, object]] = json.loads(text)
    return questions


def samples_path() -> Path:
    """The directory of the sample pictures and the clip."""
    return resolve_checkpoint("demo") / "samples"


def ask(engine: Engine, entry: dict[str, object]) -> DemoResult:
    """Asks one entry of ``demo_questions``."""
    images, videos = entry.get("images", []), entry.get("videos", [])
    assert isinstance(images, list)
    assert isinstance(videos, list)
    folder, question = samples_path(), str(entry["question"])
    output = engine.generate(
        question,
        images=[folder / name for name in images] or None,
        videos=[folder / name for name in videos] or None,
        max_new_tokens=64,
    )
    return DemoResult(
        (*images, *videos), question, str(entry["answer"]), output.text, output.timings.total_ms
    )


def run_demo(out: Path, *, device: str = "auto", backend: str = "auto") -> list[DemoResult]:
    """Asks every question of the demo and writes ``explain.png`` for its largest picture.

    Args:
        out: the directory to write to; made if it is missing.
        device: as in ``load``.
        backend: as in ``load``.

    Returns:
        One result a question.
    """
    out.mkdir(parents=True, exist_ok=True)
    with load("demo", device=device, backend=backend) as engine:
        results = [ask(engine, entry) for entry in demo_questions()]
        geometry, visual = engine.config.geometry, engine.visual
    picture = load_image(samples_path() / "detail.png")
    plan = plan_image(picture.shape[:2], geometry, visual, num_images=1)
    explain_png(out / "explain.png", picture, plan, geometry, visual)
    return results
