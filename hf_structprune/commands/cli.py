"""`hf-structprune`: chooses the subcommand and turns errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..errors import ConfigurationError, StructPruneError
from ..masking import MaskedStream, masked
from .quiet import one_bar, quiet_libraries


# The module of each command, which has a function `NAME_command`, and what it does.
COMMANDS = {
    "inspect": ("prune", "what can be cut from a model: groups, units, sizes"),
    "models": ("models_table", "what can be cut from each model type of Transformers"),
    "plan": ("prune", "what would go at a ratio, and what it saves; changes nothing"),
    "prune": ("prune", "prune a model and save the checkpoint"),
    "recover": ("checkpoints", "train a pruned model to get its quality back"),
    "quantize": ("checkpoints", "quantise a model: bitsandbytes, torchao, GPTQ, AWQ, auto-round"),
    "perplexity": ("measure", "perplexity of a model on a text"),
    "evaluate": ("measure", "perplexity, tasks, size, speed, beside the dense model's"),
    "compare": ("measure", "results of several evaluations in one table"),
    "benchmark": ("measure", "size, memory and speed of a model, beside its dense one"),
    "export": ("checkpoints", "write a model for other runtimes: GGUF (llama.cpp), ONNX, Deci"),
    "card": ("checkpoints", "write the model card of a pruned checkpoint"),
    "push": ("checkpoints", "push a pruned checkpoint to the Hub"),
    "run": ("run", "run a recipe: prune, measure both sides, write the card, push"),
    "shrink": ("shrink", "prune, distil and measure a model within a time that is given"),
    "demo": ("demo", "prune a small model, train it for minutes, show what happened"),
}
HELP = """usage: hf-structprune COMMAND [MODEL] [options]

Structured pruning for Hugging Face causal language models.
MODEL is a Hub id or a folder.

commands:
{commands}

options:
  -h, --help     this text; after a COMMAND: its options
  --version      the version of hf_structprune
  -v, --verbose  after a COMMAND: also what libraries say, and their bars

exit codes: 0 done, 2 something was wrong with what was given, 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line, by default the process's, and gives the exit code.

    Mistakes of the user print one line on stderr and give 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with _masked_output(), quiet_libraries(not _verbose(argv)), _speaking():
        return _run(argv)


def _verbose(argv: Sequence[str]) -> bool:
    return not {"-v", "--verbose"}.isdisjoint(argv)


@contextlib.contextmanager
def _masked_output() -> Iterator[None]:
    """Masks secrets in everything that is printed, by libraries too, and in the traceback of a bug."""
    try:
        out, err = MaskedStream(sys.stdout), MaskedStream(sys.stderr)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    except Exception:
        sys.excepthook = lambda *about: sys.stderr.write(masked("".join(traceback.format_exception(*about))))
        raise


class _Said(logging.StreamHandler):
    """Lines of the package, above a progress bar that is open rather than behind it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(self.stream):
            super().emit(record)


@contextlib.contextmanager
def _speaking() -> Iterator[None]:
    """Lets the package say on stderr what it does; as a library it says only what is amiss."""
    logger, handler = logging.getLogger("hf_structprune"), _Said()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _run(argv: list[str]) -> int:
    try:
        _dispatch(argv)
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # argparse after --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = _describe(error)
        if message is None:
            raise
        return _fail(f"error: {message}", 2)


def _dispatch(argv: list[str]) -> None:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {command:<13}  {text}" for command, (_, text) in COMMANDS.items())))
    elif name == "--version":
        from ..installed import __version__

        print(f"hf-structprune {__version__}")
    elif name in COMMANDS and not {"-h", "--help"}.isdisjoint(argv):
        importlib.import_module(".arguments", __package__).print_help(name)  # without torch
    elif name in COMMANDS:
        module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
        with one_bar(not _verbose(argv)):
            getattr(module, f"{name}_command")(argv[1:])
    else:
        raise StructPruneError(f"unknown command {name!r}; the commands are {', '.join(COMMANDS)}")


def _describe(error: Exception) -> str | None:
    """The line for an error that the user can do something about; `None` for a bug of ours."""
    if isinstance(error, StructPruneError):
        return str(error)
    if "No space left on device" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
        return f"the disk is full: {error}"  # safetensors has an exception of its own for it
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}" if error.filename is not None else str(error)
    return None


def program() -> str:
    """The command that was typed: ours, or Optimum's with ours in it."""
    return "optimum-cli" if Path(sys.argv[0]).stem in ("optimum-cli", "optimum_cli") else "hf-structprune"


def _fail(message: str, code: int) -> int:
    print(f"{program()}:", " ".join(message.split()), file=sys.stderr)
    return code


def check_output(path: str | None, overwrite: bool, *, file: bool = False, folders: bool = False) -> None:
    """Refuses to write over something, or where nothing can be written, before any work is done.

    The path is what `--output-dir` says, or with `file` `--output`, which with `folders` may be a folder all the same;
    whether that can be written, its writer says then.
    """
    from ..files.writing import check_folder, check_place

    option = "--output" if file else "--output-dir"
    if path is None:
        raise ConfigurationError(f"{option} is missing.")
    if not folders:
        check_place(path, file=True) if file else check_folder(path)
    place = Path(path)
    if not overwrite and (any(place.iterdir()) if place.is_dir() else place.exists()):
        raise ConfigurationError(
            f"{path} {'exists' if file else 'is not empty'}; choose another {option} or say --overwrite."
        )


class _Console(Console):
    """Breaks lines between words alone: a path or an id that is longer than a line stays one, and can be copied."""

    def print(self, *objects: Any, **options: Any) -> None:
        objects = [self._wrapped(one) if isinstance(one, str) else one for one in objects]
        super().print(*objects, **{"crop": False, **options})

    def _wrapped(self, text: str) -> Group:
        how = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
        lines = ("\n".join(wrap(line, self.width, **how)) for line in text.split("\n"))
        return Group(Text("\n".join(lines), overflow="ignore"))  # a bare Text would be joined with others, and folded


def console() -> Console:
    """A console on stdout, wide enough for the tables when it is not a terminal (or as wide as COLUMNS says)."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return _Console(width=None if known else 120, highlight=False, markup=False, soft_wrap=False)


def make_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str]) -> Table:
    """A table whose columns are aligned to the right, but for those that are named; names in its title stay whole."""
    table = Table(title=Text(title, overflow="ignore"))
    for name in headers:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def why_left(note: str) -> str:
    """A note about what is left alone, for a place that says so already; in one line."""
    return " ".join(note.split()).removesuffix(", left alone")


def show(as_json: bool, data: dict[str, Any], *tables: RenderableType) -> None:
    """Prints a result: the data as JSON, or the tables for people."""
    if as_json:
        print(json.dumps(data))
    else:
        console().print(*tables, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
