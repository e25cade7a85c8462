"""Native argmax: the lowest allowed id of the largest logit, and -1 for what cannot be chosen."""

import numpy as np
import pytest

native = pytest.importorskip("ovfast._C", reason="the native extension is not built")


def argmax(logits, forbidden, threads=2):
    out = np.full(len(logits), -7, np.int32)
    native.argmax(native.ThreadPool(threads), logits, forbidden, out)
    return out.tolist()


@pytest.mark.parametrize("vocab", [1, 15, 16, 41, 8192, 8193, 40_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_numpy(isa, vocab, threads):
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((5, vocab), dtype=np.float32)
    forbidden = (rng.random(vocab) < 0.3).astype(np.uint8)
    forbidden[rng.integers(vocab)] = 0
    masked = np.where(forbidden[None] != 0, -np.inf, logits)
    assert argmax(logits, forbidden, threads) == masked.argmax(axis=1).tolist()


def test_the_best_is_forbidden_and_equals_take_the_lowest(isa):
    logits = np.full((1, 20_000), -3.0, np.float32)
    logits[0, [9, 11, 12_000]] = 5.0
    forbidden = np.zeros(20_000, np.uint8)
    forbidden[9] = 1
    assert argmax(logits, forbidden) == [11]
    forbidden[11] = 1
    assert argmax(logits, forbidden) == [12_000]
    forbidden[12_000] = 1
    assert argmax(logits, forbidden) == [0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 17, 9_999])
def test_not_finite_is_minus_one_in_its_row_alone(isa, bad, place):
    logits = np.zeros((3, 10_000), np.float32)
    logits[:, 4] = 1.0
    logits[1, place] = bad
    assert argmax(logits, np.zeros(10_000, np.uint8)) == [4, -1, 4]


def test_nothing_allowed_and_no_rows(isa):
    assert argmax(np.zeros((2, 30), np.float32), np.ones(30, np.uint8)) == [-1, -1]
    assert argmax(np.zeros((0, 30), np.float32), np.zeros(30, np.uint8)) == []


def test_errors():
    pool, logits = native.ThreadPool(1), np.zeros((2, 30), np.float32)
    forbidden, out = np.zeros(30, np.uint8), np.zeros(2, np.int32)
    for args, kind, message in (
        ((logits.astype(np.float64), forbidden, out), TypeError, "logits has dtype float64"),
        ((logits[:, :0], forbidden[:0], out), ValueError, "columns of logits is 0"),
        ((logits, forbidden[:29], out), ValueError, "forbidden has shape"),
        ((logits, forbidden, out[:1]), ValueError, "out has shape"),
    ):
        with pytest.raises(kind, match=message):
            native.argmax(pool, *args)
