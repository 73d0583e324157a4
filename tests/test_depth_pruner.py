"""Depth through `StructuredPruner`, as a user prunes: every criterion, every family, and what is saved."""

import copy

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.errors import ConfigurationError, RatioError
from hf_structprune.model.structure import ModelStructure, decoder_layers
from hf_structprune.units import DepthKind, level_criteria


DEPTH_CRITERIA = level_criteria(DepthKind)


MATRIX = [("llama", "greedy"), ("gemma2", "angular"), ("gpt2", "taylor"), ("mixtral", "perplexity")]
PROMPT = families.make_tokens(1, 8)


def make_pruner(model, **options):
    return StructuredPruner(model, PruningConfig(**{"round_to": 1, "calibration": families.calibration(8), **options}))


def check(pruner, dense, folder):
    """What holds of every pruned model, of its checkpoint and of its plan; returns the loaded model."""
    small, plan = pruner.model, pruner.last_plan
    assert plan.parameters_before == families.count(dense)
    assert plan.parameters_after == families.count(small) == plan.parameters_before - sum(plan.removed.values())
    assert plan.matrix_parameters_after == ModelStructure.of(small).matrix_parameters
    left = dense.config.num_hidden_layers - len(plan.dropped.get("layers", ()))
    layers = [layer for _, layer in decoder_layers(small, pruner.structure.family)]
    assert small.config.num_hidden_layers == len(layers) == left
    for index, layer in enumerate(layers):
        assert {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")} <= {index}
    pruner.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=small.config._experts_implementation)
    assert type(loaded) is type(small) and loaded.config.num_hidden_layers == left
    assert torch.equal(families.logits(loaded, PROMPT), families.logits(small, PROMPT))
    assert torch.equal(families.greedy(loaded, PROMPT, True, 4), families.greedy(loaded, PROMPT, False, 4))
    again = StructuredPruner(copy.deepcopy(dense), PruningConfig.load(folder))
    again.config.calibration = pruner.config.calibration
    again.prune(PruningPlan.load(folder))
    assert again.last_plan == plan
    state = small.state_dict()
    assert again.model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())
    return loaded


@pytest.mark.parametrize(("name", "criterion"), MATRIX)
def test_one_layer_goes(name, criterion, tmp_path):
    dense = families.make_model(name)
    pruner = make_pruner(copy.deepcopy(dense), num_layers=1, criterion=criterion)
    planned = pruner.plan()
    pruner.prune()
    assert pruner.last_plan.dropped == planned.dropped and len(planned.dropped["layers"]) == 1
    loaded = check(pruner, dense, tmp_path)
    assert type(loaded).__module__.startswith("transformers.models") and not loaded.config.is_heterogeneous


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_keep_first_drops_all_others(name, tmp_path):
    dense = families.make_model(name, num_hidden_layers=4, **({"layer_types": None} if name == "gemma2" else {}))
    pruner = make_pruner(copy.deepcopy(dense), keep_first=2)
    pruner.prune()
    assert pruner.last_plan.dropped == {"layers": [2, 3]} and pruner.depth_choice is None
    check(pruner, dense, tmp_path)


def test_keep_first_needs_no_text_without_healing():
    dense = families.make_model("llama")
    pruner = StructuredPruner(copy.deepcopy(dense), PruningConfig(keep_first=2, compensation=False))
    before = dense.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruner.prune().state_dict().items())
    with pytest.raises(ConfigurationError, match="`keep_first` is 5, the model has 3 layers"):
        make_pruner(dense, keep_first=5).plan()


@pytest.mark.parametrize(
    ("units", "layers", "dropped"),
    [
        (("layers",), [3, 1], {"layers": [1, 3]}),
        (("attention",), [0, 2], {"attention": [0, 2]}),
        (("mlp",), [1], {"mlp": [1]}),
        (("attention", "mlp"), [2], {"layers": [2]}),
    ],
)
@pytest.mark.parametrize("name", ["llama"])
def test_named_layers_go_exactly(name, units, layers, dropped, tmp_path):
    dense = families.make_model(name, num_hidden_layers=4)
    layout = "uniform" if units == ("layers",) else "per_layer"
    pruner = make_pruner(copy.deepcopy(dense), units=units, layers=layers, layout=layout)
    assert pruner.plan().dropped == dropped
    pruner.prune()
    assert pruner.last_plan.dropped == dropped
    check(pruner, dense, tmp_path)


def test_named_layers_that_are_not_there_are_refused():
    for layers, message in (([4], "the layers 0 to 3"), ([0, 1, 2, 3], "All 4 layers are to go")):
        with pytest.raises(ConfigurationError, match=message):
            make_pruner(families.make_model("llama", num_hidden_layers=4), units="layers", layers=layers).plan()


def test_with_a_ratio_named_layers_are_the_candidates():
    for layers in ([0, 3], [1, 2], [2, 4]):
        pruner = make_pruner(families.make_model("llama", num_hidden_layers=6), units="layers", layers=layers)
        (gone,) = pruner.plan(1 / 7).dropped["layers"]
        assert gone in layers
        with pytest.raises(RatioError, match="at most"):
            pruner.plan(0.6)


@pytest.mark.parametrize("criterion", DEPTH_CRITERIA)
def test_protected_layers_stay(criterion):
    dense = families.make_model("llama", num_hidden_layers=6)
    options = dict(units="layers", protect_first=2, protect_last=2, criterion=criterion)
    assert make_pruner(dense, num_layers=2, **options).plan().dropped == {"layers": [2, 3]}
    with pytest.raises(RatioError, match="at most 2 can"):
        make_pruner(dense, num_layers=3, **options).plan()


@pytest.mark.parametrize("criterion", ["greedy", "magnitude", "angular"])
def test_a_ratio_alone_takes_the_nearest_number_of_whole_layers(criterion):
    dense = families.make_model("llama", num_hidden_layers=6)
    share = ModelStructure.of(dense).layers[0].parameters / families.count(dense)
    for wanted, number in ((0.3, 0), (0.7, 1), (1.3, 1), (1.6, 2), (3.4, 3)):
        plan = make_pruner(dense, units="layers", criterion=criterion).plan(wanted * share)
        assert len(plan.dropped.get("layers", ())) == number
        assert plan.ratio == pytest.approx(number * share)


@pytest.mark.parametrize("units", [("attention",), ("mlp",), ("attention", "mlp")], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "opt"])
def test_sublayers_go_by_ratio(name, units, tmp_path):
    dense = families.make_model(name)
    structure = ModelStructure.of(dense)
    sizes = [layer.sublayer(kind).parameters for layer in structure.layers for kind in units]
    ratio = (1.4 if len(units) == 1 else 2.0) * sum(sizes) / len(sizes) / structure.total_parameters
    pruner = make_pruner(copy.deepcopy(dense), units=units, layout="per_layer", criterion="perplexity")
    pruner.prune(ratio)
    plan = pruner.last_plan
    assert plan.dropped and set(plan.dropped) <= {*units, "layers"}
    if len(units) == 1:
        assert [len(layers) for layers in plan.dropped.values()] == [1]
    assert abs(plan.ratio - ratio) * structure.total_parameters <= max(sizes) / 2
    check(pruner, dense, tmp_path)


@pytest.mark.parametrize("criterion", DEPTH_CRITERIA)
def test_every_criterion_ranks_sublayers(criterion):
    dense = families.make_model("qwen3_moe")
    pruner = make_pruner(
        dense, units=("attention", "mlp"), layout="per_layer", criterion=criterion, compensation=False
    )
    plan = pruner.plan(0.2)
    assert families.count(pruner.prune(0.2)) == plan.parameters_after
    assert pruner.last_plan.dropped == plan.dropped
    assert set(pruner.depth_choice.scores) >= {(1, "attention"), (1, "mlp")}


def test_a_ratio_to_which_no_layer_is_nearest_says_what_can_go(monkeypatch):
    model = families.make_model("llama", torch.float32)
    layer = families.count(model.model.layers[0]) / families.count(model)
    pruner = StructuredPruner(model, PruningConfig(units="layers", depth_criterion="magnitude"))
    (line,) = pruner.plan(layer / 3).warnings
    assert line.startswith("nothing goes") and f"the least that can go is {layer:.2%}" in line
    assert not [one for one in pruner.plan(0.6 * layer).warnings + pruner.plan(0.0).warnings if "nothing" in one]
    said = []
    monkeypatch.setattr("hf_structprune.pruner.logger.warning", said.append)
    pruner.prune(layer / 3)
    assert said == [line] and not pruner.last_plan.warnings
