"""What is measured and exported a layer at a time is what comes out in memory, bit for bit."""

import json
import shutil

import psutil
import pytest
import torch
from families import cut, make_model, make_tokens
from moe_families import make_moe
from safetensors.torch import load_file, save_file
from test_streaming import save
from vocabularies import byte_level

from hf_structprune.commands import cli
from hf_structprune.errors import CheckpointError, ConfigurationError, PlaceError, UnsupportedModelError
from hf_structprune.evaluation.evaluator import EvaluationConfig, evaluate
from hf_structprune.evaluation.perplexity import EvaluationText, measure_perplexity, window_losses
from hf_structprune.evaluation.results import model_fingerprint
from hf_structprune.export.gguf import export_gguf
from hf_structprune.files.rooms import Spill
from hf_structprune.model.loading import load_model
from hf_structprune.model.store import OnDisk
from hf_structprune.streaming import check_measuring, load_streamed


def per_layer(name, dropped, **changes):
    return cut(make_model(name, **changes), {}, {}, "per_layer", dropped)


MODELS = {
    "llama": lambda: make_model("llama"),
    "tied in bf16": lambda: make_model("qwen3", dtype=torch.bfloat16, tie_word_embeddings=True),
    "logits are capped": lambda: make_model("gemma2"),
    "logits are scaled": lambda: make_model("granite"),
    "gpt2": lambda: make_model("gpt2"),
    "opt": lambda: make_model("opt"),
    "falcon": lambda: make_model("falcon"),
    "phi3": lambda: make_model("phi3"),
    "cohere2": lambda: make_model("cohere2"),
    "experts": lambda: make_moe("qwen3_moe"),
    "gpt_oss": lambda: make_moe("gpt_oss"),
    "of several kinds": lambda: make_moe("granitemoehybrid"),
    "sublayers skipped": lambda: per_layer("qwen2", {"mlp": [1], "attention": [2]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_memory(tmp_path, name):
    folder, spill = save(MODELS[name](), tmp_path), Spill(0, tmp_path) if len(name) > 6 else None
    tokens, counts = make_tokens(7, 12), [11, 11, 5, 1, 11, 11, 3]
    options = {"trust_remote_code": True} if name == "sublayers skipped" else {}
    whole = load_model(folder, **options)
    model, store = load_streamed(folder, spill, **options)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    for size in (1, 3):  # the last batch of three is smaller
        losses = window_losses(model, tokens, counts, size, store=store)
        assert losses.tolist() == window_losses(whole, tokens, counts, size).tolist()
    assert store.rooms == (tmp_path if spill else None)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    with store.reading() as read:
        assert model_fingerprint(model, read) == model_fingerprint(whole)


def test_one_layer_is_in_memory(tmp_path, monkeypatch):
    folder, load, seen = save(make_model("llama", num_hidden_layers=5), tmp_path), OnDisk.load, []

    def watched(self, part):
        load(self, part)
        there = [name for name, tensor in self.model.state_dict().items() if tensor.device.type != "meta"]
        seen.append(len({name.split(".")[2] for name in there if ".layers." in name}))

    monkeypatch.setattr(OnDisk, "load", watched)
    model, store = load_streamed(folder)
    window_losses(model, make_tokens(4), [3] * 4, 2, store=store)
    assert max(seen) == 1 and len(seen) < 20  # each layer twice, whatever the number of batches


def test_memory_is_announced_and_refused(tmp_path, monkeypatch, caplog):
    folder, tokens = save(make_model("llama", vocab_size=300_000), tmp_path), make_tokens(8, 64)
    model, store = load_streamed(folder)
    states = tokens.numel() * model.config.hidden_size * 4
    window_losses(model, tokens, [63] * 8, 2, store=store)
    assert "of memory are needed" in caplog.text and "disk" not in caplog.text
    memory = psutil.virtual_memory()
    least = model.get_input_embeddings().weight.numel() * 8  # with the head
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=least))
    monkeypatch.setattr(OnDisk, "load", None)  # no weight is read any more
    with pytest.raises(ConfigurationError, match="max_windows"):
        check_measuring(store, tokens, 2, True, "less (`max_windows`)")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=4 * states - 1))
    small, store = load_streamed(save(make_model("llama"), tmp_path / "small"), Spill(folder=tmp_path))
    with pytest.raises(ConfigurationError, match=r"needed"):
        check_measuring(store, tokens, 2, True, "less (`max_windows`)")
    assert store.rooms == tmp_path  # more than a quarter of what is free
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: psutil.disk_usage("/")._replace(free=states - 1))
    store.spill = Spill(0, tmp_path)
    with pytest.raises(PlaceError, match="the disk has"):
        check_measuring(store, tokens, 2, True, "less (`max_windows`)")


def test_damage_shows(tmp_path):
    folder = save(make_model("llama"), tmp_path)
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model, store = load_streamed(folder)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp.*not finite"):
        window_losses(model, make_tokens(2), [3, 3], 1, store=store)
    del stored["lm_head.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks"):
        load_streamed(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level("smollm", 400)
    make_model("llama", vocab_size=416, max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEXT = EvaluationText("own", "A cat and a dog went out. " * 40, "ours")


def test_evaluation(checkpoint, tmp_path, caplog):
    model, store = load_streamed(checkpoint)
    whole = load_model(checkpoint)
    for protocol in ("llm-pruner", "sliding"):
        found = [
            measure_perplexity(m, checkpoint, TEXT, protocol, window=16, batch_size=4, store=s)
            for m, s in ((model, store), (whole, None))
        ]
        assert found[0] == found[1] and found[0].windows > 8
    (tmp_path / "own.txt").write_text(TEXT.text)
    config = EvaluationConfig(texts=[str(tmp_path / "own.txt")], window=16)
    result = evaluate(model, checkpoint, config, name="mine", store=store)
    there = {name: f.value for name, f in evaluate(whole, checkpoint, config, name="mine").figures.items()}
    figures = {name: figure.value for name, figure in result.figures.items()}
    assert figures.items() <= there.items() and not result.samples
    assert {"perplexity/own", "efficiency/parameters", "efficiency/weight_bytes", "efficiency/macs"} <= figures.keys()
    assert "no speed" in caplog.text
    with pytest.raises(ConfigurationError, match="Tasks"):
        evaluate(model, checkpoint, EvaluationConfig(tasks=["piqa"]), name="mine", store=store)


def test_commands(checkpoint, tmp_path, capsys):
    (tmp_path / "own.txt").write_text(TEXT.text)
    text = ["--text", str(tmp_path / "own.txt"), "--window", "16", "--json"]
    found = []
    for command in (["perplexity", str(checkpoint), *text], ["evaluate", str(checkpoint), *text, "--no-samples"]):
        for how in ([], ["--stream", "--spill-above", "0"]):
            assert cli.main([*command, *how]) == 0
            found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert "perplexity/own" in json.dumps(found[3])
    assert cli.main(["evaluate", str(checkpoint), "--stream", "--device", "cuda"]) != 0
    assert cli.main(["export", str(checkpoint), "--stream", "--format", "onnx", "--output", str(tmp_path / "o")]) != 0
    assert "--stream is no option of --format onnx" in capsys.readouterr().err
    output = tmp_path / "model.gguf"
    assert cli.main(["export", str(checkpoint), "--stream", "--format", "gguf", "--output", str(output)]) == 0


EXPORTS = {
    "llama": (lambda: make_model("llama", vocab_size=416), "f16"),
    "tied in bf16": (lambda: make_model("qwen2", torch.bfloat16, vocab_size=416, tie_word_embeddings=True), "bf16"),
    "norms of heads": (lambda: make_model("qwen3", vocab_size=416), "q8_0"),
    "padded": (lambda: per_layer("llama", {"mlp": [1], "attention": [0]}, vocab_size=416), "f32"),
    "padded with biases": (lambda: per_layer("llama_bias", {"mlp": [1], "attention": [0]}, vocab_size=416), "f16"),
    "qwen2 padded": (lambda: per_layer("qwen2", {"attention": [0, 2]}, vocab_size=416), "f16"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_gguf_file_is_that_of_memory(tmp_path, name):
    make, quant = EXPORTS[name]
    folder = save(make(), tmp_path)
    byte_level("smollm", 400).save_pretrained(folder)
    whole, streamed = (
        export_gguf(folder, tmp_path / f"{stream}.gguf", quant=quant, stream=stream, trust_remote_code=True)
        for stream in (False, True)
    )
    assert streamed.path.read_bytes() == whole.path.read_bytes()
    assert (streamed.details, streamed.notes) == (whole.details, whole.notes)
    with pytest.raises(ConfigurationError, match="loaded"):
        export_gguf(make(), tmp_path / "no.gguf", stream=True)
