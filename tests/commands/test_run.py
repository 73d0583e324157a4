"""`hf-structprune run`: the steps, what is not done again, mistakes before any work, and the push."""

import json

import pytest
import torch
from few_tasks import few_tasks  # noqa: F401
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, PruningPlan
from hf_structprune.commands import cli, measure, run
from hf_structprune.evaluation import EfficiencyConfig
from hf_structprune.evaluation.results import EvaluationResult, Figure


RECIPE = """
model: {model}
output_dir: {out}
prune:
  ratio: 0.1
  calibration: {{num_samples: 4, length: 16}}
evaluate:
  texts: ["{text}"]
  window: 32
  max_windows: 2
  efficiency: false
  samples: false
push:
  repo_id: me/smaller
  private: true
"""


@pytest.fixture
def recipe(tiny_llama, tiny_tokenizer, tmp_path):
    """A recipe on a tiny checkpoint; `out` is where the result goes."""
    tiny_llama.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "some.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tmp_path / "dense", out=tmp_path / "out", text=tmp_path / "some.txt"))
    return path


def noting(steps, step, original):
    def run_step(*args, **kwargs):
        steps.append(step if step != "evaluate" else kwargs["state"])
        return original(*args, **kwargs)

    return run_step


@pytest.fixture
def done(monkeypatch):
    """Names of the long steps that were run."""
    steps = []
    for name in ("load_pruner", "load_for_measuring", "evaluate", "push_folder"):
        original = getattr(run, name)

        monkeypatch.setattr(run, name, noting(steps, name, original))
    return steps


def test_everything_is_in_the_folder(recipe, capsys):
    assert cli.main(["run", str(recipe)]) == 0
    out = recipe.parent / "out"
    dense, pruned = (EvaluationResult.load(out / f"evaluation_results{end}.json") for end in ("_dense", ""))
    assert (dense.state, pruned.state, pruned.model) == ("dense", "pruned", "out")
    assert dense.value("perplexity/some") != pruned.value("perplexity/some")
    assert (out / "recipe.yaml").read_text() == recipe.read_text()
    assert (out / "pruned_widths.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert f"{pruned.value('perplexity/some'):,.2f}" in card and "pruned_widths.png" in card
    plan = PruningPlan.load(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.num_parameters() == plan.parameters_after < plan.parameters_before
    shown = capsys.readouterr().out
    assert "perplexity" in shown and str(out) in shown


@pytest.mark.parametrize("units", ["mlp_neurons", "auto"])
def test_a_second_run_does_nothing_again(recipe, done, units):
    recipe.write_text(recipe.read_text().replace("prune:\n", f"prune:\n  units: {units}\n"))
    assert cli.main(["run", str(recipe)]) == 0
    assert done == ["load_pruner", "dense", "load_for_measuring", "pruned"]
    out = recipe.parent / "out"
    before = {name: (out / name).stat().st_mtime_ns for name in ("model.safetensors", "evaluation_results_dense.json")}
    results = (out / "evaluation_results.json").read_text()
    done.clear()
    assert cli.main(["run", str(recipe)]) == 0
    assert done == ["load_for_measuring", "pruned"]  # which finds that all is measured
    assert before == {name: (out / name).stat().st_mtime_ns for name in before}
    assert (out / "evaluation_results.json").read_text() == results


def test_an_interrupt_after_the_dense_model_is_resumed(recipe, done, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_structprune.pruner.StructuredPruner.prune", interrupted)
        assert cli.main(["run", str(recipe)]) == 130
    out = recipe.parent / "out"
    assert not out.exists() and (recipe.parent / "out-dense.json").exists()
    measured = (recipe.parent / "out-dense.json").read_text()
    assert cli.main(["run", str(recipe)]) == 0
    assert (out / "evaluation_results_dense.json").read_text() == measured


def test_overwrite_prunes_and_measures_anew(recipe, done):
    assert cli.main(["run", str(recipe)]) == 0
    recipe.write_text(recipe.read_text().replace("ratio: 0.1", "ratio: 0.2"))
    assert cli.main(["run", str(recipe)]) == 2
    done.clear()
    assert cli.main(["run", str(recipe), "--overwrite"]) == 0
    assert done == ["load_pruner", "dense", "load_for_measuring", "pruned"]
    assert PruningPlan.load(recipe.parent / "out").ratio_requested == 0.2


def test_other_settings_in_the_folder_are_an_error(recipe, capsys):
    assert cli.main(["run", str(recipe)]) == 0
    recipe.write_text(recipe.read_text().replace("prune:\n", "prune:\n  criterion: l2\n"))
    assert cli.main(["run", str(recipe)]) == 2
    assert "pruned with other settings" in capsys.readouterr().err
    assert PruningConfig.load(recipe.parent / "out").criterion == "kfac"


def test_dry_run_prints_the_plan_and_writes_nothing(recipe, done, capsys):
    assert cli.main(["run", str(recipe), "--dry-run"]) == 0
    assert "Pruning plan: asked 10.00%" in capsys.readouterr().out
    assert done == [] and not (recipe.parent / "out").exists()


def test_without_evaluation_nothing_is_measured(recipe, done):
    head, _, tail = recipe.read_text().partition("evaluate:")
    recipe.write_text(head + tail[tail.index("push:") :])
    assert cli.main(["run", str(recipe)]) == 0
    assert done == ["load_pruner"]
    assert (recipe.parent / "out" / "README.md").exists()
    assert not (recipe.parent / "out" / "evaluation_results.json").exists()


def test_push_hands_the_section_on(recipe, monkeypatch, capsys):
    pushed = []

    def push(folder, **options):
        pushed.append((folder, options))
        return type("Commit", (), {"commit_url": "https://hub/commit/1"})

    monkeypatch.setattr(run, "push_folder", push)
    assert cli.main(["run", str(recipe)]) == 0
    assert pushed == []
    assert cli.main(["run", str(recipe), "--push"]) == 0
    assert pushed == [(recipe.parent / "out", {"repo_id": "me/smaller", "private": True})]
    assert "https://hub/commit/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("ratio: 0.1", "ratio: 1.5", "`ratio` is 1.5"),
        ("some.txt", "none.txt", "none.txt"),
        ("  window: 32", "  tasks: [no_such_task]", "no_such_task"),
        ("repo_id: me/smaller", "repo: me/smaller", "`repo` is not an option of `push`"),
        ("  private: true", "  tokens: abc", "`tokens` is not an option of `push`"),
    ],
)
def test_mistakes_show_before_any_work(recipe, done, capsys, old, new, message):
    recipe.write_text(recipe.read_text().replace(old, new))
    assert cli.main(["run", str(recipe)]) == 2
    assert message in capsys.readouterr().err
    assert done == [] and not (recipe.parent / "out").exists()


def test_push_needs_a_repository(recipe, capsys, done):
    recipe.write_text(recipe.read_text().partition("push:")[0])
    assert cli.main(["run", str(recipe), "--push"]) == 2
    assert "names no `repo_id`" in capsys.readouterr().err and done == []


def test_two_runs_give_the_same_weights(recipe):
    assert cli.main(["run", str(recipe)]) == 0
    first = AutoModelForCausalLM.from_pretrained(recipe.parent / "out").state_dict()
    assert cli.main(["run", str(recipe), "--overwrite"]) == 0
    second = AutoModelForCausalLM.from_pretrained(recipe.parent / "out").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((recipe.parent / "out" / "config.json").read_text())["model_type"] == "llama"


def test_speed_is_measured_in_turns_and_once(recipe, monkeypatch):
    recipe.write_text(recipe.read_text().replace("efficiency: false", "efficiency: true"))
    turns = []

    def take_turns(subjects, config, rounds, loading):
        turns.append([subject.state for subject in subjects])
        return measure.take_turns(subjects, EfficiencyConfig(new_tokens=2, warmup=0, repeats=1), 1)

    monkeypatch.setattr(run, "take_turns_apart", take_turns)
    monkeypatch.setattr(measure, "time_loading", lambda *_, **__: Figure("efficiency/load_time", 1.0, "s"))
    assert cli.main(["run", str(recipe)]) == 0
    out = recipe.parent / "out"
    dense, pruned = (EvaluationResult.load(out / f"evaluation_results{end}.json") for end in ("_dense", ""))
    plan = PruningPlan.load(out)
    sizes = (plan.parameters_before, plan.parameters_after)
    assert (dense.value("efficiency/parameters"), pruned.value("efficiency/parameters")) == sizes
    assert "efficiency/decode_throughput" in pruned.figures and "perplexity/some" in pruned.figures
    assert "efficiency/parameters" not in EvaluationResult.load(recipe.parent / "out-dense.json").figures
    assert cli.main(["run", str(recipe)]) == 0
    assert turns == [["dense", "pruned"]]
