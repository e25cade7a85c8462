"""The file of results: what is written is read, and what is wrong is refused with its line."""

import json

import pytest

from ovfast.bench import record
from ovfast.bench.record import append_row, read, write_header
from ovfast.errors import OptionError
from tests.bench.records import header, row


@pytest.fixture
def file(tmp_path):
    """A sound file: a header and two rows."""
    path = tmp_path / "deep" / "results.jsonl"
    write_header(path, header())
    append_row(path, row())
    append_row(path, row(metric="tpot_ms"))
    return path


def change(path, line, **values):
    """Changes keys of a line; None in place of a value takes the key away."""
    lines = path.read_text().splitlines()
    changed = json.loads(lines[line - 1]) | values
    lines[line - 1] = json.dumps({k: v for k, v in changed.items() if v != "DROP"})
    path.write_text("\n".join(lines) + "\n")


def test_what_is_written_is_read(file):
    failed = row(side="transformers", samples=(), error="out of memory", floor=None)
    append_row(file, failed)
    got = read(file)
    assert got.header == header()
    assert got.rows == (row(), row(metric="tpot_ms"), failed)
    assert json.loads(file.read_text().splitlines()[0])["schema"] == record.SCHEMA == 1


def test_each_row_is_in_the_file_at_once(file):
    before = len(file.read_text().splitlines())
    append_row(file, row(workload="text"))
    assert len(file.read_text().splitlines()) == before + 1


def test_another_schema_is_refused(file):
    change(file, 1, schema=2, other="key")
    with pytest.raises(
        OptionError, match=r"results.jsonl, line 1: schema is 2; this ovfast reads 1"
    ):
        read(file)


@pytest.mark.parametrize(
    ("line", "values", "message"),
    [
        (1, {"surprise": 1}, "line 1: unknown keys surprise"),
        (1, {"commit": "DROP"}, "line 1: missing keys commit"),
        (1, {"threads": 0}, "threads is 0"),
        (1, {"hardware": {"cpu": "x"}}, "hardware is"),
        (2, {"surprise": 1}, "line 2: unknown keys surprise"),
        (3, {"samples": "DROP"}, "line 3: missing keys samples"),
        (3, {"samples": [1.0, "fast"]}, "line 3: samples is"),
        (3, {"samples": [1.0, -1.0]}, "line 3: samples is"),
        (3, {"samples": [float("nan")]}, "line 3: samples is"),
        (3, {"samples": 1.0}, "line 3: samples is 1.0"),
        (3, {"samples": []}, "samples or an error"),
        (3, {"error": "failed"}, "samples or an error"),
        (3, {"suite": "beauty"}, "line 3: suite is 'beauty'; expected one of latency"),
        (3, {"storage": "int2"}, "line 3: storage is 'int2'"),
        (3, {"unit": "s"}, "line 3: unit is 's'"),
        (3, {"floor": float("inf")}, "line 3: floor is inf"),
        (3, {"comparable": None}, "line 3: comparable is None"),
        (3, {"parameters": {"threads": 2}}, "line 3: parameters.device is None"),
        (3, {"parameters": {"device": "cpu", "x": [1]}}, "line 3: parameters.x"),
    ],
)
def test_damaged_values_are_refused_with_their_line(file, line, values, message):
    change(file, line, **values)
    with pytest.raises(OptionError, match=message):
        read(file)


@pytest.mark.parametrize(
    ("cut", "message"), [(-20, "line 3 is not JSON"), (0, "line 1 is not JSON"), (30, "line 1 is")]
)
def test_a_file_that_was_cut_off_is_refused(file, cut, message):
    file.write_text(file.read_text()[:cut])
    with pytest.raises(OptionError, match=message):
        read(file)


def test_lines_that_are_no_objects_are_refused(file):
    file.write_text(file.read_text() + "[1, 2]\n")
    with pytest.raises(OptionError, match="line 4 is a list"):
        read(file)
    with pytest.raises(OptionError, match="cannot be read"):
        read(file.parent / "none.jsonl")


def test_gpu_figures_need_a_gpu(file):
    """At write and at read, in a row and in the calibration."""
    cuda = row(parameters={"device": "cuda"})
    with pytest.raises(
        OptionError, match="a new row: device is 'cuda', but the header names no GPU"
    ):
        append_row(file, cuda)
    change(file, 3, parameters={"device": "cuda"})
    with pytest.raises(OptionError, match="line 3: device is 'cuda'"):
        read(file)
    with pytest.raises(OptionError, match=r"machine.device is 'cuda'"):
        header(machine={"device": "cuda"})
    write_header(file, header(gpu="A GPU", machine={"device": "cuda"}))
    append_row(file, cuda)
    assert read(file).rows == (cuda,)


def test_a_figure_is_in_a_file_once(file):
    assert len(read(file).by_key()) == 2
    append_row(file, row(samples=(1.0,)))
    with pytest.raises(OptionError, match="two rows measure latency 384 ovfast bfloat16 ttft_ms"):
        read(file).by_key()
