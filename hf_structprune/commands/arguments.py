"""Options of the command line, made from dataclasses; a YAML file gives them other defaults."""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin, get_type_hints

from ..checks import checked, field_types
from ..errors import ConfigurationError
from ..files.reading import parse_yaml, read_text
from .cli import program, show
from .options import TAKES


# Fields that only Python can give.
IN_MEMORY = ("calibration_texts", "calibration_tokens", "calibration_fingerprint")
# Fields that are arguments without a name: how they are shown and how many values they take.
POSITIONALS = {
    "model": ("MODEL", "?"),
    "results": ("RESULTS", "*"),
    "folder": ("DIR", "?"),
    "repo_id": ("REPO", "?"),
    "recipe": ("RECIPE", "?"),
    "types": ("TYPE", "*"),
}
_LIKE = 0.7  # how alike names must be to be taken for each other, 0 to 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        before, unknown, words = message.partition("unrecognized arguments: ")
        near = self._nearest(words) if unknown and not before else ""
        raise ConfigurationError(f"{message}{near} (see `{self.prog} --help`)")

    def _nearest(self, words: str) -> str:
        """Options that may have been meant by unknown ones."""
        given = [word.partition("=")[0] for word in words.split() if word.startswith("--")]
        found = [get_close_matches(word, self._option_string_actions, 1, _LIKE) for word in given]
        names = dict.fromkeys(f"`{name}`" for names in found for name in names)
        return f"; did you mean {' and '.join(names)}?" if names else ""


def command(function: Callable[..., tuple[Any, ...] | None]) -> Callable[[Sequence[str]], None]:
    """Makes `NAME_command` read its arguments, dataclasses all, from a command line, and prints what it gives.

    That is data, printed for `--json`, and what people see instead. Stdout holds nothing else: what libraries print
    goes to stderr. Its docstring is the description that `--help` shows.
    """

    @functools.wraps(function)
    def run(argv: Sequence[str]) -> None:
        classes = [kind for name, kind in get_type_hints(function).items() if name != "return"]
        arguments = parse(argv, function.__name__.removesuffix("_command"), function.__doc__, *classes)
        with contextlib.redirect_stdout(sys.stderr):
            found = function(*arguments)
        if found is None:  # another process says it
            return
        data, *shown = found
        show(any(getattr(one, "json", False) for one in arguments), data, *shown)

    return run


def parse(argv: Sequence[str], command: str, description: str, *classes: type) -> list[Any]:
    """One instance of each of these dataclasses, from the arguments after a command's name.

    Every field is an option, `--round-to` as well as `--round_to`, but for those that `POSITIONALS` names; the fields
    of one that is a dataclass itself have its name as a prefix (`--calibration-length`). The classes' `Args:` sections
    are the help. `--config FILE` reads values of the same names from YAML (or JSON); the command line wins.

    Raises:
        ConfigurationError: An option is unknown, has a value of the wrong type, or none where one is needed.
    """
    parser = make_parser(command, description, *classes)
    argv = _with_negative_shares([_with_hyphens(argument) for argument in argv])
    values = parser.parse_args(argv)
    if values.config is not None:
        values = parser.parse_args([*_read_config(parser, values.config), *argv])
    return [_build(cls, vars(values), parser) for cls in classes]


def print_help(command: str) -> None:
    """The options of a command; neither it nor torch is imported."""
    description, classes = TAKES[command]
    make_parser(command, description, *classes).print_help()


def make_parser(command: str, description: str, *classes: type) -> argparse.ArgumentParser:
    """The parser of the options that the dataclasses have."""
    shown = [POSITIONALS[field.name] for cls in classes for field in fields(cls) if field.name in POSITIONALS]
    positionals = "".join(f" {name} ..." if count == "*" else f" {name}" for name, count in shown)
    name = f"{program()} {command}"
    usage = f"{name}{positionals} [options]"
    parser = _Parser(prog=name, usage=usage, description=description, allow_abbrev=False)
    help_text = "YAML file with values of the options; unknown keys are errors"
    parser.add_argument("--config", metavar="FILE", help=help_text)
    help_text = "also show what libraries say, and their progress bars"
    parser.add_argument("-v", "--verbose", action="store_true", help=help_text)  # read by `cli.main`
    for cls in classes:
        _add_options(parser, cls)
    return parser


def _add_options(parser: argparse.ArgumentParser, cls: type, prefix: str = "") -> None:
    title, texts = (inspect.getdoc(cls) or cls.__name__).split(".")[0].replace("`", ""), _help_texts(cls)
    group = parser.add_argument_group(title)
    for field in fields(cls):
        name, kind, text = prefix + field.name, field_types(cls)[field.name], texts.get(field.name, "")
        default = None if field.default is MISSING else field.default
        names = [_with_hyphens(f"--{name}"), *field.metadata.get("aliases", ())]
        if is_dataclass(kind):
            _add_options(parser, kind, f"{name}_")
        elif field.name in POSITIONALS:
            metavar, count = POSITIONALS[field.name]
            parser.add_argument(name, metavar=metavar, nargs=count, default=default, help=text)
        elif kind in (bool, bool | None):
            group.add_argument(*names, action=argparse.BooleanOptionalAction, default=default, help=text)
        elif name not in IN_MEMORY:
            item = _item_type(kind)
            options = {"dest": name, "default": default, "metavar": field.name.upper(), "nargs": "+" if item else None}
            text += "" if default is None else " (default: %(default)s)"
            group.add_argument(*names, type=_reader(field.name, item or kind), help=text, **options)


def _item_type(annotation: Any) -> Any:
    """What the items are of where a sequence is allowed, else `None`."""
    for member in get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,):
        member = get_args(member)[0] if get_origin(member) is Annotated else member
        if get_origin(member) in (list, tuple, Sequence):
            return get_args(member)[0]
    return None


def _reader(name: str, kind: Any) -> Callable[[str], Any]:
    """Reads what was typed for an option, or one of several values, as the field's type says."""

    def read(text: str) -> Any:
        try:
            return checked(name, text, kind)
        except ConfigurationError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error

    return read


def _with_hyphens(argument: str) -> str:
    """`--round_to=8` as `--round-to=8`; what is not an option stays as it is."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _with_negative_shares(argv: list[str]) -> list[str]:
    """`--kv-cache -30%` as `--kv-cache=-30%`: only negative numbers are taken for values."""
    words: list[str] = []
    for argument in argv:
        if re.fullmatch(r"-[\d.]+ ?%", argument) and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += f"={argument}"
        else:
            words.append(argument)
    return words


def _help_texts(cls: type) -> dict[str, str]:
    """What the `Args:` sections of a dataclass and of those it is made from say about its fields."""
    texts = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        section = (inspect.getdoc(base) or "").partition("Args:\n")[2].split("\n\n")[0]
        for entry in re.split(r"(?:^|\n)    (?=\w)", section)[1:]:
            head, body = re.match(r"((?:\w+(?: \([^)]*\))?(?:, )?)+):(.*)", entry, re.DOTALL).groups()
            for name in re.sub(r" \([^)]*\)", "", head).split(", "):
                texts[name] = " ".join(re.sub("[`*]", "", body).replace("%", "%%").split())
    return texts


def _read_config(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """The values of a YAML file as words of a command line; those that have no name become the parser's defaults."""
    content = parse_yaml(read_text(path), path)
    if content is not None and not isinstance(content, dict):
        raise ConfigurationError(f"{path} holds a {type(content).__name__}; it must hold `option: value` lines.")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config", "verbose")}
    words = []
    for key, value in _flatten(content or {}, path).items():
        if key not in actions and not (value is None and key in IN_MEMORY):
            raise ConfigurationError(f"`{key}` in {path} is not an option; the options are {', '.join(actions)}.")
        if value is not None:
            words += _as_words(parser, actions[key], value, path)
    return [*words, "--config", path]  # which also ends a list


def _flatten(content: dict[Any, Any], path: str) -> dict[str, Any]:
    """Every option under the name of its field, those of the calibration with its prefix."""
    section = content.get("calibration")
    pairs = [(key, value) for key, value in content.items() if key != "calibration" or not isinstance(section, dict)]
    pairs += [(f"calibration_{key}", value) for key, value in section.items()] if isinstance(section, dict) else []
    values: dict[str, Any] = {}
    for key, value in pairs:
        name = str(key).replace("-", "_")
        if name in values:
            raise ConfigurationError(
                f"{path}: `{name}` is given twice (hyphens are underscores, `calibration:` is a prefix), and only "
                "one can be meant: remove one."
            )
        values[name] = value
    return values


def _as_words(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, path: str) -> list[str]:
    is_switch, is_list = isinstance(action, argparse.BooleanOptionalAction), action.nargs in ("+", "*")
    if isinstance(value, bool) != is_switch or isinstance(value, dict) or (isinstance(value, list) and not is_list):
        wanted = "true or false" if is_switch else "a list" if is_list else "one value"
        raise ConfigurationError(f"`{action.dest}` in {path} is {value!r}; it must be {wanted}.")
    if is_switch:
        return [action.option_strings[0 if value else -1]]
    items = [str(item) for item in (value if isinstance(value, list) else [value])]
    if not action.option_strings:
        parser.set_defaults(**{action.dest: items if is_list else items[0]})
        return []
    return [action.option_strings[0], *items] if is_list else [f"{action.option_strings[0]}={items[0]}"]


def _build(cls: type, values: dict[str, Any], parser: _Parser, prefix: str = "") -> Any:
    """An instance of `cls` from the parsed values."""
    chosen = {}
    for field in fields(cls):
        name, kind = prefix + field.name, field_types(cls)[field.name]
        if is_dataclass(kind):
            chosen[field.name] = _build(kind, values, parser, f"{name}_")
        elif name in values:
            needed = field.default is MISSING and field.default_factory is MISSING
            if values[name] in (None, []) and needed:
                parser.error(f"{POSITIONALS.get(field.name, (field.name.upper(),))[0]} is missing")
            chosen[field.name] = values[name]
    return cls(**chosen)
