"""The card of a recovered model: three columns, the section "Recovery", and no good news where there is none."""

import json
import re
import shlex

import pytest
from huggingface_hub import ModelCard

from hf_structprune import PruningPlan
from hf_structprune.commands import cli
from hf_structprune.commands.arguments import parse
from hf_structprune.commands.models import find_subject
from hf_structprune.commands.options import ModelArguments, RecoverArguments
from hf_structprune.errors import CheckpointError, ConfigurationError
from hf_structprune.evaluation.results import EvaluationResult, Figure
from hf_structprune.hub import make_card, push_folder, validate_card, write_card
from hf_structprune.hub.words import recover_command
from hf_structprune.hub.words import recovery_section as section_of
from hf_structprune.recovery.configuration import DistillationConfig, RecoveryConfig

from .reports import make_report


BEGIN, END = "<!-- recovery, by hf_structprune -->", "<!-- end of recovery -->"


def put(folder, report, picture=True):
    (folder / "recovery.json").write_text(json.dumps(report))
    if picture:
        (folder / "recovery.png").write_bytes(b"\x89PNG")


def measure(folder, states, **samples):
    """Results of each state beside the weights: 20 times 1, 1.5 and 1.2 as perplexity."""
    names = {"dense": "_dense", "pruned": "_pruned", "recovered": ""}
    for state, factor in (("dense", 1.0), ("pruned", 1.5), ("recovered", 1.2)):
        if state not in states:
            continue
        answers = [{"prompt": "Capital?", "text": samples[state]}] if state in samples else []
        result = EvaluationResult("m", state, samples=answers)
        result.add(Figure("perplexity/c4", 20.0 * factor, higher_is_better=False))
        result.save(folder / f"evaluation_results{names[state]}.json")


def table(card):
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_three_columns_and_the_section(folder):
    put(folder, make_report())
    measure(folder, ("dense", "pruned", "recovered"), dense="Paris.", pruned="Rome", recovered="Paris")
    write_card(folder)
    card, plan = ModelCard.load(folder / "README.md"), PruningPlan.load(folder)
    assert table(card)[0] == ["", "dense", "pruned", "pruned vs dense", "recovered", "recovered vs dense"]
    rows = {row[0].rstrip(" ↓"): row[1:] for row in table(card)[2:]}
    assert rows["perplexity, c4"][::2] == ["20.00", "+10.00 (1.50x)", "+4.00 (1.20x)"]
    assert rows["perplexity, c4"][1::2] == ["30.00", "24.00"]
    after = f"{plan.parameters_after:,}"
    assert rows["parameters"][:2] == [f"{plan.parameters_before:,}", after] and rows["parameters"][3] == after
    share = make_report()["recovered"]
    assert f"Training it afterwards brought back {share:.1%} of the log-perplexity" in card.text
    section = card.text[card.text.index(BEGIN) : card.text.index(END)]
    assert f"fell from 32.00 to 24.00 (dense: 18.40): {share:.1%} of the log-perplexity" in section
    assert "LoRA (rank 4, alpha 16), trained on the labels" in section
    assert "`them/dolly`, 1,234 sequences; `mine.jsonl`, 5 sequences" in section
    assert "20 steps, 1.00 epochs, batches of 64, learning rate 0.0001, 5,000 tokens" in section
    assert "10.0 minutes" in section and "`sample`, 32 windows of 512 tokens" in section
    assert "(recovery.png)" in section and "recovered already" in card.text
    assert "prompt: Capital?\n\ndense:     Paris.\n\npruned:    Rome\n\nrecovered: Paris\n" in card.text
    for name in ("evaluation_results.json", "evaluation_results_pruned.json", "recovery.json"):
        assert f"`{name}`" in card.text
    assert card.data.datasets == ["Salesforce/wikitext", "allenai/c4", "them/dolly"]
    (entry,) = card.data.eval_results
    assert entry.metric_value == 24.0  # its own, not that of the pruned model
    assert validate_card(folder / "README.md") is False


def test_before_anything_is_measured(folder):
    put(folder, make_report(), picture=False)
    card = make_card(folder)
    assert table(card)[0] == ["", "dense", "pruned", "pruned vs dense", "recovered", "recovered vs dense"]
    assert {row[0] for row in table(card)[2:]} == {"parameters ↓", "weights ↓", "MACs ↓", "KV cache per token ↓"}
    assert "recovery.png" not in card.text and not card.data.eval_results
    put(folder, make_report() | {"weights": {"parameters": 99_999, "bytes": 199_998}})
    assert "99,999" in make_card(folder).text
    result = EvaluationResult("m", "recovered")
    result.add(Figure("efficiency/parameters", 99_999))
    result.save(folder / "evaluation_results.json")
    make_card(folder)  # training untied the embeddings, so that there are more than the plan says


@pytest.mark.parametrize(
    ("factor", "first", "last"),
    [
        (1.09, "A larger version of", "9.0% more than before pruning."),
        (1.0, "A version of", "as many as before pruning."),
        (0.95, "A smaller version of", "5.0% fewer than before pruning."),
    ],
)
def test_a_model_that_training_has_made_larger_is_called_so(folder, factor, first, last):
    before = PruningPlan.load(folder).parameters_before
    put(folder, make_report() | {"weights": {"parameters": round(before * factor), "bytes": 1}})
    text = make_card(folder).text
    (summary,) = (line for line in text.splitlines() if line.startswith(first))
    assert f"It has {round(before * factor):,} now, {last}" in summary and f"({before:,} before, " in summary


def test_recovered_by_other_means(folder):
    """No report, only results that say so."""
    measure(folder, ("dense", "recovered"))
    card = make_card(folder)
    assert table(card)[0] == ["", "dense", "recovered", "recovered vs dense"]
    assert "It was trained afterwards." in card.text and BEGIN not in card.text and "recovered already" in card.text
    measure(folder, ("pruned",))
    assert len(table(make_card(folder))[0]) == 6


def test_a_pruned_model_has_no_word_of_it(folder):
    text = make_card(folder).text
    assert BEGIN not in text and "trained afterwards" not in text and "recovered already" not in text


def test_a_rate_that_was_lowered_is_told():
    report = make_report()
    for lowered, words in (([3], "after step 3, where"), ([3, 6], "after steps 3 and 6, where")):
        report["training"]["lowered"] = lowered
        assert f"a third of the learning rate {words} it was worse than before training" in section_of(report)
    report["training"]["lowered"] = []
    assert "a third" not in section_of(report)


@pytest.mark.parametrize(
    ("report", "sentences"),
    [
        (make_report(best=0, points=((10, 40.0), (20, 44.0)), stopped="worse"),
         ["**Training did not help.**", "was 32.00 before it and 44.00 after step 20", "those from before training",
          "Training was stopped: it brought no further improvement."]),
        (make_report(best=20, points=((10, 40.0), (20, 38.0))),
         ["rose from 32.00 to 38.00: **training made the model worse** (dense: 18.40)."]),
        (make_report(best=10, points=((10, 24.0), (20, 30.0))),
         ["fell from 32.00 to 24.00", "The weights are those after step 10; it was 30.00 after step 20."]),
        (make_report(dense=None), ["fell from 32.00 to 24.00. The dense model was not measured on it"]),
        (make_report(dense=32.0), ["Pruning had lost nothing on this text."]),
        (make_report(stopped="target"), ["The target was reached"]),
        (make_report(stopped="nan"), ["its loss was no longer finite"]),
        (make_report(points=(), best=0), ["was not measured after training"]),
        (make_report(best=15), ["The weights after step 15 were kept; the held-out text was not measured there."]),
    ],
)  # fmt: skip
def test_the_outcome_is_told_as_it_is(report, sentences, folder):
    for sentence in sentences:
        assert sentence in section_of(report)
    put(folder, report)
    text, kept_better = make_card(folder).text, bool(report["recovered"] and report["recovered"] > 0)
    assert ("is back." in text) == ("brought back" in text) == kept_better


def test_a_section_says_nothing_that_is_not_in_the_report():
    bare = {"schema_version": 1, "curve": make_report()["curve"], "best_step": 20, "configuration": {}}
    text = section_of(bare, picture=None)
    assert (
        text.startswith(BEGIN) and text.endswith(END) and "```" not in text and "* " not in text and "![" not in text
    )
    assert not re.search(r"None|nan", text)
    text = section_of({**bare, "training": {"method": "lora", "steps": 3, "seconds": None, "tokens": None}})
    assert "* Method: LoRA\n* Training: 3 steps\n" in text


@pytest.mark.parametrize(
    ("config", "distillation", "words"),
    [
        (RecoveryConfig(use_dora=True, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]), None,
         "LoRA (rank 8, alpha 16, DoRA, initialised by pissa)"),
        (RecoveryConfig(method="qlora", rank=64), None, "LoRA over a 4-bit base (rank 64, alpha 16)"),
        (RecoveryConfig(method="full", learning_rate=3e-5), None, "all weights, trained on the labels"),
        (RecoveryConfig(method="distill", weights="full"), DistillationConfig(temperature=2.0, label_weight=0.5),
         "all weights, trained to predict what them/large predicts (temperature 2, label weight 0.5)"),
    ],
)  # fmt: skip
def test_the_command_does_the_same_again(config, distillation, words):
    settings = {"configuration": config.to_dict(), "distillation": distillation and distillation.to_dict()}
    report = make_report(**settings, teacher="them/large" if distillation else None)
    assert words in section_of(report)
    words = shlex.split(recover_command(report))
    assert words[:2] == ["hf-structprune", "recover"]
    classes = (RecoverArguments, RecoveryConfig, DistillationConfig)
    arguments, parsed, distilled = parse(words[2:], "recover", "", *classes)
    assert (parsed, distilled) == (config, distillation or DistillationConfig())
    assert (arguments.model, list(arguments.dataset)) == ("small", ["them/dolly", "mine.jsonl"])
    assert float(arguments.dense) == pytest.approx(18.4, rel=1e-5)
    assert arguments.teacher == ("them/large" if distillation else None)


def test_states_and_files_that_do_not_fit(folder):
    assert find_subject(ModelArguments(str(folder))).state == "pruned"
    put(folder, make_report())
    assert find_subject(ModelArguments(str(folder))).state == "recovered"
    EvaluationResult("old", "pruned").save(folder / "evaluation_results.json")
    with pytest.raises(ConfigurationError, match=r"evaluation_results.json is of a pruned model \(old\)"):
        make_card(folder)
    (folder / "evaluation_results.json").unlink()
    EvaluationResult("new", "recovered").save(folder / "evaluation_results_pruned.json")
    with pytest.raises(ConfigurationError, match="evaluation_results_pruned.json is of a recovered model"):
        make_card(folder)
    (folder / "evaluation_results_pruned.json").unlink()
    for content, message in (("{", "is not JSON"), ('{"schema_version": 9}', "of version 9"), ("[]", "holds a list")):
        (folder / "recovery.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            make_card(folder)


def test_compare_finds_all_three(folder, capsys):
    put(folder, make_report())
    measure(folder, ("dense", "pruned", "recovered"))
    assert cli.main(["compare", str(folder), "--format", "md"]) == 0
    assert "| dense | pruned | pruned vs dense | recovered | recovered vs dense |" in capsys.readouterr().out


def test_push_takes_the_report_along_and_clears_an_older_one(folder, online):
    put(folder, make_report())
    measure(folder, ("pruned",))
    push_folder(folder, "me/small", token=online.token("me"))
    files = online.repos["me/small"].branches["main"][-1].files
    assert {"recovery.json", "recovery.png", "evaluation_results_pruned.json"} <= set(files)
    for name in ("recovery.json", "recovery.png", "evaluation_results_pruned.json"):
        (folder / name).unlink()
    push_folder(folder, "me/small", token=online.token("me"))
    files = online.repos["me/small"].branches["main"][-1].files
    assert not {"recovery.json", "recovery.png", "evaluation_results_pruned.json"} & set(files)


def test_pruning_into_the_folder_of_a_recovered_model(folder, pruner):
    put(folder, make_report())
    measure(folder, ("dense", "pruned", "recovered"))
    pruner.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert not {"recovery.json", "recovery.png", "evaluation_results_pruned.json", "evaluation_results.json"} & names
    assert "evaluation_results_dense.json" in names and BEGIN not in (folder / "README.md").read_text()
