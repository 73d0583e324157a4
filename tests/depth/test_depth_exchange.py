"""Exchanges after greedy removal, against models that really lack the layers."""

import copy

import families
import pytest
import torch

from hf_structprune import PruningConfig
from hf_structprune.depth import TextLoss, choose_depth
from hf_structprune.depth.removal import Removal
from hf_structprune.structure import ModelStructure


TOKENS = families.make_tokens(5, 12)
LAYERS = 7


@pytest.fixture(scope="module", params=range(4))
def model(request):
    return families.make_model("llama", torch.float64, seed=request.param, num_hidden_layers=LAYERS)


@torch.no_grad()
def loss(model, gone):
    """The loss of a copy without these layers."""
    model = copy.deepcopy(model)
    for layer in sorted(gone, reverse=True):
        del model.model.layers[layer]
    model.config.num_hidden_layers = len(model.model.layers)
    windows = TOKENS.view(1, 60)
    logits = model(windows, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def choose(model, criterion, kinds=("layers",), **amount):
    calibration = families.CalibrationConfig(tokens=TOKENS, batch_size=2)
    config = PruningConfig(units=kinds, depth_criterion=criterion, layout="per_layer", calibration=calibration)
    return choose_depth(model, ModelStructure.of(model), config, kinds, tokens=lambda: TOKENS, **amount)


def exchanged(model, gone):
    """Take the cheapest on top, put back what helps most, as long as that is better."""
    gone, value, losses = list(gone), loss(model, gone), []
    while len(gone) + 1 < LAYERS:
        taken = min((i for i in range(LAYERS) if i not in gone), key=lambda i: loss(model, [*gone, i]))
        more = [*gone, taken]
        back = min(gone, key=lambda i: loss(model, [j for j in more if j != i]))
        rest = [j for j in more if j != back]
        if loss(model, rest) >= value:
            break
        gone, value = rest, loss(model, rest)
        losses.append(value)
    return gone, losses


@pytest.mark.parametrize("count", range(1, LAYERS))
def test_exchanges_are_those_of_brute_force(model, count):
    greedy, choice = choose(model, "greedy", count=count), choose(model, "exchange", count=count)
    gone, losses = exchanged(model, [layer for layer, _ in greedy.order])
    assert choice.order == [(layer, "layers") for layer in gone]
    assert choice.dropped == {"layers": sorted(gone)}
    assert choice.losses[:count] == greedy.losses and choice.losses[count:] == pytest.approx(losses)
    assert choice.baseline == pytest.approx(loss(model, []))


def test_exchanges_find_what_greedy_misses():
    found = []
    for seed in range(4):
        model = families.make_model("llama", torch.float64, seed=seed, num_hidden_layers=LAYERS)
        greedy, choice = (choose(model, criterion, count=3) for criterion in ("greedy", "exchange"))
        values = [loss(model, [layer for layer, _ in one.order]) for one in (greedy, choice)]
        assert values[1] <= values[0]
        found.append(values[1] < values[0] and choice.dropped != greedy.dropped)
    assert any(found)


def test_what_comes_back_is_measured_as_without_it(model):
    structure = ModelStructure.of(model)
    text = TextLoss(model, structure, TOKENS)
    units = [(2, "layers"), (5, "attention"), (3, "mlp")]
    losses = text.put_back(Removal(structure, [*units, (0, "layers")]), units, "")
    for unit, value in losses.items():
        rest = Removal(structure, [*(one for one in units if one != unit), (0, "layers")])
        assert value == pytest.approx(text.of(rest.gone()))
    assert len(set(losses.values())) == 3


def test_only_units_of_one_size_change_places(model):
    """Layers and sublayers together: as many parameters are gone as greedy has removed."""
    kinds = ("layers", "attention", "mlp")
    wanted = round(2.6 * ModelStructure.of(model).layers[0].parameters)
    greedy, choice = (choose(model, criterion, kinds, parameters=wanted) for criterion in ("greedy", "exchange"))
    structure = ModelStructure.of(model)
    assert Removal(structure, choice.order).parameters() == Removal(structure, greedy.order).parameters()
    assert choice.losses[-1] <= greedy.losses[-1]


def test_where_prefixes_are_compared_nothing_changes_places(model):
    """A split by measured cost asks for nested removals."""
    size = ModelStructure.of(model).layers[0].parameters
    choices = [choose(model, criterion, parameters=3 * size, most=True) for criterion in ("greedy", "exchange")]
    assert choices[0] == choices[1] and len(choices[0].losses) == 3
