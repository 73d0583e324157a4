"""Options of the command line, made from dataclasses; a YAML file gives them other defaults."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers.hf_argparser import HfArgumentParser

from ..checks import checked, field_types
from ..config import CalibrationConfig
from ..errors import ConfigurationError
from ..files.reading import parse_yaml, read_text
from .cli import program


# Fields of CalibrationConfig that only Python can give, and the one that is such a dataclass itself: its fields get a
# prefix instead.
NOT_OPTIONS = ("calibration", "texts", "tokens", "fingerprint")
PREFIXES = {CalibrationConfig: "calibration_"}
# Fields that are arguments without a name: how they are shown and how many values they take.
POSITIONALS = {
    "model": ("MODEL", "?"),
    "results": ("RESULTS", "*"),
    "folder": ("DIR", "?"),
    "repo_id": ("REPO", "?"),
    "recipe": ("RECIPE", "?"),
}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see `{self.prog} --help`)")


def parse(argv: Sequence[str], command: str, description: str, *classes: type) -> list[Any]:
    """Parses the options of one command.

    Every field of the dataclasses is an option, `--round-to` as well as `--round_to`; the fields of
    [`CalibrationConfig`] come along with a field `calibration`, under the prefix `--calibration-`. `--config FILE`
    reads values of the same names from YAML (or JSON); what stands on the command line wins.

    Args:
        argv (sequence of `str`): The arguments after the command's name.
        command (`str`): The command's name.
        description (`str`): Shown above the options by `--help`.
        classes (`type`): Dataclasses, documented with an `Args:` section. Fields `model`, `folder` and `repo_id`
            become positional arguments, a list `results` all positional arguments there are.

    Returns:
        `list`: One instance of each class.

    Raises:
        ConfigurationError: An option is unknown, has a value of the wrong type, or none where one is needed.
    """
    calibrated = any(field.name == "calibration" for cls in classes for field in dataclasses.fields(cls))
    sources = [*classes, *([CalibrationConfig] if calibrated else [])]
    parser = _make_parser(command, description, sources)
    argv = [_with_hyphens(argument) for argument in argv]
    values = parser.parse_args(argv)
    if values.config is not None:
        parser.set_defaults(**_read_defaults(parser, values.config))
        values = parser.parse_args(argv)
    return [_build(cls, vars(values), parser) for cls in classes]


def _make_parser(command: str, description: str, sources: list[type]) -> _Parser:
    fields = [field for cls in sources for field in dataclasses.fields(cls)]
    shown = [POSITIONALS[field.name] for field in fields if field.name in POSITIONALS]
    positionals = "".join(f" {name} ..." if count == "*" else f" {name}" for name, count in shown)
    parser = _Parser(
        [_as_options(cls) for cls in sources],
        prog=f"{program()} {command}",
        usage=f"{program()} {command}{positionals} [options]",
        description=description,
        formatter_class=argparse.HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with values of the options; unknown keys are errors"
    )
    for cls in sources:
        texts = _help_texts(cls)
        for field in dataclasses.fields(cls):
            if field.name in POSITIONALS:
                metavar, count = POSITIONALS[field.name]
                default = None if field.default is dataclasses.MISSING else field.default
                parser.add_argument(field.name, metavar=metavar, nargs=count, default=default, help=texts[field.name])
            elif _is_switch(cls, field):
                # HfArgumentParser lets `--json` take a value, which would swallow the MODEL behind it.
                name = PREFIXES.get(cls, "") + field.name
                switch = argparse.BooleanOptionalAction
                parser.add_argument(
                    _with_hyphens(f"--{name}"), action=switch, default=field.default, help=texts[field.name]
                )
    readers = {
        PREFIXES.get(cls, "") + name: _reader(name, kind) for cls in sources for name, kind in field_types(cls).items()
    }
    for action in parser._actions:
        if action.dest in readers and action.type is not None:
            action.type = readers[action.dest]
    for action in parser._actions:  # shown once by --help; both spellings are understood
        action.option_strings = [name for name in action.option_strings if "_" not in name]
    return parser


def _reader(name: str, annotation: Any) -> Callable[[str], Any]:
    """Reads what was typed for an option, or one of several values, as the field's type says."""

    kind = _item_type(annotation)

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


def _as_options(cls: type) -> type:
    """A dataclass with the fields of `cls` that take a value, as `HfArgumentParser` understands them."""
    hints, texts, prefix = get_type_hints(cls), _help_texts(cls), PREFIXES.get(cls, "")
    options = []
    for field in dataclasses.fields(cls):
        only_python = field.name == "calibration" or (cls is CalibrationConfig and field.name in NOT_OPTIONS)
        if only_python or field.name in POSITIONALS or _is_switch(cls, field):
            continue
        text = texts[field.name] + ("" if field.default is None else " (default: %(default)s)")
        metadata = {**field.metadata, "help": text, "metavar": field.name.upper()}
        kind, default = _option_type(hints[field.name]), {"default": field.default}
        if get_origin(kind) is list and field.default is not None:  # HfArgumentParser takes no other default of lists
            default = {"default_factory": lambda value=field.default: value}
        options.append((prefix + field.name, kind, dataclasses.field(**default, metadata=metadata)))
    namespace = {"_argument_group_name": (inspect.getdoc(cls) or cls.__name__).split(".")[0].replace("`", "")}
    return dataclasses.make_dataclass(cls.__name__, options, namespace=namespace)


def _option_type(annotation: Any) -> Any:
    """The one type of an option: sequences become lists, of a union the sequence or else the first member counts."""
    members = _members(annotation)
    item = _item_type(annotation)
    return members[0] if item is annotation else list[item]


def _item_type(annotation: Any) -> Any:
    """What the items are of where a sequence is wanted, else the type itself."""
    for member in _members(annotation):
        if get_origin(member) in (list, tuple, Sequence):
            return get_args(member)[0]
    return annotation


def _members(annotation: Any) -> list[Any]:
    """The types that a value may have, but `None`, without what `Annotated` adds to them."""
    is_union = get_origin(annotation) in (Union, types.UnionType)
    members = [m for m in get_args(annotation) if m is not types.NoneType] if is_union else [annotation]
    return [get_args(member)[0] if get_origin(member) is Annotated else member for member in members]


def _is_switch(cls: type, field: dataclasses.Field) -> bool:
    return get_type_hints(cls)[field.name] in (bool, bool | None)


def _help_texts(cls: type) -> dict[str, str]:
    """What the `Args:` section of a dataclass says about each of its fields."""
    section = (inspect.getdoc(cls) or "").partition("Args:\n")[2].split("\n\n")[0]
    texts = {field.name: "" for field in dataclasses.fields(cls)}
    for entry in re.split(r"(?:^|\n)    (?=\w)", section)[1:]:
        head, body = re.match(r"((?:\w+(?: \([^)]*\))?(?:, )?)+):(.*)", entry, re.DOTALL).groups()
        for name in re.sub(r" \([^)]*\)", "", head).split(", "):
            texts[name] = " ".join(re.sub("[`*]", "", body).replace("%", "%%").split())
    return texts


def _read_defaults(parser: _Parser, path: str) -> dict[str, Any]:
    """The values of a YAML file, each through the parser, so that they are what the command line would give."""
    content = parse_yaml(read_text(path), path)
    if content is not None and not isinstance(content, dict):
        raise ConfigurationError(f"{path} holds a {type(content).__name__}; it must hold `option: value` lines.")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    defaults = {}
    for key, value in _flatten(content or {}, path).items():
        if key not in actions and not (value is None and key.removeprefix("calibration_") in NOT_OPTIONS):
            raise ConfigurationError(f"`{key}` in {path} is not an option; the options are {', '.join(actions)}.")
        if value is not None:
            defaults[key] = _parse_value(parser, actions[key], value, path)
    return defaults


def _flatten(content: dict[Any, Any], path: str) -> dict[str, Any]:
    """Every option under the name of its field, those of the calibration with its prefix."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        named = {name: value}
        if name == "calibration" and isinstance(value, dict):
            named = {f"calibration_{k}": v for k, v in _flatten(value, path).items()}
        for name in named.keys() & values.keys():
            raise ConfigurationError(
                f"{path}: `{name}` is given twice (hyphens are underscores, `calibration:` is a prefix), and only "
                "one can be meant: remove one."
            )
        values |= named
    return values


def _parse_value(parser: _Parser, action: argparse.Action, value: Any, path: str) -> Any:
    is_switch, is_list = isinstance(action, argparse.BooleanOptionalAction), action.nargs in ("+", "*")
    if isinstance(value, bool) != is_switch or isinstance(value, dict) or (isinstance(value, list) and not is_list):
        wanted = "true or false" if is_switch else "a list" if is_list else "one value"
        raise ConfigurationError(f"`{action.dest}` in {path} is {value!r}; it must be {wanted}.")
    items = [str(item) for item in (value if isinstance(value, list) else [value])]
    if is_switch or not action.option_strings:
        return value if is_switch else items if is_list else items[0]
    tokens = [action.option_strings[0], *items] if is_list else [f"{action.option_strings[0]}={items[0]}"]
    return getattr(parser.parse_args(tokens), action.dest)


def _as_text_or_pairs(value: Any, annotation: Any) -> Any:
    """What was typed for an option that takes one text or pairs, of which the parser makes a list."""
    members = _members(annotation)
    if not (isinstance(value, list) and str in members and any(get_origin(member) is dict for member in members)):
        return value
    if all(part.count("=") == 1 for part in value):
        return dict(part.split("=") for part in value)
    return value[0] if len(value) == 1 else value


def _build(cls: type, values: dict[str, Any], parser: _Parser) -> Any:
    """An instance of `cls` from the parsed values."""
    chosen = {}
    for field in dataclasses.fields(cls):
        name = PREFIXES.get(cls, "") + field.name
        if field.name == "calibration":
            chosen["calibration"] = _build(CalibrationConfig, values, parser)
        elif name in values:
            chosen[field.name] = _as_text_or_pairs(values[name], get_type_hints(cls)[field.name])
            if values[name] in (None, []) and field.default is dataclasses.MISSING:
                parser.error(f"{POSITIONALS.get(field.name, (field.name.upper(),))[0]} is missing")
    return cls(**chosen)
