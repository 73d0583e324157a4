import json
import logging
import math
import os
import sys
from pathlib import Path

import datasets
import pytest
import torch
from families import cut, make_model, random_units
from few_tasks import few_tasks  # noqa: F401
from transformers.utils import logging as transformers_logging

from hf_structprune.errors import ConfigurationError, EvaluationError, StructPruneError
from hf_structprune.evaluation import SUITES, check_tasks, expand, run_tasks
from hf_structprune.model.structure import ModelStructure


pytest.importorskip("lm_eval")

DOCS = [
    {"question": "2+2", "choices": ["4", "twenty two", "x"], "answer": 0},
    {"question": "sky", "choices": ["a deep blue", "red", "is"], "answer": 0},
    {"question": "cat says", "choices": ["moo", "meow meow meow", "b"], "answer": 1},
    {"question": "first letter", "choices": ["z", "aa", "not this one, no"], "answer": 1},
    {"question": "last", "choices": ["omega", "o", "alpha and beta"], "answer": 2},
    {"question": "sum", "choices": ["all of it", "s", "none"], "answer": 1},
]
TEXTS = [{"page": "one two three, four."}, {"page": "The quick brown fox\njumps over it"}, {"page": "x y"}]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.5
"""
TEXT = """
task: tiny_text
dataset_path: json
dataset_kwargs:
  data_files: [texts.jsonl]
output_type: loglikelihood_rolling
test_split: train
doc_to_text: ""
doc_to_target: page
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
metadata:
  version: 2
"""
GROUP = """
group: tiny_mean
task: [tiny_a, tiny_b]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files beside, below and without their data; lm-eval indexes the folder once."""
    root = tmp_path_factory.mktemp("tiny")
    tasks = root / "tasks"
    (root / "rows").mkdir()
    tasks.mkdir()
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, str(root / "cache")
    for file, rows in (("rows/a.jsonl", DOCS), ("tasks/b.jsonl", DOCS[:2]), ("tasks/texts.jsonl", TEXTS)):
        (root / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, file in (("tiny_a", "rows/a.jsonl"), ("tiny_b", "tasks/b.jsonl"), ("tiny_lost", "rows/lost.jsonl")):
        (tasks / f"{name}.yaml").write_text(CHOICE.format(name=name, file=file), encoding="utf-8")
    zero = CHOICE.format(name="tiny_zero", file="b.jsonl") + "num_fewshot: 0\n"
    unsafe = CHOICE.format(name="tiny_unsafe", file="b.jsonl") + "unsafe_code: true\n"
    broken = CHOICE.format(name="tiny_broken", file="b.jsonl") + "process_docs: !function no_such_module.f\n"
    pair = GROUP.replace("tiny_mean", "tiny_pair").split("aggregate")[0]
    for name, text in {
        "text": TEXT, "mean": GROUP, "pair": pair, "zero": zero, "unsafe": unsafe, "broken": broken
    }.items():  # fmt: skip
        (tasks / f"{name}.yaml").write_text(text, encoding="utf-8")
    yield tasks
    datasets.config.HF_DATASETS_CACHE = cache


@pytest.fixture
def model():
    """A model with opinions: its logits are far from uniform."""
    model = make_model("llama", vocab_size=128, max_position_embeddings=512)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    return model


@torch.no_grad()
def log_likelihood(model, ids, scored):
    """Sum over the last `scored` tokens."""
    ids = torch.tensor(ids)
    log_probabilities = model(ids[None]).logits[0].double().log_softmax(-1)
    return sum(log_probabilities[i - 1, ids[i]].item() for i in range(len(ids) - scored, len(ids)))


def brute_force(model, tokenizer, docs, context=""):
    hits = {"acc": [], "acc_norm": []}
    for doc in docs:
        prompt = tokenizer(context + f"Q: {doc['question']}\nA:")["input_ids"]
        answers = [tokenizer(" " + choice)["input_ids"] for choice in doc["choices"]]
        sums = [log_likelihood(model, prompt + answer, len(answer)) for answer in answers]
        means = [total / len(choice) for total, choice in zip(sums, doc["choices"], strict=True)]
        for name, scores in (("acc", sums), ("acc_norm", means)):
            hits[name].append(float(scores.index(max(scores)) == doc["answer"]))
    return hits


def by_name(figures):
    assert len({figure.name for figure in figures}) == len(figures)
    return {figure.name: figure for figure in figures}


def check(figure, hits):
    mean = sum(hits) / len(hits)
    variance = sum((hit - mean) ** 2 for hit in hits) / (len(hits) - 1)
    assert figure.value == pytest.approx(mean)
    assert figure.stderr == pytest.approx(math.sqrt(variance / len(hits)))
    assert figure.higher_is_better is True


def test_accuracies_equal_brute_force(model, tiny_tokenizer, folder):
    figures = by_name(run_tasks(model, tiny_tokenizer, "tiny_a", include_path=folder, batch_size=4))
    hits = brute_force(model, tiny_tokenizer, DOCS)
    assert hits["acc"] != hits["acc_norm"] and 0 < sum(hits["acc"]) < len(DOCS)
    assert set(figures) == {"tasks/tiny_a/acc", "tasks/tiny_a/acc_norm"}
    for metric in hits:
        check(figures[f"tasks/tiny_a/{metric}"], hits[metric])
    figure = figures["tasks/tiny_a/acc"]
    assert figure.details == {
        "num_fewshot": 0, "version": 1.5, "samples": 6, "samples_of_task": 6, "filter": "none"
    }  # fmt: skip
    assert figure.parts.sums == tuple(hits["acc"]) and figures["tasks/tiny_a/acc_norm"].parts.pairs_with(figure.parts)
    assert figure.protocol.endswith(", 0-shot, 6 documents") and figure.protocol.startswith("lm-eval ")


def test_layers_of_different_widths(model, tiny_tokenizer, folder):
    kept, counts = random_units(ModelStructure.of(model), ("kv_groups", "query_heads", "mlp_neurons"), uniform=False)
    pruned = cut(model, kept, counts, "per_layer")
    assert len({layer.mlp.down_proj.weight.shape for layer in pruned.model.layers}) > 1
    figures = by_name(run_tasks(pruned, tiny_tokenizer, ["tiny_a"], include_path=folder))
    for metric, hits in brute_force(pruned, tiny_tokenizer, DOCS).items():
        check(figures[f"tasks/tiny_a/{metric}"], hits)


def test_limit_takes_the_leading_documents(model, tiny_tokenizer, folder):
    hits = brute_force(model, tiny_tokenizer, DOCS[:3])["acc_norm"]
    for limit in (3, 0.5):
        figures = by_name(run_tasks(model, tiny_tokenizer, "tiny_a", include_path=folder, limit=limit))
        check(figures["tasks/tiny_a/acc_norm"], hits)
        assert figures["tasks/tiny_a/acc"].protocol.endswith("3 of 6 documents")


def test_few_shot(model, tiny_tokenizer, folder):
    """With one example of two documents, the other one is the example."""
    figures = by_name(run_tasks(model, tiny_tokenizer, ["tiny_b", "tiny_zero"], include_path=folder, num_fewshot=1))
    examples = [f"Q: {d['question']}\nA: {d['choices'][d['answer']]}\n\n" for d in (DOCS[1], DOCS[0])]
    pairs = zip(DOCS[:2], examples, strict=True)
    hits = [brute_force(model, tiny_tokenizer, [doc], example)["acc"][0] for doc, example in pairs]
    check(figures["tasks/tiny_b/acc"], hits)
    assert figures["tasks/tiny_b/acc"].details["num_fewshot"] == 1
    assert figures["tasks/tiny_zero/acc"].details["num_fewshot"] == 0  # the task insists
    check(figures["tasks/tiny_zero/acc"], brute_force(model, tiny_tokenizer, DOCS[:2])["acc"])


def test_perplexity_metrics(model, tiny_tokenizer, folder):
    figures = by_name(run_tasks(model, tiny_tokenizer, "tiny_text", include_path=folder))
    texts = [doc["page"] for doc in TEXTS]
    ids = [tiny_tokenizer(text)["input_ids"] for text in texts]
    nll = -sum(log_likelihood(model, [1, *one], len(one)) for one in ids)
    words, size = sum(len(text.split()) for text in texts), sum(map(len, texts))
    word = figures["tasks/tiny_text/word_perplexity"]
    assert word.value == pytest.approx(math.exp(nll / words), rel=1e-4)
    assert word.higher_is_better is False and word.stderr is None  # lm-eval has none for it
    bits = figures["tasks/tiny_text/bits_per_byte"]
    assert bits.value == pytest.approx(nll / size / math.log(2), rel=1e-5)
    assert word.parts.counts == tuple(len(text.split()) for text in texts)
    assert bits.parts.counts == tuple(map(len, texts)) and bits.parts.sums == word.parts.sums
    assert sum(word.parts.sums) == pytest.approx(nll, rel=1e-4)


def test_other_documents_or_prompts_are_no_pairs(model, tiny_tokenizer, folder):
    def parts(**options):
        return run_tasks(model, tiny_tokenizer, "tiny_b", include_path=folder, **options)[0].parts

    base = parts()
    assert base.pairs_with(parts(batch_size=1))
    assert not base.pairs_with(parts(limit=1)) and not base.pairs_with(parts(num_fewshot=1))


@pytest.mark.parametrize(
    ("metric", "noted", "value", "sums"),
    [
        ("f1", [0.5, 1.0, 0.25], 1.75 / 3, (0.5, 1.0, 0.25)),
        ("perplexity", [-2.0, -3.0, -1.0], math.exp(2), (2.0, 3.0, 1.0)),
        ("mcc", [(0, 1), (1, 1), (1, 0)], 0.3, None),  # of all answers at once
        ("brier", [(0, [0.5, 0.5])] * 3, 0.3, None),
        ("acc", [1, 0, 1], 0.9, None),  # not the mean
        ("acc", [True, False, True], 2 / 3, (1.0, 0.0, 1.0)),
        ("acc", ["a", "b", "c"], 0.3, None),
        ("f1", [0.5, math.nan, 0.5], 0.5, None),
    ],
)
def test_parts_of_every_kind_of_metric(metric, noted, value, sums):
    from hf_structprune.evaluation.tasks import _parts

    samples = [
        {"filter": "none", metric: one, "doc_hash": f"{i}", "prompt_hash": "p", "target_hash": "t"}
        for i, one in enumerate(noted)
    ]
    found = _parts("task", metric, "none", value, {"samples": {"task": samples}})
    assert (found and found.sums) == sums
    assert _parts("task", metric, "strict", value, {"samples": {"task": samples}}) is None


def test_groups_are_averaged_only_by_lm_eval(model, tiny_tokenizer, folder):
    figures = by_name(run_tasks(model, tiny_tokenizer, ["tiny_mean", "tiny_b"], include_path=folder))
    hits = brute_force(model, tiny_tokenizer, DOCS)["acc"]
    mean = figures["tasks/tiny_mean/acc"]
    assert mean.value == pytest.approx((sum(hits) + sum(hits[:2])) / 8)
    assert mean.details["tasks"] == ["tiny_a", "tiny_b"] and mean.details["samples"] == 8
    assert mean.parts.sums == (*hits, *hits[:2])
    assert "tasks/tiny_mean/acc_norm" not in figures and "tasks/tiny_b/acc_norm" in figures
    names = by_name(run_tasks(model, tiny_tokenizer, "tiny_pair", include_path=folder))
    assert {name.split("/")[1] for name in names} == {"tiny_a", "tiny_b"}


def test_what_was_there_stays_as_it_was(model, tiny_tokenizer, folder):
    def state():
        return os.getcwd(), sys.stdout, sys.stderr, logging.getLogger("lm_eval").level

    model.train()
    model.model.layers[1].eval()
    modes, before = [m.training for m in model.modules()], state()
    run_tasks(model, tiny_tokenizer, "tiny_b", include_path=folder)
    with pytest.raises(EvaluationError):
        check_tasks("tiny_lost", folder)
    assert [m.training for m in model.modules()] == modes
    assert tiny_tokenizer.pad_token is None
    assert state() == before
    first, second = (run_tasks(model, tiny_tokenizer, "tiny_b", include_path=folder) for _ in range(2))
    assert first == second


def test_progress_bars_follow_transformers(model, tiny_tokenizer, folder, capfd):
    was_enabled = transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.disable_progress_bar()
        run_tasks(model, tiny_tokenizer, ["tiny_b", "tiny_text"], include_path=folder)
        assert capfd.readouterr() == ("", "")
        transformers_logging.enable_progress_bar()
        run_tasks(model, tiny_tokenizer, "tiny_b", include_path=folder)
        assert "loglikelihood requests" in capfd.readouterr().err
    finally:
        (transformers_logging.enable_progress_bar if was_enabled else transformers_logging.disable_progress_bar)()


def test_data_files_are_found_from_any_working_directory(folder, tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "lost.jsonl").write_text(json.dumps(DOCS[0]) + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="'tiny_lost' cannot be loaded: FileNotFound.*rows/lost.jsonl") as error:
        check_tasks("tiny_lost", folder)
    assert f"looked for from {folder}, {folder.parent}, {Path.cwd()}" in str(error.value)
    monkeypatch.chdir(tmp_path)
    assert check_tasks(["tiny_lost", "tiny_a"], folder) == ["tiny_lost", "tiny_a"]  # as lm-eval itself finds it


def test_names(folder):
    assert check_tasks(["tiny_[ab]", "tiny_b", "tiny_text"], str(folder)) == ["tiny_a", "tiny_b", "tiny_text"]
    assert expand(["study-a", "arc_easy", "boolq"]) == [*SUITES["study-a"], "arc_easy"]
    assert expand("leaderboard") == ["arc_challenge", "truthfulqa_mc2", "winogrande", "hellaswag"]


def test_suites_are_known_to_lm_eval(folder):
    from hf_structprune.evaluation.tasks import find_names, task_manager

    for tasks in SUITES.values():
        assert find_names(tasks, task_manager(folder)) == list(tasks)


def test_a_data_set_of_the_hub_that_cannot_be_reached(folder):
    with pytest.raises(EvaluationError, match="Task 'hellaswag' cannot be loaded: .*'Rowan/hellaswag'") as error:
        check_tasks(["tiny_a", "hellaswag"], folder)
    assert "--include-path" in str(error.value)
    with pytest.raises(EvaluationError, match="Task 'openbookqa' cannot be loaded: .*'allenai/openbookqa'"):
        check_tasks("study-a", folder)


@pytest.mark.parametrize(
    ("tasks", "match"),
    [
        ("tiny_aa", "no task 'tiny_aa'. Nearest names: tiny_a.*Tasks in .*: tiny_a, tiny_b"),
        ("zz_nothing_*", "no task 'zz_nothing_\\*'. No name is like it"),
        ([], "No task is named; suites are llm-pruner"),
        ("tiny_unsafe", "'tiny_unsafe' runs code that the model has written"),
    ],
)
def test_wrong_names(folder, tasks, match):
    with pytest.raises(ConfigurationError, match=match):
        check_tasks(tasks, folder)


def test_a_task_whose_code_does_not_import(folder):
    with pytest.raises(EvaluationError, match="'tiny_broken' cannot be loaded: ImportError: .*no_such_module"):
        check_tasks("tiny_broken", folder)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_fewshot": -1}, "`num_fewshot` is -1"),
        ({"limit": 0}, "`limit` is 0"),
        ({"limit": 2.5}, "`limit` is 2.5"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"include_path": "nowhere"}, "'nowhere', which is no folder"),
    ],
)
def test_wrong_options(tiny_llama, tiny_tokenizer, folder, options, match):
    with pytest.raises(ConfigurationError, match=match):
        run_tasks(tiny_llama, tiny_tokenizer, "tiny_a", **{"include_path": folder} | options)


def test_without_lm_eval(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(StructPruneError, match=r'pip install "hf-structprune\[eval\]"'):
        check_tasks("boolq", folder)
