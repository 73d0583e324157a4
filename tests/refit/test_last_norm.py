"""The norm in front of the head: scaled by what brings predictions nearest to the dense model's, in every family."""

import copy
import math

import families
import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.model.structure import ModelStructure
from hf_structprune.refit import last_norm, layer_by_layer
from hf_structprune.refit.last_norm import lowest_of_parabola, soften
from hf_structprune.stats.processes import Processes
from hf_structprune.stats.stream import LayerStream


# With a bias (gpt2), `1 + w` and a soft cap (gemma2), logits that are scaled (granite, cohere2), a head of its own
# (gpt_neox).
NORMS = {
    "llama": "model.norm", "gpt2": "transformer.ln_f", "gemma2": "model.norm", "granite": "model.norm",
    "cohere2": "model.norm", "gpt_neox": "gpt_neox.final_layer_norm",
}  # fmt: skip
TOKENS = families.make_tokens(sequences=24, seed=3)


def confident(name):
    """A random model whose predictions are no longer nearly alike."""
    model = families.make_model(name, torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model


def streams(model, noise, tokens=TOKENS):
    """Hidden states that leave the last layer, with noise, and without."""
    stream = LayerStream(model, ModelStructure.of(model), tokens, 8)
    dense = [stream.outputs(0, number) for number in range(len(stream.batches))]
    random = torch.Generator().manual_seed(0)
    stream.hidden = [d + noise * d.std() * torch.randn(d.shape, generator=random) for d in dense]
    return stream, dense


@pytest.mark.parametrize("name", NORMS)
def test_factor_is_the_best_of_all(name, monkeypatch):
    model = confident(name)
    stream, clean = streams(model, 0.6)
    norm = model.get_submodule(NORMS[name])
    before = {key: tensor.clone() for key, tensor in norm.state_dict().items()}
    dense = [states.clone() for states in clean]
    # The dense model's predictions are those of the norm as it was: logits that do not change while it is scaled.
    found = soften(stream, dense, Processes())
    offset = float(name == "gemma2")
    after = {key: tensor.clone() for key, tensor in norm.state_dict().items()}
    for key, tensor in before.items():
        o = offset if key == "weight" else 0.0
        torch.testing.assert_close(after[key], (tensor + o) * found["factor"] - o)
    assert abs(found["factor"] - 1) > 0.01 and found["after"] < found["before"]

    def at(factor):
        """KL to the dense model at this factor, by scaling what the norm gives."""
        norm.load_state_dict(before)
        wanted = [
            stream.head(states, batch).log_softmax(-1) for states, batch in zip(dense, stream.batches, strict=True)
        ]
        with norm.register_forward_hook(lambda _, __, output: output * factor):
            pairs = zip(stream.hidden, stream.batches, strict=True)
            got = [stream.head(states, batch).log_softmax(-1) for states, batch in pairs]
        both = zip(wanted, got, strict=True)
        return float(torch.cat([(p.exp() * (p - q)).sum(-1).flatten() for p, q in both]).mean())

    assert found["before"] == pytest.approx(at(1.0), rel=1e-4)
    assert found["after"] == pytest.approx(at(found["factor"]), rel=1e-4)
    best = min(at(math.exp(step / 50)) for step in range(-35, 11))
    assert found["after"] <= best + 0.05 * (found["before"] - best)


def test_what_was_not_disturbed_stays_to_the_bit():
    model = confident("llama")
    stream, dense = streams(model, 0.0)
    before = model.model.norm.weight.clone()
    found = soften(stream, dense, Processes())
    assert found["factor"] == 1.0 and found["after"] == found["before"] == pytest.approx(0, abs=1e-6)
    assert torch.equal(model.model.norm.weight, before)
    assert last_norm.in_words(found) == last_norm.in_words(None) == []


def test_an_error_leaves_the_norm_as_it_was(monkeypatch):
    model = confident("llama")
    stream, dense = streams(model, 0.5)
    before = model.model.norm.weight.clone()

    def fails(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(last_norm, "kl_divergence", fails)
    with pytest.raises(ZeroDivisionError):
        soften(stream, dense, Processes())
    assert torch.equal(model.model.norm.weight, before)


def test_without_a_norm_in_front_of_the_head_nothing_is_scaled():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = OlmoForCausalLM(OlmoConfig(vocab_size=64, **sizes)).eval()  # its norms have no weights
    state = copy.deepcopy(model.state_dict())
    stream, dense = streams(model, 0.5)
    assert soften(stream, dense, Processes()) is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_long_text_is_looked_at_at_some_positions(monkeypatch):
    """Fewer positions, nearly the same factor."""
    model = confident("llama")
    stream, dense = streams(model, 0.5)
    every = soften(stream, dense, Processes())
    model = confident("llama")
    stream, dense = streams(model, 0.5)
    monkeypatch.setattr(last_norm, "_TOKENS", TOKENS.numel() // 4)
    seen = []
    original = last_norm.kl_divergence
    monkeypatch.setattr(last_norm, "kl_divergence", lambda p, q: seen.append(p.shape[:2].numel()) or original(p, q))
    some = soften(stream, dense, Processes())
    assert max(seen) == TOKENS[:8].numel() // 4
    assert some["factor"] == pytest.approx(every["factor"], rel=0.1)


@pytest.mark.parametrize("points, lowest", [
    ([(0.0, 1.0), (1.0, 0.0), (2.0, 1.0)], 1.0), ([(2.0, 4.0), (-1.0, 1.0), (0.0, 0.0)], 0.0),
    ([(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)], None), ([(0.0, 0.0), (1.0, 1.0), (2.0, 0.0)], None),
])  # fmt: skip
def test_lowest_point_of_a_parabola(points, lowest):
    assert lowest_of_parabola(points) == lowest


@pytest.mark.parametrize("name, units", [
    ("llama", {"units": "mlp_neurons"}), ("gemma2", {"units": ("mlp_neurons", "kv_groups")}),
    ("gpt2", {"units": "mlp_neurons"}), ("qwen3_moe", {"units": "expert_neurons"}),
    ("llama", {"units": "layers", "num_layers": 1}), ("olmo2", {"units": "mlp_neurons"}),
])  # fmt: skip
def test_pruned_models_come_nearer_to_the_dense_one_and_the_plan_says_so(name, units, monkeypatch):
    dense = confident(name)
    config = PruningConfig(calibration=CalibrationConfig(tokens=TOKENS), round_to=1, **units)
    ratio = None if "num_layers" in units else 0.2

    def pruned():
        pruner = StructuredPruner(copy.deepcopy(dense), config)
        pruner.prune(ratio) if ratio else pruner.prune()
        return pruner

    def distance(model):
        p, q = (families.logits(one, TOKENS).log_softmax(-1) for one in (dense, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    pruner = pruned()
    found = pruner.last_plan.softened
    assert found["after"] == pytest.approx(distance(pruner.model), rel=1e-3)
    assert found["factor"] == 1 or any("norm in front of the head" in line for line in pruner.last_plan.reasons)
    again = pruner.last_plan.from_dict(pruner.last_plan.to_dict())
    assert again.softened == found
    monkeypatch.setattr(layer_by_layer, "soften", lambda *_: None)
    plain = pruned()
    assert found["before"] == pytest.approx(distance(plain.model), rel=1e-3)
    assert found["after"] < found["before"]
    names = {name for name, tensor in plain.model.state_dict().items()
             if not torch.equal(tensor, pruner.model.state_dict()[name])}  # fmt: skip
    assert names <= {"model.norm.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}


@pytest.mark.parametrize("options", [{"compensation": False}, {"error_correction": 0.0}, {"plan": True}])
def test_without_correction_the_norm_stays(options):
    dense = confident("llama")
    named = options.pop("plan", False)
    config = PruningConfig(calibration=CalibrationConfig(tokens=TOKENS), units="mlp_neurons", **options)
    pruner = StructuredPruner(copy.deepcopy(dense), config)
    if named:
        pruner.plan(0.2, estimate=True)  # trials change nothing outside of the layers
    else:
        pruner.prune(0.2)
    assert torch.equal(pruner.model.model.norm.weight, dense.model.norm.weight)
