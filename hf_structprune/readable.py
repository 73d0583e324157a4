"""What the libraries below raise while they read a model: one line that names the file, at one place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from .errors import CheckpointError, StructPruneError
from .files.damage import damaged_weights
from .files.folders import settle
from .files.json_files import read_json_object
from .files.writing import can_only_be_a_path
from .hub.network import gated_errors
from .masking import is_masked


# Files that Transformers reads besides the weights. Some of them it leaves out without a word where they are damaged.
_OBJECTS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "adapter_config.json",
)  # fmt: skip
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_ADAPTER = "adapter_config.json"
# Endings of files that are no models by themselves, with the way to load them.
_FILES = {
    ".gguf": "give the folder that it is in as the model, and its name as `gguf_file` (--gguf-file {name})",
    ".safetensors": "give the folder that it is in, in which config.json says what model the weights are of",
    ".bin": "give the folder that it is in, in which config.json says what model the weights are of",
    ".json": "give the folder that it is in",
}


@contextmanager
def readable(source: str | os.PathLike, part: str = "", subfolder: str | None = None) -> Iterator[None]:
    """Stands around calls of libraries that read a model, its configuration or its tokenizer, and around nothing else.

    Args:
        source: The folder or Hub id that is read.
        part: What is read of it, for example `"config.json"`, if one file or kind of file.
        subfolder: Where in it the files are.

    Raises:
        CheckpointError: There is no such model, it is a file or an adapter, a file of it is damaged, or the library
            cannot make anything of it.
        HubError: The model is gated and the token has no access to it.
    """
    name = str(source)
    settle(name)
    _check_place(name)
    folder = Path(name, subfolder or "")
    check_objects(folder)
    try:
        with gated_errors(name):
            yield
    except StructPruneError:
        raise
    except Exception as wrong:  # libraries raise every kind there is for files that are not as they should be
        raise CheckpointError(_explain(name, folder, part, wrong)) from (wrong if is_masked(wrong) else None)


def check_objects(folder: Path) -> None:
    """Refuses a folder in which a small JSON file of Transformers is damaged.

    Raises:
        CheckpointError: Names the file.
    """
    for path in (folder / name for name in _OBJECTS):
        if path.is_file():
            read_json_object(path, repeats=True)


def refuse_adapter(source: str | os.PathLike, **options: Any) -> None:
    """Refuses a folder or repository that holds an adapter of PEFT: Transformers would load its base model under it.

    Args:
        source: The folder or Hub id.
        options: Where in it to look and how: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        CheckpointError: Says what to do.
    """
    if _is_adapter(str(source), options):
        raise CheckpointError(
            f"{source} holds an adapter of PEFT, whose weights are not in its base model: merge it first, "
            "`PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(FOLDER)`, and give FOLDER."
        )


def _is_adapter(source: str, options: dict[str, Any]) -> bool:
    """Whether a folder, or a repository as far as it is in the cache or can be asked, holds an adapter of PEFT."""
    if Path(source).is_dir():
        return Path(source, options.get("subfolder") or "", _ADAPTER).is_file()
    if can_only_be_a_path(source):
        return False
    from transformers.utils import find_adapter_config_file

    try:
        return find_adapter_config_file(source, **options) is not None
    except Exception:  # of the connection and of names that are no ids: what it is, cannot be told
        return False


def _check_place(name: str) -> None:
    path = Path(name)
    if path.is_file():
        how = _FILES.get(path.suffix, "give a folder or the id of a model on the Hub").format(name=path.name)
        raise CheckpointError(f"cannot load {name!r}: it is a file; {how}.")
    if can_only_be_a_path(name) and not path.exists():
        raise CheckpointError(f"cannot load {name!r}: there is no such folder.")


def _explain(name: str, folder: Path, part: str, wrong: Exception) -> str:
    """One line about what went wrong, with the file that is to blame where one is damaged."""
    found = _damaged_file(folder) if folder.is_dir() else None
    if found is not None:
        return f"cannot load {name!r}: {found}"
    said = " ".join(str(wrong).split()) or type(wrong).__name__
    if isinstance(wrong, StrictDataclassError):
        said = str(wrong).splitlines()[-1].strip().removeprefix("TypeError: ").removeprefix("ValueError: ")
    elif not isinstance(wrong, (OSError, ValueError, ImportError)):  # their words say what is meant, of others do not
        said = f"{type(wrong).__name__}: {said}"
    where = f"{part} cannot be used: " if part and folder.is_dir() else ""
    return f"cannot load {name!r}: {where}{said}"


def _damaged_file(folder: Path) -> str | None:
    """What is wrong with a large file, which is only read to find out what an error came from."""
    try:
        if (folder / "tokenizer.json").is_file():
            read_json_object(folder / "tokenizer.json", repeats=True)
    except CheckpointError as error:
        return str(error)
    if not any((folder / file).exists() for file in _WEIGHTS):
        return None
    found = damaged_weights(folder, _WEIGHTS)
    return found and f"{found}."
