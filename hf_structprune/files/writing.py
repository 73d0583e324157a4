"""Names of files and folders; writing single files so that an interrupt leaves what was there."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import PlaceError
from ..masking import masked
from .leftovers import claim, draft, drafts, release
from .places import PROBE, check_place, check_room, is_device, of_the_system, parents_of, reason, resolve, said


# A file that is being written, or the folder it is written in.
_PART = "part"


def can_only_be_a_path(name: str) -> bool:
    """Whether a name is no id of the Hub: those have at most one slash, within, and begin with a letter or digit."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file (UTF-8) all at once and without the secrets that stand in it, see `write_bytes`."""
    write_bytes(path, masked(text).encode("utf-8"))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file all at once: into a temporary file beside it, which then takes its name.

    A link is followed and stays; a file that is replaced keeps who may read and write it.

    Raises:
        PlaceError: It cannot be written.
    """
    with _errors(path):
        if is_device(path):
            Path(path).write_bytes(content)
            return
        with _draft(path) as (temporary, place):
            temporary.write_bytes(content)
            if place.exists():
                temporary.chmod(stat.S_IMODE(place.stat().st_mode))
            os.replace(temporary, place)


@contextmanager
def appearing(path: str | os.PathLike, size: int = 0) -> Iterator[Path]:
    """A temporary name beside a file, which takes the file's name when the block ends without an error.

    Args:
        path: The file; one of that name is replaced then. A link to one is followed and stays.
        size: Bytes that will be written, to see before whether the disk has room for them.

    Raises:
        PlaceError: The file cannot be written, or there is too little room.
    """
    check_room(path, size, file=True)
    with _errors(path), _draft(path) as (folder, place):
        folder.mkdir()
        yield folder / place.name
        os.replace(folder / place.name, place)


@contextmanager
def _draft(path: str | os.PathLike) -> Iterator[tuple[Path, Path]]:
    """A name beside a file and the file itself; what is under the name is removed, and what dead processes left."""
    place = resolve(path, file=True)
    for left in filter(None, map(claim, drafts(place, kinds=(_PART, PROBE)))):
        _remove(left)
        release(left)
    temporary = draft(place, _PART)
    with parents_of(place):
        try:
            yield temporary, place
        finally:
            _remove(temporary)
            release(temporary)


@contextmanager
def _errors(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if of_the_system(error) is None:
            raise
        check_place(path, file=True)  # which knows better why
        raise PlaceError(f"{said(path)} cannot be written: {reason(error)}.") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()
