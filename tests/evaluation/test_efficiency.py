import dataclasses
import json

import pytest
import torch
from families import LAYERS, VOCAB, count, cut, make_model, make_tokens, random_units
from transformers import MambaConfig, MambaForCausalLM
from transformers.utils import logging

from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation import EfficiencyConfig, efficiency, measure_efficiency
from hf_structprune.evaluation.efficiency import count_macs, count_macs_with_attention
from hf_structprune.evaluation.results import EvaluationResult
from hf_structprune.model.structure import ModelStructure


SMALL = EfficiencyConfig(batch_size=2, length=8, new_tokens=3, warmup=1, repeats=2)
SIZES = ["parameters", "weight_bytes", "macs", "macs_with_attention", "kv_cache_bytes_per_token"]
SPEEDS = ["peak_memory", "time_to_first_token", "prefill_throughput", "decode_throughput"]


def values(figures):
    names = [figure.name for figure in figures]
    assert len(set(names)) == len(names) and all(name.startswith("efficiency/") for name in names)
    return {figure.name.removeprefix("efficiency/"): figure.value for figure in figures}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_sizes(name):
    model = make_model(name, torch.bfloat16)
    found = values(measure_efficiency(model, dataclasses.replace(SMALL, speed=False)))
    assert list(found) == SIZES
    assert found["parameters"] == count(model) and found["weight_bytes"] == 2 * count(model)
    assert found["macs"] == count_macs(model, 2, 8)
    assert found["macs_with_attention"] == count_macs_with_attention(model, make_tokens(2, 8))


def test_default_is_the_published_size():
    config = EfficiencyConfig(speed=False)
    model = make_model("llama")
    figures = {figure.name: figure for figure in measure_efficiency(model, config)}
    assert (config.batch_size, config.length) == (1, 64)
    assert figures["efficiency/macs"].value == count_macs(model, 1, 64)
    assert figures["efficiency/macs"].details == {"batch_size": 1, "length": 64}


def test_tied_parameters_count_once():
    tied, free = (make_model("llama", tie_word_embeddings=tie) for tie in (True, False))
    config = EfficiencyConfig(speed=False)
    tied, free = values(measure_efficiency(tied, config)), values(measure_efficiency(free, config))
    assert free["parameters"] - tied["parameters"] == VOCAB * 32
    assert free["weight_bytes"] - tied["weight_bytes"] == 4 * VOCAB * 32
    assert free["macs"] == tied["macs"]


def test_speed_figures_are_medians_of_the_runs_that_count(monkeypatch):
    prefill, generation = iter([90.0, 4.0, 2.0, 8.0]), iter([99.0, 3.0, 1.0, 2.0, 50.0])
    monkeypatch.setattr(efficiency, "time_prefill", lambda *_: next(prefill))
    monkeypatch.setattr(efficiency, "time_generation", lambda *_: (t := next(generation), 10 * t))
    config = dataclasses.replace(SMALL, new_tokens=11, warmup=1, repeats=3)
    figures = {
        figure.name.removeprefix("efficiency/"): figure for figure in measure_efficiency(make_model("llama"), config)
    }
    assert list(figures) == [*SIZES, *SPEEDS]
    assert figures["prefill_throughput"].value == 2 * 8 / 4.0
    assert figures["time_to_first_token"].value == 2.0
    assert figures["time_to_first_token"].details["values"] == [3.0, 1.0, 2.0]
    assert figures["decode_throughput"].value == 2 * 10 / 20.0  # ten tokens after the first, of two sequences
    assert (figures["decode_throughput"].details["min"], figures["decode_throughput"].details["max"]) == (2 / 3, 2.0)
    protocol = figures["decode_throughput"].protocol
    assert protocol.startswith("batch 2, prompt of 8 tokens, 11 new ones, float32 on cpu (")
    assert protocol.endswith("median of 3 runs after 1 to warm up")


def test_real_runs_of_a_model_whose_layers_differ():
    model = make_model("llama")
    kept, counts = random_units(ModelStructure.of(model), ("kv_groups", "mlp_neurons"), uniform=False)
    dense = values(measure_efficiency(model, SMALL))
    figures = measure_efficiency(cut(model, kept, counts, "per_layer"), SMALL)
    pruned = values(figures)
    assert list(pruned) == [*SIZES, *SPEEDS] and min(pruned.values()) > 0
    assert all(pruned[name] < dense[name] for name in SIZES)
    result = EvaluationResult("tiny")
    result.add(*figures)
    assert EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_runs_are_the_same_every_time(monkeypatch):
    seen = []
    monkeypatch.setattr(efficiency, "time_prefill", lambda model, ids: seen.append(ids) or 1.0)
    for seed in (0, 0, 1):
        measure_efficiency(make_model("llama"), dataclasses.replace(SMALL, seed=seed, warmup=0, repeats=1))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert seen[0].shape == (2, 8) and seen[0].min() >= 0 and seen[0].max() < VOCAB


def test_modes_and_settings_are_restored():
    model = make_model("llama").train()
    model.model.layers[1].eval()
    modes, config = [m.training for m in model.modules()], model.generation_config
    measure_efficiency(model, SMALL)
    assert [m.training for m in model.modules()] == modes and model.generation_config is config
    assert torch.is_grad_enabled()


def test_a_quantised_model_counts_as_the_dense_one():
    """Quantisers put packed weights in the place of the matrices; the configuration still tells the true shapes."""
    model, dense = make_model("llama"), make_model("llama")
    for layer in model.model.layers:
        packed = torch.zeros(layer.mlp.down_proj.weight.numel() // 2, 1, dtype=torch.uint8)
        layer.mlp.down_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
        layer.mlp.forward = lambda hidden: hidden
    model.config.quantization_config = {"quant_method": "none"}
    found = values(measure_efficiency(model, EfficiencyConfig(speed=False)))
    expected = values(measure_efficiency(dense, EfficiencyConfig(speed=False)))
    assert list(found) == [name for name in SIZES if name != "macs_with_attention"]
    assert found["parameters"] == expected["parameters"] and found["macs"] == expected["macs"]
    assert found["weight_bytes"] == expected["weight_bytes"] - LAYERS * 32 * 48 * 7 // 2  # 4 bytes to half a byte


def test_what_cannot_be_known_is_left_out_with_a_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(efficiency.logger, "warning", warnings.append)
    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    found = values(measure_efficiency(model, EfficiencyConfig(length=8, speed=False)))
    assert list(found) == ["parameters", "weight_bytes", "macs_with_attention"]
    assert [warning.split(" is left out")[0] for warning in warnings] == [
        "efficiency/macs", "efficiency/kv_cache_bytes_per_token"
    ]  # fmt: skip


def test_progress_bar_follows_transformers(capfd):
    was_enabled = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar()
        measure_efficiency(make_model("llama"), SMALL)
        assert "Speed" in capfd.readouterr().err
        logging.disable_progress_bar()
        measure_efficiency(make_model("llama"), SMALL)
        assert capfd.readouterr().err == ""
    finally:
        (logging.enable_progress_bar if was_enabled else logging.disable_progress_bar)()


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [("batch_size", 0, 1), ("length", 0, 1), ("new_tokens", 1, 2), ("warmup", -1, 0), ("repeats", 0, 1)],
)
def test_impossible_numbers(field, value, least):
    with pytest.raises(ConfigurationError, match=f"`{field}` is {value}; it must be an integer of at least {least}"):
        EfficiencyConfig(**{field: value})


def test_longer_than_the_context():
    model = make_model("llama")  # 64 tokens
    with pytest.raises(ConfigurationError, match="`length` is 60 and `new_tokens` 5, but the model's context is 64"):
        measure_efficiency(model, EfficiencyConfig(length=60, new_tokens=5))
