"""The choice: orders, budgets, protection, ties and what is refused."""

from types import SimpleNamespace

import families
import pytest
import torch

from hf_structprune import PruningConfig
from hf_structprune.allocation.depth import LossSearch, choose_depth
from hf_structprune.allocation.removal import Amount, Removal, as_dropped, depth_candidates
from hf_structprune.criteria.depth import layer_similarities, magnitude_scores, taylor_scores
from hf_structprune.errors import RatioError, UnsupportedModelError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.plan import normalised
from hf_structprune.units import DepthKind, level_criteria


DEPTH_CRITERIA = level_criteria(DepthKind)


TOKENS = families.make_tokens(4, 10)
LAYERS = 6


def make(name="llama", **changes):
    model = families.make_model(name, num_hidden_layers=LAYERS, **changes)
    return model, ModelStructure.of(model)


def settings(criterion, **options):
    calibration = families.CalibrationConfig(tokens=TOKENS, batch_size=2)
    return PruningConfig(units=("layers",), depth_criterion=criterion, calibration=calibration, **options)


def choose(model, structure, criterion, kinds=("layers",), *, options=None, **amount):
    return choose_depth(model, structure, settings(criterion, **options or {}), kinds, tokens=lambda: TOKENS, **amount)


def no_text():
    raise AssertionError("the calibration text was loaded")


@pytest.mark.parametrize("criterion", ["block_influence", "taylor", "magnitude", "perplexity"])
def test_one_shot_criteria_take_the_least_scores(criterion):
    model, structure = make()
    choice = choose(model, structure, criterion, count=3)
    units = [(layer, "layers") for layer in range(LAYERS)]
    assert list(sorted(choice.scores)) == units
    assert choice.order == sorted(units, key=choice.scores.get)[:3]
    assert choice.dropped == {"layers": sorted(layer for layer, _ in choice.order)}
    expected = {
        "block_influence": lambda: layer_similarities(model, structure, TOKENS, batch_size=2).influences,
        "taylor": lambda: taylor_scores(model, structure, units, TOKENS, families.in_batches(batch_size=2)),
        "magnitude": lambda: magnitude_scores(model, structure, units),
    }
    if criterion in expected:
        assert choice.scores == expected[criterion]()


def test_of_equal_scores_the_lower_layer_goes_first():
    model, structure = make()
    state = model.model.layers[0].state_dict()
    for layer in model.model.layers:
        layer.load_state_dict(state)
    assert choose(model, structure, "magnitude", count=3).order == [(0, "layers"), (1, "layers"), (2, "layers")]


def test_angular_takes_the_block_with_the_least_distance():
    model, structure = make()
    found = layer_similarities(model, structure, TOKENS, batch_size=2)
    for size in range(1, LAYERS):
        start, end, _ = min(found.blocks(size), key=lambda block: block[2])
        choice = choose(model, structure, "angular", count=size)
        assert choice.dropped == {"layers": list(range(start, end))} and start > 0
        assert choice.order == [(layer, "layers") for layer in range(start, end)]
    assert choice.scores == {(layer, "layers"): found.distances[layer, "layers"] for layer in range(LAYERS)}


def test_angular_with_other_kinds_ranks_single_units():
    model, structure = make()
    found = layer_similarities(model, structure, TOKENS, batch_size=2, sublayers=True)
    choice = choose(model, structure, "angular", ("attention",), count=2)
    units = [(layer, "attention") for layer in range(LAYERS)]
    assert choice.scores == {unit: found.distances[unit] for unit in units}
    assert choice.order == sorted(units, key=found.distances.get)[:2]
    assert choice.dropped == {"attention": sorted(layer for layer, _ in choice.order)}


@pytest.mark.parametrize("criterion", DEPTH_CRITERIA)
def test_the_budget_is_met_as_nearly_as_whole_layers_allow(criterion):
    model, structure = make()
    size = structure.layers[0].parameters
    for wanted, count in ((0.4, 0), (0.6, 1), (1.4, 1), (1.6, 2), (3.0, 3), (5.0, 5)):
        choice = choose(model, structure, criterion, parameters=round(wanted * size))
        assert len(choice.dropped.get("layers", [])) == count
        assert choice.dropped == choose(model, structure, criterion, count=count).dropped
    assert choose(model, structure, criterion, parameters=size * 3 // 2).dropped == (
        choose(model, structure, criterion, count=1).dropped
    )  # of two amounts equally far away the smaller
    assert len(choose(model, structure, criterion, parameters=round(1.9 * size), most=True).order) == 1
    assert len(choose(model, structure, criterion, parameters=99 * size, most=True).order) == 5


@pytest.mark.parametrize("criterion", DEPTH_CRITERIA)
def test_layers_and_sublayers_meet_the_budget_as_nearly_as_another_unit_can_bring_it(criterion):
    model, structure = make()
    kinds, size = ("layers", "attention", "mlp"), structure.layers[0].parameters
    units = [(layer, kind) for layer in range(LAYERS) for kind in kinds]
    for wanted in (0.2, 0.9, 1.7, 2.4):
        removal = Removal(structure, choose(model, structure, criterion, kinds, parameters=round(wanted * size)).order)
        removal.units = removal.in_parts(units)
        others = [removal.parameters([unit]) for unit in units if removal.can(unit)]
        others += [removal.without(unit).parameters() for unit in removal.units]
        gone = removal.parameters()
        assert all(abs(gone - wanted * size) <= abs(other - wanted * size) for other in others), removal.units


@pytest.mark.parametrize("criterion", DEPTH_CRITERIA)
def test_protected_and_unnamed_layers_stay(criterion):
    model, structure = make()
    protected = choose(model, structure, criterion, options=dict(protect_first=2, protect_last=2), count=2)
    assert protected.dropped == {"layers": [2, 3]} and set(protected.scores) == {(2, "layers"), (3, "layers")}
    named = choose(model, structure, criterion, options=dict(layers=[1, 3, 4]), count=2)
    assert set(named.dropped["layers"]) < {1, 3, 4}
    if criterion == "angular":
        assert named.dropped == {"layers": [3, 4]}


@pytest.mark.parametrize("criterion", DEPTH_CRITERIA)
def test_one_layer_stays(criterion):
    model, structure = make()
    assert len(choose(model, structure, criterion, count=5).dropped["layers"]) == 5
    config, size = settings(criterion), structure.layers[0].parameters
    with pytest.raises(RatioError, match="6 of layers are to go, but at most 5 can"):
        choose_depth(model, structure, config, ("layers",), count=6, tokens=no_text)
    with pytest.raises(RatioError, match=rf"but at most {5 * size:,} \(\d\d\.\d\d%\) can"):
        choose_depth(model, structure, config, ("layers",), parameters=5 * size + 1, tokens=no_text)
    config = settings(criterion, layers=[0, 2, 4])
    with pytest.raises(RatioError, match=f"at most {1 if criterion == 'angular' else 3} can"):
        choose_depth(model, structure, config, ("layers",), count=4, tokens=no_text)


def test_the_text_is_loaded_only_where_it_is_looked_at():
    model, structure = make()
    assert choose_depth(model, structure, settings("magnitude"), ("layers",), count=1, tokens=no_text).order
    for criterion in DEPTH_CRITERIA:
        nothing = choose_depth(model, structure, settings(criterion), ("layers",), count=0, tokens=no_text)
        assert nothing.dropped == {} and nothing.order == []


@pytest.mark.parametrize("criterion", DEPTH_CRITERIA)
def test_of_all_sublayers_together_one_layer_keeps_one(criterion):
    model, structure = make("mistral")
    choice = choose(model, structure, criterion, ("attention", "mlp"), count=11)
    assert len(choice.dropped["layers"]) == 5 and sum(map(len, choice.dropped.values())) == 6
    with pytest.raises(RatioError, match="12 of attention, mlp are to go, but at most 11 can"):
        choose(model, structure, criterion, ("attention", "mlp"), count=12)
    assert len(choose(model, structure, criterion, ("mlp",), count=6).dropped["mlp"]) == 6


@pytest.mark.parametrize("criterion", DEPTH_CRITERIA)
def test_mixed_kinds_never_remove_the_same_twice(criterion):
    """Each removal takes something, scores are per parameter, and the budget counts shared parts once."""
    model, structure = make()
    kinds = ("layers", "attention", "mlp")
    wanted = round(3.3 * structure.layers[0].parameters)
    choice = choose(model, structure, criterion, kinds, parameters=wanted)
    gone, sizes = [], []
    for unit in choice.order:
        removal = Removal(structure, list(gone))
        assert removal.can(unit)
        gone.append(unit)
        sizes.append(Removal(structure, list(gone)).parameters())
    assert sizes == sorted(set(sizes))
    assert all(abs(sizes[-1] - wanted) <= abs(size - wanted) for size in sizes)
    plan = normalised(choice.dropped, structure)
    layers = [structure.layers[i] for i in plan.get("layers", [])]
    subs = [structure.layers[i].sublayer(kind) for kind in ("attention", "mlp") for i in plan.get(kind, [])]
    assert sizes[-1] == sum(part.parameters for part in [*layers, *subs])
    if criterion == "magnitude":
        totals = magnitude_scores(model, structure, choice.scores)
        for (layer, kind), score in choice.scores.items():
            part = structure.layers[layer] if kind == "layers" else structure.layers[layer].sublayer(kind)
            assert score == pytest.approx(1e6 * totals[layer, kind] / part.parameters)


def test_what_has_gone_before_is_no_candidate_and_is_not_counted():
    model, structure = make()
    first = choose(model, structure, "greedy", count=2)
    both = choose(model, structure, "greedy", count=4)
    second = choose(model, structure, "greedy", count=2, without=first.dropped)
    assert first.order + second.order == both.order
    assert second.dropped == {"layers": sorted(layer for layer, _ in second.order)}
    assert second.losses == pytest.approx(both.losses[2:]) and second.baseline == pytest.approx(both.losses[1])
    size = structure.layers[0].parameters
    assert choose(model, structure, "greedy", parameters=2 * size, without=first.dropped).order == second.order
    with pytest.raises(RatioError, match="at most 3 can"):
        choose(model, structure, "greedy", count=4, without=first.dropped)
    attention = {"attention": [0, 1, 2, 3, 4]}
    rest = choose(model, structure, "magnitude", ("mlp",), count=5, without=attention)
    assert len(rest.dropped["mlp"]) == 5
    sizes = [
        Removal(structure, [(0, "layers")], attention).parameters(),
        structure.layers[0].sublayer("mlp").parameters,
    ]
    assert sizes[0] == sizes[1]


def test_perplexity_measures_the_losses_along_the_way_where_they_are_compared():
    model, structure = make()
    size = structure.layers[0].parameters
    choice = choose(model, structure, "perplexity", parameters=3 * size, most=True)
    assert len(choice.losses) == len(choice.order) == 3
    assert choice.losses[0] == pytest.approx(choice.scores[choice.order[0]])
    assert choice.losses[0] != pytest.approx(choice.losses[1])


@pytest.mark.parametrize("criterion", DEPTH_CRITERIA)
def test_the_same_text_gives_the_same_choice_and_the_model_is_left_alone(criterion):
    model, structure = make("olmo2")
    before = families.logits(model, TOKENS)
    kinds = ("layers", "mlp")
    first = choose(model, structure, criterion, kinds, count=3)
    assert choose(model, structure, criterion, kinds, count=3) == first
    assert torch.equal(families.logits(model, TOKENS), before)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__


def test_wrong_requests_name_what_is_wrong():
    model, structure = make()
    for layer in structure.layers:
        layer.sublayers = []
    with pytest.raises(UnsupportedModelError, match="No layer that may be cut has an attention"):
        choose(model, structure, "magnitude", ("layers", "attention"), count=1)


def test_a_layer_that_lacks_a_sublayer_is_no_candidate_for_it():
    _, structure = make()
    structure.layers[2].sublayers = [structure.layers[2].sublayer("mlp")]
    units = depth_candidates(structure, settings("magnitude"), ("attention", "layers"))
    assert (2, "attention") not in units and (2, "layers") in units and len(units) == 11


def test_nearest_amounts():
    amount, (least, *more) = (
        Amount(parameters=10),
        [SimpleNamespace(parameters=lambda n=n: n) for n in (7, 12, 13, 14)],
    )
    assert [amount.nearer(one, least) for one in more] == [True, False, False]
    assert not Amount(parameters=10, most=True).nearer(more[0], SimpleNamespace(parameters=lambda: 0))


def test_what_comes_back_leads_nearer():
    _, structure = make()
    smaller, larger = sorted(("attention", "mlp"), key=lambda kind: structure.layers[0].sublayer(kind).parameters)
    less, more = (structure.layers[0].sublayer(kind).parameters for kind in (smaller, larger))
    removal, gone = Removal(structure, [(1, larger), (2, smaller)]), less + more
    assert less < more and removal.parameters() == gone

    def returns(wanted):
        return Amount(parameters=wanted).returns(removal)

    assert not returns(gone + 5) and not returns(gone) and not returns(gone - (less - 1) // 2)
    assert returns(gone - less // 2 - 1) == returns(gone - (more - 1) // 2) == [(2, smaller)]
    assert returns(gone - more // 2 - 1) == returns(0) == removal.units
    assert Amount(parameters=gone - 7).distance(removal) == (7, 7)
    assert Amount(parameters=gone + 7).distance(removal) == (7, -7)
    assert Amount(count=3).distance(removal) == (1, -1) and not Amount(count=2).returns(removal)


class Table:
    """Stands for `TextLoss`: every unit costs what a table says, whatever else has gone."""

    def __init__(self, rises):
        self.rises = rises

    def scan(self, removal, candidates, description):
        base = sum(self.rises[unit] for unit in removal.units)
        return {unit: base + self.rises[unit] for unit in candidates}, base

    def put_back(self, removal, candidates, description):
        base = sum(self.rises[unit] for unit in removal.units)
        return {unit: base - self.rises[unit] for unit in candidates}


def test_greedy_passes_over_what_is_too_large_for_the_rest():
    """A layer costs least per parameter but is too large now: the attention that costs least goes instead."""
    _, structure = make()
    attention, layer = structure.layers[0].sublayer("attention").parameters, structure.layers[0].parameters
    units = depth_candidates(structure, settings("greedy"), ("layers", "attention"))
    rises = {unit: 1.0 + 0.01 * unit[0] if unit[1] == "layers" else 9.0 - unit[0] for unit in units}
    found = LossSearch(lambda: Table(rises), units, Amount(parameters=layer + attention), Removal(structure))
    found.remove()
    assert found.removal.units == [(0, "layers"), (5, "attention")]
    assert found.losses == [1.0, 5.0] and found.baseline == 0.0
    assert found.scores[0, "layers"] == pytest.approx(1e6 / layer)
    assert found.scores[1, "attention"] == pytest.approx(8e6 / attention)
    removal = Removal(structure)
    rises = {unit: 1.0 if unit[1] == "layers" else 0.1 for unit in units}
    LossSearch(lambda: Table(rises), units, Amount(count=8), removal).remove()
    assert removal.units[:7] == [*((i, "attention") for i in range(6)), (0, "layers")]
    assert as_dropped(removal.units, structure) == {"layers": [0, 1], "attention": [2, 3, 4, 5]}


@pytest.mark.parametrize("criterion", ["exchange", "perplexity"])
def test_what_is_lacking_after_a_return_is_filled_again(monkeypatch, criterion):
    """An MLP, as large as three attentions, makes place for one, and then a second one fits."""
    model, structure = make(intermediate_size=97)
    attention, mlp = (structure.layers[0].sublayer(kind).parameters for kind in ("attention", "mlp"))
    assert abs(mlp - 3 * attention) < 0.02 * attention
    kinds = ("layers", "attention", "mlp")
    rises = {(layer, kind): 9.0 for layer in range(LAYERS) for kind in kinds}
    rises |= {(layer, "layers"): 18.0 for layer in range(LAYERS)}
    if criterion == "exchange":  # two MLPs are cheapest per parameter, one and an attention cost less in all
        rises |= {(1, "mlp"): 0.1, (2, "mlp"): 0.1, (3, "attention"): 0.05, (4, "attention"): 0.05}
        wanted, expected = 2 * mlp - round(1.03 * attention), {(3, "attention"), (4, "attention")}
    else:  # a layer is cheapest; of its halves the MLP comes back, since it costs more
        rises |= {(1, "layers"): 0.1, (1, "attention"): 0.2, (3, "attention"): 0.3}
        wanted, expected = round(2.1 * attention), {(1, "attention"), (3, "attention")}
    monkeypatch.setattr("hf_structprune.allocation.depth.TextLoss", lambda *_: Table(rises))
    choice = choose(model, structure, criterion, kinds, parameters=wanted)
    assert expected <= set(choice.order) and len(choice.dropped["attention"]) == 2
    assert abs(Removal(structure, choice.order).parameters() - wanted) < 0.15 * attention


@pytest.mark.parametrize("criterion", ["greedy", "exchange", "perplexity"])
def test_half_of_the_cheapest_layer_comes_back_where_it_is_too_much(monkeypatch, criterion):
    model, structure = make(intermediate_size=97)
    kinds = ("layers", "attention", "mlp")
    rises = {(layer, kind): 18.0 if kind == "layers" else 9.0 for layer in range(LAYERS) for kind in kinds}
    rises |= {(1, "layers"): 0.1, (1, "attention"): 0.5, (1, "mlp"): 0.5}
    monkeypatch.setattr("hf_structprune.allocation.depth.TextLoss", lambda *_: Table(rises))
    wanted = round(3.4 * structure.layers[0].sublayer("attention").parameters)
    assert choose(model, structure, criterion, kinds, parameters=wanted).dropped == {"mlp": [1]}


@pytest.mark.parametrize(
    ("gone", "cheap", "expected"),
    [
        # The attention is cheapest, but nothing of its size could come back.
        ({(1, "mlp"): 1.0}, {(3, "attention"): 0.001, (2, "mlp"): 0.5}, {(2, "mlp")}),
        # The MLP's return would help most, but leaves too little gone.
        (
            {(1, "mlp"): 9.0, (1, "attention"): 1.0}, {(2, "attention"): 0.5},
            {(1, "mlp"), (2, "attention")},
        ),
        # For a layer an MLP and an attention of others come back; its own halves may do so later.
        (
            {(1, "mlp"): 9.0, (3, "attention"): 3.0}, {(2, "layers"): 0.3, (2, "attention"): 0.15, (2, "mlp"): 0.45},
            {(2, "attention"), (2, "mlp")},
        ),
    ],
)  # fmt: skip
def test_exchanges_keep_the_amount(gone, cheap, expected):
    _, structure = make(intermediate_size=97)
    kinds = ("layers", "attention", "mlp")
    units = [(layer, kind) for layer in range(LAYERS) for kind in kinds]
    table = Table({unit: 40.0 if unit[1] == "layers" else 20.0 for unit in units} | gone | cheap)
    removal = Removal(structure, list(gone))
    amount = Amount(parameters=removal.parameters())
    search = LossSearch(lambda: table, units, amount, removal, losses=[sum(gone.values())])
    search.exchange()
    assert set(removal.units) == expected and removal.parameters() == amount.parameters
    assert len(search.losses) == 2 and search.losses[1] < search.losses[0]


class Growing(Table):
    """Every removal makes what is left dearer by a share of its own; counts what was measured."""

    def __init__(self, rises):
        super().__init__(rises)
        self.measured = []

    def scan(self, removal, candidates, description):
        gone = len(removal.units)
        base = sum(self.cost(unit, number) for number, unit in enumerate(removal.units))
        self.measured.append(len(candidates))
        return {unit: base + self.cost(unit, gone) for unit in candidates}, base

    def cost(self, unit, gone):
        return self.rises[unit] * (1 + gone * (0.05 + 0.4 * (unit[0] % 3 == 0)))


def test_greedy_measures_only_as_many_as_it_takes_to_be_sure():
    structure = ModelStructure.of(families.make_model("llama", num_hidden_layers=20))
    units = depth_candidates(structure, settings("greedy"), ("layers",))
    table = Growing({unit: 1.0 + 0.3 * ((unit[0] * 7) % 20) for unit in units})
    removal = Removal(structure)
    LossSearch(lambda: table, units, Amount(count=8), removal).remove()
    wanted, left = [], list(units)
    for gone in range(8):
        best = min(left, key=lambda unit: table.cost(unit, gone))
        wanted.append(best)
        left.remove(best)
    assert removal.units == wanted and wanted != sorted(units, key=table.rises.get)[:8]
    assert table.measured[0] == 20 and sum(table.measured) < 20 + 7 * 13
