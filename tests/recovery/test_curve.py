"""The arithmetic of a recovery."""

import math

import pytest

from hf_structprune.recovery.curve import Point, RecoveryCurve, measuring_steps


def curve(*values, pruned=3.0, dense=2.0):
    return RecoveryCurve(pruned, dense, [Point(10 * (i + 1), value) for i, value in enumerate(values)])


def test_share():
    made = curve()
    assert made.recovered(3.0) == 0 and made.recovered(2.0) == 1 and made.recovered(2.75) == 0.25
    assert made.recovered(3.5) == -0.5


@pytest.mark.parametrize("dense", [None, 3.0, 3.2, 2.9995])
def test_no_share_without_a_loss(dense):
    assert curve(dense=dense).recovered(2.5) is None


def test_the_pruned_model_can_be_the_best():
    assert curve(3.1, 3.2).best == Point(0, 3.0)
    assert curve(2.9, 2.8, 2.8, 2.95).best.step == 20
    assert curve(3.0).best.step == 0  # no better is no reason to change
    assert curve(3.1).is_worse and not curve(3.1, 3.0).is_worse and not curve().is_worse


def test_target():
    assert curve(2.6, 2.5).verdict(target=0.5) == "target"
    assert curve(2.6, 2.51).verdict(target=0.5) is None
    assert curve(2.0, dense=None).verdict(target=0.5) is None


@pytest.mark.parametrize(
    ("values", "patience", "expected"),
    [
        ((), 1, None),
        ((3.1, 3.1), 3, None),
        ((3.1, 3.1, 3.1), 3, "worse"),
        ((2.9, 2.95, 2.93), 3, None),
        ((2.9, 2.95, 2.93, 2.91), 3, "worse"),
        ((2.9, 2.95, 2.93, 2.89), 3, None),
        ((2.9, 2.9), 1, "worse"),
        ((3.1,) * 50, None, None),
    ],
)
def test_patience(values, patience, expected):
    assert curve(*values).verdict(patience=patience) == expected


def test_round_trip():
    made = RecoveryCurve(3.0, None, [Point(5, 2.5, 1.25)])
    assert RecoveryCurve.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    ("steps", "evaluations", "expected"),
    [(100, 4, {25, 50, 75, 100}), (10, 3, {4, 7, 10}), (3, 10, {1, 2, 3}), (7, None, {7}), (1, 1, {1})],
)
def test_measuring_steps(steps, evaluations, expected):
    assert measuring_steps(steps, evaluations) == expected


@pytest.mark.parametrize("evaluations", range(1, 30))
def test_measuring_steps_are_even_and_end_with_the_last(evaluations):
    found = sorted(measuring_steps(97, evaluations))
    gaps = [b - a for a, b in zip([0, *found], found, strict=False)]
    assert len(found) == evaluations and found[-1] == 97
    assert max(gaps) - min(gaps) <= 1 and math.isclose(sum(gaps), 97)
