"""Pushes a checkpoint folder to the Hub: everything in one commit."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from transformers.utils import logging

from ..errors import HubError
from .card import write_card
from .network import LOGIN, clear_errors
from .own_files import check_own_files
from .uploads import check_checkpoint, choose_files, stale_files


logger = logging.get_logger(__name__)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Pushes a checkpoint of this package to the Hub, in one commit.

    The card is written anew first, with the name of the repository (see `write_card`: text in its marked sections
    stays, a README.md of other origin is pushed as it is). Then go weights, configuration, tokenizer, generation
    configuration, plan, results, pictures, card, `.eval_results/`, and the recipe if there is one. Hidden files,
    pickles and what training leaves stay behind. Weights and results of an earlier push that are not replaced are
    deleted in the same commit.

    If the connection breaks, nothing is committed; a second call uploads only what had not arrived.

    Args:
        folder: The checkpoint.
        repo_id: Where it goes, such as `"me/SmolLM2-135M-pruned"`; made if it is not there.
        private: Make a new repository private. `None` leaves that to the account's settings.
        token: Token with the right to write. Default: that of `hf auth login` or `HF_TOKEN`.
        commit_message: First line of the commit.
        revision: Branch to commit to, made if it is not there. Default: `main`.
        create_pr: Open a pull request instead.

    Returns:
        The commit, with `commit_url`, `oid` and `pr_url`.

    Raises:
        HubError: The folder is not complete or not ours, the token is missing, wrong or has no right, the Hub cannot
            be reached, or `private` was asked for and the repository is public.
        CheckpointError: A file of this package in the folder is damaged.
    """
    folder = Path(folder)
    check_checkpoint(folder)
    check_own_files(folder)
    _check_token(token)
    if create_pr and revision not in (None, "main"):
        raise HubError(f"`create_pr` proposes a change to `main`; it cannot go to the branch {revision!r} as well.")
    with clear_errors(repo_id, token):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise HubError(
                f"{repo_id} exists and is public; nothing was pushed. Make it private in its settings first."
            )
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        write_card(folder, name=repo_id)
        go, stay = choose_files(folder)
        if stay:
            logger.warning(f"Not uploaded: {', '.join(map(str, stay))}.")
        remote = api.list_repo_files(repo_id, revision=revision)
        operations = [CommitOperationAdd(path.as_posix(), folder / path) for path in go]
        operations += [CommitOperationDelete(name) for name in stale_files(remote, go)]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload {repo_id.rpartition('/')[2]}, pruned by hf_structprune",
            revision=revision,
            create_pr=create_pr,
        )


def _check_token(token: str | None) -> None:
    """Refuses a token that no request can carry: the HTTP library would print it."""
    found = token if token is not None else get_token()
    if not found:
        raise HubError(f"There is no token for the Hub; {LOGIN}.")
    if not found.isascii() or not found.isprintable() or " " in found:
        raise HubError("The token has spaces, line breaks or other characters that no token of the Hub has.")
