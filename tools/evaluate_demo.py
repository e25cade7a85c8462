"""Exact answers of a demo checkpoint on held-out scenes, through ovfast itself; ``train_demo.py
--evaluate`` prints it.

Each sample is asked its first question alone, as a fresh chat, and counts only if the whole answer
is right. The "detail" samples are asked twice: with all views, and with the base view alone, which
cannot show the digit.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass

import numpy as np

import ovfast
from tools import demo_scenes

EVALUATION_SEED = 20_000_001  # training draws from seeds below 1000


@dataclass(frozen=True, slots=True)
class Row:
    """Exact answers of one kind of sample: ``right`` of ``count``, and by question."""

    kind: str
    right: int
    count: int
    by_question: dict[str, tuple[int, int]]

    @property
    def share(self) -> float:
        return self.right / self.count


def ask(engine: ovfast.Engine, sample: demo_scenes.Sample, visual: ovfast.VisualOptions) -> str:
    """The engine's answer to a sample's first question."""
    pictures = [scene.image for scene in sample.scenes]
    media = {"videos": [pictures]} if sample.kind == "video" else {"images": pictures}
    output = engine.generate(sample.questions[0][0], visual=visual, max_new_tokens=48, **media)
    return str(output.text)


def question_form(question: str) -> str:
    """A question without its colours, kinds and places, for the breakdown."""
    words = {
        *demo_scenes.COLOURS,
        *demo_scenes.KINDS,
        *demo_scenes.ORDINALS,
        "top",
        "bottom",
        "left",
        "right",
    }
    plurals = {f"{kind}s" for kind in demo_scenes.KINDS}
    return " ".join(
        "…" if word.strip("?.") in words | plurals else word for word in question.split()
    )


def evaluate(engine: ovfast.Engine, count: int, seed: int = EVALUATION_SEED) -> list[Row]:
    """Asks ``count`` samples of each kind.

    Args:
        engine: with a demo checkpoint.
        count: samples a kind.
        seed: of the scenes.

    Returns:
        A row for "single", "several", "video", "detail", and "detail, base view only".
    """
    everything = ovfast.VisualOptions()
    runs = [(kind, kind, everything) for kind in demo_scenes.MAKERS]
    runs.append(("detail, base view only", "detail", ovfast.VisualOptions(max_views=1)))
    rows = []
    for name, kind, visual in runs:
        rng = np.random.default_rng([seed, list(demo_scenes.MAKERS).index(kind)])
        seen: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        for _ in range(count):
            sample = demo_scenes.MAKERS[kind](rng)
            question, answer = sample.questions[0]
            tally = seen[question_form(question)]
            tally[0] += ask(engine, sample, visual) == answer
            tally[1] += 1
        right, total = (sum(tally[i] for tally in seen.values()) for i in (0, 1))
        rows.append(
            Row(name, right, total, {form: (t[0], t[1]) for form, t in sorted(seen.items())})
        )
    return rows


def print_table(rows: list[Row], *, details: bool) -> None:
    """Prints one line a row, and with ``details`` one a question."""
    for row in rows:
        print(f"{row.kind:24} {row.right:5} of {row.count:5}  {100 * row.share:5.1f} %")
        if details:
            for form, (right, count) in row.by_question.items():
                print(f"    {form:44} {right:5} of {count:5}  {100 * right / count:5.1f} %")
