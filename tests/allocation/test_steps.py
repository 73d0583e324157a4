"""Cutting in several steps: each only tightens, and the last one ends where one step would."""

import random

import families
import pytest

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.allocation.widths import Budget, next_counts
from hf_structprune.errors import StructPruneError
from hf_structprune.model.structure import ModelStructure


ALL = ("mlp_neurons", "kv_groups", "query_heads")


def draw(seed):
    """A random configuration that can be carried out, its family and its ratio."""
    r = random.Random(seed)
    name = r.choice([name for name in families.FAMILIES if families.kinds_of(name)])
    layout = r.choice(["uniform", "per_layer"])
    kinds = [k for k in families.kinds_of(name) if layout == "per_layer" or name not in families.DERIVED_HEAD_DIM]
    kinds = kinds or ["mlp_neurons"]
    units = tuple(r.sample(kinds, r.randint(1, len(kinds))))
    options = {"units": units, "layout": layout, "criterion": r.choice(["l2", "random"]), "compensation": False}
    if layout == "per_layer" and "query_heads" not in units:
        options["allocation"] = r.choice(["uniform", "global", "global"])
    options |= r.choice([{"round_to": None}, {"round_to": 1}, {"round_to": 8}, {"align_to": 8}])
    ratio = r.choice([0.02, 0.05, 0.08, 0.12] if len(units) == 1 else [0.05, 0.1, 0.15, 0.2])
    if r.random() < 0.2:
        named = {"mlp_ratio": 0.3} if "mlp_neurons" in units else {}
        named |= {"attention_ratio": 0.5} if set(units) - {"mlp_neurons"} else {}
        return name, options | named | {"allocation": "uniform"}, None
    if r.random() < 0.2 and set(units) == {"mlp_neurons", "kv_groups"}:
        options["split"] = {"mlp_neurons": 0.6, "kv_groups": 0.4}
    return name, options, ratio


def make_pruner(name, options, steps):
    config = PruningConfig(**options, iterative_steps=steps, calibration=families.calibration(8, 8))
    return StructuredPruner(families.make_model(name), config)


def pruned(name, options, ratio, steps):
    pruner = make_pruner(name, options, steps)
    pruner.prune(ratio)
    return pruner


@pytest.mark.parametrize("seed", range(30))
def test_several_steps_end_as_near_as_one(seed):
    name, options, ratio = draw(seed)
    pruner = make_pruner(name, options, 2 + seed % 3)
    structure, before = pruner.structure, families.count(pruner.model)
    try:
        one = pruner.plan(ratio)
    except StructPruneError as error:  # too much is asked, which has to be found before the first step
        with pytest.raises(type(error)):
            pruner.prune(ratio)
        assert families.count(pruner.model) == before
        return
    small = pruner.prune(ratio)
    plan = pruner.last_plan
    assert (plan.parameters_before, plan.parameters_after) == (before, families.count(small))
    assert plan.parameters_before - plan.parameters_after == sum(plan.removed.values())
    if options.get("allocation") == "global":
        budget = Budget(structure, PruningConfig(**options))
        step = max((budget.step(g) * g.cost for g in budget.groups), default=0)
        heads = max((layer.group("kv_groups").cost for layer in budget.attentions), default=0)
        off = abs(plan.ratio - ratio) * structure.total_parameters
        assert off <= max(abs(one.ratio - ratio) * structure.total_parameters, (step or heads) / 2 + 1)
    else:
        assert [(g.layer, g.kind, g.keep) for g in plan.groups] == [(g.layer, g.kind, g.keep) for g in one.groups]


def test_search_reaches_the_ratio_in_steps_as_in_one():
    options = dict(units=("mlp_neurons", "kv_groups"), layout="per_layer", allocation="search", round_to=1)
    plans = [pruned("mistral", options, 0.15, steps).last_plan for steps in (1, 3)]
    assert abs(plans[1].ratio - 0.15) <= abs(plans[0].ratio - 0.15) + 0.001


def test_every_step_cuts_and_none_gives_back(monkeypatch):
    seen = []
    carry_out = StructuredPruner._carry_out

    def watched(self, run, plan, known=None):
        seen.append({(g.layer, g.kind): (g.before, g.keep) for g in plan.groups})
        carry_out(self, run, plan, known)

    monkeypatch.setattr(StructuredPruner, "_carry_out", watched)
    small = pruned("mistral", {"units": ALL, "round_to": 1}, 0.25, 4)
    neurons = [step[0, "mlp_neurons"] for step in seen]
    cuts = [before - after for before, after in neurons]
    assert len(neurons) == 4 and max(cuts) - min(cuts) <= 1 and min(cuts) > 0
    assert [before for before, _ in neurons[1:]] == [after for _, after in neurons[:-1]]
    assert small.last_plan.keep(0, "mlp_neurons", 48) == neurons[-1][1]


def test_kept_query_heads_are_those_of_the_kept_groups_when_they_go_in_different_steps():
    """One query head in each KV group is left before a whole group goes with it."""
    small = pruned("llama", {"units": ("kv_groups", "query_heads"), "layout": "per_layer"}, 0.2, 2)
    plan = small.last_plan
    assert plan.parameters_after == families.count(small.model)
    for layer in range(families.LAYERS):
        decisions = plan.of_layer(layer)
        groups = decisions["kv_groups"].kept if "kv_groups" in decisions else [0, 1]
        heads = decisions["query_heads"].kept
        assert sorted({head // 2 for head in heads}) == groups


@pytest.mark.parametrize("steps_left, wanted", [(1, 20), (2, 34), (4, 41), (100, 48)])
def test_a_step_goes_an_equal_part_of_the_way_that_is_left(steps_left, wanted):
    structure = ModelStructure.of(families.make_model("llama"))
    budget = Budget(structure, PruningConfig(units="mlp_neurons", round_to=1, layout="per_layer"))
    counts = next_counts(budget, {(0, "mlp_neurons"): 20}, steps_left)
    assert counts.get((0, "mlp_neurons"), 48) == wanted
    assert set(counts) <= {(0, "mlp_neurons")}


def test_rounding_refers_to_the_dense_width():
    dense = ModelStructure.of(families.make_model("llama", intermediate_size=128))  # a step of 4 by default
    now = ModelStructure.of(families.make_model("llama", intermediate_size=60))
    assert Budget(now, PruningConfig(units="mlp_neurons"), dense=dense).step(now.groups[-1]) == 4
    assert Budget(now, PruningConfig(units="mlp_neurons")).step(now.groups[-1]) == 1
