"""Allocations: asked is got, and impossible ratios say what is possible."""

import re
from collections import Counter

import families
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_structprune import PruningConfig
from hf_structprune.allocation.widths import Budget, active_layers, allocate, spread
from hf_structprune.errors import ConfigurationError, RatioError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.plan import PruningPlan


ALL = ("mlp_neurons", "kv_groups", "query_heads")
RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.37, 0.4, 0.5)


@pytest.fixture(scope="module")
def smollm2():
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return ModelStructure.of(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def tiny():
    return ModelStructure.of(families.make_model("mistral"))


def plan(structure, ratio, scores=None, head_counts=None, **options):
    if not {"units", "attention_ratio", "mlp_ratio", "split"} & options.keys():
        options["units"] = "mlp_neurons"
    config = PruningConfig(**options)
    counts = allocate(Budget(structure, config, head_counts), ratio, scores=scores)
    return PruningPlan.from_counts(structure, counts, model_type="llama", layout=config.layout, ratio_requested=ratio)


def widths(plan, structure):
    return [plan.keep(g.layer, g.kind, g.size) for g in structure.groups if g.kind == "mlp_neurons"]


@pytest.mark.parametrize("units", [("mlp_neurons",), ("mlp_neurons", "kv_groups"), ALL])
@pytest.mark.parametrize("ratio", RATIOS)
def test_exact_ratios_are_met_within_a_tenth_of_a_point(smollm2, ratio, units):
    got = plan(smollm2, ratio, units=units, layout="per_layer", round_to=1)
    assert abs(got.ratio - ratio) <= 0.001


@pytest.mark.parametrize("units", [("mlp_neurons",), ALL])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layout, layers_in_a_step", [("uniform", 30), ("per_layer", 1)])
def test_default_rounding_is_at_most_half_a_step_off(smollm2, ratio, layout, layers_in_a_step, units):
    got = plan(smollm2, ratio, units=units, layout=layout)
    step = layers_in_a_step * 32 * 3 * 576
    assert abs(got.ratio - ratio) * smollm2.total_parameters <= step / 2 + 1
    assert all(width % 32 == 0 for width in widths(got, smollm2))


@pytest.mark.parametrize("units", [("mlp_neurons",), ALL])
def test_uniform_layout_has_one_width_for_all_layers(smollm2, units):
    got = plan(smollm2, 0.3, units=units)
    for kind in units:
        assert len({g.keep for g in got.groups if g.kind == kind}) <= 1
        assert len([g for g in got.groups if g.kind == kind]) in (0, 30)


def test_per_layer_widths_differ_by_one_step_and_smaller_ones_are_interleaved(smollm2):
    got = widths(plan(smollm2, 0.3, layout="per_layer"), smollm2)
    low, high = sorted(set(got))
    assert high - low == 32
    rarer = min((low, high), key=got.count)
    places = [i for i, width in enumerate(got) if width == rarer]
    gaps = {b - a for a, b in zip(places, places[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_heads_alone_come_within_half_a_head(smollm2):
    group = smollm2.layers[0].group("kv_groups")
    got = plan(smollm2, 0.05, units=("kv_groups",), layout="per_layer")
    assert abs(got.ratio - 0.05) * smollm2.total_parameters <= group.cost / 2


def test_only_expressible_head_counts_are_chosen(smollm2):
    got = plan(smollm2, 0.1, head_counts={(1, 3)}, units=ALL, layout="per_layer", round_to=1)
    assert {g.keep for g in got.groups if g.kind == "kv_groups"} <= {1}
    assert not [g for g in got.groups if g.kind == "query_heads" and g.keep != 3]
    assert abs(got.ratio - 0.1) <= 0.001


def test_spread_is_even_and_complete():
    assert spread(5, 3) == [1, 2, 2]
    for total in range(12):
        shares = spread(total, 5)
        assert sum(shares) == total and max(shares) - min(shares) <= 1


def random_scores(structure, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        (g.layer, g.kind): torch.rand(g.size, generator=generator) * 1.3**g.layer + g.layer for g in structure.groups
    }


def brute_force(groups, scores, target):
    """Removes one unit after the other, always the lowest z-score of the model, until no step brings it closer."""
    ranking = []
    for group in groups:
        values = scores[group.layer, group.kind].double()
        for z in (values - values.mean()) / values.std():
            ranking.append((float(z), group))
    left = {(g.layer, g.kind): g.size for g in groups}
    removed = 0
    for _, group in sorted(ranking, key=lambda entry: entry[0]):
        key = (group.layer, group.kind)
        if left[key] == 1:
            continue
        if abs(removed + group.cost - target) > abs(removed - target):
            break
        left[key] -= 1
        removed += group.cost
    return left


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4])
def test_global_equals_a_brute_force_ranking(tiny, ratio, seed):
    scores = random_scores(tiny, seed)
    got = plan(tiny, ratio, scores, allocation="global", layout="per_layer", round_to=1)
    groups = [g for g in tiny.groups if g.kind == "mlp_neurons"]
    expected = brute_force(groups, scores, round(ratio * tiny.total_parameters))
    assert widths(got, tiny) == list(expected.values())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4])
def test_global_ranks_heads_among_neurons_and_closes_the_rest_with_neurons(tiny, ratio, seed):
    scores, units = random_scores(tiny, seed), ("mlp_neurons", "kv_groups")
    got = plan(tiny, ratio, scores, units=units, allocation="global", layout="per_layer", round_to=1)
    target = round(ratio * tiny.total_parameters)
    expected = brute_force([g for kind in units for g in tiny.groups if g.kind == kind], scores, target)
    shifts = []
    for (layer, kind), keep in expected.items():
        if kind == "kv_groups":
            assert got.keep(layer, kind, 2) == keep
        else:
            shifts.append(got.keep(layer, kind, families.WIDTH) - keep)
    assert max(shifts) - min(shifts) <= 1  # the same in every layer, to whole neurons
    neuron = tiny.layers[0].group("mlp_neurons").cost
    assert abs(got.parameters_before - got.parameters_after - target) <= neuron / 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4])
def test_global_by_rises_of_the_loss_loses_the_least_in_all(tiny, ratio, seed):
    """Neurons of all layers go in the order of what they cost; more than 70 % of a layer only when all have."""
    rises = {key: score * 7 ** key[0] for key, score in random_scores(tiny, seed).items()}
    config = PruningConfig(units=("mlp_neurons",), allocation="global", layout="per_layer", round_to=1)
    counts = allocate(Budget(tiny, config), ratio, rises=rises)
    groups = [group for group in tiny.groups if group.kind == "mlp_neurons"]
    order = sorted(
        (place >= 0.7 * group.size, float(rise), group.key)
        for group in groups
        for place, rise in enumerate(rises[group.key].sort().values[: group.size - group.least])
    )
    number = round(ratio * tiny.total_parameters / groups[0].cost)
    gone = Counter(key for *_, key in order[:number])
    found = {group.key: group.size - counts.get(group.key, group.size) for group in groups}
    assert abs(sum(found.values()) - number) <= 1 and len(set(found.values())) > 1
    assert all(abs(found[key] - gone[key]) <= 1 for key in found)


def test_global_does_not_see_the_scale_of_a_layer(tiny):
    scores = random_scores(tiny, 0)
    scaled = {key: value * 7 ** key[0] + 3 for key, value in scores.items()}
    options = dict(units=("mlp_neurons",), allocation="global", layout="per_layer", round_to=1)
    assert plan(tiny, 0.2, scores, **options) == plan(tiny, 0.2, scaled, **options)


@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_global_with_default_rounding_meets_the_ratio(smollm2, ratio):
    scores = random_scores(smollm2, 1)
    got = plan(smollm2, ratio, scores, allocation="global", layout="per_layer")
    assert all(width % 32 == 0 for width in widths(got, smollm2))
    assert abs(got.ratio - ratio) * smollm2.total_parameters <= 32 * 3 * 576 / 2 + 1


def test_global_refuses_query_heads(tiny):
    with pytest.raises(ConfigurationError, match="does not split query heads"):
        plan(tiny, 0.1, random_scores(tiny, 0), units=ALL, allocation="global", layout="per_layer")


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(), list(range(30))),
        (dict(layer_range=(4, 18)), list(range(4, 18))),
        (dict(layers=[0, 3, 29]), [0, 3, 29]),
        (dict(protect_first=4, protect_last=2), list(range(4, 28))),
        (dict(layer_range=(2, 30), protect_first=4, protect_last=2), list(range(4, 28))),
    ],
)
def test_layers_that_may_be_cut(smollm2, options, expected):
    config = PruningConfig(layout="per_layer", **options)
    assert active_layers(config, 30) == expected
    got = plan(smollm2, 0.03, layout="per_layer", **options)
    assert {g.layer for g in got.groups} <= set(expected) and got.groups


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layer_range=(4, 31)), "Layer 30 is asked for, but the model has layers 0 to 29"),
        (dict(layers=[30]), "Layer 30"),
        (dict(protect_first=20, protect_last=10), "No layer is left"),
    ],
)
def test_layers_that_are_not_there_raise(smollm2, options, message):
    with pytest.raises(ConfigurationError, match=message):
        plan(smollm2, 0.1, layout="per_layer", **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(layout="per_layer", round_to=1),
        dict(layout="per_layer", layer_range=(3, 14), round_to=1),
        dict(units=ALL, layout="per_layer", round_to=1),
        dict(units=("kv_groups",)),
        dict(units=ALL),
    ],
)
def test_an_impossible_ratio_names_the_largest_one_and_that_works(smollm2, options):
    with pytest.raises(RatioError) as error:
        plan(smollm2, 0.97, **options)
    largest = float(re.search(r"at most ([\d.]+)\s*%", str(error.value)).group(1)) / 100
    assert plan(smollm2, largest, **options).ratio == pytest.approx(largest, abs=1e-4)
    with pytest.raises(RatioError):
        plan(smollm2, largest + 0.001, **options)


def test_ratio_0_cuts_nothing(smollm2):
    assert plan(smollm2, 0.0).groups == []
    assert plan(smollm2, 0.0).ratio == 0.0


@pytest.mark.parametrize("attention_ratio, kv_groups", [(0.0, 3), (0.3, 3), (0.34, 2), (0.5, 2), (0.67, 1), (0.99, 1)])
def test_by_kind_no_more_whole_heads_go_than_asked(smollm2, attention_ratio, kv_groups):
    got = plan(smollm2, None, attention_ratio=attention_ratio)
    assert {got.keep(layer, "kv_groups", 3) for layer in range(30)} == {kv_groups}
    assert {got.keep(layer, "query_heads", 9) for layer in range(30)} == {3 * kv_groups}
    assert set(widths(got, smollm2)) == {1536}


@pytest.mark.parametrize(
    "mlp_ratio, round_to, width", [(0.3, 1, 1075), (0.3, None, 1088), (0.5, 1, 768), (0.99, 1, 15)]
)
def test_by_kind_kept_neurons_are_rounded_down_then_to_the_step(smollm2, mlp_ratio, round_to, width):
    got = plan(smollm2, None, mlp_ratio=mlp_ratio, round_to=round_to)
    assert set(widths(got, smollm2)) == {width}
    assert {g.kind for g in got.groups} == {"mlp_neurons"}


def test_by_kind_query_heads_go_from_every_kv_group(smollm2):
    got = plan(smollm2, None, attention_ratio=0.34, units=("query_heads",))
    assert {g.keep for g in got.groups} == {6} and {g.kind for g in got.groups} == {"query_heads"}
