"""Allocations under `align_to`: everything that is cut is aligned, and the ratio is met to within one aligned unit."""

import itertools

import families
import pytest
import torch

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.allocation.widths import Budget, allocate
from hf_structprune.errors import ConfigurationError, RatioError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.plan import PruningPlan
from hf_structprune.units.heads import removed_by_pair, shape_after


RATIOS = (0.02, 0.1, 0.2, 0.3)


def plan_of(structure, config, ratio, seed=0):
    """The plan for random scores and sensitivities."""
    generator = torch.Generator().manual_seed(seed)
    scores = {(g.layer, g.kind): torch.rand(g.size, generator=generator) for g in structure.groups}
    sensitivity = {key: float(torch.rand((), generator=generator)) + 0.1 for key in scores}
    counts = allocate(Budget(structure, config), ratio, None, scores, sensitivity)
    return PruningPlan.from_counts(structure, counts, model_type="llama", layout=config.layout)


def widths_left(structure, plan, config):
    """Every width of a kind that may be cut: MLPs, and heads times their size."""
    for layer in structure.layers:
        mlp = layer.group("mlp_neurons")
        if mlp is not None and "mlp_neurons" in config.units:
            yield plan.keep(layer.index, "mlp_neurons", mlp.size)
        if layer.attention is not None and {"kv_groups", "query_heads"} & set(config.units):
            yield shape_after(layer, plan).query_width


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_everything_that_is_cut_is_aligned_in_every_family_and_layout(name, layout):
    units = tuple(families.kinds_of(name))
    if layout == "uniform" and name in (*families.DERIVED_HEAD_DIM, "cohere2"):
        units = ("mlp_neurons",)  # heads cannot be cut
    config = PruningConfig(units=units, layout=layout, align_to=16)
    with torch.device("meta"):
        model = families.make_model(name)
    pruner = StructuredPruner(model, config)
    for ratio in (0.02, 0.15):
        try:
            plan = pruner.plan(ratio)
        except RatioError:
            assert name in ("mixtral", "qwen3_moe") and ratio > 0.02  # their experts are not cut
            continue
        assert plan.groups or ratio == 0.02  # where one step may be more than twice of what is asked
        left = list(widths_left(pruner.structure, plan, config))
        assert left and not [width for width in left if width % 16]


@pytest.fixture(scope="module")
def odd():
    """MLPs 52 wide, 6 heads of 8 in 3 KV groups: neither is a multiple of 16 to begin with, except 48 = 6 x 8."""
    return ModelStructure.of(
        families.make_model("mistral", intermediate_size=52, num_attention_heads=6, num_key_value_heads=3)
    )


UNITS = [("mlp_neurons",), ("kv_groups",), ("mlp_neurons", "kv_groups"), ("mlp_neurons", "kv_groups", "query_heads")]


WAYS = [("uniform", "uniform"), ("uniform", "per_layer"), ("global", "per_layer"), ("search", "per_layer")]


@pytest.mark.parametrize(
    "units, allocation, layout",
    [  # global and search do not split query heads
        (units, *way) for units in UNITS for way in WAYS if way[0] == "uniform" or "query_heads" not in units
    ],
)
@pytest.mark.parametrize("align_to", [4, 16, 32])
def test_what_is_left_is_aligned_and_the_ratio_met(odd, units, align_to, allocation, layout):
    config = PruningConfig(units=units, align_to=align_to, allocation=allocation, layout=layout)
    budget = Budget(odd, config)
    least = aligned_removals(budget)[0]
    reachable = [ratio for ratio in RATIOS if ratio * odd.total_parameters <= budget.removable]
    assert reachable
    for ratio, seed in itertools.product(reachable, range(3)):
        plan = plan_of(odd, config, ratio, seed)
        assert not [width for width in widths_left(odd, plan, config) if width % align_to]
        target = min(max(ratio * odd.total_parameters, least), budget.removable)
        layers = len(odd.layers) if layout == "uniform" else 1
        assert abs(plan.parameters_before - plan.parameters_after - target) <= layers * unit(budget)


def aligned_removals(budget):
    """Least and most that aligned widths remove."""
    removals = []
    for pick in (min, max):
        heads = [
            pick(removed_by_pair(layer, *option) for option in budget.attention_options(layer))
            for layer in budget.attentions
        ]
        step = budget.config.align_to
        sizes = {group: range(step, group.size + 1, step) for group in budget.groups}
        mlps = [pick((g.size - width) * g.cost for width in sizes[g]) for g in budget.groups]
        removals.append(sum(heads) + sum(mlps))
    return removals


def unit(budget):
    """Parameters of one aligned unit of a layer: of MLPs, which close the gap, or else of heads."""
    if budget.groups:
        return budget.config.align_to * budget.groups[0].cost
    sizes = sorted({removed_by_pair(budget.attentions[0], *o) for o in
                    budget.attention_options(budget.attentions[0])})  # fmt: skip
    return max((b - a for a, b in itertools.pairwise(sizes)), default=0)


@pytest.mark.parametrize("align_to", [4, 8, 16])
def test_uniform_widths_are_the_nearest_of_all_aligned_ones(odd, align_to):
    group = odd.layers[0].group("mlp_neurons")
    for ratio in RATIOS:
        plan = plan_of(odd, PruningConfig(units="mlp_neurons", align_to=align_to), ratio)
        target = ratio * odd.total_parameters / len(odd.layers)
        removed = [(52 - width) * group.cost for width in range(align_to, 53, align_to)]
        got = (plan.parameters_before - plan.parameters_after) // len(odd.layers)
        assert abs(got - target) == min(abs(one - target) for one in removed)


def test_a_whole_width_that_is_not_aligned_is_not_kept(odd):
    for layout in ("uniform", "per_layer"):
        plan = plan_of(odd, PruningConfig(units="mlp_neurons", align_to=16, layout=layout), 0.001)
        assert {group.keep for group in plan.groups} == {48} and len(plan.groups) == 3
    # Heads take more than was asked for, and neurons are aligned all the same.
    both = PruningConfig(units=("kv_groups", "mlp_neurons"), align_to=32)
    plan = plan_of(odd, both, 0.001)
    kept = {(group.kind, group.keep) for group in plan.groups}
    assert kept == {("mlp_neurons", 32), ("kv_groups", 2), ("query_heads", 4)}


def test_layers_that_are_left_whole_stay_as_they_are(odd):
    config = PruningConfig(units="mlp_neurons", align_to=16, layout="per_layer", protect_first=1)
    plan = plan_of(odd, config, 0.1)
    assert plan.keep(0, "mlp_neurons", 52) == 52 and all(group.keep % 16 == 0 for group in plan.groups)


@pytest.mark.parametrize("attention_ratio, mlp_ratio, heads, width", [(0.0, 0.1, 6, 48), (0.1, 0.5, 6, 32)])
def test_ratios_by_kind_are_aligned(odd, attention_ratio, mlp_ratio, heads, width):
    config = PruningConfig(attention_ratio=attention_ratio, mlp_ratio=mlp_ratio, align_to=16)
    plan = plan_of(odd, config, None)
    assert {shape_after(layer, plan).heads for layer in odd.layers} == {heads}
    assert {plan.keep(layer, "mlp_neurons", 52) for layer in range(3)} == {width}


def test_ratios_by_kind_do_not_round_up_to_a_width_that_is_not_aligned(odd):
    plan = plan_of(odd, PruningConfig(mlp_ratio=0.01, align_to=20), None)  # 51 is nearer to 60 than to 40
    assert {plan.keep(layer, "mlp_neurons", 52) for layer in range(3)} == {40}


def test_ratios_by_kind_take_the_most_heads_that_are_aligned(odd):
    plan = plan_of(odd, PruningConfig(attention_ratio=0.1, align_to=32), None)
    assert {shape_after(layer, plan).heads for layer in odd.layers} == {4}


@pytest.mark.parametrize("options, words", [
    (dict(units=("mlp_neurons",), align_to=64), "only 52 wide"),
    (dict(units=("kv_groups",), align_to=20), "2 x 8 = 16, 4 x 8 = 32, 6 x 8 = 48"),
    (dict(units=("kv_groups", "query_heads"), align_to=64), "1 x 8 = 8, 2 x 8 = 16, 3 x 8 = 24"),
])  # fmt: skip
def test_an_alignment_that_nothing_has_says_what_there_is(odd, options, words):
    with pytest.raises(ConfigurationError, match=f"`align_to` is {options['align_to']}") as error:
        plan_of(odd, PruningConfig(**options), 0.1)
    assert words in str(error.value)


@pytest.mark.parametrize("align_to, size", [(8, 24), (16, 16)])
def test_hidden_sizes_are_aligned(align_to, size):
    model = families.make_model("mistral")
    plan = StructuredPruner(model, PruningConfig(units="hidden", align_to=align_to)).plan(0.3)
    assert (plan.hidden.before, plan.hidden.keep) == (families.HIDDEN, size)
    with pytest.raises(ConfigurationError, match="no hidden size below the model's own, 32, is a multiple of 64"):
        StructuredPruner(model, PruningConfig(units="hidden", align_to=64)).plan(0.2)
