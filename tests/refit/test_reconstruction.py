"""Layers that are trained after their re-fit: never worse, the same each time, and nothing comes back that was cut."""

import copy
import re

import families
import pytest
import torch

from hf_structprune import CalibrationConfig, PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.errors import ConfigurationError, UnsupportedModelError
from hf_structprune.refit import reconstruction
from hf_structprune.refit.reconstruction import check_reconstruction


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(reconstruction, "STEPS", 16)
    monkeypatch.setattr(reconstruction, "STEP_TOKENS", 128)
    monkeypatch.setattr(reconstruction, "RATE", 0.01)  # so few of them have to be wider


def tokens(sequences=64):
    return torch.randint(3, 60, (sequences, 16), generator=torch.Generator().manual_seed(1))


def pruned(model, ratio=0.15, batch_size=8, **options):
    calibration = CalibrationConfig(tokens=tokens(), batch_size=batch_size)
    pruner = StructuredPruner(copy.deepcopy(model), PruningConfig(calibration=calibration, round_to=1, **options))
    pruner.prune(ratio)
    return pruner


def distance(pruner, model):
    """Squared distance of the last hidden states from the dense model's, on other text."""
    other = families.make_tokens(sequences=64, seed=5)
    with torch.no_grad():
        return float((pruner.model.base_model(other)[0] - model.base_model(other)[0]).square().mean())


@pytest.mark.parametrize(
    "name, units",
    [
        ("llama_bias", ("mlp_neurons", "kv_groups")),
        ("gemma2", ("mlp_neurons",)),  # layers do not simply add up
        ("phi3", ("mlp_neurons", "query_heads")),  # fused projections
        ("qwen3_moe", ("mlp_neurons", "kv_groups")),
    ],
)
def test_layers_come_nearer_to_what_they_should_put_out(name, units):
    model = families.make_model(name)
    pruner = pruned(model, 0.2, units=units, reconstruct=True)
    found = pruner.last_plan.reconstructed
    assert [(one["layer"], one["steps"]) for one in found] == [(layer, 16) for layer in range(families.LAYERS)]
    assert all(one["after"] <= one["before"] for one in found)
    assert distance(pruner, model) < distance(pruned(model, 0.2, units=units), model)
    assert any("layers were reconstructed" in line for line in pruner.last_plan.reasons)


@pytest.mark.parametrize(
    "name, units", [("llama", ("mlp_neurons", "kv_groups")), ("phi3", ("mlp_neurons",)), ("gpt2", None)]
)
def test_error_that_is_reported_is_that_of_the_small_model(name, units):
    """Of one layer that sees what it saw before: what was cut has no part in it."""
    model, last = families.make_model(name, torch.bfloat16), families.LAYERS - 1
    options = dict(units=units, layout="per_layer", layers=[last], error_correction=0.0, token_weighting=False)
    pruner = pruned(model, 0.08, reconstruct=True, **options)
    (found,) = pruner.last_plan.reconstructed
    with torch.no_grad():
        outputs = []
        for one in (pruner.model, model):
            layers = one.transformer.h if name == "gpt2" else one.model.layers
            handle = layers[last].register_forward_hook(lambda _, __, out: outputs.append(out))
            one.base_model(tokens()[32:40], use_cache=False)  # the fifth of eight batches is held out
            handle.remove()
    small, dense = (out[0] if isinstance(out, tuple) else out for out in outputs)
    error = (small.float() - dense.float()).square().sum(-1) / dense.float().square().sum(-1).mean()
    assert found["layer"] == last and float(error.mean()) == pytest.approx(found["after"], rel=0.02)


def test_without_a_step_it_is_the_closed_form_and_with_some_the_same_each_time(monkeypatch):
    monkeypatch.setattr(reconstruction, "STEPS", 4)
    model = families.make_model("mixtral")
    options = dict(units=("experts",))
    closed, none = pruned(model, **options), pruned(model, reconstruct_minutes=0, **options)
    assert [one["steps"] for one in none.last_plan.reconstructed] == [0] * families.LAYERS
    for name, value in closed.model.state_dict().items():
        assert torch.equal(value, none.model.state_dict()[name]), name
    one, other = (pruned(model, reconstruct=True, **options) for _ in range(2))
    assert one.last_plan.reconstructed == other.last_plan.reconstructed
    changed = set()
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
        changed |= set() if torch.equal(value, closed.model.state_dict()[name]) else {name}
    assert any(".experts." in name for name in changed) and any("q_proj" in name for name in changed)
    assert torch.equal(one.model.model.layers[0].mlp.gate.weight, closed.model.model.layers[0].mlp.gate.weight)


def test_steps_that_are_much_too_wide_leave_the_closed_form_or_are_begun_again(monkeypatch):
    model, options = families.make_model("gemma2"), dict(units=("mlp_neurons",))
    monkeypatch.setattr(reconstruction, "RATE", 1e5)
    closed, wide = pruned(model, **options), pruned(model, reconstruct=True, **options)
    assert all(one["after"] == one["before"] for one in wide.last_plan.reconstructed)
    for name, value in closed.model.state_dict().items():
        assert torch.equal(value, wide.model.state_dict()[name]), name
    monkeypatch.setattr(reconstruction, "SLOWER", 1e-7)
    found = pruned(model, reconstruct=True, **options).last_plan.reconstructed
    assert all(one["after"] < one["before"] for one in found)


def test_sublayer_that_goes_is_not_trained():
    model = families.make_model("llama_bias")
    pruner = pruned(model, None, units=("mlp",), layers=[1], layout="per_layer", reconstruct=True)
    assert [one["layer"] for one in pruner.last_plan.reconstructed] == [1, 2]
    assert distance(pruner, model) < distance(
        pruned(model, None, units=("mlp",), layers=[1], layout="per_layer"), model
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(compensation=False), "compensation"),
        (dict(units=("hidden",)), "all layers change at once"),
    ],
)
def test_options_that_contradict_it(options, words):
    with pytest.raises(ConfigurationError, match=words):
        PruningConfig(reconstruct=True, **options)


def test_what_cannot_be_held_out_or_trained_is_refused_before_anything_changes():
    model = families.make_model("llama")
    before = copy.deepcopy(model.state_dict())
    pruner = StructuredPruner(
        model, PruningConfig(calibration=CalibrationConfig(tokens=tokens(8), batch_size=8), reconstruct=True)
    )
    with pytest.raises(ConfigurationError, match="batch_size"):
        pruner.prune(0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(UnsupportedModelError, match="belongs to layer 0 and to layer 2"):
        check_reconstruction(pruner.structure, model, [1, 2])


def test_layers_that_come_after_three_with_little_gain_are_left_as_the_closed_form_has_them(monkeypatch):
    gains = iter([0.2, 0.005, 0.03, 0.009, 0.0, 0.009, 0.5, 0.5])

    def run(self, seconds):
        return 50, 1.0, 1 - next(gains)

    monkeypatch.setattr(reconstruction._Training, "run", run)
    model, options = families.make_model("llama", num_hidden_layers=8), dict(units=("mlp_neurons",))
    found = pruned(model, reconstruct=True, **options).last_plan.reconstructed
    assert [one["layer"] for one in found] == [0, 1, 2, 3, 4, 5]
    gains = iter([0.0] * 8)
    timed = pruned(model, reconstruct_minutes=5, **options).last_plan.reconstructed
    assert len(timed) == 8  # what was asked for


def test_auto_trains_the_layers_and_what_is_named_does_not(tmp_path, monkeypatch):
    model = families.make_model("llama")
    pruner = pruned(model, 0.1)
    assert [one["layer"] for one in pruner.last_plan.reconstructed] == [0, 1, 2]
    assert any("layers were reconstructed" in line for line in pruner.last_plan.reasons)
    pruner.save_pretrained(tmp_path / "small")
    assert '"reconstruct": true' in (tmp_path / "small" / "pruning_config.json").read_text(encoding="utf-8")
    replayed = pruned(families.make_model("llama"), PruningPlan.load(tmp_path / "small" / "pruning_plan.json"))
    for name, value in pruner.model.state_dict().items():
        assert torch.equal(value, replayed.model.state_dict()[name]), name
    left = [
        dict(reconstruct=False), dict(units=("mlp_neurons",)), dict(criterion="wanda"), dict(compensation=False),
    ]  # fmt: skip
    for options in left:
        plan = pruned(families.make_model("llama"), 0.1, **options).last_plan
        assert not plan.reconstructed and not any("`reconstruct`" in line for line in plan.reasons)


@pytest.mark.parametrize(
    "why", ["all experts of a layer would be", "the calibration text is one batch", "that takes .* GB, and 0.0 GB are"]
)
def test_auto_says_why_layers_are_not_trained(why, monkeypatch):
    if "GB" in why:
        monkeypatch.setattr(reconstruction, "memory_left", lambda: 1000)
    model = families.make_model("mixtral" if "experts" in why else "llama")
    plan = pruned(model, 0.1, batch_size=64 if "batch" in why else 8).last_plan
    assert not plan.reconstructed
    words = r"layers are re-fitted alone, and not trained on from there \(`reconstruct`\), since " + why
    assert any(re.match(words, line) for line in plan.reasons)
