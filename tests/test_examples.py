"""The examples run, in a small form: with a tiny model, a few sequences and steps."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def dense(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    tiny_llama.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    return "dense"


def run(monkeypatch, name, *argv):
    monkeypatch.setattr(sys, "argv", [name, *argv])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_scripts_one_after_the_other(dense, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "prune_and_chat.py", "--model", dense, "--samples", "2", "--new-tokens", "2", "--ask", "one two")
    assert "pruned: " in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained("smaller").num_parameters() < 29000  # of 31,456
    rows = [json.dumps({"prompt": "one two", "completion": " three"})] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    windows = ["--window", "32", "--max-windows", "2"]
    run(monkeypatch, "recover_with_trl.py", "smaller", "--dataset", "rows.jsonl", "--max-steps", "2", *windows)
    assert "The best is in recovered: step " in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained("recovered").num_parameters() < 29000
    run(monkeypatch, "push.py", "smaller", "--dense", dense, *windows)
    assert "perplexity" in capsys.readouterr().out
    assert "hf_structprune" in (tmp_path / "smaller" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_notebook(dense, monkeypatch, capsys):
    for name, value in {"MODEL": dense, "FOLDER": "smaller", "WINDOW": "32", "SAMPLES": "2"}.items():
        monkeypatch.setenv(f"QUICKSTART_{name}", value)
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
    assert "31,456 -> " in capsys.readouterr().out
    assert names["smaller"].num_parameters() == names["pruner"].last_plan.parameters_after
