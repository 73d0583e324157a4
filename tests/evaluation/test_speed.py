import sys

import pytest
import torch
from families import cut, make_model, make_tokens, random_units
from transformers import GenerationConfig

from hf_structprune.errors import ConfigurationError, EvaluationError
from hf_structprune.evaluation import efficiency as speed
from hf_structprune.evaluation import time_loading
from hf_structprune.evaluation.efficiency import median_figure, time_generation, time_prefill, where
from hf_structprune.model.structure import ModelStructure


class Clock:
    """Time that passes only inside the model: one second a token that goes through a forward pass."""

    def __init__(self, monkeypatch, model):
        self.now, self.calls = 100.0, []
        monkeypatch.setattr(speed.time, "perf_counter", lambda: self.now)
        model.register_forward_pre_hook(self.forward, with_kwargs=True)

    def forward(self, module, args, kwargs):
        self.calls.append(kwargs)
        self.now += kwargs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "qwen3_moe"])
def test_generation_is_timed_from_the_call_to_the_tokens(name, monkeypatch):
    model = make_model(name)
    clock = Clock(monkeypatch, model)
    times = time_generation(model, make_tokens(2, 10), new_tokens=6)
    assert times == (10.0, 5.0)  # a prompt of ten at once, then five single tokens
    assert len(clock.calls) == 6


def test_generation_ignores_the_end_of_text_and_the_models_settings(monkeypatch):
    model = make_model("llama")
    own = GenerationConfig(
        eos_token_id=list(range(64)), do_sample=True, temperature=0.3, max_length=12, num_beams=3, use_cache=False
    )
    model.generation_config = own
    clock = Clock(monkeypatch, model)
    time_generation(model, make_tokens(1, 10), new_tokens=7)
    assert model.generation_config is own
    assert [call["input_ids"].shape for call in clock.calls] == [(1, 10)] + [(1, 1)] * 6


def test_layers_of_different_widths(monkeypatch):
    model = make_model("llama")
    kept, counts = random_units(ModelStructure.of(model), ("kv_groups", "mlp_neurons"), uniform=False)
    model = cut(model, kept, counts, "per_layer")
    clock = Clock(monkeypatch, model)
    assert time_generation(model, make_tokens(1, 10), 4)[1] == 3.0 and len(clock.calls) == 4


def test_a_model_that_stops_early_is_an_error(monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(model, "generate", lambda ids, **_: ids)
    with pytest.raises(EvaluationError, match="LlamaForCausalLM generated 0 tokens instead of 5"):
        time_generation(model, make_tokens(1), 5)
    assert model.generation_config.max_new_tokens is None


def test_prefill_is_one_forward_pass_with_a_cache(monkeypatch):
    model = make_model("llama")
    clock = Clock(monkeypatch, model)
    assert time_prefill(model, make_tokens(3, 12)) == 12.0
    (call,) = clock.calls
    assert call["use_cache"] is True and call["logits_to_keep"] == 1 and call["input_ids"].shape == (3, 12)


def test_time_ends_when_devices_are_done(monkeypatch):
    model, order = make_model("llama"), []
    monkeypatch.setattr(speed, "synchronize", lambda devices: order.append(devices))
    model.register_forward_hook(lambda *_: order.append("forward"))
    cpu = {torch.device("cpu")}
    time_prefill(model, make_tokens(1))
    assert order == [cpu, "forward", cpu]
    order.clear()
    time_generation(model, make_tokens(1), 4)
    assert order == [cpu, "forward", cpu, "forward", "forward", "forward", cpu]  # first token, last token


def test_synchronize_waits_for_every_cuda_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    devices = {torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu"), torch.device("meta")}
    speed.synchronize(devices)
    assert set(waited) == {torch.device("cuda:0"), torch.device("cuda:1")}


def test_median_and_spread():
    figure = median_figure("efficiency/x", [4.0, 1.0, 2.0, 3.0, 100.0], "s", "how", device="cpu")
    assert figure.value == 3.0 and figure.higher_is_better is False
    assert figure.details == {
        "min": 1.0, "max": 100.0, "iqr": 2.0, "values": [4.0, 1.0, 2.0, 3.0, 100.0], "device": "cpu"
    }  # fmt: skip
    single = median_figure("efficiency/x", [7.0], "tokens/s", "how")
    assert single.value == 7.0 and single.details["iqr"] == 0.0 and single.higher_is_better is True


def test_where():
    words = where(make_model("llama", torch.bfloat16))
    assert words.startswith("bfloat16 on cpu (") and words.endswith(" threads)")


@pytest.mark.slow
def test_loading_in_a_fresh_process(tmp_path):
    model = make_model("llama")
    kept, counts = random_units(ModelStructure.of(model), ("mlp_neurons",), uniform=False)
    cut(model, kept, counts, "per_layer").save_pretrained(tmp_path)
    figure = time_loading(tmp_path, repeats=2)
    assert figure.name == "efficiency/load_time" and figure.unit == "s"
    assert len(figure.details["values"]) == 2 and 0 < figure.details["min"] <= figure.value
    assert "fresh process" in figure.protocol


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Traceback ...\nCheckpointError: no config.json' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(EvaluationError, match=r"folder could not be loaded: CheckpointError: no config\.json$"):
        time_loading("folder")
    python.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(EvaluationError, match="folder could not be loaded: the process ended with status 3"):
        time_loading("folder")


def test_the_first_load_is_not_counted(monkeypatch):
    clock, seconds = [0.0], iter([50.0, 2.0, 3.0])

    def load(name, **options):
        assert (name, options) == ("folder", {"dtype": "auto", "revision": "main"})
        clock[0] += next(seconds)
        return make_model("llama")

    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr("hf_structprune.evaluation.efficiency.load_model", load)
    assert speed._load("folder", "auto", "cpu", 2, {"revision": "main"}) == [2.0, 3.0]


def test_repeats_are_checked_before_a_process_starts(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ConfigurationError, match="`repeats` is 0"):
        time_loading("folder", repeats=0)
