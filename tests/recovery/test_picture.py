"""The recovery curve as a picture."""

import math

import pytest

from hf_structprune.recovery.curve import Point, RecoveryCurve
from hf_structprune.recovery.picture import curve_figure, draw_curve


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
