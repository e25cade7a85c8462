"""BENCHMARKS.md: from committed records alone, and with everything they say."""

import subprocess
from pathlib import Path

import pytest

from ovfast.bench.plots import CHARTS
from ovfast.bench.record import append_row, read, write_header
from ovfast.bench.report import page, write_report
from ovfast.errors import OptionError
from tests.bench.records import header
from tests.bench.test_plots import full_record


def git(root: Path, *words: str) -> None:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    subprocess.run(["git", *identity, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one committed record."""
    git(tmp_path, "init", "-q")
    record = full_record()
    write_header(tmp_path / "run.jsonl", record.header)
    for one in record.rows:
        append_row(tmp_path / "run.jsonl", one)
    git(tmp_path, "add", "run.jsonl")
    git(tmp_path, "commit", "-q", "-m", "Record")
    return tmp_path


def test_a_page_says_what_the_records_say(checkout: Path) -> None:
    out = checkout / "BENCHMARKS.md"
    written = write_report([checkout / "run.jsonl"], out, checkout / "pictures")
    assert written[-1] == out
    text = out.read_text()
    assert "## run\n" in text
    assert "`ovfast bench latency`, 2026-11-24. A CPU" in text
    assert "No figure here is of a GPU." in text
    assert "| 384 (0.5b) | ttft_ms | ovfast bfloat16 | 100 ms |" in text
    assert "does not start" in text
    assert "not comparable" in text
    assert "2.99× faster (2.94–3.06) | 6 pairs" in text
    for picture in written[:-1]:
        assert f"]({picture.relative_to(checkout).as_posix()})" in text


def test_only_committed_records_are_reported(checkout: Path) -> None:
    file, out, pictures = checkout / "run.jsonl", checkout / "B.md", checkout / "pictures"
    (checkout / "new.jsonl").write_bytes(file.read_bytes())
    with pytest.raises(OptionError, match=r"new\.jsonl is not committed as it is"):
        write_report([file, checkout / "new.jsonl"], out, pictures)
    file.write_text(file.read_text() + "\n")
    with pytest.raises(OptionError, match=r"run\.jsonl is not committed as it is"):
        write_report([file], out, pictures)
    with pytest.raises(OptionError, match=r"run\.jsonl is not committed as it is"):
        write_report([checkout / "none" / "run.jsonl"], out, pictures)
    with pytest.raises(OptionError, match="no records"):
        write_report([], out, pictures)
    assert not out.exists()


ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_this_repository_is_that_of_its_records() -> None:
    """Not its pictures: their bytes depend on the release of matplotlib."""
    out, pictures = ROOT / "BENCHMARKS.md", ROOT / "benchmarks/pictures"
    files = sorted((ROOT / "benchmarks/results").glob("*.jsonl"))
    assert files
    drawn = {
        file: [
            pictures / f"{file.stem}-{chart}.{kind}"
            for chart in CHARTS
            for kind in ("png", "svg")
            if (pictures / f"{file.stem}-{chart}.{kind}").exists()
        ]
        for file in files
    }
    assert out.read_text() == page({file: read(file) for file in files}, drawn, ROOT)


def test_a_gpu_is_named_where_there_was_one() -> None:
    record = full_record()
    with_gpu = type(record)(header(gpu="A GPU"), ())
    text = page({Path("a.jsonl"): with_gpu, Path("b.jsonl"): record}, {}, Path())
    assert text.count("No figure here is of a GPU.") == 1
