"""The search over widths with what goes as a whole: layers, sublayers, experts; and what follows it."""

import dataclasses
import random
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from families import make_tokens
from moe_families import make_moe
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.allocation import evolution
from hf_structprune.allocation.assembly import Divergence, assembled
from hf_structprune.allocation.evolution import options_of
from hf_structprune.allocation.exchange import Exchange
from hf_structprune.allocation.levels import build_levels, ladders_of
from hf_structprune.allocation.removal import as_dropped
from hf_structprune.allocation.widths import Budget
from hf_structprune.criteria import make_criterion
from hf_structprune.errors import ConfigurationError, RatioError, UnsupportedModelError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.refit import reconstruction


def configured(*units, **options):
    calibration = {"tokens": make_tokens(16, 24), "batch_size": 16}  # one batch, so that every price is exact
    options = {"search_evaluations": 300, "round_to": 8, "damping": 0.1, **options}
    return PruningConfig(units=units, layout="per_layer", allocation="evolution", calibration=calibration, **options)


@pytest.fixture
def searches(monkeypatch):
    """What every search was given, looked at and found, and the price of everything that it could have chosen."""
    found, search = [], evolution.search

    def seen(options, measure, batches, config, target, levels):
        assert batches == 1
        prices, looked = {}, []

        def priced(choice, numbers=(0,)):
            looked.append(tuple(choice))
            if tuple(choice) not in prices:
                prices[tuple(choice)] = measure(choice, list(numbers))
            return prices[tuple(choice)]

        result = search(options, priced, batches, config, target, levels)
        exchange = Exchange(options, target, evolution._finest(levels.ladders))
        assert all(map(exchange.fits, looked))  # the budget is exact at every step
        every = product(*(range(len(row)) for row in options.gone))
        every = {choice: priced(choice) for choice in every if exchange.fits(choice)}
        found.append(SimpleNamespace(options=options, ladders=levels.ladders, result=result, every=every))
        return result

    monkeypatch.setattr(evolution, "search", seen)
    return found


def loud(model):
    """Larger weights, so that prices are far from rounding errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model


@pytest.mark.parametrize("units, step", [(("mlp_neurons", "layers"), 8), (("mlp_neurons", "attention", "mlp"), 16)])
def test_nothing_is_better_than_what_is_found(units, step, tiny_llama, searches, tmp_path):
    """Of all layers, sublayers and widths by which as many parameters go the search finds the cheapest."""
    model, config = loud(tiny_llama), configured(*units, round_to=step, levels=str(tmp_path / "levels"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = StructuredPruner(model, config).plan(0.4)
    (search,) = searches
    assert len(search.every) > 20 and max(search.every.values()) > 0.01
    assert search.result.ended == min(search.every.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert plan.dropped and plan.ratio == pytest.approx(0.4, abs=0.01)
    again = StructuredPruner(model, dataclasses.replace(config, levels=None))
    pruned = again.prune(0.4)
    assert shape(again.last_plan) == shape(plan)  # another folder, the same seed
    assert sum(p.numel() for p in pruned.parameters()) == plan.parameters_after
    again.save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    ids = make_tokens(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, pruned(ids).logits, atol=1e-4, rtol=1e-4)


def shape(plan):
    return {(one.layer, one.kind): one.keep for one in plan.groups}, plan.dropped


def test_parameters_of_all_choices_are_those_of_their_plans(tiny_llama):
    structure, config = ModelStructure.of(tiny_llama), configured("mlp_neurons", "kv_groups", "layers", "mlp")
    ladders = ladders_of(structure, config, Budget(structure, config))
    options, chance, counted = options_of(ladders, structure), random.Random(0), []
    for _ in range(300):
        choice = [chance.randrange(len(row)) for row in options.gone]
        gone = [(one.layer, one.kind) for one, level in zip(ladders, choice, strict=True) if not one.group and level]
        if not options.leaves_layers(choice):
            assert {(layer, "layers") for layer in range(3)} <= set(gone)
            continue
        counts = {one.group.key: one.counts[level] for one, level in zip(ladders, choice, strict=True) if one.group}
        dropped = as_dropped(gone, structure)
        plan = PruningPlan.from_counts(structure, counts, model_type="llama", layout="per_layer", dropped=dropped)
        counted.append(options.total(choice))
        assert counted[-1] == plan.parameters_before - plan.parameters_after
    assert max(counted) <= options.most and len(set(counted)) > 40


def test_experts_and_what_is_left_of_them(searches, tmp_path):
    """Levels of experts are what the cut model computes: their price, and the best of all choices."""
    model = loud(make_moe("qwen3_moe", num_experts=8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = StructuredPruner(model, configured("experts", "mlp", levels=str(tmp_path)))
    plan = pruner.plan(0.3)
    (search,) = searches
    assert search.result.ended == min(search.every.values()) and len(search.every) > 5
    assert plan.ratio == pytest.approx(0.3, abs=0.05)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ladder = next(one for one in search.ladders if one.kind == "experts")
    with safe_open(tmp_path / f"layer-{ladder.layer:05}.safetensors", "pt") as file:
        kept = file.get_tensor("experts.4.columns").long()
        matrices = file.get_tensor("experts.4.weight")
    assert matrices.shape[0] == len(kept) == 4
    assert ladder.nats[0] == 0 and max(ladder.nats) > 0
    pruned = pruner.prune(0.3)
    assert shape(pruner.last_plan) == shape(plan)
    assert sum(p.numel() for p in pruned.parameters()) == plan.parameters_after


def test_an_assembly_of_experts_is_the_cut_model(tmp_path):
    """With nothing re-fitted the model at a level gives what the model with the plan carried out gives."""
    model = loud(make_moe("qwen3_moe", num_experts=8))
    config = configured("experts", compensation=False, damping=None, levels=str(tmp_path), search_evaluations=0)
    structure, tokens = ModelStructure.of(model), make_tokens(16, 24)
    levels = build_levels(
        model, structure, make_criterion(config), config, Budget(structure, config), tokens, tmp_path
    )
    choice = [next(n for n, count in enumerate(one.counts) if count == 4) for one in levels.ladders]
    divergence = Divergence(model, structure, tokens, 16)
    with assembled(model, structure, levels, tokens) as assembly, assembly.at(choice) as skip:
        found = divergence([0], skip)
        kept = {one.group.key: levels.read(n, choice[n])[0].tolist() for n, one in enumerate(levels.ladders)}
    assert divergence([0]) == pytest.approx(0, abs=1e-6)
    counts = {key: len(units) for key, units in kept.items()}
    plan = PruningPlan.from_counts(structure, counts, model_type="qwen3_moe", layout="per_layer")
    for decision in plan.groups:
        decision.kept = kept[decision.layer, decision.kind]
    with torch.no_grad():
        dense = model(tokens).logits[:, ::4].log_softmax(-1)
        small = StructuredPruner(model, config).prune(plan)(tokens).logits[:, ::4].log_softmax(-1)
    nats = torch.nn.functional.kl_div(small, dense, log_target=True, reduction="sum") / dense[..., 0].numel()
    assert found == pytest.approx(float(nats), rel=1e-3) and found > 0.01


def test_reconstruction_follows_the_search(tiny_llama, monkeypatch):
    """The widths are those of the search alone; the layers are trained afterwards, and said."""
    monkeypatch.setattr(reconstruction, "STEPS", 12)
    config = configured("mlp_neurons", "kv_groups", search_evaluations=22)
    config.calibration.batch_size = 4
    alone = StructuredPruner(tiny_llama, config).plan(0.15)
    pruner = StructuredPruner(tiny_llama, dataclasses.replace(config, reconstruct=True))
    pruner.prune(0.15)
    assert shape(pruner.last_plan) == shape(alone)
    assert len(pruner.last_plan.reconstructed) == 3
    assert all(one["after"] <= one["before"] for one in pruner.last_plan.reconstructed)
    assert any(one["after"] < one["before"] for one in pruner.last_plan.reconstructed)
    assert any("evolution" in line for line in pruner.last_plan.reasons)


def test_what_cannot_be_is_refused(tiny_llama):
    with pytest.raises(RatioError, match=r"parameters \(95.00% of the model\) are to go, but at most"):
        StructuredPruner(tiny_llama, configured("mlp_neurons", "layers", search_evaluations=0)).plan(0.95)
    with pytest.raises(UnsupportedModelError, match="none of expert_neurons in layer 0 .* use allocation='search'"):
        StructuredPruner(make_moe("qwen3_moe"), configured("expert_neurons")).plan(0.1)
    with pytest.raises(ConfigurationError, match="units='auto' compares kinds"):
        PruningConfig(allocation="evolution", units=("mlp_neurons", "layers"))
