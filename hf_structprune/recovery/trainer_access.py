"""What a callback is not given: the Trainer it belongs to."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from ..files.writing import write_text
from ..model.measuring import measuring


_FRAMES = 12  # from an event up to the Trainer there are two, and one for each function of ours
_ORIGINAL = "_without_recovery"


def calling_trainer(callback: TrainerCallback) -> tuple[Trainer | None, str | None]:
    """The Trainer whose event is being handled, and the checkpoint that its training was resumed from.

    Events get arguments, state and model, but not the Trainer, and without it nothing can be logged: reporting
    callbacks stand before those of the user, so what a callback adds to the logs it is handed comes too late for
    them. Only `Trainer.log` reaches all of them. So this looks at the objects that the functions further up the stack
    belong to, and takes the Trainer that has this callback. The folder given to `Trainer.train` is in the arguments of
    the same function and nowhere else.

    Args:
        callback: The callback that handles the event.

    Returns:
        The Trainer and the checkpoint's folder; `None` each where there is none.
    """
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            break
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and any(one is callback for one in owner.callback_handler.callbacks):
            folder = frame.f_locals.get("resume_from_checkpoint")
            return owner, folder if isinstance(folder, str) else None
        frame = frame.f_back
    return None, None


def log(trainer: Trainer, values: dict[str, float]) -> None:
    """Logs values through a Trainer without any effect on its own logs.

    `Trainer.log` takes back a wish to log that is still open, and TRL's adds the averages of its training metrics to
    whatever is logged in train mode, and starts them anew.
    """
    wish = trainer.control.should_log
    with measuring(trainer.model):
        trainer.log(dict(values))
    trainer.control.should_log = wish


def keep_in_card(trainer: Trainer, section: Callable[[], str]) -> None:
    """Makes every model card that a Trainer writes from now on end with a section.

    `Trainer.push_to_hub` writes the card anew after all callbacks have been called, so the section is put in by the
    writing itself.

    Args:
        trainer: The Trainer; only this one is changed.
        section: Gives the section when a card has been written.
    """
    original = getattr(trainer.create_model_card, _ORIGINAL, trainer.create_model_card)

    @functools.wraps(original)
    def create_model_card(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        card = Path(trainer.args.output_dir) / "README.md"
        if trainer.is_world_process_zero() and card.is_file():
            write_text(card, with_section(card.read_text(encoding="utf-8"), section()))
        return result

    setattr(create_model_card, _ORIGINAL, original)
    trainer.create_model_card = create_model_card


def with_section(card: str, section: str) -> str:
    """A card with a section that is in it once: in the place of an earlier one, or else at the end.

    Args:
        card: The card.
        section: Its first and its last line are comments by which an earlier one is found.
    """
    lines = section.strip().splitlines()
    before, begin, rest = card.partition(lines[0])
    _, end, after = rest.partition(lines[-1])
    if begin and end:
        return f"{before}{section.strip()}{after}"
    return f"{card.rstrip()}\n\n{section.strip()}\n"
