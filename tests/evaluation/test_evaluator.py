"""`evaluate`: what is measured, what an interrupt leaves, what a second call does again."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from few_tasks import few_tasks  # noqa: F401

from hf_structprune.errors import ConfigurationError, StructPruneError, TextError
from hf_structprune.evaluation import evaluator, expand
from hf_structprune.evaluation.evaluator import EvaluationConfig, evaluate
from hf_structprune.evaluation.perplexity import load_text, measure_perplexity
from hf_structprune.evaluation.results import EvaluationResult, Figure, model_fingerprint
from hf_structprune.evaluation.table import ResultTable


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
metadata:
  version: 3.0
"""


@pytest.fixture
def texts(tmp_path):
    """Two text files: `one` and `two`."""
    paths = []
    for name in ("one", "two"):
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_text(f"This is text number {name}. " * 20)
    return [str(path) for path in paths]


@pytest.fixture
def folder(tmp_path):
    """A folder with the tasks `odd` and `even` on six questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [json.dumps({"question": f"Is {n} right?", "answer": n % 2}) for n in range(6)]
    (folder / "questions.jsonl").write_text("\n".join(rows) + "\n")
    for name in ("odd", "even"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name))
    return str(folder)


@pytest.fixture
def ran(monkeypatch):
    """Tasks that only note that they ran; `ran.fails` raises when it is reached."""

    class Ran(list):
        fails = None

    ran = Ran()

    def run_tasks(model, tokenizer, names, **options):
        (name,) = names
        if name == ran.fails:
            raise KeyboardInterrupt
        ran.append(name)
        return [Figure(f"tasks/{name}/acc", len(ran) / 10, stderr=0.1, details=options)]

    monkeypatch.setattr(evaluator, "run_tasks", run_tasks)
    monkeypatch.setattr(evaluator, "check_tasks", lambda names, include_path=None: expand(names))
    return ran


def only(**options):
    return EvaluationConfig(**{"texts": (), "efficiency": False, "samples": False, "window": 64} | options)


def test_everything_at_once(tiny_llama, tiny_tokenizer, texts, folder, tmp_path, monkeypatch):
    quick = partial(evaluator.EfficiencyConfig, length=8, new_tokens=3, warmup=0, repeats=1)
    monkeypatch.setattr(evaluator, "EfficiencyConfig", quick)
    config = EvaluationConfig(
        texts=texts, window=64, max_windows=2, tasks=["odd", "even"], include_path=folder, limit=4, batch_size=2
    )
    output = tmp_path / "made" / "results.json"
    result = evaluate(
        tiny_llama, tiny_tokenizer, config, name="me/tiny", state="pruned", base_model="me/big", output=output
    )
    assert EvaluationResult.load(output) == result
    assert (result.model, result.state, result.base_model) == ("me/tiny", "pruned", "me/big")
    expected = measure_perplexity(tiny_llama, tiny_tokenizer, load_text(texts[1]), window=64, max_windows=2)
    assert result.value("perplexity/two") == pytest.approx(expected.perplexity, rel=1e-6)
    assert result.figures["tasks/odd/acc"].details["samples"] == 4
    assert result.value("efficiency/parameters") == sum(p.numel() for p in tiny_llama.parameters())
    assert all({"prompt", "text"} <= set(sample) for sample in result.samples) and result.samples
    assert result.settings["completed"] == [
        "perplexity/one", "perplexity/two", "tasks/odd", "tasks/even", "efficiency", "samples",
    ]  # fmt: skip
    assert (result.settings["limit"], result.settings["tasks"]) == (4, ["odd", "even"])
    assert result.settings["texts"] == ["one", "two"] and result.settings["include_path"] == Path(folder).name
    assert str(Path(folder).parent) not in json.dumps(result.to_dict())  # results are published
    assert result.environment["versions"]["torch"] == torch.__version__


def test_interrupted_evaluation_goes_on_and_repeats_nothing(
    tiny_llama, tiny_tokenizer, texts, tmp_path, ran, monkeypatch
):
    measured = []

    def counting(model, tokenizer, text, *args, **options):
        measured.append(text.name)
        return measure_perplexity(model, tokenizer, text, *args, **options)

    monkeypatch.setattr(evaluator, "measure_perplexity", counting)
    config, output = only(texts=texts, tasks=["a", "b", "c"]), tmp_path / "results.json"
    ran.fails = "b"
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=output)
    assert (measured, ran) == (["one", "two"], ["a"])
    half = EvaluationResult.load(output)
    assert half.settings["completed"] == ["perplexity/one", "perplexity/two", "tasks/a"]
    assert "tasks/a/acc" in half.figures and "tasks/b/acc" not in half.figures

    ran.fails = None
    whole = evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=output)
    assert (measured, ran) == (["one", "two"], ["a", "b", "c"])
    assert whole.value("tasks/a/acc") == half.value("tasks/a/acc") == 0.1
    assert {name: whole.figures[name] for name in half.figures} == half.figures
    assert EvaluationResult.load(output) == whole

    before = output.read_bytes()
    assert evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=output) == whole
    assert (measured, ran, output.read_bytes()) == (["one", "two"], ["a", "b", "c"], before)


def test_an_evaluation_that_goes_on_gives_what_one_run_gives(tiny_llama, tiny_tokenizer, texts, tmp_path, ran):
    config = only(texts=texts, tasks=["a", "b"])
    ran.fails = "a"
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=tmp_path / "r.json")
    ran.fails = None
    resumed = evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=tmp_path / "r.json")
    ran.clear()
    assert resumed.figures == evaluate(tiny_llama, tiny_tokenizer, config, name="m").figures


def test_models_are_compared_on_the_same_windows(tiny_llama, tiny_tokenizer, texts, tmp_path):
    """And where an older file has no windows, it goes on as before, compared unpaired."""
    config, name = only(texts=texts[:1], window=32), "perplexity/one"
    dense = evaluate(tiny_llama, tiny_tokenizer, config, name="d", output=tmp_path / "d.json")
    content = json.loads((tmp_path / "d.json").read_text())
    for figure in content["figures"]:
        del figure["parts"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = evaluate(tiny_llama, tiny_tokenizer, config, name="d", output=tmp_path / "old.json")
    assert old.value(name) == dense.value(name) and old.figures[name].parts is None
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.down_proj.weight.mul_(3)
    pruned = evaluate(tiny_llama, tiny_tokenizer, config, name="p", state="pruned")
    cells = [
        {row.name: row.cells[1] for row in ResultTable([base, pruned]).rows()}[name]
        for base in (dense, EvaluationResult.load(tmp_path / "d.json"), old)
    ]
    assert [cell.comparison.test for cell in cells] == ["bootstrap", "bootstrap", "unpaired"]
    assert cells[0] == cells[1] and cells[0].comparison.low < cells[0].difference < cells[0].comparison.high


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"window": 32}, "window"),
        ({"max_windows": 1}, "max_windows"),
        ({"limit": 10}, "limit"),
        ({"num_fewshot": 5}, "num_fewshot"),
        ({"tasks": ["a", "b"]}, "tasks"),
        ({"seed": 1}, "seed"),
    ],
)
def test_other_settings_are_refused(tiny_llama, tiny_tokenizer, texts, tmp_path, ran, change, named):
    config, output = only(texts=texts[:1], tasks=["a"]), tmp_path / "results.json"
    evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=output)
    before, other = output.read_bytes(), dataclasses.replace(config, **change)
    with pytest.raises(ConfigurationError, match=rf"results\.json .*\({named}\).*--overwrite"):
        evaluate(tiny_llama, tiny_tokenizer, other, name="m", output=output)
    assert (ran, output.read_bytes()) == (["a"], before)
    evaluate(tiny_llama, tiny_tokenizer, other, name="m", output=output, overwrite=True)
    assert EvaluationResult.load(output).settings[named] == json.loads(json.dumps(other.to_dict()))[named]
    assert ran[:2] == ["a", "a"]


def test_another_model_or_text_is_refused(tiny_llama, tiny_tokenizer, texts, tmp_path):
    config, output = only(texts=texts[:1]), tmp_path / "results.json"
    evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=output)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight.add_(0.01)
    with pytest.raises(ConfigurationError, match="model_fingerprint"):
        evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=output)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight.sub_(0.01)
    Path(texts[0]).write_text("Another text under the same name. " * 20)
    with pytest.raises(ConfigurationError, match="text_fingerprints"):
        evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=output)


def test_only_what_is_left_needs_the_same_machine(tiny_llama, tiny_tokenizer, tmp_path, ran, monkeypatch):
    config, output = only(tasks=["a", "b"]), tmp_path / "results.json"
    ran.fails = "b"
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=output)
    ran.fails, here = None, evaluator.describe_environment

    def elsewhere(device):
        found = here(device)
        return {**found, "hardware": {**found["hardware"], "threads": 64}}

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "describe_environment", elsewhere)
        with pytest.raises(ConfigurationError, match=r"\(hardware\)"):
            evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=output)
    result = evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=output)
    monkeypatch.setattr(evaluator, "describe_environment", elsewhere)
    assert evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=output) == result


@pytest.mark.parametrize("content", ["{}", "not json"])
def test_files_that_are_not_ours_are_not_written_over(tiny_llama, tiny_tokenizer, tmp_path, ran, content):
    output = tmp_path / "thesis.json"
    output.write_text(content)
    with pytest.raises(ConfigurationError):
        evaluate(tiny_llama, tiny_tokenizer, only(tasks=["a"]), name="m", output=output)
    assert (ran, output.read_text()) == ([], content)


def test_mistakes_are_found_before_anything_is_measured(tiny_llama, tiny_tokenizer, texts, tmp_path, ran, monkeypatch):
    monkeypatch.setattr(evaluator, "measure_perplexity", lambda *_, **__: pytest.fail("measured"))
    for config, output, error in (
        (only(texts=[texts[0], str(tmp_path / "none.txt")]), None, TextError),
        (only(texts=texts), tmp_path, ConfigurationError),
        (only(texts=texts), Path(texts[0]) / "r.json", ConfigurationError),
    ):
        with pytest.raises(error):
            evaluate(tiny_llama, tiny_tokenizer, config, name="m", output=output)
    twin = tmp_path / "other" / "one.txt"
    twin.parent.mkdir()
    twin.write_text("A twin. " * 50)
    with pytest.raises(ConfigurationError, match="two are called 'one'"):
        evaluate(tiny_llama, tiny_tokenizer, only(texts=[texts[0], str(twin)]), name="m")
    monkeypatch.undo()
    with pytest.raises(StructPruneError, match="no_such_task"):
        evaluate(tiny_llama, tiny_tokenizer, only(texts=texts, tasks=["no_such_task"]), name="m")


def test_window_is_the_protocols_or_the_models_context(tiny_llama, tiny_tokenizer, texts):
    result = evaluate(tiny_llama, tiny_tokenizer, only(texts=texts[:1], window=None), name="m")
    assert result.figures["perplexity/one"].details["window"] == 256
    short = only(texts=texts[:1], window=None, protocol="llm-pruner")
    assert evaluate(tiny_llama, tiny_tokenizer, short, name="m").figures["perplexity/one"].details["window"] == 128


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"protocol": "mine"}, "'mine'.*paper"),
        ({"window": 1}, "`window` is 1"),
        ({"stride": 4096}, "`stride` is 4096"),
        ({"max_windows": 0}, "`max_windows` is 0"),
        ({"num_fewshot": -1}, "`num_fewshot` is -1"),
        ({"limit": 0}, "`limit` is 0"),
        ({"limit": 2.5}, "`limit` is 2.5"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"texts": (), "efficiency": False, "samples": False}, "nothing to measure"),
    ],
)
def test_bad_values(options, match):
    with pytest.raises(ConfigurationError, match=match):
        EvaluationConfig(**options)


def test_defaults_and_single_values():
    config = EvaluationConfig()
    assert (config.texts, config.tasks) == (("sample",), ())
    config = EvaluationConfig(texts="a.txt", tasks="boolq", limit=200.0)
    assert (config.texts, config.tasks, config.limit) == (("a.txt",), ("boolq",), 200)
    assert isinstance(config.limit, int) and EvaluationConfig(limit=0.5).limit == 0.5


def test_fingerprint(tiny_llama):
    first = model_fingerprint(tiny_llama)
    tiny_llama.config._name_or_path = "elsewhere"
    assert model_fingerprint(tiny_llama) == first
    assert model_fingerprint(tiny_llama.to(torch.bfloat16)) != first
    tiny_llama.float()
    tiny_llama.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert model_fingerprint(tiny_llama) != first


def test_fingerprint_notices_every_tensor(tiny_llama):
    seen = {model_fingerprint(tiny_llama)}
    for parameter in tiny_llama.parameters():
        with torch.no_grad():
            parameter.mul_(1.001)
        seen.add(model_fingerprint(tiny_llama))
    assert len(seen) == 1 + len(list(tiny_llama.parameters()))
