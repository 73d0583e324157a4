"""What a command prints is ours: no word of the libraries below, unless `-v` asks for it."""

import json
import os
import re
import subprocess
import sys
import warnings
from logging import getLogger

import pytest
from tqdm import tqdm as any_bar
from transformers.utils import logging

from hf_structprune import progress
from hf_structprune.commands import cli


# One process, so that torch is imported once: what libraries say when they are imported is among what is looked at.
SCRIPT = """
import json, sys
from hf_structprune.commands.cli import main

if __name__ == "__main__":
    for argv in json.loads(sys.argv[1]):
        print("$", argv[0], file=sys.stderr, flush=True)
        if main(argv):
            sys.exit(1)
"""


@pytest.mark.slow
def test_commands_say_nothing_of_libraries(tiny_llama, tiny_tokenizer, tmp_path):
    dense, pruned, better = (str(tmp_path / name) for name in ("dense", "pruned", "better"))
    tiny_llama.save_pretrained(dense)
    tiny_tokenizer.save_pretrained(dense)
    row = {"prompt": "one two", "completion": "three four"}
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps(row)] * 8), encoding="utf-8")
    (tmp_path / "run.py").write_text(SCRIPT, encoding="utf-8")
    short = ["--calibration-num-samples", "4", "--calibration-length", "32"]
    windows = ["--window", "32", "--max-windows", "2"]
    trained = ["--max-steps", "1", "--max-length", "64", "--evaluations", "1", *windows]
    commands = [
        ["prune", dense, "--ratio", "0.1", "--output-dir", pruned, *short],
        ["evaluate", pruned, "--baseline", dense, "--no-efficiency", "--no-samples", *windows],
        ["recover", pruned, "--dataset", str(tmp_path / "chats.jsonl"), "--output-dir", better, *trained],
        ["export", pruned, "--format", "onnx", "--output", str(tmp_path / "onnx")],
        ["benchmark", pruned, "--rounds", "1", "--repeats", "1", "--length", "8", "--new-tokens", "2"],
        ["prune", dense, "--ratio", "0.1", "--output-dir", pruned, "--overwrite", "-v", *short],
    ]
    command = [sys.executable, str(tmp_path / "run.py"), json.dumps(commands)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "COLUMNS": "80"})
    assert result.returncode == 0, result.stderr
    *quiet, loud = re.split(r"(?m)^\$ ", result.stderr)[1:]
    names = [said.split("\n")[0] for said in quiet]
    assert names == ["prune", "evaluate", "recover", "export", "benchmark"]
    others = re.compile(r"\w*(Warning|warn|WARN|\d+%|torch\.onnx|libraries)|^W\d{4}")
    assert not [line for said in quiet for line in said.split("\n") if others.search(line)], result.stderr
    assert "Loading weights" in loud and "Pruning" in loud  # bars of Transformers and ours


def test_libraries_are_as_loud_as_before(monkeypatch, capsys):
    """What a command does to logs, warnings and bars ends with it, and `-v` leaves all as it is."""
    loggers = [getLogger(name) for name in ("", "transformers", "torchao")]
    before = [logger.level for logger in loggers], logging.is_progress_bar_enabled(), list(warnings.filters)
    said = []

    def talk(argv):
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn_explicit("old", DeprecationWarning, "them.py", 1, "library.module")
        said.append((len(caught), getLogger("library").isEnabledFor(30), logging.is_progress_bar_enabled()))

    monkeypatch.setattr("hf_structprune.commands.models_table.models_command", talk)
    logging.enable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["models"]) == cli.main(["models", "-v"]) == 0
    (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()
    assert said == [(0, False, False), (1, True, True)]
    assert before == ([logger.level for logger in loggers], logging.is_progress_bar_enabled(), list(warnings.filters))


def test_one_bar_at_a_time(capsys):
    with progress.chosen(True):
        for _ in progress.tqdm(range(2), desc="outer"):
            list(progress.tqdm(range(2), desc="inner"))
        list(progress.tqdm(range(2), desc="next"))
        with progress.hidden():
            list(progress.tqdm(range(2), desc="hidden"))
        list(any_bar(range(2), desc="not ours", disable=not progress.enabled()))
    shown = capsys.readouterr().err
    assert [name for name in ("outer", "inner", "next", "hidden", "not ours") if name in shown] == [
        "outer", "next", "not ours",
    ]  # fmt: skip
