"""`keep` asks for an exact shape, several kinds of units at once; `criterion` may differ by kind."""

import families
import pytest

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.criteria import make_criterion
from hf_structprune.errors import ConfigurationError, RatioError


def make_pruner(name="llama", **options):
    options = {"calibration": families.calibration(8, 12), "round_to": 1, **options}
    return StructuredPruner(families.make_model(name), PruningConfig(**options))


def test_an_exact_shape_in_one_call():
    """As Minitron and LLM-Shearing state it: so wide, so deep, so many neurons and heads."""
    pruner = make_pruner(
        keep={"hidden": 24, "layers": 2, "mlp_neurons": 30, "kv_groups": 1}, depth_criterion="magnitude"
    )
    model = pruner.prune()
    config = model.config
    sizes = (config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.num_key_value_heads)
    assert sizes == (24, 2, 30, 1) and config.num_attention_heads == 2 and type(model).__name__ == "LlamaForCausalLM"
    assert model(families.make_tokens(2, 8)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2", "phi3", "falcon_7b"])
def test_families_take_a_shape(name):
    pruner = make_pruner(name, keep={"layers": 2, "mlp_neurons": 20}, depth_criterion="magnitude", compensation=False)
    pruner.prune()
    assert len(pruner.structure.layers) == 2
    assert {group.size for group in pruner.structure.groups if group.kind == "mlp_neurons"} == {20}


@pytest.mark.parametrize(
    ("keep", "sugar"),
    [
        ({"hidden": 24}, {"hidden_size": 24}),
        ({"layers": 2}, {"num_layers": 1, "depth_criterion": "magnitude"}),
    ],
)
def test_older_options_say_the_same(keep, sugar):
    extra = {key: value for key, value in sugar.items() if key == "depth_criterion"}
    plans = [make_pruner(**options).plan() for options in ({"keep": keep, **extra}, sugar)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_sublayers_are_counted_by_those_that_stay(kind):
    pruner = make_pruner(keep={kind: 2}, layout="per_layer", depth_criterion="magnitude", compensation=False)
    pruner.prune()
    assert [decision.keep for decision in pruner.last_plan.decisions] == [2]
    assert sum(layer.sublayer(kind) is not None for layer in pruner.structure.layers) == 2


def test_what_other_kinds_are_rounded_to_is_not_what_keep_asks_for():
    """Halves of layers go whole, here one more than half of one: `keep`, of other units, is not to blame for it."""
    pruner = make_pruner(units=("hidden", "attention"), keep={"hidden": 28}, layout="per_layer",
                         depth_criterion="magnitude", compensation=False)  # fmt: skip
    total = pruner.structure.total_parameters
    narrow = make_pruner(keep={"hidden": 28}).plan()
    half = make_pruner(keep={"hidden": 28, "attention": 2}, layout="per_layer", depth_criterion="magnitude").plan()
    step = narrow.parameters_after - half.parameters_after
    plan = pruner.plan((narrow.parameters_before - narrow.parameters_after + 0.9 * step) / total)
    assert plan.parameters_after == half.parameters_after
    with pytest.raises(RatioError, match="`keep` is .* alone removes"):
        pruner.plan((narrow.parameters_before - narrow.parameters_after - step) / total)


def test_a_ratio_is_reached_by_the_units_that_are_not_named():
    pruner = make_pruner(units=("layers", "mlp_neurons"), keep={"layers": 2}, depth_criterion="magnitude",
                         compensation=False)  # fmt: skip
    pruner.prune(0.4)
    plan = pruner.last_plan
    assert plan.num_layers - len(plan.dropped["layers"]) == 2 and plan.ratio == pytest.approx(0.4, abs=0.01)
    with pytest.raises(RatioError, match="more than the"):
        make_pruner(units=("layers", "mlp_neurons"), keep={"layers": 1}, depth_criterion="magnitude").plan(0.1)


def test_query_heads_are_those_of_a_layer():
    pruner = make_pruner(keep={"query_heads": 2}, criterion="l1", layout="per_layer")
    pruner.prune()
    assert {layer.attention.heads for layer in pruner.structure.layers} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep={"toes": 3}), "toes"),
        (dict(keep={"layers": 0}), "at least 1"),
        (dict(keep={}), "must be like"),
        (dict(keep=["layers=2", "layers=3"]), "'layers' 2 times"),
        (dict(keep={"layers": 2}, num_layers=1), "`keep` and `num_layers`"),
        (dict(keep={"hidden": 24}, hidden_size=24), "`keep` and `hidden_size`"),
        (dict(keep={"mlp_neurons": 24}, mlp_ratio=0.5), "give one of them"),
        (dict(keep={"layers": 2}, units="mlp_neurons"), "`keep` names 'layers'"),
        (dict(keep={"layers": 2}, split={"layers": 1.0}), "`split` and `keep`"),
        (dict(keep={"hidden": 20}, align_to=8), "not a multiple of 8"),
        (dict(keep={"mlp_neurons": 20}, align_to=8), "not a multiple of 8"),
    ],
)
def test_contradictions_are_named(options, message):
    with pytest.raises(ConfigurationError, match=message):
        PruningConfig(**options)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"mlp_neurons": 100}, "layer 0 has only 48 MLP neurons"),
        ({"kv_groups": 3}, "3 KV groups of layer 0"),
        ({"query_heads": 3}, "3 query heads in 2 KV groups"),
        ({"layers": 9}, "only 3 decoder layers"),
        ({"hidden": 32}, "less than the model's own"),
    ],
)
def test_what_the_model_does_not_have_is_named(keep, message):
    with pytest.raises(ConfigurationError, match=message):
        make_pruner(keep=keep, layout="per_layer", depth_criterion="magnitude").plan()


def test_a_ratio_counts_the_widths_that_are_stated():
    model = families.make_model("llama")
    options = dict(units=("kv_groups", "mlp_neurons"), keep={"kv_groups": 1}, round_to=1, layout="per_layer")
    plan = StructuredPruner(model, PruningConfig(calibration=families.calibration(8, 16), **options)).plan(0.3)
    assert plan.ratio == pytest.approx(0.3, abs=0.01) and set(plan.removed) == {"kv_groups", "mlp_neurons"}


def test_no_ratio_where_all_is_stated():
    with pytest.raises(ConfigurationError, match="`keep` in the configuration says how much goes"):
        make_pruner(keep={"mlp_neurons": 24}).plan(0.3)
    with pytest.raises(ConfigurationError, match="With `units='auto'` the other units take what is left"):
        PruningConfig(keep={"vocabulary": 64}).check_ratio(0.3)


def test_criteria_by_kind():
    config = PruningConfig(criterion={"layers": "angular", "kv_groups": "l1", "mlp_neurons": "wanda"},
                           split={"layers": 0.5, "kv_groups": 0.2, "mlp_neurons": 0.3})  # fmt: skip
    assert config.depth_criterion == "angular" and config.criterion == {"kv_groups": "l1", "mlp_neurons": "wanda"}
    assert [config.criterion_of(kind) for kind in ("layers", "kv_groups", "mlp_neurons")] == ["angular", "l1", "wanda"]
    criterion = make_criterion(config)
    assert (criterion.needs_inputs, criterion.needs_gram, criterion.needs_gradients) == (True, False, False)
    assert PruningConfig.from_dict(config.to_dict()) == config
    alone = PruningConfig(criterion={"mlp_neurons": "l2"})
    assert alone.criterion == "l2" and alone.units == ("mlp_neurons",)


def test_each_kind_is_ranked_by_its_own_criterion():
    plans, both = {}, {"kv_groups": "l1", "mlp_neurons": "random"}
    for name, criterion in {"both": both, "l1": "l1", "random": "random"}.items():
        pruner = make_pruner(keep={"kv_groups": 1, "mlp_neurons": 24}, criterion=criterion, compensation=False)
        pruner.prune()
        plans[name] = {(one.layer, one.kind): one.kept for one in pruner.last_plan.groups}
    heads = {key for key in plans["both"] if key[1] != "mlp_neurons"}
    for key, kept in plans["both"].items():
        assert kept == plans["l1" if key in heads else "random"][key]


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ({"layers": "obs"}, "obs"),
        ({"layers": "angular", "attention": "greedy"}, "compared with each other"),
        ({"toes": "l1"}, "toes"),
    ],
)
def test_wrong_criteria_by_kind_are_named(criterion, message):
    units = tuple(kind for kind in criterion if kind != "toes") or "mlp_neurons"
    with pytest.raises(ConfigurationError, match=message):
        PruningConfig(units=units, criterion=criterion, layout="per_layer")
