"""`hf-structprune run` with a section `quantize`: prune, recover, quantise, measure all four states, cards."""

import json
import re
import shlex

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_structprune import PruningPlan
from hf_structprune.commands import cli, measure, run
from hf_structprune.evaluation import EfficiencyConfig
from hf_structprune.evaluation.results import EvaluationResult, Figure
from hf_structprune.quantization.quantizing import Gptq


pytest.importorskip("bitsandbytes")
pytest.importorskip("trl")

RECIPE = """
model: {folder}/dense
output_dir: {folder}/pruned
prune:
  ratio: 0.1
  calibration: {{num_samples: 4, length: 16}}
recover:
  dataset: {folder}/rows.jsonl
  output_dir: {folder}/recovered
  max_steps: 1
  evaluations: 1
  max_length: 256
  precision: fp32
  text: {folder}/some.txt
  max_windows: 1
quantize:
  bits: 4
  output_dir: {folder}/quantised
evaluate:
  texts: ["{folder}/some.txt"]
  window: 32
  max_windows: 2
  efficiency: true
  samples: false
push:
  repo_id: me/smaller
"""
STATES = ("dense", "pruned", "recovered", "quantised")


@pytest.fixture
def recipe(tiny_llama, make_tokenizer, tmp_path):
    """A recipe for all four states of a tiny checkpoint."""
    tiny_llama.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    rows = [{"instruction": f"Say {n}.", "input": "", "output": "All right, here it is."} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "some.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


@pytest.fixture
def done(monkeypatch):
    """The long steps that were run; speed is measured for a moment only."""
    steps = []

    def note(module, name, word, change=lambda *args: args):
        original = getattr(module, name)

        def step(*args, **kwargs):
            steps.append(word(*args))
            return original(*change(*args), **kwargs)

        monkeypatch.setattr(module, name, step)

    def briefly(subjects, config, rounds):
        return subjects, EfficiencyConfig(new_tokens=2, warmup=0, repeats=1), 1

    loading = Figure("efficiency/load_time", 1.0, "s")  # which would be measured in a process for each state
    monkeypatch.setattr(measure, "time_loading", lambda *_, **__: loading)
    monkeypatch.setattr(run, "take_turns_apart", measure.take_turns)
    note(run, "take_turns_apart", lambda subjects, *rest: [subject.state for subject in subjects], briefly)
    note(run, "recover", lambda *args: "recover")
    note(run, "quantize", lambda *args: "quantise")
    return steps


def weights(folder):
    """The bytes of every tensor by name."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).view(torch.uint8).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def results(folder):
    """What lies in a folder, by state."""
    return {r.state: r for r in map(EvaluationResult.load, folder.glob("evaluation_results*.json"))}


def test_all_four_states_are_made_measured_and_told_of(recipe, done, capsys, monkeypatch):
    assert cli.main(["run", str(recipe)]) == 0
    assert done == ["recover", "quantise", list(STATES)]
    folder = recipe.parent
    found = results(folder / "quantised")
    assert set(found) == set(STATES)
    plan = PruningPlan.load(folder / "quantised")
    counts = [found[state].value("efficiency/parameters") for state in STATES]
    assert counts == [plan.parameters_before, *[plan.parameters_after] * 3]
    sizes = [found[state].value("efficiency/weight_bytes") for state in STATES]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3]
    values = [found[state].value("perplexity/some") for state in STATES]
    assert values[0] != values[1] and values[2] != values[3]
    assert all("efficiency/decode_throughput" in found[state].figures for state in STATES)
    # Each state's own folder says the same, and knows those before it.
    for number, name in enumerate(STATES[1:], 2):
        assert results(folder / name) == {state: found[state] for state in STATES[:number]}
    assert "efficiency/parameters" not in EvaluationResult.load(folder / "pruned-dense.json").figures
    card = (folder / "quantised" / "README.md").read_text()
    head = "|  | dense | pruned | pruned vs dense | recovered | recovered vs dense | quantised | quantised vs dense |"
    assert head in card and "## Quantised" in card and "## Recovery" in card
    assert f"{found['quantised'].value('perplexity/some'):,.2f}" in card
    assert (folder / "quantised" / "recipe.yaml").read_text() == recipe.read_text()
    assert AutoModelForCausalLM.from_pretrained(folder / "quantised").config.quantization_config.load_in_4bit
    shown = capsys.readouterr().out
    assert "quantised" in shown and str(folder / "quantised") in shown

    # The picture comes first; the commands of the card, copied, make the same weights again.
    assert card.index("](quality.png)") < card.index("## Before and after") < card.index("](pruned_widths.png)")
    assert (folder / "quantised" / "quality.png").read_bytes().startswith(b"\x89PNG")
    commands = re.findall(
        r"(?m)^hf-structprune (?:prune|recover|quantize) .*", card[card.index("## How it was made") :]
    )
    assert [command.split()[1] for command in commands] == ["prune", "recover", "quantize"]
    again = folder / "again"
    again.mkdir()
    for name in ("dense", "rows.jsonl", "some.txt"):
        (again / name).symlink_to(folder / name)
    monkeypatch.chdir(again)
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, command
    for name in STATES[1:]:
        assert weights(again / name) == weights(folder / name), name

    # A second run does nothing again; one with other settings refuses; the section comes last and goes alone.
    done.clear()
    before = (folder / "quantised" / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["run", str(recipe)]) == 0
    assert done == [] and (folder / "quantised" / "model.safetensors").stat().st_mtime_ns == before
    text = recipe.read_text()
    recipe.write_text(text.replace("  bits: 4", "  bits: 8"))
    assert cli.main(["run", str(recipe)]) == 2
    assert "was quantised with other settings" in capsys.readouterr().err and done == []
    recipe.write_text(text.replace("  bits: 4", "  bits: 8").replace("/quantised", "/other"))
    assert cli.main(["run", str(recipe)]) == 0
    assert done == ["quantise", list(STATES)]  # speeds are only compared where they were measured together
    assert results(folder / "other")["recovered"].value("perplexity/some") == found["recovered"].value(
        "perplexity/some"
    )


def test_without_recovery_there_are_three(recipe, done, monkeypatch):
    text = recipe.read_text()
    text = text[: text.index("recover:")] + text[text.index("quantize:") :]
    recipe.write_text(text.replace("efficiency: true", "efficiency: false").replace("/quantised", "/q8"))
    pushed = []

    def push(folder, **options):
        pushed.append((folder, options))
        return type("Commit", (), {"commit_url": "https://hub/commit/1"})

    monkeypatch.setattr(run, "push_folder", push)
    assert cli.main(["run", str(recipe), "--push"]) == 0
    assert done == ["quantise"]
    assert set(results(recipe.parent / "q8")) == {"dense", "pruned", "quantised"}
    assert pushed == [(recipe.parent / "q8", {"repo_id": "me/smaller"})]  # what came out last


def test_dry_run_tells_of_it(recipe, done, capsys):
    assert cli.main(["run", str(recipe), "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "recovered by lora on" in shown and "quantised to 4 bits by bitsandbytes" in shown
    assert done == [] and not (recipe.parent / "pruned").exists()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("  bits: 4", "  bits: 5", "`bits` is 5"),
        ("  bits: 4", "  bit: 4", "`bit` is not an option of `quantize`"),
        ("/quantised", "/recovered", "`output_dir` recovered"),
        ("  bits: 4", "  bits: 4\n  device: nowhere", "nowhere"),
    ],
)
def test_mistakes_show_before_any_work(recipe, done, capsys, old, new, message):
    recipe.write_text(recipe.read_text().replace(old, new))
    assert cli.main(["run", str(recipe)]) == 2
    assert message in capsys.readouterr().err
    assert done == [] and not (recipe.parent / "pruned").exists()


def test_a_missing_library_shows_before_any_work(recipe, done, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert cli.main(["run", str(recipe)]) != 0
    assert "bitsandbytes" in capsys.readouterr().err
    assert done == [] and not (recipe.parent / "pruned").exists()


def test_a_group_size_that_does_not_divide_what_the_plan_leaves(recipe, done, capsys, monkeypatch):
    """The dense widths are multiples of 16; those of the plan are not."""
    monkeypatch.setattr(Gptq, "packages", ())  # nothing is run
    text = recipe.read_text().replace("  bits: 4", "  bits: 4\n  method: gptq\n  group_size: 16")
    recipe.write_text(text.replace("ratio: 0.1", "ratio: 0.1\n  round_to: 1"))
    assert cli.main(["run", str(recipe)]) == 2
    assert "`group_size` is 16, which does not divide" in capsys.readouterr().err
    assert done == [] and not (recipe.parent / "pruned").exists()
    # Layers that go change no width, so that the dense ones tell; the plan itself is made on weights.
    recipe.write_text(
        text.replace("ratio: 0.1", "ratio: 0.3\n  units: layers").replace("group_size: 16", "group_size: 32")
    )
    assert cli.main(["run", str(recipe)]) == 2
    assert "does not divide the 48 inputs of model.layers.0.mlp.down_proj" in capsys.readouterr().err and done == []
