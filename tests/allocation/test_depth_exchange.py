"""Exchanges after greedy removal, against models that really lack the layers."""

import copy

import families
import pytest
import torch

from hf_structprune import PruningConfig
from hf_structprune.allocation.depth import LossSearch, choose_depth
from hf_structprune.allocation.removal import Amount, Removal, as_dropped
from hf_structprune.model.structure import ModelStructure
from hf_structprune.stats.losses import TextLoss


TOKENS = families.make_tokens(5, 12)
LAYERS = 7


@pytest.fixture(scope="module", params=range(2))
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


KINDS = ("layers", "attention", "mlp")


@torch.no_grad()
def loss_of_parts(model, parts):
    """The loss of a copy in which these attentions and MLPs add nothing."""
    model = copy.deepcopy(model)
    for layer, kind in parts:
        block = model.model.layers[layer]
        (block.self_attn.o_proj if kind == "attention" else block.mlp.down_proj).weight.zero_()
    return loss(model, [])


def halves(units):
    """Layers as their sublayers."""
    parts = [[(layer, "attention"), (layer, "mlp")] if kind == "layers" else [(layer, kind)] for layer, kind in units]
    return list(dict.fromkeys(unit for part in parts for unit in part))


class Reference:
    """Greedy's end improved by brute force: losses of zeroed copies, sizes counted from the modules."""

    def __init__(self, model, wanted):
        block = model.model.layers[0]
        norm = block.input_layernorm.weight.numel()
        self.sizes = {
            kind: norm + sum(p.numel() for p in part.parameters())
            for kind, part in (("attention", block.self_attn), ("mlp", block.mlp))
        }
        self.model, self.wanted = model, wanted

    def size(self, parts):
        return sum(self.sizes[kind] for _, kind in parts)

    def distance(self, parts):
        return abs(self.size(parts) - self.wanted), self.size(parts)

    def back(self, parts, value, allowed):
        """Those parts with the one back that helps most per parameter, or None; and the loss."""
        rests = [(unit, [one for one in parts if one != unit]) for unit in parts]
        values = {unit: (rest, loss_of_parts(self.model, rest)) for unit, rest in rests if allowed(unit, rest)}
        if not values:
            return None, value
        return values[min(values, key=lambda unit: (values[unit][1] - value) / self.sizes[unit[1]])]

    def trimmed(self, parts):
        losses, value = [], loss_of_parts(self.model, parts)
        while True:
            now = self.distance(parts)
            rest, value = self.back(parts, value, lambda _, fewer, now=now: self.distance(fewer) < now)
            if rest is None:
                return parts, losses
            parts, losses = rest, [*losses, value]

    def balanced(self, parts, unit, farthest):
        """Takes a unit on top and puts others back until the amount is as near as it was; None where that fails."""
        rest, new = halves([*parts, unit]), set(halves([unit])) - set(parts)
        value = loss_of_parts(self.model, rest)
        while rest is not None and self.distance(rest) > farthest:
            rest, value = self.back(
                rest, value, lambda one, fewer: one not in new and self.size(fewer) >= self.wanted - farthest[0]
            )
        return rest, value

    def exchanged(self, parts):
        losses, value = [], loss_of_parts(self.model, parts)
        while True:
            farthest = self.distance(parts)
            units = [(layer, kind) for layer in range(LAYERS) for kind in KINDS]
            tried = {unit: halves([*parts, unit]) for unit in units if set(halves([unit])) - set(parts)}
            rises = {
                unit: (loss_of_parts(self.model, more) - value) / (self.size(more) - self.size(parts))
                for unit, more in tried.items() if len(more) < 2 * LAYERS
            }  # fmt: skip
            options = (self.balanced(parts, unit, farthest) for unit in sorted(rises, key=rises.get))
            rest, found = next(option for option in options if option[0] is not None)
            if found >= value:
                return parts, losses
            parts, value = rest, found
            losses.append(value)


@pytest.mark.parametrize("layers", [0.9, 1.6])
def test_layers_and_sublayers_against_brute_force(model, layers):
    """What is too much comes back, then a layer may change places with an attention and an MLP of others."""
    structure = ModelStructure.of(model)
    wanted = round(layers * structure.layers[0].parameters)
    reference = Reference(model, wanted)
    assert reference.size(halves([(0, "layers")])) == structure.layers[0].parameters
    greedy, choice = (choose(model, criterion, KINDS, parameters=wanted) for criterion in ("greedy", "exchange"))
    parts, losses = reference.exchanged(greedy.order)
    assert set(choice.order) == set(parts)
    assert choice.losses[: len(greedy.losses)] == greedy.losses
    assert choice.losses[len(greedy.losses) :] == pytest.approx(losses)
    assert reference.distance(choice.order) <= reference.distance(greedy.order)


def test_what_is_too_much_comes_back(model):
    """Two whole layers went; the attention of one of them is nearer to what is too much than an MLP."""
    structure = ModelStructure.of(model)
    units = [(index, kind) for index in range(LAYERS) for kind in KINDS]
    layer, attention = structure.layers[0].parameters, structure.layers[0].sublayer("attention").parameters
    amount = Amount(parameters=2 * layer - round(0.7 * attention))
    removal = Removal(structure, [(3, "layers"), (5, "layers")])
    removal.units[:] = removal.in_parts(units)
    expected, values = Reference(model, amount.parameters).trimmed(list(removal.units))
    text = TextLoss(model, structure, TOKENS)
    search = LossSearch(lambda: text, units, amount, removal, losses=[loss(model, [3, 5])])
    search.put_back_excess()
    assert removal.units == expected and removal.parameters() == 2 * layer - attention
    gone = as_dropped(removal.units, structure)
    assert len(gone["layers"]) == len(gone["mlp"]) == 1
    assert search.losses[1:] == pytest.approx(values)


def test_only_layers_whose_sublayers_may_go_alone_are_taken_apart(model):
    structure = ModelStructure.of(model)
    units = [(3, "layers"), (5, "attention"), (2, "mlp"), (2, "layers")]
    removal = Removal(structure, units)
    assert removal.in_parts([(3, "layers"), (3, "attention"), (2, "mlp"), (2, "layers")]) == units
    parts = removal.in_parts((layer, kind) for layer in range(LAYERS) for kind in KINDS)
    assert parts == [(3, "attention"), (3, "mlp"), (5, "attention"), (2, "mlp"), (2, "attention")]
    whole = Removal(structure, parts)
    assert whole.parameters() == removal.parameters() and whole.gone() == removal.gone()
    structure.layers[3].sublayers = [structure.layers[3].sublayer("mlp")]  # next to something that cannot go alone
    assert removal.in_parts((layer, kind) for layer in range(LAYERS) for kind in KINDS)[0] == (3, "layers")


def test_where_prefixes_are_compared_nothing_changes_places(model):
    """A split by measured cost asks for nested removals."""
    size = ModelStructure.of(model).layers[0].parameters
    choices = [choose(model, criterion, parameters=3 * size, most=True) for criterion in ("greedy", "exchange")]
    assert choices[0] == choices[1] and len(choices[0].losses) == 3
