"""`hf-structprune shrink`: one line prunes, distils on the model's own text, measures and writes the card."""

import json
import time
from types import SimpleNamespace

import pytest
import yaml


pytest.importorskip("trl")
pytest.importorskip("peft")

from transformers import AutoModelForCausalLM  # noqa: E402

from hf_structprune import PruningPlan  # noqa: E402
from hf_structprune.commands import cli, run, shrink, time_budget  # noqa: E402
from hf_structprune.evaluation import EvaluationResult  # noqa: E402
from hf_structprune.recovery import RecoveryConfig, kept_batches, save  # noqa: E402


SMALL = {
    "max_length": 64, "batch_size": 2, "micro_batch_size": 2, "evaluations": 2, "max_windows": 2, "window": 32,
    "precision": "fp32", "max_samples": 8, "max_steps": 3, "distillation": {"generated_tokens": 100},
}  # fmt: skip


made = shrink.recipe_of


@pytest.fixture
def place(tiny_llama, make_tokenizer, tmp_path, monkeypatch):
    """A dense checkpoint, and recipes that are done in a moment."""
    tiny_llama.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "own.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)

    def quick(*given):
        content = made(*given)
        content["prune"] |= {"units": ["mlp_neurons"], "calibration": {"num_samples": 4, "length": 16}}
        content["recover"] |= {**SMALL, "text": str(tmp_path / "own.txt")}
        content["evaluate"] |= {"texts": [str(tmp_path / "own.txt")], "window": 32, "max_windows": 2, "samples": False}
        return content

    monkeypatch.setattr(shrink, "recipe_of", quick)
    monkeypatch.setattr(kept_batches, "cached_assets_path", lambda *_, **__: tmp_path / "cache")
    monkeypatch.setattr(save, "draw_curve", lambda curve, path, best_step=None: path.write_bytes(b"a curve"))
    return tmp_path


def test_one_line_and_what_is_done_is_not_done_again(place, capsys, monkeypatch):
    out, line = place / "out", ["shrink", str(place / "dense"), "--ratio", "0.2", "--minutes", "3", "--output-dir"]
    assert cli.main([*line, str(out)]) == 0
    shown = capsys.readouterr().out
    plan = PruningPlan.load(out)
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == plan.parameters_after
    assert plan.parameters_after < plan.parameters_before
    report = json.loads((out / "recovery.json").read_text())
    assert report["configuration"]["method"] == "distill" and report["dataset"] == [] and report["teacher"] == "dense"
    assert 0 < report["configuration"]["minutes"] < 3 and report["training"]["steps"] == 3
    states = ("evaluation_results_dense", "evaluation_results_pruned", "evaluation_results")
    assert [EvaluationResult.load(out / f"{name}.json").state for name in states] == ["dense", "pruned", "recovered"]
    assert "## Recovery" in (out / "README.md").read_text() and "of 3 minutes are for the training" in shown
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["minutes"] == 3 and recipe["output_dir"] == f"{out}-pruned"
    again = []
    monkeypatch.setattr(run, "recover", lambda *args, **kwargs: again.append(args))
    assert cli.main(["run", str(out / "recipe.yaml")]) == 0 and again == []  # the same as a recipe, and done
    assert cli.main([*line, str(out)]) == 0 and again == []
    assert cli.main([*line[:-1], "--output-dir", str(place / "dense")]) == 2  # which holds something else
    assert "is not empty" in capsys.readouterr().err


def test_without_time_nothing_is_trained_and_more_time_goes_on_from_there(place, capsys, monkeypatch):
    late, prune = [0.0], run.StructuredPruner.prune
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0])
    monkeypatch.setattr(run, "time", clock)
    monkeypatch.setattr(time_budget, "time", clock)

    def slowly(*given, **more):
        late[0] = 170.0
        return prune(*given, **more)

    monkeypatch.setattr(run.StructuredPruner, "prune", slowly)
    monkeypatch.setattr(run, "window_seconds", lambda model, window: (8.0, 0.001))  # too slow to measure two
    line = ["shrink", str(place / "dense"), "--ratio", "0.2", "--output-dir", str(place / "out"), "--minutes"]
    assert cli.main([*line, "3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "more than foretold" in shown and "Not trained: of 3 minutes" in shown and "Asked for 3 minutes" in shown
    assert "One window of each text instead of 2" in shown
    assert EvaluationResult.load(place / "out-pruned" / "evaluation_results.json").settings["max_windows"] == 1
    assert not (place / "out").exists() and (place / "out-pruned" / "README.md").is_file()
    trained = []
    monkeypatch.setattr(run, "recover", lambda *given, **more: trained.append((given, more)))
    late[0] = 0.0
    assert cli.main([*line, "4"]) != 0  # nothing was recovered, which is then measured
    ((pruned, *_, config), more), *_ = trained
    assert pruned == place / "out-pruned" and 3 < config.minutes < 4
    assert more["until"] - clock.monotonic() <= 60 * config.minutes + 1


def test_too_few_minutes_are_refused_before_any_work(place, capsys, monkeypatch):
    monkeypatch.setattr(run, "window_seconds", lambda model, window: (100.0, 100.0))
    line = ["shrink", str(place / "dense"), "--ratio", "0.2", "--minutes", "3", "--output-dir", str(place / "out")]
    assert cli.main(line) == 2
    assert "Give at least" in " ".join(capsys.readouterr().err.split())
    assert not list(place.glob("out*"))


def test_all_weights_are_trained_where_there_is_room(place, monkeypatch):
    parameters = AutoModelForCausalLM.from_pretrained(place / "dense").num_parameters()
    for memory, room in ((36 * parameters + 40, True), (36 * parameters - 40, False)):
        monkeypatch.setattr(shrink, "memory_in_all", lambda memory=memory: memory)
        assert shrink.has_room(str(place / "dense")) == room
    options = shrink.ShrinkArguments("m", 0.2, 60.0, "o", dataset=["d.jsonl"])
    recover = made(options, None, True)["recover"]
    assert recover["weights"] == "full" and recover["distillation"] == {"label_weight": shrink.LABEL_WEIGHT}
    assert "weights" not in made(options)["recover"]


def test_half_of_the_calibration_is_of_the_data(place):
    options = shrink.ShrinkArguments("m", 0.2, 60.0, "o")
    assert made(options)["prune"]["calibration"] == shrink.CALIBRATION
    options.dataset = ["d.jsonl@0.7", "org/data@0.3"]
    asked = {**shrink.CALIBRATION, "dataset": ["d.jsonl", "org/data", "packaged"]}
    assert made(options)["prune"]["calibration"] == asked and made(options)["recover"]["dataset"] == options.dataset


def test_widths_may_differ_between_layers(place):
    options = shrink.ShrinkArguments("m", 0.2, 60.0, "o")
    assert made(options)["prune"] == {
        "ratio": 0.2, "reconstruct": False, "calibration": shrink.CALIBRATION,
    }  # fmt: skip
    options.layout = "per_layer"
    assert made(options)["prune"].items() >= {"layout": "per_layer", "allocation": "global", "ratio": 0.2}.items()
    line = ["shrink", str(place / "dense"), "--ratio", "0.2", "--minutes", "3", "--output-dir", str(place / "out")]
    assert cli.main([*line, "--layout", "mixed"]) == 2
    assert not (place / "out").exists()


def test_tokens_may_go_beside_the_other_units(place, capsys):
    (place / "text.txt").write_text("The cat sat on the mat. " * 400)
    line = ["shrink", str(place / "dense"), "--ratio", "0.2", "--minutes", "3", "--output-dir", str(place / "out")]
    for half in (["--vocabulary-size", "64"], ["--vocabulary-text", str(place / "text.txt")]):
        assert cli.main([*line, *half]) == 2 and "give both" in " ".join(capsys.readouterr().err.split())
    options = shrink.ShrinkArguments("m", 0.2, 60.0, "o", vocabulary_size=64, vocabulary_text=["t.txt"])
    asked = {"units": "auto", "keep": {"vocabulary": 64}, "vocabulary_text": ["t.txt"]}
    assert made(options)["prune"].items() >= asked.items()


def test_questions_of_the_dense_model_go_with_data_and_without():
    options = shrink.ShrinkArguments("m", 0.2, 60.0, "o", dense_questions=300)
    assert made(options)["recover"]["distillation"] == {"dense_questions": 300}
    options.dataset = ["d.jsonl"]
    both = {"dense_questions": 300, "label_weight": shrink.LABEL_WEIGHT}
    assert made(options)["recover"]["distillation"] == both
    about = {**shrink.CALIBRATION, "dense_questions": shrink.QUESTIONS, "seed": RecoveryConfig().seed}  # less than 300
    assert made(options)["prune"]["calibration"] == {**about, "dataset": ["d.jsonl", "packaged"]}
    options.dense_questions = shrink.QUESTIONS - 1
    assert made(options)["prune"]["calibration"]["dense_questions"] == shrink.QUESTIONS - 1
    options.dense_questions = 0
    assert made(options)["recover"]["distillation"] == {"label_weight": shrink.LABEL_WEIGHT}
    assert not {"dense_questions", "seed"} & made(options)["prune"]["calibration"].keys()


def test_a_model_that_chats_asks_itself_where_there_is_no_data(place, make_tokenizer, capsys, monkeypatch):
    options = shrink.ShrinkArguments("m", 0.2, 6.0, "o")
    chats, base = made(options, chats=True), made(options)
    assert chats["recover"]["distillation"] == {"dense_questions": 6 * shrink.A_MINUTE}
    assert chats["prune"]["calibration"]["dense_questions"] == 6 * shrink.A_MINUTE < shrink.QUESTIONS
    assert "distillation" not in base["recover"] and base["prune"]["calibration"] == shrink.CALIBRATION
    options.dataset = ["d.jsonl"]
    assert made(options, chats=True)["recover"]["distillation"] == {"label_weight": shrink.LABEL_WEIGHT}
    options.dataset, options.dense_questions = None, 0
    assert made(options, chats=True) == base
    monkeypatch.setattr(shrink, "recipe_of", made)  # as it is
    line = ["shrink", str(place / "dense"), "--ratio", "0.2", "--minutes", "2", "--output-dir", str(place / "out")]
    assert cli.main([*line, "--dry-run"]) == 0 and "dense_questions" not in capsys.readouterr().out
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    make_tokenizer(chat_template=template).save_pretrained(place / "dense")
    assert cli.main([*line, "--dry-run"]) == 0 and "dense_questions: 50" in capsys.readouterr().out


def test_sequences_are_no_longer_than_the_model_takes():
    lengths = [shrink.recipe_of(shrink.ShrinkArguments("m", 0.2, 1.0, "o"), n)["recover"] for n in (128, 2048, None)]
    assert [recover.get("max_length") for recover in lengths] == [128, None, None]


def test_a_dry_run_prints_recipe_and_plan(place, capsys):
    line = ["shrink", str(place / "dense"), "--ratio", "0.2", "--minutes", "3", "--output-dir", str(place / "out")]
    assert cli.main([*line, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "minutes: 3" in shown and "Pruning plan" in shown and "what the dense model writes" in shown
    assert not (place / "out").exists()
