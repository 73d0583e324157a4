"""The arithmetic of a recovery, and its picture."""

import math

import pytest

from hf_structprune.recovery.measuring import Point, RecoveryCurve, curve_figure, draw_curve, measuring_steps


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


CURVE = RecoveryCurve(3.0, 2.0, [Point(10, 2.7), Point(20, 2.5), Point(30, 2.6)])


def texts(axis):
    return " | ".join(text.get_text() for text in axis.texts)


def test_what_is_in_it():
    axis = curve_figure(CURVE).axes[0]
    line, *rest = axis.lines
    assert list(line.get_xdata()) == [0, 10, 20, 30] and list(line.get_ydata()) == [3.0, 2.7, 2.5, 2.6]
    assert {tuple(other.get_ydata()) for other in rest} == {(3.0, 3.0), (2.0, 2.0), (2.5,)}
    shown = texts(axis)
    assert f"pruned, perplexity {math.exp(3):.2f}" in shown and f"dense, perplexity {math.exp(2):.2f}" in shown
    assert f"perplexity {math.exp(2.5):.2f}, 50 % back" in shown


def test_the_kept_step_may_be_another():
    assert "40 % back" in texts(curve_figure(CURVE, best_step=30).axes[0])


@pytest.mark.parametrize("curve", [RecoveryCurve(3.0), RecoveryCurve(3.0, None, [Point(4, 2.0)])])
def test_without_a_dense_model(curve):
    shown = texts(curve_figure(curve).axes[0])
    assert "back" not in shown and "dense" not in shown


def test_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw_curve(CURVE, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
