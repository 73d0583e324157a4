"""The loss without layers and sublayers, against models that really lack them."""

import copy
import itertools

import families
import pytest
import torch

from hf_structprune import PruningConfig
from hf_structprune.allocation.depth import choose_depth
from hf_structprune.allocation.removal import Removal
from hf_structprune.model.structure import ModelStructure, expert_outputs
from hf_structprune.stats.losses import SEQUENCES, TextLoss, joined


TOKENS = families.make_tokens(5, 12)
WINDOWS = TOKENS.view(1, 60)  # what the models are measured on: their context is 64
UNITS = [(layer, kind) for layer in range(families.LAYERS) for kind in ("layers", "attention", "mlp")]
CLOSE = dict(rel=2e-6)  # the loss is taken of logits in float32


def open_text(model, structure, tokens=TOKENS, batch_size=2):
    return TextLoss(model, structure, tokens, batch_size)


@torch.no_grad()
def loss(model, tokens=WINDOWS):
    logits = model(tokens, use_cache=False).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def lacking(model, structure, units):
    """A copy of the model without layers in its list, and with the last projections of sublayers zeroed."""
    model = copy.deepcopy(model)
    gone = sorted({layer for layer, kind in units if kind == "layers"}, reverse=True)
    for layer, kind in units:
        if kind == "layers":
            continue
        sublayer = structure.layers[layer].sublayer(kind)
        module = model.get_submodule(sublayer.consumer or sublayer.module)
        for parameter in module.parameters() if sublayer.consumer else expert_outputs(module):
            parameter.data.zero_()
    layers = model.get_submodule(structure.layers[0].name.rpartition(".")[0])
    config = model.config
    for layer in gone:
        del layers[layer]
        if getattr(config, "layer_types", None):
            config.layer_types = [*config.layer_types[:layer], *config.layer_types[layer + 1 :]]
    if gone:
        setattr(config, config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), len(layers))
    return model


@pytest.mark.parametrize("name", families.FAMILIES)
def test_losses_are_those_of_models_that_lack_the_unit(name):
    model = families.make_model(name, torch.float64)
    structure = ModelStructure.of(model)
    units = [(i, k) for i, k in UNITS if k == "layers" or structure.layers[i].sublayer(k)]
    assert len(units) == len(UNITS)
    losses, base = open_text(model, structure).scan(Removal(structure), units, "")
    assert base == pytest.approx(loss(model), **CLOSE)
    assert list(losses) == units
    for unit, value in losses.items():
        assert value == pytest.approx(loss(lacking(model, structure, [unit])), **CLOSE), unit
        assert value != pytest.approx(base, rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "falcon", "mixtral", "olmo2"])
def test_losses_on_top_of_what_has_gone(name):
    """With the attention of layer 1 gone: the prefix lacks it, and a layer that has lost both sublayers is skipped."""
    model = families.make_model(name, torch.float64)
    structure = ModelStructure.of(model)
    removal = Removal(structure, [(1, "attention")])
    text = open_text(model, structure)
    units = [(0, "layers"), (1, "mlp"), (1, "layers"), (2, "attention"), (2, "layers")]
    losses, base = text.scan(removal, units, "")
    assert base == pytest.approx(loss(lacking(model, structure, removal.units)), **CLOSE)
    for unit, value in losses.items():
        both = [unit] if unit[0] == 1 and unit[1] == "layers" else [*removal.units, unit]
        assert value == pytest.approx(loss(lacking(model, structure, both)), **CLOSE), unit
        assert text.of(removal.gone([unit])) == pytest.approx(value, **CLOSE)
    removal = Removal(structure, [(0, "layers")])
    losses, _ = text.scan(removal, [(1, "mlp"), (2, "layers")], "")
    for unit, value in losses.items():
        assert value == pytest.approx(loss(lacking(model, structure, [(0, "layers"), unit])), **CLOSE)


def test_single_removals_of_all_layers_cost_half_a_forward_pass_each():
    """Counted in layers run, for all sequences together: L / 2 + 1 passes, the recording of arguments included."""
    layers, tokens = 8, families.make_tokens(16, 12)
    model = families.make_model("llama", num_hidden_layers=layers)
    structure, runs = ModelStructure.of(model), []
    handles = [
        layer.mlp.register_forward_hook(lambda _, args, __: runs.append(args[0].shape[:-1].numel()))
        for layer in model.model.layers
    ]
    units = [(layer, "layers") for layer in range(layers)]
    TextLoss(model, structure, tokens, batch_size=2).scan(Removal(structure), units, "")
    for handle in handles:
        handle.remove()
    passes = sum(runs) / (layers * tokens.numel())
    assert passes <= layers / 2 + 1
    assert passes > layers / 2


def test_silenced_sublayers_are_not_run():
    model = families.make_model("llama")
    structure, runs = ModelStructure.of(model), []
    text = open_text(model, structure)
    handles = [m.register_forward_hook(lambda *_: runs.append(1)) for m in (model.model.layers[1].mlp.down_proj,)]
    text.of({"layers": set(), "attention": set(), "mlp": {1}})
    assert runs == []
    text.of({"layers": set(), "attention": {1}, "mlp": set()})
    assert len(runs) == 1  # batches
    for handle in handles:
        handle.remove()


def test_the_loss_is_taken_a_few_positions_at_a_time(monkeypatch):
    """No more logits at once than `MAX_LOGITS`, with the same result; the last position has nothing to predict."""
    from hf_structprune.model import measuring

    model = families.make_model("gemma2", torch.float64)  # caps its logits: no bare head
    structure, positions = ModelStructure.of(model), []
    monkeypatch.setattr(measuring, "MAX_LOGITS", 6 * families.VOCAB)
    text = open_text(model, structure)
    handle = model.lm_head.register_forward_hook(lambda _, args, __: positions.append(args[0].shape[:-1].numel()))
    value = text.of({"layers": set(), "attention": set(), "mlp": set()})
    handle.remove()
    assert max(positions) == 6 and sum(positions) == WINDOWS.numel() - 1
    assert value == pytest.approx(loss(model), **CLOSE)


def test_only_the_first_sequences_are_used():
    model = families.make_model("llama", torch.float64)
    structure, tokens = ModelStructure.of(model), families.make_tokens(SEQUENCES + 8, 6)
    value = TextLoss(model, structure, tokens, 8).of({"layers": set(), "attention": set(), "mlp": set()})
    assert value == pytest.approx(loss(model, tokens[:SEQUENCES].view(2, 48)), **CLOSE)


@pytest.mark.parametrize(
    "shape, context, windows",
    [
        ((16, 256), 8192, (2, 2048)),
        ((16, 256), None, (2, 2048)),
        ((16, 256), 1000, (8, 512)),
        ((7, 256), 1000, (2, 768)),  # one sequence is left over
        ((10, 128), 8192, (1, 1280)),
        ((3, 3000), 8192, (3, 3000)),
        ((4, 100), 64, (4, 100)),
    ],
)
def test_neighbouring_sequences_are_joined_to_the_context(shape, context, windows):
    tokens = torch.arange(shape[0] * shape[1]).view(shape)
    found = joined(tokens, context)
    assert found.shape == windows
    assert torch.equal(found.flatten(), tokens.flatten()[: found.numel()])


def test_a_model_that_breaks_without_a_layer_has_an_infinite_loss():
    model = families.make_model("llama")
    structure = ModelStructure.of(model)
    with torch.no_grad():
        model.lm_head.weight[5].fill_(float("nan"))
    assert open_text(model, structure).of({"layers": {1}, "attention": set(), "mlp": set()}) == float("inf")


def test_bfloat16_losses_are_close_to_those_in_float32():
    model = families.make_model("llama", torch.bfloat16)
    structure = ModelStructure.of(model)
    losses, _ = open_text(model, structure).scan(Removal(structure), UNITS, "")
    for unit, value in losses.items():
        assert value == pytest.approx(loss(lacking(model, structure, [unit]).float()), rel=0.02)


@pytest.mark.parametrize("name", ["llama", "mixtral", "opt"])
def test_measuring_leaves_the_model_as_it_was(name):
    model = families.make_model(name)
    structure = ModelStructure.of(model)
    before, state = families.logits(model, TOKENS), copy.deepcopy(model.state_dict())
    first = open_text(model, structure).scan(Removal(structure), UNITS, "")
    assert open_text(model, structure).scan(Removal(structure), UNITS, "") == first
    assert torch.equal(families.logits(model, TOKENS), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__


def config(criterion="greedy"):
    calibration = families.CalibrationConfig(tokens=TOKENS, batch_size=2)
    return PruningConfig(units=("layers",), depth_criterion=criterion, calibration=calibration)


def best_by_brute_force(model, structure, count):
    """Greedy removal with a copy of the model for every trial."""
    gone, losses = [], []
    for _ in range(count):
        trials = {
            layer: loss(lacking(model, structure, [*gone, (layer, "layers")]))
            for layer in range(len(structure.layers))
            if (layer, "layers") not in gone
        }
        layer = min(trials, key=trials.get)
        gone.append((layer, "layers"))
        losses.append(trials[layer])
    return gone, losses, trials


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_greedy(seed):
    model = families.make_model("llama", torch.float64, seed=seed, num_hidden_layers=6)
    structure = ModelStructure.of(model)
    choice = choose_depth(model, structure, config(), ("layers",), count=4, tokens=lambda: TOKENS)
    order, losses, last = best_by_brute_force(model, structure, 4)
    assert choice.order == order and choice.dropped == {"layers": sorted(layer for layer, _ in order)}
    assert choice.losses == pytest.approx(losses)
    assert choice.baseline == pytest.approx(loss(model))
    assert {unit: choice.scores[unit] for unit in order} == pytest.approx(dict(zip(order, losses, strict=True)))
    stay = [layer for layer in range(6) if (layer, "layers") not in order]
    assert [choice.scores[layer, "layers"] for layer in stay] == pytest.approx([last[layer] for layer in stay])


def test_greedy_measures_again_where_one_shot_does_not():
    """A model in which the two differ, and greedy is better."""
    model = families.make_model("llama", torch.float64, seed=7, num_hidden_layers=6)
    structure = ModelStructure.of(model)
    singles = {i: loss(lacking(model, structure, [(i, "layers")])) for i in range(6)}
    one_shot = choose_depth(model, structure, config("perplexity"), ("layers",), count=3, tokens=lambda: TOKENS)
    assert one_shot.order == [(i, "layers") for i in sorted(singles, key=singles.get)[:3]]
    assert one_shot.scores == pytest.approx({(i, "layers"): value for i, value in singles.items()})
    assert one_shot.baseline == pytest.approx(loss(model)) and one_shot.losses == []
    greedy = choose_depth(model, structure, config(), ("layers",), count=3, tokens=lambda: TOKENS)
    assert greedy.order == best_by_brute_force(model, structure, 3)[0] != one_shot.order
    assert greedy.losses[-1] < loss(lacking(model, structure, one_shot.order))


def test_kinds_compete_by_the_rise_of_the_loss_per_parameter():
    model = families.make_model("llama", torch.float64, seed=1, num_hidden_layers=4)
    structure = ModelStructure.of(model)
    settings, kinds = config(), ("layers", "attention", "mlp")
    choice = choose_depth(model, structure, settings, kinds, count=2, tokens=lambda: TOKENS)
    gone, base = [], loss(model)
    for number in range(2):
        trials, before = {}, Removal(structure, list(gone)).parameters()
        for layer, kind in itertools.product(range(4), kinds):
            unit = (layer, kind)
            if not Removal(structure, list(gone)).can(unit):
                continue
            value = loss(lacking(model, structure, [*gone, unit]))
            size = Removal(structure, [*gone, unit]).parameters() - before
            trials[unit] = (1e6 * (value - base) / size, value)
        # A layer without its attention loses its MLP or the rest of the layer, which is the same.
        best = min(trials, key=lambda unit: (round(trials[unit][0], 3), unit[0], kinds.index(unit[1])))
        assert choice.order[number] == best
        assert choice.scores[best] == pytest.approx(trials[best][0], rel=1e-4)
        base = trials[best][1]
        gone.append(best)
