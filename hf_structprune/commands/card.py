"""`hf-structprune card DIR`: writes the model card of a pruned checkpoint, with what has been measured by now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import HubError
from .arguments import parse
from .common import results_only_on_stdout, show


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


def run(argv: Sequence[str]) -> None:
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
