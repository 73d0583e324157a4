"""The model card, parsed back: every number comes from a file beside it, and nothing else is claimed."""

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_structprune import CalibrationConfig, PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.commands import cli
from hf_structprune.errors import ConfigurationError, HubError
from hf_structprune.evaluation.results import EvaluationResult, Figure
from hf_structprune.hub import make_card, origin, validate_card, write_card
from hf_structprune.hub.card import model_index
from hf_structprune.hub.words import calibration_datasets, calibration_in_words, config_expression, method_of
from hf_structprune.units import KINDS


DETAILS = {"num_fewshot": 0, "samples": 200, "samples_of_task": 10042}
ENVIRONMENT = {
    "date": "2026-01-31T12:00:00+00:00", "versions": {"torch": "2.13.0"}, "hardware": {"device": "Chip", "threads": 2},
}  # fmt: skip


def results(folder, plan, **more):
    """What was measured on both sides, saved beside the weights: results by file name."""
    sides = {}
    for name, state, factor in (("_dense", "dense", 1.0), ("", "pruned", 1.5)):
        result = EvaluationResult("a-model", state, environment=ENVIRONMENT, **more)
        result.add(
            Figure(
                "perplexity/wikitext2",
                20.4321 * factor,
                higher_is_better=False,
                protocol="windows of 2048 tokens",
                details={"source": "Salesforce/wikitext, wikitext-2-raw-v1, test split"},
            ),
            Figure("tasks/hellaswag/acc_norm", 0.6125 / factor, stderr=0.0345, higher_is_better=True, details=DETAILS),
            Figure("efficiency/decode_throughput", 12.25 * factor, "tokens/s", higher_is_better=True),
        )
        result.save(folder / f"evaluation_results{name}.json")
        sides[name] = result
    return sides


def table(card):
    """The table of a card: cells by the row's name without arrow."""
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].rstrip(" ↑↓"): row[1:] for row in rows if not set(row[0]) <= set("- ")}


def python_blocks(card):
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def test_card_of_a_fresh_checkpoint(folder, pruner):
    card, plan = ModelCard.load(folder / "README.md"), pruner.last_plan
    data = card.data.to_dict()
    assert {"structured-pruning", "pruned", "hf_structprune"} <= set(data["tags"])
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["datasets"] == ["Salesforce/wikitext", "allenai/c4"]
    assert not {"license", "base_model", "model-index"} & set(data)
    assert set(table(card)) == {"parameters", "weights", "MACs", "KV cache per token"}
    assert table(card)["parameters"][:2] == [f"{plan.parameters_before:,}", f"{plan.parameters_after:,}"]
    assert f"asked 20.00%, got {plan.ratio:.2%}" in card.text
    assert "nothing has been measured" in card.text and "none is set here" in card.text
    assert validate_card(folder / "README.md") is False


def test_every_number_of_the_table_is_one_of_the_files(folder):
    plan = PruningPlan.load(folder)
    sides = results(folder, plan)
    write_card(folder)
    card = ModelCard.load(folder / "README.md")
    known = {
        "parameters": (plan.parameters_before, plan.parameters_after),
        "weights": (plan.bytes_before, plan.bytes_after),
        "MACs": (plan.macs_before, plan.macs_after),
        "KV cache per token": (plan.kv_bytes_before, plan.kv_bytes_after),
    }
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "M": 1e6, "%": 0.01}
    names = {"perplexity, wikitext2": "perplexity/wikitext2", "hellaswag, acc_norm": "tasks/hellaswag/acc_norm"}
    names["decode throughput"] = "efficiency/decode_throughput"
    known |= {label: tuple(sides[side].value(name) for side in ("_dense", "")) for label, name in names.items()}
    found = table(card)
    assert set(found) == set(known)
    for label, cells in found.items():
        for cell, value in zip(cells, known[label], strict=False):
            number, unit = re.match(r"([\d,.]+) ?(\S*)", cell).groups()
            scale, decimals = units.get(unit, 1), len(number.partition(".")[2])
            assert number == f"{value / scale:,.{decimals}f}", (label, cell)
    assert "± 3.45" in found["hellaswag, acc_norm"][0]
    assert "windows of 2048" in card.text and "Chip, 2 threads, torch 2.13.0, 2026-01-31" in card.text


def test_model_index_has_the_unrounded_numbers_and_names_the_limit(folder):
    sides = results(folder, PruningPlan.load(folder))
    card = make_card(folder)
    entries = {entry.metric_type: entry for entry in card.data.eval_results}
    assert set(entries) == {"perplexity", "acc_norm"}
    assert entries["perplexity"].metric_value == sides[""].value("perplexity/wikitext2")
    assert entries["perplexity"].dataset_type == "Salesforce/wikitext"
    assert entries["perplexity"].metric_name == "perplexity, windows of 2048 tokens"
    task = entries["acc_norm"]
    assert (task.dataset_type, task.metric_value) == ("Rowan/hellaswag", sides[""].value("tasks/hellaswag/acc_norm"))
    assert task.metric_name == "acc_norm, 0-shot, limit 200" and task.dataset_args["limit"] == 200


def test_limited_runs_infinite_values_and_own_tasks_are_not_for_leaderboards(folder):
    plan = PruningPlan.load(folder)
    results(folder, plan)
    write_card(folder)
    assert not (folder / ".eval_results").exists()
    whole = Figure("tasks/boolq/acc", 0.625, details={"samples": 3270, "samples_of_task": 3270})
    result = EvaluationResult("a-model", "pruned")
    result.add(whole, Figure("perplexity/c4", float("inf")), Figure("tasks/mine/acc", 0.5))
    result.save(folder / "evaluation_results.json")
    write_card(folder)
    assert [path.name for path in (folder / ".eval_results").iterdir()] == ["boolq.yaml"]
    (entry,) = yaml.safe_load((folder / ".eval_results" / "boolq.yaml").read_text())
    assert (entry["dataset"]["id"], entry["value"]) == ("google/boolq", 0.625)
    assert {e.metric_value for e in make_card(folder).data.eval_results} == {0.625, 0.5}
    (folder / ".eval_results" / "by-hand.yaml").write_text("[]\n")
    dataclasses.replace(result, settings={"include_path": "tasks"}).save(folder / "evaluation_results.json")
    write_card(folder)
    assert [path.name for path in (folder / ".eval_results").iterdir()] == ["by-hand.yaml"]


def test_what_is_no_longer_measured_disappears(folder):
    results(folder, PruningPlan.load(folder))
    write_card(folder)
    assert "hellaswag" in (folder / "README.md").read_text()
    for name in ("evaluation_results.json", "evaluation_results_dense.json"):
        (folder / name).unlink()
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert not any(word in text for word in ("hellaswag", "HellaSwag", "model-index", "perplexity,", "Chip"))


def test_results_of_another_model_are_refused(folder):
    for name, state in (("evaluation_results.json", "pruned"), ("evaluation_results_dense.json", "dense")):
        result = EvaluationResult("another", state)
        result.add(Figure("efficiency/parameters", 12345))
        result.save(folder / name)
        with pytest.raises(ConfigurationError, match=f"{name} was measured on another model: another has 12,345"):
            make_card(folder)
        (folder / name).unlink()
    EvaluationResult("dense", "dense").save(folder / "evaluation_results.json")
    with pytest.raises(ConfigurationError, match="evaluation_results.json is of a dense model"):
        make_card(folder)


def test_hand_text_and_metadata_survive(folder):
    readme = folder / "README.md"
    mark, mine = "<!-- your text: introduction -->\n", "Mine: {{ x }} $ \\1\n\ntwo"
    text = readme.read_text().replace(mark, f"{mark}{mine}\n").replace("- pruned\n", "- pruned\n- mine\n")
    text = text.replace("---\n", "---\nlicense: mit\nwidget:\n- text: Hello\nlanguage: fr\n", 1)
    readme.write_text(text + "\n<!-- your text: more -->\nAlso mine.\n<!-- end of your text: more -->\n\nUnmarked.\n")
    results(folder, PruningPlan.load(folder))
    write_card(folder, name="me/small")
    once = readme.read_text()
    for kept in (mine, "Also mine.", "license: mit", "language: fr", "- mine\n", "- text: Hello"):
        assert once.count(kept) == 1, kept
    assert "Unmarked." not in once and "`mit`, the licence of" in once
    write_card(folder)
    assert readme.read_text() == once  # the Hub id too


def test_a_card_of_other_origin_is_left_alone(folder, pruner, caplog):
    readme = folder / "README.md"
    readme.write_text("# All mine\n")
    assert write_card(folder) is None
    pruner.save_pretrained(folder)
    assert readme.read_text() == "# All mine\n"
    assert cli.main(["card", str(folder)]) == 2
    assert readme.read_text() == "# All mine\n"
    assert cli.main(["card", str(folder), "--overwrite", "--name", "me/small"]) == 0
    assert 'from_pretrained("me/small")' in readme.read_text()


def test_saving_again_keeps_the_text_and_drops_the_results(folder, pruner):
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("<!-- your text: notes -->\n", "<!-- your text: notes -->\nMine.\n"))
    results(folder, PruningPlan.load(folder))
    (folder / "notes.txt").write_text("mine")
    pruner.save_pretrained(folder)
    assert "\nMine.\n" in readme.read_text() and "1.5" not in readme.read_text()
    names = {path.name for path in folder.iterdir()}
    assert {"notes.txt", "evaluation_results_dense.json"} <= names and "evaluation_results.json" not in names


def test_base_model_its_licence_and_language(tiny_llama, tiny_tokenizer, tmp_path):
    base = tmp_path / "base-model"
    tiny_llama.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: llama3.2\nlanguage:\n- en\n- de\ntags: [theirs]\n---\n# Base\n")
    pruner = StructuredPruner.from_pretrained(base, PruningConfig(criterion="l2", compensation=False, round_to=1))
    pruner.prune(0.2)
    pruner.save_pretrained(tmp_path / "small")
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert (card.data.license, card.data.language, card.data.base_model) == ("llama3.2", ["en", "de"], None)
    assert "**Built with Llama**" in card.text and "rename this one" in card.text
    assert card.data.datasets is None and "Calibration: none" in card.text
    everything = "".join(path.read_text() for path in (tmp_path / "small").glob("*") if path.suffix != ".safetensors")
    assert str(tmp_path) not in everything and "base-model" in card.text
    write_card(tmp_path / "small", name="me/Llama-small", base_model="meta-llama/Llama-3.2-1B")
    card = ModelCard.load(tmp_path / "small" / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("meta-llama/Llama-3.2-1B", "finetune")
    assert "rename" not in card.text and "](https://huggingface.co/meta-llama/Llama-3.2-1B)" in card.text
    assert 'StructuredPruner.from_pretrained("meta-llama/Llama-3.2-1B"' in card.text
    write_card(tmp_path / "small")
    assert ModelCard.load(tmp_path / "small" / "README.md").data.base_model == "meta-llama/Llama-3.2-1B"


def test_base_model_on_the_hub(online, tiny_llama, tmp_path):
    from .server import Commit, Repo

    tiny_llama.save_pretrained(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    files["README.md"] = b"---\nlicense: gemma\nlanguage: en\n---\n"
    commit = Commit("model", files)
    online.repos["other/gemma"] = Repo(branches={"main": [commit]})
    pruner = StructuredPruner.from_pretrained("other/gemma", PruningConfig(criterion="l2", compensation=False))
    pruner.prune(0.2)
    pruner.save_pretrained(tmp_path / "small")
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert (card.data.base_model, card.data.license, card.data.language) == ("other/gemma", "gemma", "en")
    assert "Gemma Terms of Use" in card.text and f"revision `{commit.oid}`" in card.text
    assert f'from_pretrained("other/gemma", config=config, revision="{commit.oid}")' in card.text
    assert validate_card(tmp_path / "small" / "README.md") is True


@pytest.mark.parametrize("which", ["pruner", "per_layer_pruner"])
def test_the_lines_that_load_it_run(which, request, tmp_path, monkeypatch, logits):
    pruner = request.getfixturevalue(which)
    monkeypatch.chdir(tmp_path)
    pruner.save_pretrained("small")
    card = ModelCard.load("small/README.md")
    per_layer = which == "per_layer_pruner"
    blocks = python_blocks(card)[: 2 if per_layer else 1]
    assert ["import hf_structprune" in b for b in blocks] == ([True, False] if per_layer else [False])
    assert ["trust_remote_code" in b for b in blocks] == ([False, True] if per_layer else [False])
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for block in blocks:
        names = {}
        exec(block, names)
        assert torch.equal(logits(names["model"]), logits(pruner.model))
        assert names["tokenizer"]("a").input_ids
    assert ("vllm serve small" in card.text) != per_layer == ("--format deci" in card.text)
    assert ("--trust_remote_code" in card.text) == per_layer


def test_the_lines_that_make_it_again_run(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained("base")
    tiny_tokenizer.save_pretrained("base")
    config = PruningConfig(
        units="mlp_neurons",
        criterion="taylor", taylor="second", layout="per_layer", layer_range=(0, 2), round_to=1, token_weighting=False,
        calibration=CalibrationConfig(num_samples=4, length=32, seed=3),
    )  # fmt: skip
    pruner = StructuredPruner.from_pretrained("base", config)
    pruner.prune(0.1)
    pruner.save_pretrained("small")
    card = ModelCard.load("small/README.md")
    exec(next(block for block in python_blocks(card) if "pruner.prune" in block), {})
    assert PruningPlan.load("pruned").to_dict() == pruner.last_plan.to_dict()
    assert PruningConfig.load("pruned") == config
    weights = Path("small/model.safetensors").read_bytes()
    assert Path("pruned/model.safetensors").read_bytes() == weights
    command = next(line for line in card.text.splitlines() if line.startswith("hf-structprune prune "))
    assert cli.main([*shlex.split(command)[1:], "--overwrite"]) == 0
    assert PruningPlan.load("pruned").to_dict() == pruner.last_plan.to_dict()
    assert PruningConfig.load("pruned") == config and Path("pruned/model.safetensors").read_bytes() == weights


DECISIONS = [
    (dict(num_layers=1, criterion="angular"), None, ["Decoder layers gone, counted from 0: {} (criterion `angular`)"]),
    (dict(keep_first=2), None, ["Decoder layers gone, counted from 0: 2 (named in the configuration)"]),
    (dict(units="layers", layers=[2, 0]), None, ["Decoder layers gone, counted from 0: 0, 2 (named in the conf"]),
    (dict(units="layers", criterion="block_influence", protect_last=1), 0.25, ["criterion `block_influence`)"]),
    (
        dict(units=("attention",), layers=[1], layout="per_layer"), None,
        ["Attention of layers gone, counted from 0: 1 (named in the configuration)"],
    ),
    (
        dict(units=("attention", "mlp"), layout="per_layer", criterion="taylor"), 0.2,
        ["gone, counted from 0: ", "(criterion `taylor`)"],
    ),
    (
        dict(split={"layers": 0.6, "mlp_neurons": 0.4}, round_to=1), 0.4,
        ["Criterion: `obs`, allocation: `uniform`", "gone, counted from 0: {} (criterion `exchange`)",
         "Of all parameters: "],
    ),
    (dict(hidden_size=24, criterion="magnitude"), None, ["Hidden size: 24 instead of 32 (criterion `magnitude`)"]),
    (
        dict(hidden_size=26, num_layers=1, depth_criterion="perplexity", hidden_criterion="taylor"), None,
        ["Hidden size: 26 instead of 32 (criterion `taylor`)", "counted from 0: {} (criterion `perplexity`)"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "ratio", "said"), DECISIONS, ids=lambda value: str(value)[:60])
def test_what_went_is_named_and_can_be_made_again(
    options, ratio, said, tiny_llama, tiny_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained("base")
    tiny_tokenizer.save_pretrained("base")
    config = PruningConfig(**options, calibration=CalibrationConfig(num_samples=4, length=32))
    assert (
        eval(config_expression(config), {"PruningConfig": PruningConfig, "CalibrationConfig": CalibrationConfig})
        == config
    )
    pruner = StructuredPruner.from_pretrained("base", config)
    pruner.prune(ratio)
    pruner.save_pretrained("small")
    card, plan = ModelCard.load("small/README.md"), pruner.last_plan
    layers = ", ".join(map(str, plan.dropped.get("layers", ())))
    for words in said:
        assert words.format(layers) in card.text
    assert ("Criterion: `obs`" in card.text) == ("mlp_neurons" in config.units)
    exec(next(block for block in python_blocks(card) if "pruner.prune" in block), {})
    assert PruningPlan.load("pruned").to_dict() == plan.to_dict() and PruningConfig.load("pruned") == config
    if "split" in options or "hidden_criterion" in options:  # what is written in other ways on the command line
        command = next(line for line in card.text.splitlines() if line.startswith("hf-structprune prune "))
        assert cli.main([*shlex.split(command)[1:], "--overwrite"]) == 0
        assert PruningPlan.load("pruned").to_dict() == plan.to_dict() and PruningConfig.load("pruned") == config


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig(),
        PruningConfig(num_layers=4, protect_first=4, protect_last=2, criterion="perplexity"),
        PruningConfig(units=("layers", "attention"), layers=[3, 5], layout="per_layer"),
        PruningConfig(split=["hidden=0.25", "layers=0.5", "mlp_neurons=0.25"], hidden_criterion="pca"),
        PruningConfig.llm_pruner(0.3, layer_range=(1, 3)),
        PruningConfig(
            criterion="wanda", damping=0.1, calibration=CalibrationConfig(dataset=["a/b", "c"], chat_template=True)
        ),
    ],
)
def test_configuration_as_an_expression(config):
    names = {"PruningConfig": PruningConfig, "CalibrationConfig": CalibrationConfig}
    assert eval(config_expression(config), names) == config


def test_own_calibration_files_are_named_without_their_paths(tiny_llama, tiny_tokenizer, tmp_path):
    text = tmp_path / "secret-folder" / "my.txt"
    text.parent.mkdir()
    text.write_text("Some text to calibrate on. " * 200)
    calibration = CalibrationConfig(dataset=[str(text), str(text)], num_samples=4, length=32)
    pruner = StructuredPruner(tiny_llama, PruningConfig(round_to=1, calibration=calibration), tiny_tokenizer)
    pruner.prune(0.2)
    pruner.save_pretrained(tmp_path / "small")
    for name in ("README.md", "config.json"):
        content = (tmp_path / "small" / name).read_text()
        assert "my.txt" in content and "secret-folder" not in content
    assert ModelCard.load(tmp_path / "small" / "README.md").data.datasets is None
    beside = CalibrationConfig(dataset=[str(text), "packaged"])
    said = calibration_in_words(beside)
    assert "`my.txt`, in turns with the sample of hf_structprune" in said
    assert "secret" not in said and "split" not in said
    assert calibration_datasets(beside) == calibration_datasets(CalibrationConfig())
    for known in ({}, {"dataset": str(text)}, {"texts": ["text"]}):
        asked = calibration_in_words(CalibrationConfig(dense_questions=200, **known))
        assert asked == (
            calibration_in_words(CalibrationConfig(**known))
            + "; every fourth one is of 200 questions at most that the dense model asked itself"
        )
    assert calibration_datasets(CalibrationConfig(dataset=["org/data", "packaged"]))[0] == "org/data"


def test_options_of_loading_are_in_the_lines_that_make_it_again(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    config = PruningConfig(criterion="l2", compensation=False)
    pruner = StructuredPruner.from_pretrained(tmp_path / "base", config, dtype=torch.bfloat16, token="hf_secret")
    pruner.prune(0.2)
    pruner.save_pretrained(tmp_path / "small")
    text = (tmp_path / "small" / "README.md").read_text()
    assert 'from_pretrained("base", config=config, dtype="bfloat16")' in text
    assert "hf-structprune prune base --output-dir pruned --dtype bfloat16 --ratio 0.2" in text
    assert not any(b"hf_secret" in path.read_bytes() for path in (tmp_path / "small").iterdir())


def test_samples_side_by_side(folder):
    for name, state, text in (("_dense", "dense", "Paris."), ("", "pruned", "Rome ```")):
        samples = [{"prompt": "Capital?", "text": text}, {"prompt": f"Only {state}", "text": "x"}]
        EvaluationResult("m", state, samples=samples).save(folder / f"evaluation_results{name}.json")
    text = make_card(folder).text
    assert "prompt: Capital?\n\ndense:     Paris.\n\npruned:    Rome ```\n" in text and "Only dense" not in text


def test_pictures(folder):
    (folder / "pictures").mkdir()
    for name in ("pruned_widths.png", "pictures/quality.png", "pictures/widths.png"):
        (folder / name).write_bytes(b"\x89PNG")
    text = str(make_card(folder))
    found = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert found == ["pruned_widths.png", "pictures/widths.png", "pictures/quality.png"]


@pytest.mark.parametrize("units, criterion, told", [
    (("mlp_neurons",), "obs", False), (("mlp_neurons",), "wanda", True), (("auto",), "obs", True),
])  # fmt: skip
def test_the_criterion_is_told_where_it_is_not_what_comes_by_default(units, criterion, told):
    config = PruningConfig(units=units, criterion=criterion)
    assert ("criterion" in config_expression(config)) == told


def test_citations(folder):
    config = PruningConfig.load(folder)
    dataclasses.replace(config, criterion="wanda", allocation="global", layout="per_layer").save(
        folder / "pruning_config.json"
    )
    plan = PruningPlan.load(folder)
    softened = {"factor": 0.9, "before": 0.2, "after": 0.1}
    for found_of_norm, cited in ((None, []), (softened | {"factor": 1.0}, []), (softened, ["guo2017calibration"])):
        dataclasses.replace(plan, softened=found_of_norm).save(folder / "pruning_plan.json")
        found = re.findall(r"@\w+{(\S+),", make_card(folder).text)
        assert found == ["sun2024wanda", "an2024flap", "hassibi1992second", *cited]  # of allocation and re-fit, too
    dataclasses.replace(plan, calibrated=False).save(folder / "pruning_plan.json")  # nothing was re-fitted
    assert "hassibi1992second" not in make_card(folder).text


@pytest.mark.parametrize("kind", KINDS)
def test_every_criterion_can_be_told(kind):
    for name in KINDS[kind].criteria:
        method = method_of(kind, name)
        assert bool(method.papers) == (
            name not in ("random", "frequency", "router", "embedding_norm", *(["l2"] * (kind == "experts")))
        )
        assert method.needs_text == (name not in ("random", "l1", "l2", "magnitude", "embedding_norm"))
        assert all(re.match(r"@(inproceedings|article){\w+,\n  title = {", paper.bibtex) for paper in method.papers)


def test_what_is_no_checkpoint_of_ours(tiny_llama, tmp_path, capsys):
    tiny_llama.save_pretrained(tmp_path)
    with pytest.raises(HubError, match="no pruning_config.json.*no checkpoint that hf_structprune has pruned"):
        write_card(tmp_path)
    with pytest.raises(ConfigurationError, match="neither a folder nor a Hub id"):
        make_card_of_base(tmp_path, "no/such/thing")


def make_card_of_base(folder, base):
    PruningConfig().save(folder / "pruning_config.json")
    plan = PruningPlan(0.2, "llama", "uniform", [], 10, 8, 10, 8, 4, 3, 4.0)
    plan.save(folder / "pruning_plan.json")
    return make_card(folder, base_model=base)


def test_the_record_survives_training_and_pruning_again(pruner, tmp_path):
    pruner.save_pretrained(tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    model.save_pretrained(tmp_path / "again")  # as a trainer does
    record = json.loads((tmp_path / "again" / "config.json").read_text())["hf_structprune"]
    assert record["ratio"] == pruner.last_plan.ratio
    second = StructuredPruner.from_pretrained(tmp_path / "small", PruningConfig(criterion="l1", compensation=False))
    second.prune(0.1)
    record = second.model.config.hf_structprune
    assert (record["base_model"], record["pruning_config"]["criterion"]) == ("small", "l1")
    assert os.sep not in record["base_model"]


def test_a_local_file_is_not_called_the_data_set_of_its_name():
    for source, dataset in (
        ("wikitext2.txt", "wikitext2"),
        ("Salesforce/wikitext, test split", "Salesforce/wikitext"),
    ):
        result = EvaluationResult("m")
        result.add(Figure("perplexity/wikitext2", 20.0, details={"source": source}))
        assert model_index(result)[0].dataset_type == dataset


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    asked = []

    def model_info(self, name, timeout):
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr(origin.HfApi, "model_info", model_info)
    monkeypatch.setattr(origin.ModelCard, "load", lambda *args, **kwargs: pytest.fail("this would try for long"))
    assert origin.base_metadata(origin.Origin("some/never-cached", True)) == {}
    assert asked == ["some/never-cached"]


@pytest.mark.parametrize(
    ("options", "ratio", "cited", "text"),
    [
        (dict(keep_first=2, compensation=False), None, None, False),
        (dict(units="layers", layers=[1], compensation=False), None, None, False),
        (dict(units="layers", layers=[0, 1], compensation=False), 0.2, "song2024sleb", True),
        (dict(num_layers=1, criterion="magnitude", compensation=False), None, "kim2024shortened", False),
        (dict(hidden_size=24, criterion="magnitude", compensation=False), None, "ma2023llmpruner", False),
    ],
)
def test_only_what_was_used_is_cited_and_named(options, ratio, cited, text, tiny_llama, tiny_tokenizer, tmp_path):
    config = PruningConfig(**options, calibration=CalibrationConfig(num_samples=4, length=32))
    pruner = StructuredPruner(tiny_llama, config, tiny_tokenizer)
    pruner.prune(ratio)
    pruner.save_pretrained(tmp_path / "small")
    card = ModelCard.load(tmp_path / "small" / "README.md")
    papers = ("song2024sleb", "kim2024shortened", "ma2023llmpruner", "minitron")
    assert [paper for paper in papers if paper in card.text.lower()] == ([cited] if cited else [])
    assert ("Calibration: none" not in card.text) == text == (card.data.datasets is not None)
