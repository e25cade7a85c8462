"""The parts of verify that need no model: its cases, its distances, its report."""

import hashlib

import pytest
import torch

from ovfast.anyres import VisualGeometry, VisualOptions, plan_image
from ovfast.verify import VerifyReport, VerifyRow
from ovfast.verify.cases import make_cases
from ovfast.verify.stages import Stages, compare


def depends_on_pass_order(size_hw: tuple[int, int], target_hw: tuple[int, int]) -> bool:
    """Whether Pillow 13 resizes vertically first, and older releases horizontally."""
    (height, width), (target_h, target_w) = size_hw, target_hw
    return height > target_h and height - target_h > 2 * (width - target_w)


@pytest.mark.parametrize("side", [56, 84, 384])
@pytest.mark.parametrize("grid", [3, 6])
def test_cases_hold_for_every_pillow_and_cover_the_views(side: int, grid: int) -> None:
    cases = make_cases(side)
    assert len({case.name for case in cases}) == len(cases)
    pinpoints = tuple((side * i, side * j) for i in range(1, grid + 1) for j in range(1, grid + 1))
    geometry = VisualGeometry(side, 14, pinpoints, 9)
    num_views = set()
    for case in cases:
        for picture in case.images:
            size_hw, alone = picture.shape[:2], len(case.images) == 1
            plan = plan_image(size_hw, geometry, VisualOptions(), num_images=len(case.images))
            num_views.add(plan.num_views)
            base_hw = size_hw if alone else plan.canvas_hw
            assert not depends_on_pass_order(base_hw, (side, side)), case.name
            if alone:
                assert not depends_on_pass_order(size_hw, plan.resized_hw), case.name
        for clip in case.videos:
            assert not depends_on_pass_order(clip.shape[1:3], (side, side))
    assert num_views == ({1, 2, 4, 5, 7, 16} if grid == 6 else {1, 2, 4, 5, 7})


def test_cases_are_the_same_everywhere() -> None:
    """Stored references belong to these pixels."""
    hashed = hashlib.sha256()
    for case in make_cases(56):
        for pixels in (*case.images, *case.videos):
            hashed.update(repr(pixels.shape).encode() + pixels.tobytes())
    assert hashed.hexdigest()[:16] == "d9260707b6bc81c5"


def stages(hidden: torch.Tensor, tokens: tuple[int, ...] = (), logits=None) -> Stages:
    return Stages(None, hidden, hidden, tokens, logits)


def compare_hidden(ours: torch.Tensor, theirs: torch.Tensor, truth=None) -> VerifyRow:
    """The logits row with heads that pass their rows through."""
    truth = None if truth is None else stages(truth, (1,), torch.zeros(1, 4))
    heads = (lambda x: x,) * (2 if truth is None else 3)
    their = stages(theirs, (1,), torch.tensor([[0.0, 1.0, -1.0, 0.5]]))
    return compare("case", stages(ours, (1,)), their, truth, heads)[0]


def test_distance_is_relative_to_the_largest() -> None:
    theirs = torch.zeros(200, 4)
    theirs[3, 0], theirs[150, 2] = 50.0, -1.0
    ours = theirs.clone()
    ours[150, 2] += 0.005  # in another block than the largest
    row = compare_hidden(ours, theirs)
    assert (row.stage, row.ok, row.bound) == ("logits", True, 2e-4)
    assert row.error == pytest.approx(1e-4, rel=1e-3)
    ours[150, 2] += 0.01
    assert not compare_hidden(ours, theirs).ok


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    theirs = torch.ones(100, 4)
    ours = theirs.clone()
    ours[80, 1] = value
    row = compare_hidden(ours, theirs)
    assert (row.ok, row.note) == (False, "not finite")
    assert not compare_hidden(ours, theirs + 0.1, theirs).ok


def test_another_shape_fails() -> None:
    row = compare_hidden(torch.ones(3, 5), torch.ones(3, 4))
    assert (row.ok, row.note) == (False, "(3, 5) instead of (3, 4)")


def test_16_bits_compare_distances_from_truth() -> None:
    truth = torch.full((100, 4), 8.0)
    theirs = truth + 0.01
    assert compare_hidden(truth - 0.012, theirs, truth).error == pytest.approx(1.2, rel=1e-3)
    assert not compare_hidden(truth - 0.013, theirs, truth).ok


def test_tokens_may_differ_only_in_a_tie() -> None:
    hidden = torch.ones(1, 4)
    logits = torch.tensor([[0.0, 10.0, 1.0, -torch.inf], [9.999, 1.0, 10.0, -torch.inf]])
    theirs = stages(hidden, (1, 2), logits)
    heads = (lambda x: x, lambda x: x)

    def tokens(*ids: int) -> VerifyRow:
        return compare("case", stages(hidden, ids), theirs, None, heads)[-1]

    assert (tokens(1, 2).error, tokens(1, 2).note) == (0.0, "2 equal")
    tie = tokens(1, 0)
    assert tie.error == pytest.approx(1e-4, rel=1e-2)
    assert (tie.ok, tie.note) == (True, "token 1 is 0 instead of 2")
    assert not tokens(2, 2).ok


def test_report_names_the_earliest_stage() -> None:
    rows = (
        VerifyRow("a", "prompt", 0.0, 0.0),
        VerifyRow("a", "logits", 1.0, 0.1),
        VerifyRow("b", "tower", float("nan"), 0.1),
    )
    report = VerifyReport("m", "r", "cpu", "float32", "native", rows)
    assert not report.ok
    assert report.first_failure is rows[2]
    values = report.as_dict()
    assert (values["first_failure"], values["rows"][2]["error"]) == ("b: tower", None)
    assert not VerifyReport("m", "r", "cpu", "float32", "native", ()).ok
    assert VerifyReport("m", "r", "cpu", "float32", "native", rows[:1]).ok
