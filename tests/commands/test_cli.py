"""The entry point: help, exit codes and one-line errors. What needs a model is in `test_command_runs.py`."""

import errno
import importlib
import inspect
import os
import subprocess
import sys
from typing import Any, get_type_hints

import pytest

import hf_structprune
from hf_structprune.commands import cli, options


def run(*argv: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hf_structprune.commands.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def assert_one_error_line(text: str, *parts: str) -> None:
    assert text.startswith("hf-structprune: error: "), text
    assert text.count("\n") == 1, text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help(argv, capsys):
    assert cli.main(argv) == 0
    output = capsys.readouterr().out
    assert all(command in output for command in cli.COMMANDS)
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([command, "--help"]) == 0
    positional = {
        "compare": "RESULTS ...",
        "card": "DIR",
        "push": "DIR REPO",
        "run": "RECIPE",
        "models": "TYPE ...",
    }.get(command, "MODEL")
    output = capsys.readouterr().out
    assert f"hf-structprune {command} {positional} [options]" in output
    assert max(map(len, output.splitlines())) <= 80


def test_names_longer_than_a_line_stay_whole(capsys, monkeypatch):
    """So that paths can be copied; words around them are wrapped, and cells of tables lose nothing."""
    monkeypatch.setenv("COLUMNS", "40")
    path = f"/folder/{'a-b' * 20}"
    shown = cli.make_table(f"{path}: 3 layers", ("name",), [(path,)], left=("name",))
    cli.show(False, {}, shown, f"Saved to {path} after a while, which is longer than one line is.", "  hf-structprune")
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == f"{path}: 3 layers" and "".join(line.strip("│ ") for line in lines[3:5]) == path
    *_, before, whole, after, _, command = lines
    assert (before, whole, after) == ("Saved to", path, "after a while, which is longer than one")
    assert command == "  hf-structprune"
    assert max(len(line) for line in lines if line != path) <= 40


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-structprune {hf_structprune.__version__}\n"


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["bogus"], ["'bogus'", "inspect"]),
        (["inspect"], ["MODEL is missing"]),
        (["plan", "m"], ["--ratio is missing"]),
        (["plan", "m", "--ratio", "1.5"], ["--ratio: `ratio` is 1.5"]),
        (["plan", "m", "--ratio", "0.3", "--mlp-ratio", "0.3"], ["both given"]),
        (["plan", "m", "--ratio", "0.3", "--criterion", "best"], ["`criterion`", "'best'", "auto", "obs"]),
        (["plan", "/no/such/model", "--ratio", "0.3"], ["cannot load '/no/such/model'"]),
        (["plan", "m", "--ratio", "0.3", "--config", "no-such.yaml"], ["There is no file no-such.yaml"]),
        (["prune", "m", "--ratio", "0.3"], ["--output-dir is missing"]),
        (["prune", "m", "--output-dir", "o", "--plan", "p", "--ratio", "0.3"], ["--ratio and --plan"]),
        (["prune", "m", "--output-dir", "o", "--plan", "no-such.json"], ["There is no file no-such.json"]),
        (["perplexity", "m", "--window", "1"], ["`window` is 1"]),
        (["perplexity", "m", "--max-windows", "0"], ["`max_windows` is 0"]),
        (["perplexity", "m", "--batch-size", "0"], ["`batch_size` is 0"]),
        (["perplexity", "m", "--protocol", "papers"], ["`protocol` is 'papers'", "llm-pruner"]),
        (["perplexity", "m", "--window", "64", "--stride", "65"], ["`stride` is 65", "64"]),
        (["demo", "m", "--ratio", "-1"], ["--ratio: `ratio` is -1"]),
        (["card"], ["DIR is missing"]),
        (["push", "no-such-folder"], ["REPO is missing"]),
        (["push", "no-such-folder", "me/x"], ["There is no folder no-such-folder"]),
        (["evaluate", "m", "--protocol", "mine"], ["`protocol` is 'mine'", "paper"]),
        (["evaluate", "m", "--suite", "study-z"], ["`suite` is 'study-z'", "study-a"]),
        (["evaluate", "m", "--pictures"], ["--pictures needs --output"]),
        (["evaluate", "m", "--output", "/"], ["/ is a folder"]),
        (["evaluate", "/no/such/model"], ["cannot load '/no/such/model'"]),
        (
            ["inspect", "no/model"],
            ["'no/model': it is no folder, not whole in the Hub's cache, and HF_HUB_OFFLINE is set"],
        ),
        (["evaluate", "nowhere/"], ["cannot load 'nowhere/': there is no such folder"]),
        (["quantize", "nowhere/", "--output-dir", "o"], ["cannot load 'nowhere/': there is no such folder"]),
        (["compare"], ["RESULTS is missing"]),
        (["compare", "no-such.json"], ["There is no no-such.json"]),
        (["compare", "a.json", "--format", "pdf"], ["`format` is 'pdf'", "csv"]),
        (["benchmark", "m", "--rounds", "0"], ["`rounds` is 0"]),
        (["benchmark", "m", "--repeats", "0"], ["`repeats` is 0"]),
    ],
)
def test_bad_values(argv, parts, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_error_line(captured.err, *parts)


@pytest.mark.parametrize("overwrite_needed", ["folder", "file"])
@pytest.mark.parametrize("command", [["prune", "m", "--ratio", "0.3"], ["demo", "m"]])
def test_nothing_is_written_over(command, overwrite_needed, tmp_path, capsys):
    target = tmp_path / "out"
    kept = target / "thesis.txt" if overwrite_needed == "folder" else target
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    assert cli.main([*command, "--output-dir", str(target)]) == 2
    assert_one_error_line(capsys.readouterr().err, str(target))
    assert kept.read_text() == "mine"


def test_the_exit_code_and_the_line_of_a_process():
    """With a mistake that is found before torch is imported."""
    result = run("bogus")
    assert (result.returncode, result.stdout) == (2, "")
    assert_one_error_line(result.stderr, "'bogus'")


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KeyboardInterrupt(), 130, "hf-structprune: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2, "hf-structprune: error: the disk is full"),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            2,
            "hf-structprune: error: the disk is full",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "hf-structprune: error: Permission denied: x\n"),
        (OSError("two\n  lines"), 2, "hf-structprune: error: two lines\n"),
    ],
)
def test_errors_while_working(error, code, line, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main([]) == code
    text = capsys.readouterr().err
    assert text.startswith(line) and text.count("\n") == 1


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_dispatch", lambda argv: {}["missing"])
    with pytest.raises(KeyError):
        cli.main([])


def test_neither_the_package_nor_help_imports_torch():
    """Both answer at once: whatever is asked of them, torch and Transformers take seconds."""
    script = (
        "import sys, hf_structprune\n"
        "from hf_structprune.commands.cli import COMMANDS, main\n"
        "codes = [main([command, '--help']) for command in COMMANDS]\n"
        "slow = {'torch', 'transformers', 'huggingface_hub', 'datasets'} & sys.modules.keys()\n"
        "sys.exit(f'{slow}' if slow or any(codes) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_says_what_the_command_reads(command):
    """`--help` is made from a table, so that the command is not imported; this is what the command itself says."""
    module = importlib.import_module(f"hf_structprune.commands.{cli.COMMANDS[command][0]}")
    function = getattr(module, f"{command}_command")
    description, classes = options.TAKES[command]
    assert description == function.__doc__
    hints = get_type_hints(inspect.unwrap(function))
    assert hints.pop("return") in (type(None), tuple[Any, ...], tuple[Any, ...] | None)
    if hasattr(function, "__wrapped__"):
        assert classes == tuple(hints.values())
    else:
        (name,) = (one.__name__ for one in classes)
        assert f"{function.__name__}.__doc__, {name})" in inspect.getsource(function)
