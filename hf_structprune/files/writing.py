"""Writes files and folders all at once: after an error, an interrupt or a kill there is the old one or the new one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError, PlaceError
from ..masking import masked
from .places import (
    PROBE,
    as_kind,
    check_place,
    check_room,
    claim,
    draft,
    drafts,
    is_device,
    kind_of,
    must_stay,
    number_of,
    of_the_system,
    parents_of,
    reason,
    release,
    resolve,
    said,
)


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
        _discard(left)
    temporary = draft(place, _PART)
    with parents_of(place):
        try:
            yield temporary, place
        finally:
            _discard(temporary)


def _discard(draft: Path) -> None:
    with contextlib.suppress(OSError):
        _remove(draft)
    release(draft)


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
# In a finished draft until it has its place: tells it from what it has changed places with.
_MARK = ".unfinished-"

# Kinds of drafts. Beside the folder: `new` is being written, `swap` changes places with what is there, `old` was
# there, `gone` is not wanted any more. In a folder that must stay itself: `new`, then `ready` to be moved, then
# `moving`.
_NEW, _SWAP, _OLD, _GONE, _READY, _MOVING = "new", "swap", "old", PROBE, "ready", "moving"

# From here on a folder cannot be renamed although its parent can be written: mounted, in use, of a lower layer, ...
_CANNOT_MOVE = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


def write_folder(folder: str | os.PathLike, write: Callable[[Path], None], size: int = 0) -> None:
    """Fills a folder all at once: what is written appears only when everything has been.

    The files are made in a hidden folder beside it, which then changes places with the one that is there, in one step
    where the system can; after an error or an interrupt the folder is as it was before. Where the process is killed,
    at any moment, the folder is the one from before or the new one; what else it leaves is put in order by the next
    writing or loading of this name, see `settle`.

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
    settle(folder)
    check_room(folder, size)
    inside = place.is_dir() and must_stay(place)
    new = draft(place, _NEW, place if inside else None)
    with _folder_errors(folder, new, place), parents_of(place), _tidied(new, place):
        new.mkdir()
        write(new)
        (_pour if inside else _change_places)(new, place)


def check_folder(folder: str | os.PathLike) -> None:
    """Refuses a folder that cannot be written, before any work is done; what dead processes left there is settled.

    Args:
        folder: The folder, which need not exist yet.

    Raises:
        PlaceError: See `places.check_place`.
    """
    settle(folder)
    check_place(folder)


def settle(folder: str | os.PathLike) -> None:
    """Finishes or takes back what a dead process has left of writing a folder; nothing happens where nothing was left.

    A folder that stood beside its name in the moment of the kill is put back, other files of the user that were on
    their way to the new folder arrive, and half-written files go. What a living process uses is left alone, and so is
    what was left on another machine.

    Args:
        folder: The folder, which may be missing; ids of the Hub have nothing to put in order.
    """
    try:
        place = Path(os.path.realpath(folder))
        left = drafts(place, kinds=(_NEW, _SWAP, _OLD, _GONE))
        left += drafts(place, place, kinds=(_NEW, _READY, _MOVING, _GONE))
    except (OSError, ValueError):
        return
    for path in left:
        with contextlib.suppress(OSError):
            mine = claim(path)
            if mine is None:
                continue
            with _tidied(mine, place):
                if kind_of(mine) in (_READY, _MOVING):
                    _go_on_pouring(mine, place)


@contextlib.contextmanager
def _folder_errors(folder: str | os.PathLike, new: Path, place: Path) -> Iterator[None]:
    """Turns what the file system says into one line that tells what is in the folder now."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        if of_the_system(cause) is None and not isinstance(cause, SafetensorError):
            raise
        state = f"{said(folder)} is unchanged"
        if any((place / as_kind(new, kind).name).exists() for kind in (_READY, _MOVING)):
            state = f"{said(folder)} is written in part, and the rest follows when it is written or loaded again"
        raise CheckpointError(f"The checkpoint could not be written, {state}: {reason(cause)}.") from error


@contextlib.contextmanager
def _tidied(draft: Path, place: Path) -> Iterator[None]:
    """Nothing is left of a draft, after success, failure or interrupt."""
    try:
        yield
    finally:
        try:
            for kind in (_SWAP, _OLD):
                there = as_kind(draft, kind)
                if not there.is_dir():
                    continue
                if _mark(there).exists():
                    there.rename(as_kind(draft, _GONE))  # at once: half of it would be taken for what was there
                else:
                    _take_over(there, place)
            for kind in (_NEW, _GONE):
                shutil.rmtree(as_kind(draft, kind), ignore_errors=True)
        finally:
            release(draft)


def _change_places(new: Path, place: Path) -> None:
    """Puts a finished draft in the place of a folder."""
    if not place.exists():
        new.rename(place)
        return
    _like(place, new)
    swap = as_kind(new, _SWAP)
    _mark(new).touch()
    new.rename(swap)
    try:
        if not _exchange(swap, place):
            old = as_kind(new, _OLD)
            place.rename(old)
            swap.rename(place)
    except OSError as error:
        if error.errno not in _CANNOT_MOVE or not place.exists():
            raise
        within = place / new.name
        shutil.copytree(swap, within, ignore=shutil.ignore_patterns(f"{_MARK}*"))
        _pour(within, place)


def _pour(new: Path, place: Path) -> None:
    """Moves the files of a finished draft in a folder to their names there."""
    ready = as_kind(new, _READY)
    new.rename(ready)
    try:
        _go_on_pouring(ready, place)
    except KeyboardInterrupt:
        _go_on_pouring(next(path for path in (as_kind(new, _MOVING), ready) if path.exists()), place)
        raise


def _go_on_pouring(path: Path, place: Path) -> None:
    """Does what is left to do; it does not matter how much of it was done before."""
    if kind_of(path) == _READY:
        names = set(os.listdir(path))
        if _ENTRY in names:
            (place / _ENTRY).unlink(missing_ok=True)
        for other in place.iterdir():
            if _is_ours(other) and other.name not in names:
                _remove(other)
        path = path.rename(as_kind(path, _MOVING))
    for file in sorted(path.iterdir(), key=lambda file: file.name == _ENTRY):
        target = place / file.name
        if target.is_dir() and not target.is_symlink():
            _remove(target)
        os.replace(file, target)
    path.rmdir()


def _take_over(old: Path, place: Path) -> None:
    """Puts a folder back that lost its place; if another has it, other files of the old one go there."""
    if not place.exists():
        old.rename(place)
        return
    new = set(os.listdir(place))
    for path in old.iterdir():
        if path.name not in new and not _is_ours(path):
            path.rename(place / path.name)
    (place / _mark(old).name).unlink(missing_ok=True)
    shutil.rmtree(old.rename(as_kind(old, _GONE)), ignore_errors=True)


def _mark(path: Path) -> Path:
    return path / f"{_MARK}{number_of(path)}"


def _is_ours(path: Path) -> bool:
    return any(path.match(pattern) for pattern in (*_OURS, f"{_MARK}*"))


def _like(folder: Path, new: Path) -> None:
    """Who may do what in the new folder is what it was in the old one."""
    shutil.copymode(folder, new)
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(new, -1, folder.stat().st_gid)


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
