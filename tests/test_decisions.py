"""Dropped layers and sublayers in one form, and what they take from a model."""

import json

import families
import pytest

from hf_structprune.errors import ConfigurationError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.plan import Decision, PruningPlan, is_dropped, normalised


@pytest.fixture
def structure():
    return ModelStructure.of(families.make_model("llama"))


def make_plan(structure, counts=None, **options):
    return PruningPlan.from_counts(structure, counts or {}, model_type="llama", layout="per_layer", **options)


def test_a_layer_that_loses_both_sublayers_is_dropped(structure):
    assert normalised({"attention": [2, 0], "mlp": [0], "layers": []}, structure) == {"layers": [0], "attention": [2]}


def test_a_layer_that_loses_the_only_sublayer_it_has_left_is_dropped():
    for name in ("llama", "cohere2", "mixtral"):  # Cohere's norm belongs to both sublayers
        model = families.cut(families.make_model(name), {}, {}, "per_layer", {"attention": [1], "mlp": [2]})
        structure = ModelStructure.of(model)
        assert normalised({"mlp": [0, 1]}, structure) == {"layers": [1], "mlp": [0]}
        assert normalised({"attention": [2]}, structure) == {"layers": [2]}
        with pytest.raises(ConfigurationError, match="All 3 layers are to go"):
            normalised({"mlp": [1], "attention": [2], "layers": [0]}, structure)
        with pytest.raises(ConfigurationError, match="Layer 1 has no attention that could go alone"):
            normalised({"attention": [1]}, structure)


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ({"layers": [3]}, "the layers 0 to 2"),
        ({"heads": [0]}, "the kinds are layers, attention, mlp"),
        ({"layers": [0, 1, 2]}, "All 3 layers are to go"),
        ({"layers": [0, 1], "attention": [2], "mlp": [2]}, "All 3 layers are to go"),
    ],
)
def test_impossible_decisions_are_refused(structure, dropped, message):
    with pytest.raises(ConfigurationError, match=message):
        normalised(dropped, structure)


def test_which_widths_go_with_what():
    dropped = {"layers": [0], "attention": [1], "mlp": [2]}
    gone = {(layer, kind) for layer in range(3) for kind in ("kv_groups", "query_heads", "mlp_neurons")
            if is_dropped(dropped, layer, kind)}  # fmt: skip
    assert gone == {
        (0, "kv_groups"), (0, "query_heads"), (0, "mlp_neurons"), (1, "kv_groups"), (1, "query_heads"),
        (2, "mlp_neurons"),
    }  # fmt: skip


def test_parameters_and_shares_of_every_kind_add_up(structure):
    counts = {(1, "mlp_neurons"): 24, (0, "mlp_neurons"): 24, (1, "kv_groups"): 1, (2, "kv_groups"): 1}
    plan = make_plan(structure, counts, dropped={"layers": [0], "attention": [2]})
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    attention = 2 * 32 * 32 + 2 * 32 * 16 + 32
    assert plan.removed == {
        "layers": layer, "attention": attention, "mlp_neurons": 24 * 3 * 32, "kv_groups": attention // 2 - 16,
    }  # fmt: skip
    assert plan.parameters_before - plan.parameters_after == sum(plan.removed.values())
    assert plan.num_layers == 3 and {g.layer for g in plan.groups} == {1}
    assert (plan.neurons_before, plan.neurons_after) == (3 * 48, 24 + 48)


def test_json_and_table(structure):
    plan = make_plan(structure, dropped={"layers": [0, 2]})
    plan.decisions.append(Decision("hidden", None, 32, 24, list(range(24))))
    again = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and again.is_dropped(2, "mlp_neurons") and not again.is_dropped(1, "mlp_neurons")
    assert "0 2" in str(plan) and "decoder layers, gone" in str(plan) and "hidden size" in str(plan)


def test_plans_that_were_written_before_there_was_depth_can_be_read(structure):
    values = make_plan(structure, {(0, "mlp_neurons"): 24}).to_dict()
    for name in ("decisions", "num_layers", "removed"):
        del values[name]
    values |= {"version": 1, "groups": [{"layer": 0, "kind": "mlp_neurons", "num_units": 48, "keep": 24}]}
    plan = PruningPlan.from_dict(values)
    assert plan.dropped == {} and plan.hidden is None and plan.parameters_after == values["parameters_after"]


@pytest.mark.parametrize(("keep", "kept"), [(0, None), (32, None), (2, [1, 0]), (2, [0, 40])])
def test_impossible_hidden_sizes_are_refused(keep, kept):
    with pytest.raises(ConfigurationError):
        Decision("hidden", None, 32, keep, kept)
