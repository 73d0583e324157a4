"""Writes files and folders all at once: after an error, an interrupt or a kill there is the old one or the new one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError, PlaceError
from ..masking import masked
from .places import (
    PROBE,
    alone,
    check_place,
    check_room,
    draft,
    is_device,
    must_stay,
    of_the_system,
    parents_of,
    reason,
    resolve,
    said,
)


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
        with _draft_of(path) as (temporary, place):
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
    with _errors(path), _draft_of(path) as (folder, place):
        folder.mkdir()
        yield folder / place.name
        os.replace(folder / place.name, place)


@contextmanager
def _draft_of(path: str | os.PathLike) -> Iterator[tuple[Path, Path]]:
    """A name beside a file and the file itself; what is under the name goes, also what a killed process has left."""
    place = resolve(path, file=True)
    temporary = draft(place, _NEW)
    with alone(place), parents_of(place):
        try:
            _discard(temporary, draft(place, PROBE))
            yield temporary, place
        finally:
            _discard(temporary)


@contextmanager
def _errors(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if of_the_system(error) is None:
            raise
        check_place(path, file=True)  # which knows better why
        raise PlaceError(f"{said(path)} cannot be written: {reason(error)}.") from error


# Files of an earlier checkpoint that would be mistaken for part of a new one.
# What was measured on the earlier weights goes with them; the results of the dense model stay.
_OURS = (
    "*.safetensors", "*.safetensors.index.json", "modeling_structprune.py",
    "evaluation_results.json", "evaluation_results_pruned.json", "evaluation_results_recovered.json", ".eval_results",
    "pruned_widths.png", "recovery.json", "recovery.png", "quantization.json",
)  # fmt: skip
# Without this file nothing loads: where a folder cannot change all at once, it goes first and comes last.
_ENTRY = "config.json"

# Kinds of drafts: `new` is being written, or was there before; `old` was there and comes back if nothing is; `ready`
# is whole and will be moved into the folder, file by file; `moving` is on its way.
_NEW, _OLD, _READY, _MOVING = "new", "old", "ready", "moving"

# With these a folder cannot be renamed although its parent can be written (in use, a lower layer, ...), or its files
# cannot have two names.
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
_CANNOT_MOVE = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EMLINK, *_CANNOT_EXCHANGE)


def write_folder(folder: str | os.PathLike, write: Callable[[Path], None], size: int = 0) -> None:
    """Fills a folder all at once: what is written appears only when everything has been.

    The files are made in a hidden folder beside it, which then changes places with the one that is there, in one step
    where the system can; after an error or an interrupt the folder is as it was before. Where the process is killed,
    at any moment, the folder is the one from before or the new one; what else it leaves is put in order by the next
    writing or loading of this name, see `settle`. Other processes that write the same folder wait.

    A link is followed and stays. A folder that must stay itself (the working directory or one above it, a mounted file
    system, a folder in one without permission to write) is filled from a hidden folder in it, by renaming: there an
    earlier `config.json` goes first and the new one comes last, so that no mixture of two checkpoints can be loaded.

    Args:
        folder: Where the files go. Other files in it stay, but an earlier checkpoint in it goes.
        write: Writes the files into the folder it is given.
        size: Bytes that will be written, to see before whether the disk has room for them.

    Raises:
        PlaceError: The place cannot be written, or there is too little room.
        CheckpointError: Writing failed.
    """
    place = resolve(folder)
    with alone(place):
        _settle(place)
        check_room(folder, size)
        inside = place.is_dir() and must_stay(place)
        new = draft(place, _NEW, inside=inside)
        with _folder_errors(folder, place), parents_of(place):
            try:
                new.mkdir()
                write(new)
                (_pour if inside else _change_places)(new, place)
            finally:
                _settle(place)


def check_folder(folder: str | os.PathLike) -> None:
    """Refuses a folder that cannot be written, before any work is done; what killed processes left there is settled.

    Raises:
        PlaceError: See `places.check_place`.
    """
    settle(folder)
    check_place(folder)


def settle(folder: str | os.PathLike) -> None:
    """Finishes or takes back what a killed process has left of writing a folder; nothing happens where nothing was.

    A folder that stood beside its name in the moment of the kill is put back, files that were on their way to the
    folder arrive, and half-written ones go. What a living process writes is left alone, and so is what was left on
    another machine.

    Args:
        folder: The folder, which may be missing; ids of the Hub have nothing to put in order.
    """
    with contextlib.suppress(OSError, ValueError):
        place = Path(os.path.realpath(folder))
        if _left(place, _NEW, _OLD, _READY, _MOVING, PROBE):
            with alone(place, wait=False):
                _settle(place)


def _settle(place: Path) -> None:
    """Puts in order what is left of writing a folder; only for who has it `alone`."""
    _discard(*_left(place, _NEW, PROBE))
    with contextlib.suppress(OSError):
        for old in _left(place, _OLD):
            # At once: half of it would be taken for what was there.
            old.rename(place if not place.exists() else old.with_suffix(f".{_NEW}"))
        _discard(*_left(place, _NEW))
        for path in _left(place, _READY, _MOVING):
            _go_on_pouring(path, place)


def _left(place: Path, *kinds: str) -> list[Path]:
    paths = [draft(place, kind, inside=inside) for kind in kinds for inside in (False, True)]
    return [path for path in paths if path.exists()]


@contextlib.contextmanager
def _folder_errors(folder: str | os.PathLike, place: Path) -> Iterator[None]:
    """Turns what the file system says into one line that tells what is in the folder now."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        if of_the_system(cause) is None and not isinstance(cause, SafetensorError):
            raise
        state = f"{said(folder)} is unchanged"
        if _left(place, _READY, _MOVING):
            state = f"{said(folder)} is written in part, and the rest follows when it is written or loaded again"
        raise CheckpointError(f"The checkpoint could not be written, {state}: {reason(cause)}.") from error


def _change_places(new: Path, place: Path) -> None:
    """Puts a finished draft in the place of a folder."""
    if not place.exists():
        new.rename(place)
        return
    written = set(os.listdir(new))
    try:
        _take_along([path for path in place.iterdir() if path.name not in written and not _is_ours(path)], new)
        _like(place, new)
        if not _exchange(new, place):
            place.rename(new.with_suffix(f".{_OLD}"))
            new.rename(place)
    except OSError as error:
        if error.errno not in _CANNOT_MOVE or not place.exists():
            raise
        _discard(*(path for path in new.iterdir() if path.name not in written))
        _pour(new, place)


def _take_along(paths: Iterable[Path], new: Path) -> None:
    """Gives files, and those in folders, a second name in a new folder."""
    for path in paths:
        name = new / path.name
        if path.is_symlink():
            name.symlink_to(os.readlink(path))
        elif path.is_dir():
            name.mkdir()
            _take_along(path.iterdir(), name)
            _like(path, name)
        else:
            os.link(path, name)


def _like(folder: Path, new: Path) -> None:
    """Who may do what in the new folder is what it was in the old one."""
    shutil.copymode(folder, new)
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(new, -1, folder.stat().st_gid)


def _pour(new: Path, place: Path) -> None:
    """Moves the files of a finished draft to their names in a folder."""
    _go_on_pouring(new.rename(new.with_suffix(f".{_READY}")), place)


def _go_on_pouring(path: Path, place: Path) -> None:
    """Does what is left to do; it does not matter how much of it was done before."""
    if path.suffix == f".{_READY}":
        names = set(os.listdir(path))
        if _ENTRY in names:
            (place / _ENTRY).unlink(missing_ok=True)
        for other in place.iterdir():
            if _is_ours(other) and other.name not in names:
                _remove(other)
        path = path.rename(path.with_suffix(f".{_MOVING}"))
    for file in sorted(path.iterdir(), key=lambda file: file.name == _ENTRY):
        target = place / file.name
        if target.is_dir() and not target.is_symlink():
            _remove(target)
        os.replace(file, target)
    path.rmdir()


def _is_ours(path: Path) -> bool:
    return any(path.match(pattern) for pattern in _OURS)


def _discard(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Two folders change places in one step; `False` where the system has no such step.

    Raises:
        OSError: It has, but these two cannot.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if function is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
    if function(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), os.fspath(one), None, os.fspath(other))
