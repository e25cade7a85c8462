"""Sides: their protocol, their turns, and that what fails is reported and stops nothing else."""

import hashlib
import math
import time
from pathlib import Path

import pytest

from ovfast.bench.sides import Outcome, Rounds, Side, SideError, SideSpec, take_turns
from tests.support.bench_sides import scripted_side

COUNTING = """
count = 0
def step(self, number):
    self.count += 1
    return [self.count, number]
"""
QUICK = Rounds(repeats=3, warmup=0)


@pytest.fixture
def start(tmp_path: Path, request: pytest.FixtureRequest):
    """start(name, methods) -> a loaded side, ended with the test."""

    def make(name: str, methods: str = "") -> Side:
        side = Side(scripted_side(tmp_path, name, methods))
        request.addfinalizer(side.close)
        side.load()
        return side

    return make


def arguments(index: int) -> dict[str, int]:
    return {"number": index}


def test_bytes_arrive_as_they_were_and_prints_do_no_harm(start) -> None:
    digest = """
    def digest(self, requests):
        import hashlib
        print("chatter on stdout")
        return [hashlib.sha256(data).hexdigest() for data in requests[0]["images"]]
    """
    side, data = start("one", digest), bytes(range(256)) * 40
    answer = side.ask("digest", requests=[{"images": (data, b"")}])
    assert answer == [hashlib.sha256(part).hexdigest() for part in (data, b"")]


def test_sides_take_turns(start, tmp_path: Path) -> None:
    log = tmp_path / "log"
    note = f"""
    def step(self, number):
        with open({str(log)!r}, "a") as stream:
            stream.write(type(self).__module__ + NAME + str(number) + " ")
        return number
    """
    sides = [start(name, note.replace("NAME", repr(name))) for name in "ab"]
    outcomes = take_turns(sides, "step", arguments, rounds=Rounds(repeats=2, warmup=2))
    turns = [word[-2:] for word in log.read_text().split()]
    assert turns == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"]
    assert [outcome.answers for outcome in outcomes.values()] == [[2, 3]] * 2  # the rest warmed up


def test_a_failing_side_is_reported_and_the_others_go_on(start) -> None:
    fails = """
    def step(self, number):
        if number == 1:
            raise ValueError("no such number")
        return number
    """
    bad, good = start("bad", fails), start("good", COUNTING)
    told = []
    outcomes = take_turns(
        [bad, good], "step", arguments, rounds=QUICK, told=lambda *what: told.append(what)
    )
    assert outcomes[bad] == Outcome([], [], "ValueError: no such number")
    assert [answer[1] for answer in outcomes[good].answers] == [0, 1, 2]
    assert [(side, index) for side, index, answer in told if isinstance(answer, SideError)] == [
        (bad, 1)
    ]
    assert bad.ask("step", number=5) == 5  # only that job failed


def test_a_dying_side_is_out_and_says_its_last_words(start) -> None:
    dies = """
    def step(self, number):
        import os, sys
        sys.stderr.write("out of cheese")
        sys.stderr.flush()
        os._exit(3)
    """
    bad, good = start("bad", dies), start("good", COUNTING)
    outcomes = take_turns([bad, good], "step", arguments, rounds=QUICK)
    assert "code 3" in outcomes[bad].error
    assert "out of cheese" in outcomes[bad].error
    assert len(outcomes[good].answers) == 3
    again = take_turns([bad, good], "step", arguments, rounds=QUICK)
    assert "code 3" in again[bad].error
    assert len(again[good].answers) == 3


def test_a_hanging_side_is_ended(start) -> None:
    hangs = """
    def step(self, number):
        import time
        time.sleep(60)
    """
    side, began = start("slow", hangs), time.monotonic()
    side._timeout_s = 0.3
    with pytest.raises(SideError, match=r"no answer in 0\.3 s"):
        side.ask("step", number=0)
    assert time.monotonic() - began < 30
    with pytest.raises(SideError, match=r"no answer in 0\.3 s"):
        side.ask("step", number=1)


def test_what_a_side_does_not_do_is_no_failure(start) -> None:
    able, unable = start("able", COUNTING), start("unable")
    outcomes = take_turns([unable, able], "step", arguments, rounds=QUICK)
    assert outcomes[unable] == Outcome(unsupported=True)
    assert len(outcomes[able].answers) == 3


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (SideSpec("x", "float32", ("/nonexistent/python",)), "cannot be started"),
        (SideSpec("x", "float32", missing="there is no x here"), "there is no x here"),
        (SideSpec("x", "float32", ("/bin/false",)), "failed|ended|Broken pipe"),
    ],
)
def test_a_side_that_does_not_start_says_why(spec: SideSpec, said: str) -> None:
    with Side(spec) as side:
        for call in (side.load, lambda: side.ask("step")):
            with pytest.raises(SideError, match=said):
                call()


def test_slow_rounds_are_fewer_and_count_from_the_first(start, monkeypatch) -> None:
    monkeypatch.setattr("ovfast.bench.sides.SLOW_S", 0.05)
    monkeypatch.setattr("ovfast.bench.sides.COUNTED_S", 0.1)
    sleeps = """
    def step(self, number):
        import time
        time.sleep({})
        return number
    """
    rounds = Rounds(repeats=9, slow_repeats=3, warmup=1)
    for seconds, expected in ((0.06, [1, 2, 3]), (0.11, [0, 1, 2])):
        side = start(f"s{int(100 * seconds)}", sleeps.format(seconds))
        (outcome,) = take_turns([side], "step", arguments, rounds=rounds).values()
        assert outcome.answers == expected


def test_a_deadline_leaves_one_round(start) -> None:
    side = start("one", COUNTING)
    late = Rounds(repeats=9, warmup=1, deadline=time.monotonic() - 1)
    (outcome,) = take_turns([side], "step", arguments, rounds=late).values()
    assert [answer[1] for answer in outcome.answers] == [1]
    assert Rounds().deadline == math.inf


def test_peaks_are_of_each_job(start) -> None:
    grows = """
    def step(self, number):
        return len(bytearray(b"1") * (number << 20))
    """
    side = start("one", grows)
    peaks = []
    for megabytes in (1, 200, 1):
        side.ask("step", number=megabytes)
        peaks.append(side.peak_bytes)
    if not peaks[0]:
        pytest.skip("no /proc here")
    assert peaks[1] - peaks[0] > 150 << 20
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not let a process forget its peak")
    assert peaks[2] < peaks[1] - (150 << 20)
