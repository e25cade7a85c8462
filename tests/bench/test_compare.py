"""Ratios inside a record and between two: planted changes are found, noise is not called one."""

import io
import random
import sys

import pytest
from rich.console import Console

from ovfast.bench import compare as compare_module
from ovfast.bench.compare import compare, rerun, rerun_command
from ovfast.bench.ratios import (
    peer_ratios,
    prediction_error,
    prediction_errors,
    share_of_limit,
)
from ovfast.bench.record import Record, append_row, write_header
from ovfast.bench.statistics import Ratio
from ovfast.bench.table import amount, print_comparison, print_record, ratio_text
from ovfast.errors import OptionError
from tests.bench.records import header, row

LIMITS = {"read_gb_per_s": {"1": 15.0, "2": 25.0}, "float32_gflops": 150.0}
WITH_TRANSFORMERS = {"versions": {"torch": "2.13.0", "transformers": "5.23.0"}}


def samples(seed: int, median: float = 100.0, noise: float = 0.03, count: int = 12):
    rng = random.Random(seed)
    return tuple(median * rng.lognormvariate(0, noise) for _ in range(count))


def record(*rows, **changes):
    return Record(header(**changes), rows)


def slowed(rows, factor):
    """Recorded rows of ours with a slow-down planted into every sample."""
    return [row(samples=tuple(factor * x for x in one.samples), metric=one.metric) for one in rows]


def test_a_planted_slow_down_is_flagged_and_none_is_not():
    rows = [row(samples=samples(1)), row(metric="tpot_ms", samples=samples(2, 30))]
    again = compare(record(*rows), record(*slowed(rows, 1.0)))
    assert [one.verdict for one in again.differences] == ["no difference shown"] * 2
    assert again.slower == ()
    later = compare(record(*rows), record(*slowed(rows, 1.1)))
    assert [one.verdict for one in later.differences] == ["slower"] * 2
    assert later.differences[0].ratio.median == pytest.approx(1 / 1.1, rel=0.02)
    assert len(later.slower) == 2
    faster = compare(record(*slowed(rows, 1.1)), record(*rows))
    assert [one.verdict for one in faster.differences] == ["faster"] * 2


def test_runs_of_the_same_speed_are_seldom_called_different():
    """New noise every time: at 95 % some 1 of 20."""
    called = 0
    for seed in range(200):
        old = record(row(samples=samples(seed)))
        new = record(row(samples=samples(seed + 10_000)))
        called += compare(old, new).differences[0].verdict != "no difference shown"
    assert called <= 18


def test_too_few_samples_show_nothing():
    old, new = record(row(samples=(100.0, 101.0, 99.0))), record(row(samples=(150.0, 151.0, 149.0)))
    got = compare(old, new).differences[0]
    assert got.verdict == "no difference shown"
    assert got.ratio.high < 1


def test_a_slower_machine_is_no_slower_program():
    """Its limits moved as much as the times."""
    slow = {name: value for name, value in LIMITS.items() if name != "read_gb_per_s"}
    slow |= {"read_gb_per_s": {"2": 25.0 / 1.3}}
    old = record(row(samples=samples(1)), machine={"limits": LIMITS})
    moved = row(samples=samples(2, 125))
    same = compare(old, record(moved, machine={"limits": LIMITS}))
    assert same.differences[0].verdict == "slower"
    drifted = compare(old, record(moved, machine={"limits": slow}))
    assert drifted.differences[0].verdict == "no difference shown"
    assert any("0.77 to 1.00 times as fast" in note for note in drifted.notes)
    memory = {"metric": "peak_bytes", "unit": "bytes"}
    old = record(row(samples=samples(1), **memory), machine={"limits": LIMITS})
    more = record(row(samples=samples(2, 125), **memory), machine={"limits": slow})
    assert compare(old, more).differences[0].verdict == "slower", "bytes do not depend on speed"


def test_a_peer_beside_ours_takes_the_machine_s_noise_away():
    """The machine was half as fast at the second run; ours also lost 10 %."""

    def run(seed, ours, theirs):
        weather = samples(seed, 1.0, noise=0.3)
        pairs = [(ours * w, theirs * w) for w in weather]
        return record(
            row(samples=tuple(a for a, _ in pairs)),
            row(side="transformers", samples=tuple(b for _, b in pairs), storage="float32"),
            **WITH_TRANSFORMERS,
        )

    got = compare(run(1, 100, 300), run(2, 220, 600)).differences[0]
    assert (got.unit, got.verdict) == ("transformers", "slower")
    assert got.ratio.median == pytest.approx(1 / 1.1)
    same = compare(run(1, 100, 300), run(2, 200, 600)).differences[0]
    assert same.ratio.median == pytest.approx(1)
    assert same.verdict == "no difference shown"
    other = run(2, 220, 600)
    newer = header(versions={"torch": "2.13.0", "transformers": "9.0"})
    got = compare(run(1, 100, 300), Record(newer, other.rows))
    assert got.differences[0].unit == "ms", "another release of the peer is no unit"
    assert "transformers was 5.23.0, is 9.0" in got.notes


def test_more_tokens_a_second_are_better():
    rate = {"suite": "throughput", "unit": "tokens/s", "metric": "tokens_per_s"}
    old = record(row(samples=samples(1), **rate))
    new = record(row(samples=samples(1, 120), **rate))
    assert compare(old, new).differences[0].verdict == "faster"
    both = [row(samples=samples(1, 120), **rate), row(side="vllm", samples=samples(1), **rate)]
    assert peer_ratios(both)[0].ratio.median == pytest.approx(1.2)


def test_what_cannot_be_compared_is_said():
    broken = row(metric="tpot_ms", samples=(), error="out of memory")
    gone = row(workload="text")
    old = record(row(), broken, gone)
    new = record(row(), row(metric="tpot_ms"), threads=1)
    notes = compare(old, new).notes
    assert "384 tpot_ms bfloat16: failed: out of memory" in notes
    assert "1 figures are in the old record only" in notes
    assert "threads were 2, are 1" in notes
    with pytest.raises(OptionError, match="share no figure"):
        compare(record(row()), record(gone))


def test_peer_ratios_pair_the_same_thing():
    ours, theirs = (
        row(),
        row(side="transformers", storage="float32", samples=samples(3, 200, count=6)),
    )
    got = peer_ratios([ours, theirs, row(side="transformers", workload="text")])
    assert len(got) == 1
    assert got[0].ratio.median == pytest.approx(2, rel=0.05)
    for change, why in (
        ({"samples": (), "error": "no memory"}, "transformers failed: no memory"),
        ({"comparable": False, "prompt_tokens": 9}, "not comparable: 9 prompt tokens against 1500"),
        ({"samples": (1.0,)}, "not measured in turn"),
        ({"samples": (0.0,) * 6}, "too small"),
    ):
        broken = row(**({"side": "transformers"} | change))
        one = peer_ratios([ours, broken])[0]
        assert one.ratio is None
        assert why in one.why


def test_shares_and_errors_of_one_row():
    one = row(samples=(100.0,) * 6, floor=40.0, predicted=90.0)
    assert share_of_limit(one) == pytest.approx(0.4)
    assert prediction_error(one) == pytest.approx(-0.1)
    rate = row(samples=(50.0,), floor=100.0, unit="tokens/s")
    assert share_of_limit(rate) == pytest.approx(0.5)
    bare = row(floor=None, predicted=None)
    assert share_of_limit(bare) is None
    assert prediction_error(bare) is None
    assert prediction_errors([bare]) is None
    assert prediction_errors([one, bare]).median == pytest.approx(0.1)


def printed(function, *arguments):
    console = Console(width=200, file=io.StringIO())
    function(*arguments, console)
    return console.file.getvalue()


def test_a_table_never_prints_a_speed_up_that_was_not_shown():
    near = row(
        side="transformers", storage="float32", samples=(101.0, 99.0, 100.0, 103.0, 97.0, 100.0)
    )
    far = row(side="vllm", samples=samples(3, 300, count=6))
    failed = row(side="sglang", samples=(), error="[red] no GPU")
    text = printed(print_record, record(row(), near, far, failed))
    line = next(
        line for line in text.splitlines() if "transformers float32" in line and "pairs" in line
    )
    assert "no difference shown" in line
    assert "×" not in line
    assert "3.00× faster" in text or "2.9" in text
    assert "[red] no GPU" in text
    assert "median error 10%" in text
    assert "A CPU" in text
    assert "2 threads" in text


def test_a_comparison_is_printed_with_what_must_be_known():
    rows = [row(samples=samples(1))]
    text = printed(print_comparison, compare(record(*rows), record(*slowed(rows, 1.1), threads=1)))
    assert "1.10× slower" in text
    assert "threads were 2, are 1" in text


def test_ratios_in_words():
    assert ratio_text(Ratio(1.5, 1.2, 1.8, 6, 0.97)) == "1.50× faster (1.20–1.80)"
    assert ratio_text(Ratio(0.5, 0.4, 0.8, 6, 0.97)) == "2.00× slower (0.40–0.80)"
    assert ratio_text(Ratio(1.5, 0.9, 1.8, 6, 0.97)) == "no difference shown (0.90–1.80)"
    few = ratio_text(Ratio(1.5, 1.2, 1.8, 5, 0.94))
    assert few == "no difference shown (1.20–1.80, too few to be sure)"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0421, "ms", "42.1 µs"),
        (1.5, "ms", "1.50 ms"),
        (37_629.0, "ms", "37.6 s"),
        (3.57e9, "bytes", "3.57 GB"),
        (12.34, "tokens/s", "12.3 tokens/s"),
        (95.44, "%", "95.4 %"),
        (0.0, "ms", "0 µs"),
    ],
)
def test_amounts(value, unit, text):
    assert amount(value, unit) == text


def test_a_record_s_command_runs_again(tmp_path, monkeypatch):
    """With this interpreter, a checkpoint that is elsewhere here, and a file of its own."""
    command = "ovfast bench latency --model ck05 --workload text"
    words = rerun_command(command, ["/models/ck05"])
    assert words[:3] == [sys.executable, "-m", "ovfast"]
    assert words[3:] == ["bench", "latency", "--model", "/models/ck05", "--workload", "text"]
    with pytest.raises(OptionError, match="2 models for"):
        rerun_command(command, ["a", "b"])
    with pytest.raises(OptionError, match="expected `ovfast bench"):
        rerun_command("rm -rf x", [])

    def runs(words, check):
        write_header(out, header())
        append_row(out, row())
        return type("Done", (), {"returncode": code})()

    monkeypatch.setattr(compare_module.subprocess, "run", runs)
    out, code = tmp_path / "new.jsonl", 0
    assert rerun(record(row()), out).rows == (row(),)
    code = 2
    with pytest.raises(OptionError, match="exit code 2"):
        rerun(record(row()), out)
