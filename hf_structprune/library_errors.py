"""What the libraries below raise for the Hub and for models that cannot be read, in words that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)

from .errors import CheckpointError, HubError, StructPruneError
from .files.reading import can_only_be_a_path, damage, damaged_weights, read_json_object
from .files.writing import settle
from .masking import causes, is_masked, remember


# The base class of the errors of the client's HTTP library, which is another one in other versions of the client.
_HTTP_ERROR = HfHubHTTPError.__mro__[1]
LOGIN = "`hf auth login`, the environment variable HF_TOKEN or the argument `token` gives one"


def is_network_error(error: BaseException) -> bool:
    """Whether an error comes from the connection and not from what was asked."""
    known = isinstance(error, (ConnectionError, TimeoutError, _HTTP_ERROR))
    return known and not isinstance(error, HfHubHTTPError)


def unreachable(error: BaseException) -> str | None:
    """Why the Hub was not asked for what is not here, with the way out; `None` for an error of another kind."""
    chain = list(causes(error))
    if not any(isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)) for cause in chain):
        return None
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set (unset it to ask the Hub)"
    lost = next((cause for cause in chain if is_network_error(cause)), None)
    if lost is None:
        return "the Hub was not asked (`local_files_only`)"
    return f"the Hub cannot be reached (check the connection: {' '.join(str(lost).split())})"


@contextmanager
def clear_errors(repo_id: str, token: str | None = None) -> Iterator[None]:
    """Turns what the client raises while it talks about a repository into `HubError`s that say what to do.

    What they were raised from is kept for the traceback unless the token stands in it.
    """
    remember(token)
    try:
        yield
    except StructPruneError:
        raise
    except Exception as error:
        if (message := explain(error, repo_id)) is None:
            raise
        raise HubError(message) from (error if is_masked(error) else None)


_MEANINGS = (
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, so that nothing can be pushed; unset it and push again."),
    (LocalTokenNotFoundError, f"There is no token for the Hub; {LOGIN}."),
    (GatedRepoError, "{repo} is gated: accept its conditions on its page on the Hub with the account of your token, "
                     f"then try again ({LOGIN})."),
    (HFValidationError, "{repo!r} is not the id of a repository, such as user/name: {error}"),
)  # fmt: skip


def explain(error: BaseException, repo_id: str) -> str | None:
    """One sentence for an error of the client and its causes; `None` for one that is not about the Hub."""
    if isinstance(error, ValueError) and "README.md" in str(error):
        return f"The Hub refuses the model card: {error}"
    chain = list(causes(error))
    for kind, words in _MEANINGS:
        for cause in chain:
            if isinstance(cause, kind):
                return words.format(repo=repo_id, error=cause)
    for cause in chain:
        if isinstance(cause, HfHubHTTPError) and getattr(cause, "response", None) is not None:
            status, said = cause.response.status_code, (cause.server_message or "").strip()
            other = "The Hub refused the request for {repo} ({status})."
            if status >= 500:
                other = "The Hub answered with the error {status}; nothing was committed to {repo}, push again later."
            answer = _STATUSES.get(status, other).format(repo=repo_id, status=status)
            return f"{answer} The Hub says: {said}" if said else answer
        if is_network_error(cause):
            return (
                f"The connection to the Hub was lost while pushing to {repo_id} ({type(cause).__name__}: {cause}). "
                "Nothing is lost here, and files that had arrived stay there: the same command uploads only what is "
                "missing."
            )
    if isinstance(error, (OSError, RuntimeError)):  # the storage backend has errors of many kinds
        return f"The push to {repo_id} failed: {error}. Nothing is lost here; push again."
    return None


_CHANGED = "{repo} was changed by someone else at the same time; nothing was committed, push again."
_STATUSES = {
    401: f"The Hub does not accept the token for {{repo}}: it is wrong or has expired; {LOGIN}.",
    403: "The token has no right to write to {repo}: use one with the role `write` of an account that may, choose a "
         "repository of your own, or propose the change with `create_pr`.",
    404: "There is no {repo} on the Hub, or the token cannot see it; check the name and the revision.",
    409: _CHANGED, 412: _CHANGED,
    429: "The Hub asks to slow down; wait a few minutes and push again.",
}  # fmt: skip


# Files that Transformers reads besides the weights. Some of them it leaves out without a word where they are damaged.
_OBJECTS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "adapter_config.json",
)  # fmt: skip
# How to load files that are no models by themselves, by their endings.
_WEIGHTS = "give the folder that it is in, in which config.json says what model the weights are of"
_FILES = {
    ".gguf": "give the folder that it is in as the model, and its name as `gguf_file` (--gguf-file {name})",
    ".safetensors": _WEIGHTS, ".bin": _WEIGHTS, ".json": "give the folder that it is in",
}  # fmt: skip


@contextmanager
def readable(model: str | os.PathLike, part: str = "", subfolder: str | None = None) -> Iterator[None]:
    """Stands around calls of libraries that read a model, its configuration or its tokenizer, and around nothing else.

    `part` is what is read of it, for example `"config.json"`, if one file or kind of file.

    Raises:
        CheckpointError: There is no such model, it is a file or an adapter, a file of it is damaged, or the library
            cannot make anything of it.
        HubError: The model is gated and the token has no access to it.
    """
    name, place = str(model), Path(model)
    settle(name)
    if place.is_file():
        how = _FILES.get(place.suffix, "give a folder or the id of a model on the Hub").format(name=place.name)
        raise CheckpointError(f"cannot load {name!r}: it is a file; {how}.")
    if can_only_be_a_path(name) and not place.exists():
        raise CheckpointError(f"cannot load {name!r}: there is no such folder.")
    folder = place / (subfolder or "")
    for path in (folder / file for file in _OBJECTS):
        if path.is_file():
            read_json_object(path, repeats=True)
    try:
        yield
    except StructPruneError:
        raise
    except Exception as wrong:  # libraries raise every kind there is for files that are not as they should be
        if any(isinstance(cause, GatedRepoError) for cause in causes(wrong)):
            raise HubError(f"{explain(wrong, name)}") from (wrong if is_masked(wrong) else None)
        raise CheckpointError(_explain(name, folder, part, wrong)) from (wrong if is_masked(wrong) else None)


def refuse_adapter(model: str | os.PathLike, **options: Any) -> None:
    """Refuses a folder or repository that holds an adapter of PEFT: Transformers would load its base model under it.

    A repository is looked at as far as it is in the cache or can be asked. A `CheckpointError` says what to do.
    """
    found: Any = None
    if Path(model).is_dir():
        found = Path(model, options.get("subfolder") or "", "adapter_config.json").is_file()
    elif not can_only_be_a_path(str(model)):
        from transformers.utils import find_adapter_config_file

        with suppress(Exception):  # of the connection and of names that are no ids: what it is, cannot be told
            found = find_adapter_config_file(str(model), **options)
    if found:
        raise CheckpointError(
            f"{model} holds an adapter of PEFT, whose weights are not in its base model: merge it first, "
            "`PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(FOLDER)`, and give FOLDER."
        )


def _explain(name: str, folder: Path, part: str, wrong: Exception) -> str:
    """One line about what went wrong, with the file that is to blame where one is damaged."""
    weights = ("model.safetensors", "model.safetensors.index.json")
    found = damaged_weights(folder) if any((folder / weight).exists() for weight in weights) else None
    if (folder / "tokenizer.json").is_file():  # large, and only read to find out what an error came from
        found = damage(folder / "tokenizer.json") or found
    if found is not None:
        return f"cannot load {name!r}: {found}."
    said = " ".join(str(wrong).split()) or type(wrong).__name__
    if not folder.is_dir():
        if (why := unreachable(wrong)) is not None:
            return f"cannot load {name!r}: it is no folder, not whole in the Hub's cache, and {why}."
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes(wrong)):
            return f"cannot load {name!r}: it is no folder, and no model of the Hub that the token can see; {LOGIN}."
    if isinstance(wrong, StrictDataclassError):
        said = str(wrong).splitlines()[-1].strip().removeprefix("TypeError: ").removeprefix("ValueError: ")
    elif not isinstance(wrong, (OSError, ValueError, ImportError)):  # their words say what is meant, of others do not
        said = f"{type(wrong).__name__}: {said}"
    where = f"{part} cannot be used: " if part and folder.is_dir() else ""
    return f"cannot load {name!r}: {where}{said}"
