"""A plan is carried out on the model it was made for, and on no other."""

import dataclasses

import families
import pytest

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.errors import ConfigurationError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.plan import Decision, decisions_of
from hf_structprune.prune import check_plan


def make_pruner(model, **options):
    options = {"calibration": families.calibration(8, 8), "compensation": False, **options}
    return StructuredPruner(model, PruningConfig(**options))


def dropping(name="llama", **changes):
    """A plan that only names a layer, which any model with as many layers has."""
    return make_pruner(families.make_model(name, **changes), layers=[1], units=("layers",)).plan()


OTHERS = {
    "fewer layers": ("llama", {"num_hidden_layers": 2}, r"a 3-layer llama of 27,\d+ .* this is a 2-layer llama of"),
    "more layers": ("llama", {"num_hidden_layers": 5}, "a 3-layer llama of .* this is a 5-layer llama of"),
    "width": ("llama", {"intermediate_size": 40}, r"llama of 27,\d+ parameters, .*; this is a 3-layer llama of 25,"),
    "type": ("mistral", {}, "a 3-layer llama of .* this is a 3-layer mistral of"),
    "tied": ("llama", {"tie_word_embeddings": True}, r"of 27,\d+ parameters, .*; .* of 25,\d+ parameters"),
}


@pytest.mark.parametrize("name, changes, message", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("whole_layers", [True, False])
def test_a_plan_of_another_model_is_refused_and_the_model_left(name, changes, message, whole_layers):
    plan = dropping() if whole_layers else make_pruner(families.make_model("llama")).plan(0.1)
    model = families.make_model(name, **changes)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=message):
        make_pruner(model).prune(plan)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


def test_what_differs_in_kind_but_not_in_number_is_told_apart():
    """Two MLP widths that change places, one bias for a weight: all parameters together are as many."""
    model = families.make_model("llama")
    structure, plan = ModelStructure.of(model), dropping()
    with pytest.raises(ConfigurationError, match="with 143 MLP neurons; .* with 144 MLP neurons"):
        check_plan(model, structure, dataclasses.replace(plan, neurons_before=143))
    with pytest.raises(ConfigurationError, match=r"1 of them in matrices .* 25,\d+ of them in matrices"):
        check_plan(model, structure, dataclasses.replace(plan, matrix_parameters_before=1))


def test_a_plan_without_a_number_of_layers_is_of_the_first_ones_and_carried_out():
    model = families.make_model("llama")
    small = make_pruner(model).prune(dataclasses.replace(dropping(), num_layers=0))
    assert len(small.model.layers) == 2


@pytest.mark.parametrize("name", ["model_type", "parameters_before", "neurons_before"])
def test_a_plan_written_by_hand_says_what_it_is_for(name):
    values = dropping().to_dict()
    del values[name]
    with pytest.raises(ConfigurationError, match=f"incomplete.*{name}"):
        PruningPlan.from_dict(values)


def test_a_plan_of_a_model_that_changed_its_type_is_for_the_model_before(tmp_path):
    """Three of four heads make a Mistral of a Llama; the plan is still for the Llama."""
    options = dict(units=("query_heads", "kv_groups"), layout="uniform")
    llama = dict(num_attention_heads=6, num_key_value_heads=6, hidden_size=48, head_dim=8)
    first = make_pruner(families.make_model("llama", **llama), **options)
    small = first.prune(0.1)
    assert small.config.model_type == "mistral" and first.last_plan.model_type == "llama"
    first.last_plan.save(tmp_path / "plan.json")
    again = make_pruner(families.make_model("llama", **llama), **options)
    again.prune(PruningPlan.load(tmp_path / "plan.json"))
    assert families.count(again.model) == first.last_plan.parameters_after


def test_the_plan_that_is_given_stays_as_it_is():
    pruner = make_pruner(families.make_model("llama"), units=("hidden",), hidden_size=24)
    plan = pruner.plan()
    given = plan.to_dict()
    pruner.prune(plan)
    assert plan.to_dict() == given and pruner.last_plan.hidden.kept is not None


def heads(keep, kept=None):
    return Decision("query_heads", 0, 4, keep, kept)


KV_1 = Decision("kv_groups", 0, 2, 1, [1])
CONTRADICTIONS = {
    "twice": ([Decision("mlp_neurons", 0, 48, 8), Decision("mlp_neurons", 0, 48, 9)], {}, "layer 0 2 times"),
    "dropped": ([Decision("mlp_neurons", 1, 48, 8)], {"layers": [1]}, "drops the mlp_neurons of layer 1 and keeps"),
    "uneven": ([heads(3)], {}, "3 query heads in 2 KV groups"),
    "too many": ([KV_1, heads(3)], {}, "3 query heads in 1 KV groups"),
    "other groups": ([KV_1, heads(2, [0, 1])], {}, r"query heads \[0, 1\] of layer 0"),
    "one group": ([heads(2, [0, 1])], {}, r"every KV group that stays must keep 1"),
    "gone groups": ([Decision("kv_groups", 0, 2, 1), heads(2, [1, 2])], {}, "the others none"),
}


@pytest.mark.parametrize("groups, dropped, message", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_decisions_that_contradict_each_other_are_refused(groups, dropped, message):
    model = families.make_model("llama")
    plan = dataclasses.replace(dropping(), layout="per_layer", decisions=decisions_of(groups, dropped, layers=3))
    with pytest.raises(ConfigurationError, match=message):
        check_plan(model, ModelStructure.of(model), plan)


def test_an_unknown_layout_is_refused():
    model = families.make_model("llama")
    with pytest.raises(ConfigurationError, match="layout 'wide'; there are uniform, per_layer"):
        check_plan(model, ModelStructure.of(model), dataclasses.replace(dropping(), layout="wide"))


def test_hidden_channels_are_as_many_as_are_kept():
    with pytest.raises(ConfigurationError, match="must name 3 of 8"):
        Decision("hidden", None, 8, 3, [0, 1])
