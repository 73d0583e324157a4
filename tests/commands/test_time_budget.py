"""The minutes of a recipe: what is foretold, what is refused, and what is said as the time goes."""

import re
import threading
from types import SimpleNamespace

import pytest

from hf_structprune.commands import time_budget
from hf_structprune.commands.time_budget import (
    ASKED,
    GRADIENTS,
    HEADS,
    LEAST,
    MEASURING,
    RECONSTRUCTING,
    TOKENS,
    TimeBudget,
    pruning_seconds,
)
from hf_structprune.config import PruningConfig
from hf_structprune.errors import ConfigurationError
from hf_structprune.refit.reconstruction import STEPS


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time_budget, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def budget_of(minutes, clock):
    said = []
    return TimeBudget(minutes, clock[0], said.append), said


@pytest.mark.parametrize("wanted", [1, 6, 40])
@pytest.mark.parametrize("each", [0.01, 4.0, 70.0])
def test_windows_take_no_more_than_their_share(clock, each, wanted):
    budget, said = budget_of(10, clock)
    count = budget.windows(each, texts=2, models=3, wanted=wanted)
    fits = [n for n in range(1, wanted + 1) if n * 2 * 3 * each <= MEASURING * 600]
    assert count == max(fits, default=1)
    assert bool(said) == (count < wanted)


@pytest.mark.parametrize("gone", [0.0, 20.0])
@pytest.mark.parametrize(("measuring", "pruning"), [(120.0, 240.0), (6.0, 0.0), (3.0, 33.0)])
def test_too_few_minutes_are_refused_and_as_many_as_it_says_are_enough(clock, measuring, pruning, gone):
    few, _ = budget_of(0.5, clock)
    clock[0] += gone
    with pytest.raises(ConfigurationError, match="nothing to train") as refused:
        few.check(measuring, pruning + 30.0)
    enough = float(re.search(r"at least ([\d.]+),", str(refused.value)).group(1))
    budget, said = budget_of(enough, [clock[0] - gone])
    budget.check(measuring, pruning + 30.0)
    assert len(said) == 1 and "about" in said[0]
    much, _ = budget_of(0.6 * enough, [clock[0] - gone])
    with pytest.raises(ConfigurationError):
        much.check(measuring, pruning + 30.0)


def test_training_gets_what_is_left_and_is_left_out_where_that_is_less_than_a_tenth(clock):
    budget, said = budget_of(60, clock)
    clock[0] += 600.0
    assert budget.training(after=120.0) == pytest.approx(60 - 10 - 2 - 1.2 - 0.25)
    clock[0] += 60 * (50 - 2 - 1.2 - 60 * LEAST) + 1
    assert budget.training(after=120.0) is None and "Not trained" in said[-1] and "more `minutes`" in said[-1]


def test_a_step_that_takes_longer_says_so_meanwhile(clock):
    lines, rang = [], {word: threading.Event() for word in ("at most", "all the time")}

    def say(line):
        lines.append(line)
        for word, event in rang.items():
            if word in line:
                event.set()

    budget = TimeBudget(1.0, clock[0], say)
    with budget.step("Pruning", 0.001, after=59.998):
        assert lines == []  # the clock stands
        clock[0] += 0.0015
        assert rang["at most"].wait(20) and not rang["all the time"].is_set()
        clock[0] += 40.0
        assert rang["all the time"].wait(20)
    assert "Pruning took 0:40, 0:40 more than foretold" in lines[-1]
    assert budget.account([("pruning", 40.0)]) == "Asked for 1 minutes, took 0:40 (minutes:seconds): pruning 0:40."


def test_a_step_in_time_says_nothing(clock):
    budget, said = budget_of(10, clock)
    with budget.step("Pruning", 100.0):
        clock[0] += 105.0
    assert said == []
    with pytest.raises(ZeroDivisionError), budget.step("Pruning", 100.0):
        raise ZeroDivisionError
    assert said == []


TIMES = 2.5, 2.0  # of a pass of 2048 tokens, with its loss and without the head


def test_a_large_head_makes_pruning_longer_where_it_runs():
    """On a model of tokens, most of a pass is the head: in gradients and where kinds are measured, not in re-fits."""
    heavy, light = (pruning_seconds(PruningConfig(), True, (whole, 1.0), 2048) for whole in (4.0, 1.0))
    assert heavy - light == pytest.approx(3.0 / 8 * (GRADIENTS * 32 + HEADS))
    named = PruningConfig("mlp_neurons")
    assert pruning_seconds(named, False, (4.0, 1.0), 2048) == pruning_seconds(named, False, (1.0, 1.0), 2048)


def test_what_pruning_takes_goes_with_its_text_and_the_minutes_it_is_given():
    alone = {"reconstruct": False}
    kinds = "mlp_neurons", "auto"
    named, plain = (pruning_seconds(PruningConfig(units, **alone), False, TIMES, 2048) for units in kinds)
    assert 0.1 * named < plain - named < 0.15 * named  # gradients, of 32 sequences
    for count, gradients in ((128, plain - named), (512, plain - named), (64, (plain - named) / 2)):
        text = PruningConfig("mlp_neurons", calibration={"num_samples": count})
        assert pruning_seconds(text, False, TIMES, 2048) == pytest.approx(named * count / 256)
        text = PruningConfig(calibration={"num_samples": count}, **alone)
        assert pruning_seconds(text, False, TIMES, 2048) == pytest.approx(named * count / 256 + gradients)
        assert pruning_seconds(text, True, TIMES, 2048) > named * count / 256 + gradients
    search = PruningConfig("mlp_neurons", layout="per_layer", allocation="search")
    assert 2.4 < pruning_seconds(search, False, TIMES, 2048) / named < 2.6
    ranked = PruningConfig("mlp_neurons", layout="per_layer", allocation="global")
    assert 1.5 < pruning_seconds(ranked, False, TIMES, 2048) / named < 1.7
    trained = plain + 2.0 * RECONSTRUCTING * STEPS  # of 2048 tokens, layer by layer
    assert pruning_seconds(PruningConfig(), False, TIMES, 2048) == pytest.approx(trained)
    assert (
        pruning_seconds(PruningConfig("mlp_neurons", reconstruct=True), False, TIMES, 2048)
        > named + trained - plain - 1
    )
    assert pruning_seconds(PruningConfig(reconstruct_minutes=3), False, TIMES, 2048) == plain + 180
    asked = PruningConfig(calibration={"dense_questions": 200}, **alone)
    assert pruning_seconds(asked, False, TIMES, 2048) == pytest.approx(plain + 2.5 * ASKED * 200 / 2048)
    for tokens in ({"vocabulary_text": "t.txt"}, {"keep": {"vocabulary": 64}, "vocabulary_text": "t.txt"}):
        beside = pruning_seconds(PruningConfig("auto", **tokens, **alone), False, TIMES, 2048)
        assert beside == pytest.approx(plain + 2.0 * TOKENS * 64 * 256 / 2048)
    search = PruningConfig(units="mlp_neurons", layout="per_layer", allocation="evolution", search_minutes=5)
    assert pruning_seconds(search, False, TIMES, 2048) == named + 300
