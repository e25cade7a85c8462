"""A peer that noise hits harder than ours must not make ours slower or faster."""

from ovfast.bench.compare import compare
from ovfast.bench.record import Record
from tests.bench.records import header, row

TRANSFORMERS = {"versions": {"torch": "2.13.0", "transformers": "5.23.0"}}


def run(ours: float, theirs: float) -> Record:
    spread = (0.97, 0.98, 0.99, 1.0, 1.01, 1.02, 1.03)
    pairs = [(ours * factor, theirs * factor) for factor in spread]
    return Record(
        header(**TRANSFORMERS),
        (
            row(samples=tuple(a for a, _ in pairs)),
            row(side="transformers", storage="float32", samples=tuple(b for _, b in pairs)),
        ),
    )


def test_a_peer_that_moved_alone_is_no_difference_of_ours() -> None:
    """Other programs had the processors at the first run: spinning threads of the peer suffered."""
    for old, new in ((run(113, 2700), run(82, 350)), (run(82, 350), run(113, 2700))):
        (difference,) = compare(old, new).differences
        assert difference.unit == "transformers"
        assert difference.verdict == "no difference shown"
        assert difference.ratio.low < 1 < difference.ratio.high


def test_both_doubts_outlived_is_a_difference() -> None:
    assert compare(run(100, 300), run(120, 310)).differences[0].verdict == "slower"
    assert compare(run(120, 310), run(100, 300)).differences[0].verdict == "faster"
