"""Checkpoints of this package: saved whole, carried over to the next one, and pushed to the Hub in one commit."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import CONFIG_NAME, PruningConfig
from ..errors import HubError, StructPruneError
from ..evaluation.results import RESULTS_NAME
from ..files.reading import damaged_weights
from ..files.shards import Shards
from ..files.writing import check_folder, write_folder
from ..library_errors import LOGIN, clear_errors
from ..model.rebuild import check_whole
from ..plan import PLAN_NAME, PruningPlan
from ..progress import hidden
from .card import EVAL_RESULTS, TASKS, card_name, is_ours, write_card
from .contents import BEFORE, CARD_NAME, DENSE_RESULTS_NAME, WIDTHS_NAME, Contents, check_card, read_text
from .older import write_for_older
from .origin import Origin
from .words import PICTURE_NAME, QUANTIZATION_NAME, RECOVERY_NAME


logger = logging.get_logger(__name__)


def save_checkpoint(
    model: PreTrainedModel, tokenizer: Any, folder: Path, name: str, *, config: PruningConfig,
    plan: PruningPlan | None, origin: Origin | None, shards: Shards | None = None, **kwargs: Any,
) -> None:  # fmt: skip
    """Writes a pruned model as a checkpoint that the card calls `name`, all at once or not at all.

    A `plan` of `None` is refused; `shards` are the weights, where they are written already and not in the model;
    `kwargs` go to the model's `save_pretrained`.
    """
    check_whole(model)
    if plan is None:
        raise StructPruneError("Nothing has been pruned yet: call `prune` before `save_pretrained` or `push_to_hub`.")
    check_folder(folder)
    previous = read_text(folder / CARD_NAME)

    def write(path: Path) -> None:
        if shards is None:
            model.save_pretrained(path, **kwargs)
        else:
            with hidden():  # a bar of no weights
                model.save_pretrained(path, state_dict={}, **kwargs)
            shards.finish(path, model.num_parameters())
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        write_for_older(path, model.config)
        config.save(path / CONFIG_NAME)
        plan.save(path / PLAN_NAME)
        write_card(path, name=name, previous=previous, recorded=origin)

    write_folder(folder, write, size=plan.bytes_after if shards is None else 0)


# What neither training nor quantising changes: how it was pruned, how wide it is, what the dense model could do.
STILL_TRUE = (CONFIG_NAME, PLAN_NAME, DENSE_RESULTS_NAME, WIDTHS_NAME)


def copy_files(earlier: Path, target: Path, names: Sequence[str]) -> None:
    """Copies those of the files that are there."""
    for name in names:
        if (earlier / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(earlier / name, target / name)


def write_card_from(earlier: Path, path: Path, folder: Path, previous: str) -> None:
    """Writes the card of a checkpoint that was made from another one, into `path`, which will be `folder`.

    It keeps the marked texts and the metadata of `previous`, the card in the folder now, or else of that of `earlier`.
    """
    theirs = read_text(earlier / CARD_NAME)
    replaced = previous or (theirs if is_ours(theirs) else "")
    or_say(lambda: write_card(path, name=card_name(folder, previous), previous=replaced), "The card", folder)


def or_say(write: Callable[[], Any], what: str, folder: Path) -> None:
    """Writes what can be made again later; if that fails, the weights of long work are saved all the same."""
    try:
        write()
    except StructPruneError as error:
        logger.warning(f"{what} was not written: {error} `hf-structprune card {folder.name}` makes the card again.")


def push_folder(
    folder: str | os.PathLike, repo_id: str, *, private: bool | None = None, token: str | None = None,
    commit_message: str | None = None, revision: str | None = None, create_pr: bool = False,
) -> CommitInfo:  # fmt: skip
    """Pushes a checkpoint of this package to the Hub, in one commit.

    The card is written anew first, with the name of the repository (see `write_card`: text in its marked sections
    stays, a README.md of other origin is pushed as it is). Then go weights, configuration, tokenizer, generation
    configuration, plan, results, pictures, card, `.eval_results/`, and the recipe if there is one. Hidden files,
    pickles and what training leaves stay behind. Weights and results of an earlier push that are not replaced are
    deleted in the same commit. If the connection breaks, nothing is committed; a second call uploads only what had
    not arrived.

    Args:
        repo_id: Where it goes, such as `"me/SmolLM2-135M-pruned"`; made if it is not there.
        private: Make a new repository private. `None` leaves that to the account's settings.
        token: Token with the right to write. Default: that of `hf auth login` or `HF_TOKEN`.
        revision: Branch to commit to, made if it is not there. Default: `main`.

    Returns:
        The commit, with `commit_url`, `oid` and `pr_url`.

    Raises:
        HubError: The folder is not complete or not ours, the token is missing, wrong or has no right, the Hub cannot
            be reached, or `private` was asked for and the repository is public.
        CheckpointError: A file of this package in the folder is damaged.
    """
    folder = Path(folder)
    Contents(folder)
    check_card(folder)
    if (damage := damaged_weights(folder)) is not None:
        raise HubError(f"{folder} is no whole checkpoint: {damage}.")
    sent = get_token() if token is None else token
    if not sent:
        raise HubError(f"There is no token for the Hub; {LOGIN}.")
    if not sent.isascii() or not sent.isprintable() or " " in sent:  # the HTTP library would print it
        raise HubError("The token has spaces, line breaks or other characters that no token of the Hub has.")
    if create_pr and revision not in (None, "main"):
        raise HubError(f"`create_pr` proposes a change to `main`; it cannot go to the branch {revision!r} as well.")
    with clear_errors(repo_id, token):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise HubError(f"{repo_id} exists and is public; nothing was pushed. Make it private in its settings.")
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        write_card(folder, name=repo_id)
        if stay := choose_files(folder)[1]:
            logger.warning(f"Not uploaded: {', '.join(stay)}.")
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr,
            commit_message=commit_message or f"Upload {repo_id.rpartition('/')[2]}, pruned by hf_structprune",
            allow_patterns=_GO, ignore_patterns=_NEVER, delete_patterns=_STALE,
        )  # fmt: skip


# Hidden files may hold secrets (.env, .netrc, .git), all but these; pickles run code when they are read; keys are
# secret; the folders are of training.
_GO = ["[!.]*", ".gitattributes", f"{EVAL_RESULTS}/*"]
_ENDINGS = ("bin", "pt", "pth", "pkl", "pickle", "ckpt", "joblib", "npy", "npz", "pyc", "pem", "key")
_FOLDERS = ("__pycache__", "checkpoint-*", "runs", "wandb")
_NEVER = [
    "*/.*", *(f"*.{ending}" for ending in _ENDINGS), *(f"{at}{name}/*" for name in _FOLDERS for at in ("", "*/")),
]  # fmt: skip
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_LARGEST_TEXT = 10_000_000
# Files of an earlier checkpoint on the Hub that would be taken for part of this one.
_STALE = [
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "modeling_structprune.py",
    RESULTS_NAME, *BEFORE.values(), RECOVERY_NAME, PICTURE_NAME, QUANTIZATION_NAME,
    *(f"{EVAL_RESULTS}/{task}.yaml" for task in TASKS),
]  # fmt: skip


def choose_files(folder: Path) -> tuple[list[str], list[str]]:
    """The files that go to the Hub, and what stays: files, and folders that stay whole.

    A `HubError` names a file that would go and has what looks like a token of the Hub in it.
    """
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    go = list(filter_repo_objects(there, allow_patterns=_GO, ignore_patterns=_NEVER))
    for name in go:
        if (folder / name).stat().st_size < _LARGEST_TEXT and _TOKEN.search((folder / name).read_bytes()):
            raise HubError(f"{folder / name} has what looks like a token of the Hub in it; nothing was uploaded.")
    some_go = {name.partition("/")[0] for name in go}
    stay = (name if name.partition("/")[0] in some_go else name.partition("/")[0] for name in there if name not in go)
    return go, list(dict.fromkeys(stay))


def take_over(earlier: Path, target: Path) -> None:
    """Copies what stands beside the weights of one checkpoint (results, pictures, recipe, card) to another.

    Only if both have the same weights: what was measured on others is not true of these.
    """
    if not (earlier / CARD_NAME).is_file():
        return
    if _digests(earlier) != _digests(target):
        logger.warning(f"The model has changed since it was saved to {earlier}: the results there are left out.")
        return
    weights = (".safetensors", ".safetensors.index.json")
    names = [name for name in choose_files(earlier)[0] if not (name.endswith(weights) or (target / name).exists())]
    copy_files(earlier, target, [CARD_NAME, *names])


def _digests(folder: Path) -> dict[str, bytes]:
    """Hashes of the weights of a checkpoint by name, in however many files they are."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, a method and no dictionary
                values = file.get_tensor(name).flatten().view(torch.uint8).numpy()
                found[name] = hashlib.sha256(values).digest()
    return found
