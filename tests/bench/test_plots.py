"""Pictures of records: each renders, as PNG and SVG, and only where its rows are there."""

import dataclasses
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from ovfast.bench.plots import CHARTS, draw, stage_bars
from ovfast.bench.record import Record
from tests.bench.records import header, row

LIMITS = {
    "device": "cpu",
    "threads": 2,
    "limits": {
        "read_gb_per_s": {"1": 15.0, "2": 25.0},
        "float32_gflops": 150.0,
        "int8_gops": 300.0,
        "bfloat16_gflops": None,
        "launch_us": None,
    },
    "rates": {},
    "backend": "native",
}
STAGES = ("media_ms", "preprocess_ms", "vision_ms", "prefill_ms")


def full_record() -> Record:
    """Rows for every chart; one of a peer that failed and one that has another prompt."""
    rows = [row(metric=name, samples=(10.0, 11.0), floor=5.0, predicted=None) for name in STAGES]
    rows += [row(workload="prefill of 2962", metric="prefill_ms")]  # a stage alone: no panel
    rows += [row(), row(side="transformers", storage="float32", samples=(300.0,) * 6)]
    rows += [row(side="vllm", samples=(), error="does not start")]
    rows += [row(side="llama.cpp", samples=(50.0,) * 6, comparable=False)]
    for context in (64, 3000):
        parameters = {"device": "cpu", "context": context}
        for side, storage, scale in (("ovfast", "int8", 1.0), ("transformers", "float32", 4.0)):
            step = (scale * 20.0 + context / 300, scale * 21.0 + context / 300)
            rows.append(
                row(
                    workload="decode",
                    metric="step_ms",
                    side=side,
                    storage=storage,
                    samples=step,
                    floor=15.0,
                    parameters=parameters,
                    flops=1_000_000_000,
                    num_bytes=500_000_000,
                )
            )
    return Record(header(machine=LIMITS), tuple(rows))


def colours(file: Path) -> int:
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    return len(np.unique(pixels, axis=0))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return draw(full_record(), tmp_path_factory.mktemp("drawn") / "pictures", "run")


def test_every_chart_renders(drawn: list[Path]) -> None:
    kinds = [f"run-{name}.{kind}" for name in CHARTS for kind in ("png", "svg")]
    assert [file.name for file in drawn] == kinds
    for file in drawn:
        if file.suffix == ".png":
            assert colours(file) > 20, "an empty sheet"
        else:
            root = ET.parse(file).getroot()
            assert root.tag.endswith("svg")
            assert len(list(root.iter())) > 50


def test_panels_of_the_first_token_are_those_of_requests() -> None:
    figure = stage_bars(full_record())
    assert figure is not None
    assert [axes.get_title("left") for axes in figure.axes] == ["384"]


def test_charts_without_rows_are_left_out(tmp_path: Path) -> None:
    assert draw(Record(header(), (row(),)), tmp_path, "run") == []
    failed = row(samples=(), error="no memory", metric="vision_ms")
    assert draw(Record(header(machine=LIMITS), (failed,)), tmp_path, "run") == []


@pytest.mark.slow
def test_pictures_show_what_the_rows_say(drawn: list[Path], tmp_path: Path) -> None:
    """The same bytes for the same rows, other ones for twice the times."""
    before = full_record()
    slower = tuple(
        dataclasses.replace(one, samples=tuple(2 * x for x in one.samples))
        if one.side == "ovfast"
        else one
        for one in before.rows
    )
    again = draw(before, tmp_path / "again", "run")
    others = draw(Record(before.header, slower), tmp_path / "others", "run")
    for first, same, other in zip(drawn, again, others, strict=True):
        assert first.read_bytes() == same.read_bytes() != other.read_bytes()
