"""What travels in the checkpoints of a training, so that it can be resumed: the curve and the best weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigurationError
from ..files.writing import write_text
from .curve import Point, RecoveryCurve
from .session import Clock, Session, agreed


STATE_NAME = "recovery_state.json"
BEST_NAME = "recovery_best.safetensors"


def write_state(session: Session, folder: Path, settings: dict[str, Any]) -> None:
    """Writes the curve so far and the best weights into a checkpoint; the curve last, so that it is never alone.

    Args:
        session: The training.
        folder: The checkpoint.
        settings: What the training was begun with, see `begun`; empty for a training that `recover` does not run.
    """
    session.best.copy_to(folder / BEST_NAME)
    state = {
        "schema_version": 1,
        "curve": session.curve.to_dict(),
        "kept": asdict(session.kept),
        "text": session.watch.describe(),
        "seconds": round(session.clock.seconds, 3),
        "settings": settings,
    }
    write_text(folder / STATE_NAME, json.dumps(state, indent=1, allow_nan=False) + "\n")


def find_state(folders: list[str | Path | None]) -> Path | None:
    """The first folder that has a state."""
    return next((Path(folder) for folder in folders if folder and (Path(folder) / STATE_NAME).is_file()), None)


def read_state(session: Session, folder: Path) -> None:
    """Puts a session back to where `write_state` wrote it; the first process reads for all.

    Raises:
        ConfigurationError: It was measured on another text.
        CheckpointError: It cannot be read.
    """
    state = agreed(_read(folder / STATE_NAME, session.watch.describe()) if session.best.writes else None)
    session.curve, session.kept = RecoveryCurve.from_dict(state["curve"]), Point(**state["kept"])
    session.best.take_from(folder / BEST_NAME)
    session.clock = Clock(state["seconds"])


def _read(path: Path, text: dict[str, Any]) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        theirs = state["text"]
        complete = all(key in state for key in ("curve", "kept", "seconds"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    if not complete:
        raise CheckpointError(f"{path} is incomplete: remove it to measure anew.")
    differing = [key for key in text if key != "source" and theirs.get(key) != text[key]]
    if differing:
        raise ConfigurationError(
            f"{path} is of another text or other windows ({', '.join(differing)}): give the callback the same ones, "
            "or remove the file to measure anew."
        )
    return state
