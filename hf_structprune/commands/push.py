"""`hf-structprune push DIR REPO`: pushes a pruned checkpoint to the Hub, everything in one commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .arguments import parse
from .common import results_only_on_stdout, show


@dataclass
class PushArguments:
    """What goes where. The token is that of `hf auth login` or of the environment variable HF_TOKEN.

    Args:
        folder (`str`): The checkpoint.
        repo_id (`str`): The repository, such as user/name; made if it is not there.
        private (`bool`): Make a new repository private.
        revision (`str`, *optional*): Branch to commit to, made if it is not there. Default: main.
        create_pr (`bool`): Open a pull request instead of committing.
        commit_message (`str`, *optional*): First line of the commit.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    folder: str
    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    json: bool = False


def run(argv: Sequence[str]) -> None:
    """Pushes and prints the address."""
    (command,) = parse(argv, "push", "Push the checkpoint in DIR to the Hub.", PushArguments)
    with results_only_on_stdout():
        from ..hub import push_folder

        commit = push_folder(
            command.folder, command.repo_id, private=command.private or None, revision=command.revision,
            create_pr=command.create_pr, commit_message=command.commit_message,
        )  # fmt: skip
    data = {
        "repo_id": commit.repo_url.repo_id,
        "commit_url": commit.commit_url,
        "oid": commit.oid,
        "pr_url": commit.pr_url,
    }
    show(command.json, data, f"Pushed to {commit.repo_url}: {commit.pr_url or commit.commit_url}")
