"""Budgets that depth, hidden size and widths share, through `StructuredPruner`."""

import copy
import dataclasses

import families
import pytest
import torch
from test_depth_pruner import check, make_pruner

from hf_structprune import CalibrationConfig, PruningConfig
from hf_structprune.allocation.depth import choose_depth
from hf_structprune.allocation.widths import Budget, allocate
from hf_structprune.errors import ConfigurationError, RatioError, UnsupportedModelError
from hf_structprune.model.hidden_size import hidden_group
from hf_structprune.model.structure import ModelStructure
from hf_structprune.stats.survey import survey


def make_model(name="llama", layers=6, width=200, **changes):
    return families.make_model(name, num_hidden_layers=layers, intermediate_size=width, **changes)


def shares(plan):
    """The part of what goes that each kind takes."""
    return {kind: count / sum(plan.removed.values()) for kind, count in plan.removed.items()}


@pytest.fixture(scope="module")
def learnt():
    """A model of which every part has a use, and the text it has learnt: next token = token + 1."""
    model = make_model()
    torch.manual_seed(0)
    tokens = (torch.randint(3, families.VOCAB, (24, 1)) + torch.arange(12)) % families.VOCAB
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval(), CalibrationConfig(tokens=tokens, batch_size=8)


@pytest.mark.parametrize(
    ("split", "layout"),
    [
        ({"layers": 0.5, "mlp_neurons": 0.5}, "per_layer"),
        ({"kv_groups": 0.15, "mlp_neurons": 0.85}, "uniform"),
        ({"kv_groups": 0.05, "mlp_neurons": 0.95}, "per_layer"),
        ({"hidden": 0.3, "layers": 0.5, "mlp_neurons": 0.2}, "uniform"),
        ({"attention": 0.3, "layers": 0.4, "mlp_neurons": 0.3}, "per_layer"),
    ],
    ids=str,
)
def test_a_stated_split(split, layout, tmp_path):
    dense = make_model(layers=8)
    pruner = make_pruner(copy.deepcopy(dense), split=split, layout=layout, depth_criterion="block_influence")
    planned = pruner.plan(0.3)
    small = pruner.prune(0.3)
    plan = pruner.last_plan
    assert (plan.parameters_after, plan.removed) == (planned.parameters_after, planned.removed)
    structure = ModelStructure.of(dense)
    # One neuron of a layer, or of each of them where all have to be alike.
    finest = 3 * families.HIDDEN * (len(structure.layers) if layout == "uniform" else 1)
    asked = 0.3 * structure.total_parameters
    assert abs(sum(plan.removed.values()) - asked) <= finest
    first, alike = structure.layers[0], len(structure.layers) if layout == "uniform" else 1
    coarse = {"layers": first.parameters, "attention": first.sublayer("attention").parameters}
    coarse["kv_groups"] = first.group("kv_groups").cost * alike
    coarse["hidden"] = 2 * hidden_group(dense, structure).cost  # what heads divide, or a kernel wants
    coarse = {kind: coarse.get(kind, 0) for kind in split}
    for kind, part in split.items():
        slack = coarse[kind] or sum(coarse.values())
        assert shares(plan)[kind] == pytest.approx(part, abs=0.5 * (slack + finest) / asked)
        assert f": {plan.removed[kind] / plan.parameters_before:.2%} of the model" in str(plan)
    loaded = check(pruner, dense, tmp_path)
    assert loaded.config.is_heterogeneous == (layout == "per_layer")
    assert small.config.num_hidden_layers == 8 - len(plan.dropped.get("layers", ()))


def test_the_order_of_the_units_does_not_matter():
    parts, plans = {"attention": 0.3, "layers": 0.4, "mlp_neurons": 0.3}, []
    for kinds in (("attention", "layers", "mlp_neurons"), ("layers", "mlp_neurons", "attention")):
        options = dict(split={kind: parts[kind] for kind in kinds}, layout="per_layer", depth_criterion="magnitude")
        plans.append(make_pruner(make_model(layers=8), **options).plan(0.3))
    assert plans[0].dropped == plans[1].dropped and plans[0].removed == plans[1].removed


def test_units_too_large_for_the_budget_leave_it_to_finer_ones():
    """A layer is nearer to 90 % of a tenth than none, but more than the tenth."""
    pruner = make_pruner(make_model(), split={"layers": 0.9, "mlp_neurons": 0.1})
    plan = pruner.plan(0.1)
    assert set(plan.removed) == {"mlp_neurons"} and plan.ratio == pytest.approx(0.1, abs=0.005)


def test_heads_that_the_layout_cannot_cut_are_no_part_of_a_split():
    with pytest.raises(UnsupportedModelError, match="left alone: the configuration of GPT2LMHeadModel derives"):
        make_pruner(families.make_model("gpt2"), split={"kv_groups": 0.5, "mlp_neurons": 0.5}).plan(0.1)


def test_a_stated_amount_and_a_ratio_for_the_rest(tmp_path):
    dense = make_model("qwen3")
    for options, kind in (
        ({"hidden_size": 24}, "hidden"),
        ({"num_layers": 1}, "layers"),
        ({"keep_first": 5}, "layers"),
    ):
        pruner = make_pruner(copy.deepcopy(dense), units=(kind, "mlp_neurons"), **options)
        pruner.prune(0.4)
        plan = pruner.last_plan
        assert set(plan.removed) == {kind, "mlp_neurons"}
        assert plan.ratio == pytest.approx(0.4, abs=0.005)
        check(pruner, dense, tmp_path / next(iter(options)))


@pytest.mark.parametrize("options", [{"num_layers": 3}, {"keep_first": 2}, {"hidden_size": 16}], ids=str)
def test_a_stated_amount_beyond_the_ratio_is_refused(options):
    kind = "hidden" if "hidden_size" in options else "layers"
    with pytest.raises(RatioError, match=f"`{next(iter(options))}` is .* alone removes .*more than the 30.00%"):
        make_pruner(make_model(), units=(kind, "mlp_neurons"), **options).plan(0.3)
    with pytest.raises(RatioError, match="alone removes"):
        make_pruner(make_model(), units=("hidden", "layers"), hidden_size=16).plan(0.3)


def cost_of(dropped, losses, baseline, number, structure, sensitivity, config, asked):
    """`best_part`'s formula written out: the rise of the loss, and `a * share^2` of every group that is cut."""
    gone = sum(structure.layers[n].parameters for n in dropped.get("layers", ()))
    gone += sum(structure.layers[n].sublayer("attention").parameters for n in dropped.get("attention", ()))
    try:
        counts = allocate(
            Budget(structure, config, dropped=dropped), None, max(0, asked - gone), sensitivity=sensitivity
        )
    except RatioError:
        return float("inf")
    rise = losses[number - 1] - baseline if number else 0.0
    whole = {(g.layer, g.kind): g.size for g in structure.groups}
    return rise + sum(sensitivity[key] * ((whole[key] - keep) / whole[key]) ** 2 for key, keep in counts.items())


@pytest.mark.parametrize(
    ("ratio", "options"),
    [
        (0.15, dict(units=("layers", "mlp_neurons"))),
        (0.8, dict(units=("layers", "mlp_neurons"))),
        (0.45, dict(units=("layers", "mlp_neurons"), depth_criterion="perplexity")),
        (0.15, dict(units=("attention", "mlp_neurons"), layout="per_layer")),
        (0.45, dict(units=("attention", "mlp_neurons"), layout="per_layer", allocation="search")),
    ],
    ids=str,
)
def test_without_a_split_the_cheapest_of_all_is_taken(learnt, options, ratio):
    model, calibration = learnt
    pruner = make_pruner(model, calibration=calibration, **options)
    plan, config = pruner.plan(ratio), pruner.config
    structure, tokens = ModelStructure.of(model), calibration.tokens
    asked, kind = round(ratio * structure.total_parameters), config.units[0]
    depth = choose_depth(model, structure, config, (kind,), parameters=asked, most=True, tokens=lambda: tokens)
    search = dataclasses.replace(config, allocation="search", layout="per_layer")
    sensitivity = survey(model, structure, search, lambda: tokens).sensitivity
    costs = []
    for number in range(len(depth.order) + 1):
        dropped = {kind: sorted(layer for layer, _ in depth.order[:number])} if number else {}
        costs.append(cost_of(dropped, depth.losses, depth.baseline, number, structure, sensitivity, config, asked))
    best = costs.index(min(costs))
    assert len(plan.dropped.get(kind, ())) == best
    assert plan.dropped.get(kind, []) == sorted(layer for layer, _ in depth.order[:best])
    assert plan.ratio == pytest.approx(ratio, abs=0.02)


def test_what_cannot_be_reached_together_is_refused(learnt):
    model, calibration = learnt
    with pytest.raises(RatioError, match="after any of 0 to 5 removals"):
        make_pruner(model, calibration=calibration, units=("layers", "mlp_neurons")).plan(0.99)
    options = dict(units=("layers", "mlp_neurons"), calibration=calibration)
    with pytest.raises(ConfigurationError, match="gives no cost"):
        make_pruner(model, depth_criterion="angular", **options).plan(0.3)
    with pytest.raises(ConfigurationError, match="The cost of query heads is not measured"):
        make_pruner(model, units=("layers", "query_heads"), calibration=calibration).plan(0.1)


@pytest.mark.parametrize(
    "options",
    [
        dict(split={"kv_groups": 0.5, "query_heads": 0.5}),
        dict(split={"kv_groups": 0.5, "mlp_neurons": 0.5}, attention_ratio=0.1),
    ],
)
def test_splits_that_cannot_be_kept_are_refused(options):
    with pytest.raises(ConfigurationError, match="give one of them"):
        PruningConfig(**options)
