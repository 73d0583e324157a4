"""`hf-structprune card` and `push`: writes the model card of a checkpoint, and pushes it to the Hub in one commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import HubError
from .arguments import parse
from .cli import results_only_on_stdout, show


@dataclass
class CardArguments:
    """The card.

    Args:
        folder (`str`): The checkpoint.
        name (`str`, *optional*): Id it will have on the Hub, for the lines that load it. Default: the folder's name.
        base_model (`str`, *optional*): Hub id or folder of the model that was pruned. Default: what was recorded.
        overwrite (`bool`): Replace a README.md that was not written by this command.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    folder: str
    name: str | None = None
    base_model: str | None = None
    overwrite: bool = False
    json: bool = False


def card_command(argv: Sequence[str]) -> None:
    """Writes the card and says where and how it was checked."""
    description = "Write the model card of the checkpoint in DIR. Text in its marked sections is kept."
    (command,) = parse(argv, "card", description, CardArguments)
    with results_only_on_stdout():
        from ..hub import validate_card, write_card

        path = write_card(
            command.folder, name=command.name, base_model=command.base_model, overwrite=command.overwrite
        )
        if path is None:
            raise HubError(
                f"The README.md in {command.folder} was not written by hf_structprune; say --overwrite to replace it."
            )
        asked = validate_card(path)
    how = "The Hub finds its metadata valid." if asked else "Its metadata was checked here; the Hub was not asked."
    show(command.json, {"card": str(path), "checked_by_hub": asked}, f"Wrote {path}. {how}")


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


def push_command(argv: Sequence[str]) -> None:
    """Pushes and prints the address."""
    (command,) = parse(argv, "push", "Push the checkpoint in DIR to the Hub.", PushArguments)
    with results_only_on_stdout():
        from ..hub import push_folder

        options = {name: getattr(command, name) for name in ("revision", "create_pr", "commit_message")}
        commit = push_folder(command.folder, command.repo_id, private=command.private or None, **options)
    data = {"repo_id": commit.repo_url.repo_id, **{n: getattr(commit, n) for n in ("commit_url", "oid", "pr_url")}}
    show(command.json, data, f"Pushed to {commit.repo_url}: {commit.pr_url or commit.commit_url}")
