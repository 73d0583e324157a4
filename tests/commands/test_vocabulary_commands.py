"""The vocabulary on the command line."""

import json
from pathlib import Path

import pytest
from families import make_model
from kinds_of_tokenizers import TEXTS, tokenizer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_structprune import PruningPlan
from hf_structprune.commands import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("llama", vocab_size=1002, max_position_embeddings=256, eos_token_id=2).save_pretrained(path / "dense")
    tokenizer_of("byte_level").save_pretrained(path / "dense")
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (path / "my.jsonl").write_text("\n".join(rows) + "\n")
    return path


def run(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main([*argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_prune_evaluate_and_compare(folder, tmp_path, capsys):
    dense, out, text = str(folder / "dense"), str(tmp_path / "small"), str(folder / "my.jsonl")
    options = ["--units", "vocabulary", "--vocabulary-text", text]
    plan = json.loads(run(capsys, "plan", dense, "--ratio", "0.2", *options, "--json"))
    assert plan["removed"].keys() == {"vocabulary"} and plan["vocabulary_report"]["sources"][0]["source"] == "my.jsonl"
    told = run(capsys, "prune", dense, "--ratio", "0.2", *options, "--output-dir", out)
    assert "tokens of my.jsonl stay" in " ".join(told.split())
    small, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    keep = PruningPlan.load(out).of_model("vocabulary").keep
    assert len(tokenizer) == small.config.vocab_size == keep < 1002
    assert small.config.eos_token_id == tokenizer.eos_token_id
    measured = ["--texts", text, "--window", "32", "--max-windows", "8", "--no-efficiency", "--no-samples"]
    found = json.loads(run(capsys, "evaluate", out, "--baseline", dense, *measured, "--json"))
    rows = {row["figure"]: row["cells"]["pruned"] for row in found["rows"]}
    assert list(rows)[-1] == "perplexity/my" and rows["perplexity/my"]["difference"] is None
    assert rows["word_perplexity/my"]["difference"] is not None


def test_inspect_shows_the_curve(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    dense, text, out = str(folder / "dense"), str(folder / "my.jsonl"), tmp_path / "out"
    options = ["--vocabulary", "--vocabulary-text", text]
    data = json.loads(run(capsys, "inspect", dense, *options, "--output-dir", str(out), "--json"))
    points = data["points"]
    assert points[0]["keep"] == data["must_stay"] and points[-1]["covered"] == points[-1]["covered_held_out"] == 1
    assert [p["covered"] for p in points] == sorted(p["covered"] for p in points)
    assert points[-1]["longer"] == 0 and points[0]["longer"] > points[len(points) // 2]["longer"] > 0
    assert all(p["saved"] == (1002 - p["keep"]) * 64 for p in points)
    assert (out / "vocabulary_coverage.png").stat().st_size > 5000
    assert "of text held out" in run(capsys, "inspect", dense, *options)
    assert cli.main(["inspect", dense, "--vocabulary-text", text]) == 2
    assert "--vocabulary-text goes with --vocabulary" in capsys.readouterr().err
