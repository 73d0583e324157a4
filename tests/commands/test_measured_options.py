"""`evaluate`, `compare` and `benchmark` on a tiny model and its pruned checkpoint."""

import csv
import io
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from few_tasks import few_tasks  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.commands import cli, measure
from hf_structprune.evaluation.results import EvaluationResult, Figure


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with a tiny Llama, `dense`, and what is left of it, `pruned`."""
    from tiny_tokenizers import build_tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    build_tokenizer().save_pretrained(folder / "dense")
    settings = PruningConfig(mlp_ratio=0.5, criterion="l2", compensation=False, round_to=1)
    pruner = StructuredPruner.from_pretrained(folder / "dense", settings)
    pruner.prune()
    pruner.save_pretrained(folder / "pruned")
    return folder


@pytest.fixture
def dense(checkpoints):
    return str(checkpoints / "dense")


@pytest.fixture
def pruned(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "pruned", tmp_path / "pruned")
    return str(tmp_path / "pruned")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "words.txt").write_text("Words to measure on, one after the other. " * 20)
    return str(tmp_path / "words.txt")


@pytest.fixture
def quick(text):
    return ["--text", text, "--window", "64", "--max-windows", "2", "--no-samples", "--no-efficiency"]


def run(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main([*argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def fail(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main([*argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def test_evaluate_writes_beside_a_checkpoint_of_ours(dense, pruned, text, capsys):
    argv = ["evaluate", pruned, "--baseline", dense, "--text", text, "--window", "64", "--no-samples", "--pictures"]
    content = json.loads(run(capsys, *argv, "--json"))
    assert content["output"] == str(Path(pruned) / "evaluation_results.json")
    mine = EvaluationResult.load(pruned)
    base = EvaluationResult.load(Path(pruned) / "evaluation_results_dense.json")
    assert (mine.state, mine.base_model, mine.model) == ("pruned", "dense", Path(pruned).name)  # no paths
    assert (base.state, base.base_model, base.model) == ("dense", None, Path(dense).name)
    assert mine.value("efficiency/parameters") == base.value("efficiency/parameters") - 2 * 3 * 32 * 32
    assert set(mine.figures) == set(base.figures) and "perplexity/words" in mine.figures
    rows = {row["figure"]: row["cells"] for row in content["rows"]}
    assert rows["efficiency/parameters"]["pruned"]["difference"] == -2 * 3 * 32 * 32
    assert rows["perplexity/words"]["dense"]["value"] == base.value("perplexity/words")
    pictures = Path(pruned) / "pictures"
    assert sorted(path.name for path in pictures.iterdir()) == ["quality.png", "speed.png", "widths.png"]
    before = (Path(pruned) / "evaluation_results.json").read_bytes()
    table = run(capsys, *argv)  # all done: nothing is measured again
    assert (Path(pruned) / "evaluation_results.json").read_bytes() == before
    assert "pruned vs dense" in table and "perplexity, words ↓" in table and "Saved to" in table


def test_evaluate_a_model_that_is_not_ours(dense, quick, tmp_path, capsys):
    files = sorted(Path(dense).iterdir())
    assert "Not saved" in run(capsys, "evaluate", dense, *quick)
    assert sorted(Path(dense).iterdir()) == files
    output = tmp_path / "results.json"
    assert str(output) in run(capsys, "evaluate", dense, *quick, "--output", str(output), "--state", "recovered")
    assert EvaluationResult.load(output).state == "recovered"


def test_interrupt_and_go_on(dense, pruned, quick, capsys, monkeypatch):
    argv, original = ["evaluate", pruned, "--baseline", dense, *quick], measure.evaluate
    measured = []

    def interrupted(model, *args, **options):
        if options["state"] == "pruned" and not measured:
            measured.append("interrupt")
            raise KeyboardInterrupt
        return original(model, *args, **options)

    monkeypatch.setattr(measure, "evaluate", interrupted)
    assert cli.main(argv) == 130
    base = Path(pruned) / "evaluation_results_dense.json"
    before = base.read_bytes()
    assert not (Path(pruned) / "evaluation_results.json").exists()
    run(capsys, *argv)
    assert base.read_bytes() == before and EvaluationResult.load(pruned).state == "pruned"


def test_other_settings_need_overwrite(pruned, quick, capsys):
    run(capsys, "evaluate", pruned, *quick)
    assert "--overwrite" in fail(capsys, "evaluate", pruned, *quick, "--seed", "7")
    run(capsys, "evaluate", pruned, *quick, "--seed", "7", "--overwrite")
    assert EvaluationResult.load(pruned).settings["seed"] == 7


def test_baseline_from_a_file(dense, pruned, quick, tmp_path, capsys):
    file = str(tmp_path / "before.json")
    run(capsys, "evaluate", dense, *quick, "--output", file)
    assert "pruned vs dense" in run(capsys, "evaluate", pruned, "--baseline", file, *quick)
    copied = Path(pruned) / "evaluation_results_dense.json"
    assert EvaluationResult.load(copied) == EvaluationResult.load(file)
    run(capsys, "evaluate", pruned, "--baseline", str(copied), *quick)
    other = EvaluationResult.load(file)
    other.add(Figure("perplexity/words", 1.0))
    other.save(file)
    assert "other results than the baseline" in fail(capsys, "evaluate", pruned, "--baseline", file, *quick)


def test_no_texts(pruned, capsys):
    content = json.loads(run(capsys, "evaluate", pruned, "--texts", "none", "--no-samples", "--json"))
    assert all(row["figure"].startswith("efficiency/") for row in content["rows"])
    assert "nothing to measure" in fail(
        capsys, "evaluate", pruned, "--texts", "none", "--no-samples", "--no-efficiency"
    )


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--text", "no-such.txt"], "no-such.txt"),
        (["--tasks", "no_such_task", "--texts", "none"], "no_such_task"),
        (["--baseline", "/no/such/model"], "/no/such/model"),
        (["--baseline", "no-such.json"], "no-such.json"),
        (["--state", "squeezed"], "`state` is 'squeezed'"),
    ],
)
def test_mistakes_show_before_a_model_is_loaded(pruned, argv, part, capsys, monkeypatch):
    monkeypatch.setattr(measure, "load_for_measuring", lambda *_: pytest.fail("loaded"))
    assert part in fail(capsys, "evaluate", pruned, *argv)


@pytest.fixture
def files(tmp_path):
    """Results of a dense and of a pruned model, in one folder, and of a third."""
    folder = tmp_path / "checkpoint"
    for name, state, value in (("_dense", "dense", 18.0), ("", "pruned", 20.0)):
        result = EvaluationResult(f"me/{state}", state)
        result.add(Figure("perplexity/sample", value, "", 0.5, False), Figure("efficiency/parameters", 5 * value))
        result.save(folder / f"evaluation_results{name}.json")
    result.save(tmp_path / "third.json")
    return folder


def test_compare_prints_every_format(files, capsys):
    names = [str(files / "evaluation_results_dense.json"), str(files)]
    assert "+2.00 (1.11x) *" in run(capsys, "compare", *names)
    markdown = run(capsys, "compare", *names, "--format", "md")
    assert markdown.splitlines()[2] == "| perplexity, sample ↓ | 18.00 ± 0.50 | 20.00 ± 0.50 | +2.00 (1.11x) \\* ‡ |"
    rows = list(csv.DictReader(io.StringIO(run(capsys, "compare", *names, "--format", "csv"))))
    assert float(rows[0]["pruned ratio"]) == 20 / 18
    assert json.loads(run(capsys, "compare", *names, "--format", "json"))["baseline"] == "dense"


def test_compare_a_folder_is_dense_and_pruned(files, tmp_path, capsys):
    assert json.loads(run(capsys, "compare", str(files), "--format", "json"))["baseline"] == "dense"
    several = json.loads(run(capsys, "compare", str(files), str(tmp_path / "third.json"), "--format", "json"))
    assert [result["state"] for result in several["results"]] == ["pruned", "pruned"]


def test_compare_writes_files(files, tmp_path, capsys):
    for name, start in (("a.md", "|  | dense"), ("a.csv", "figure,unit,dense"), ("a.json", "{"), ("a.txt", "")):
        assert run(capsys, "compare", str(files), "--output", str(tmp_path / name)) == ""
        assert (tmp_path / name).read_text().startswith(start)
    assert "pruned vs dense" in (tmp_path / "a.txt").read_text()
    run(capsys, "compare", str(files), "--pictures", str(tmp_path / "pictures"))
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["quality.png"]


BENCHMARK = ["--repeats", "2", "--warmup", "0", "--new-tokens", "4", "--length", "16"]


def test_benchmark_takes_turns(dense, pruned, tmp_path, capsys, monkeypatch):
    turns, load = [], measure.load_for_measuring

    def noting(arguments):
        turns.append(Path(arguments.model).name)
        return load(arguments)

    monkeypatch.setattr(measure, "load_for_measuring", noting)
    monkeypatch.setattr(measure, "time_loading", lambda *_, **__: Figure("efficiency/load_time", 1.0, "s"))
    output = tmp_path / "speed.json"
    argv = ["benchmark", pruned, "--baseline", dense, *BENCHMARK, "--rounds", "2", "--output", str(output)]
    content = json.loads(run(capsys, *argv, "--json"))
    assert turns == ["dense", "pruned"] * 2
    mine, base = EvaluationResult.load(output), EvaluationResult.load(tmp_path / "speed_dense.json")
    assert (mine.state, base.state) == ("pruned", "dense")
    decode = mine.figures["efficiency/decode_throughput"]
    assert len(decode.details["values"]) == 2 * 2 and "2 such rounds" in decode.protocol
    assert mine.value("efficiency/load_time") > 0 and mine.value("efficiency/peak_memory") > 0
    rows = {row["figure"]: row["cells"]["pruned"] for row in content["rows"]}
    assert all(cell["comparable"] for cell in rows.values())
    assert rows["efficiency/weight_bytes"]["difference"] == -4 * 2 * 3 * 32 * 32
    assert "speed.json exists" in fail(capsys, *argv)
    assert turns == ["dense", "pruned"] * 2


def test_benchmark_of_sizes_only(pruned, capsys):
    content = json.loads(run(capsys, "benchmark", pruned, "--no-speed", "--json"))
    names = {row["figure"] for row in content["rows"]}
    assert "efficiency/macs" in names and not {n for n in names if "time" in n or "throughput" in n}
    assert not (Path(pruned) / "evaluation_results.json").exists()
    assert "MACs ↓" in run(capsys, "benchmark", pruned, "--no-speed")


def test_benchmark_asks_questions_of_both(dense, pruned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "question_protocol", partial(measure.question_protocol, max_length=90))
    folder, output = tmp_path / "made" / "questions", tmp_path / "benchmark.json"
    argv = ["--no-speed", "--questions", str(folder), "--output", str(output)]
    run(capsys, "benchmark", pruned, "--baseline", dense, *argv)
    for name in ("questions.csv", "questions_baseline.csv"):
        rows = list(csv.DictReader((folder / name).open()))
        assert len(rows) == 6 and rows[-1]["question"] == "mean"
    measured = EvaluationResult.load(output).figures["efficiency/question_throughput"]
    last = list(csv.DictReader((folder / "questions.csv").open()))[-1]
    assert float(last["tokens_per_second"]) == round(measured.value, 2)


def test_turns_in_a_process_of_their_own_give_the_same_sizes(dense, pruned):
    from hf_structprune.commands.measure import take_turns, take_turns_apart
    from hf_structprune.commands.models import find_subject
    from hf_structprune.commands.options import ModelArguments
    from hf_structprune.evaluation import EfficiencyConfig

    subjects = [find_subject(ModelArguments(name)) for name in (dense, pruned)]
    here, apart = (turns(subjects, EfficiencyConfig(speed=False), 1) for turns in (take_turns, take_turns_apart))
    assert [result.figures for result in here] == [result.figures for result in apart]
