"""Writes files and folders all at once: after an error, an interrupt or a kill there is the old one or the new one.

Places that cannot be written are refused before any work is done. What is being written has a hidden name beside its
place (in a folder that must stay where it is: inside), where nothing of it is taken for what it will be.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm

from ..errors import CheckpointError, PlaceError
from ..masking import masked


_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# No permission, or no such thing in this file system.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# With these a folder cannot change places with another one although its parent can be written (no such step in the
# system, a lower layer, ...), or its files cannot have two names.
_CANNOT_MOVE = (
    errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP,
    errno.ENOTSUP,
)  # fmt: skip
# Kinds of drafts: one that tries whether there can be one; one that is being written, or was there before; one that is
# whole and will be moved into the folder, file by file; one that is on its way.
_PROBE, _NEW, _READY, _MOVING = "gone", "new", "ready", "moving"
# Files of an earlier checkpoint that would be mistaken for part of a new one.
# What was measured on the earlier weights goes with them; the results of the dense model stay.
_OURS = (
    "*.safetensors", "*.safetensors.index.json", "modeling_structprune.py",
    "evaluation_results.json", "evaluation_results_pruned.json", "evaluation_results_recovered.json", ".eval_results",
    "pruned_widths.png", "recovery.json", "recovery.png", "quantization.json",
)  # fmt: skip
# Without this file nothing loads: where a folder cannot change all at once, it goes first and comes last.
_ENTRY = "config.json"


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file (UTF-8) all at once and without the secrets that stand in it, see `write_bytes`."""
    write_bytes(path, masked(text).encode("utf-8"))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file all at once, see `appearing`; what is no file, as `/dev/stdout`, takes it as it comes."""
    if is_device(path):
        with _errors(path):
            Path(path).write_bytes(content)
        return
    with appearing(path, len(content)) as temporary:
        temporary.write_bytes(content)


@contextmanager
def appearing(path: str | os.PathLike, size: int = 0) -> Iterator[Path]:
    """A temporary name beside a file, which takes the file's name when the block ends without an error.

    What a killed process has left of it goes with the next writing.

    Args:
        path: The file. A link to one is followed and stays; one that is replaced keeps who may read and write it.
        size: Bytes that will be written, to see before whether the disk has room for them.

    Raises:
        PlaceError: The file cannot be written, or there is too little room.
    """
    check_room(path, size, file=True)
    place = resolve(path, file=True)
    folder = draft(place, _NEW)
    with _errors(path), alone(place), parents_of(place):
        try:
            _discard(folder, draft(place, _PROBE))
            folder.mkdir()
            yield folder / place.name
            if place.exists():
                (folder / place.name).chmod(stat.S_IMODE(place.stat().st_mode))
            os.replace(folder / place.name, place)
        finally:
            _discard(folder)


@contextmanager
def _errors(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if of_the_system(error) is None:
            raise
        check_place(path, file=True)  # which knows better why
        raise PlaceError(f"{said(path)} cannot be written: {reason(error)}.") from error


def write_folder(folder: str | os.PathLike, write: Callable[[Path], None], size: int = 0) -> None:
    """Fills a folder all at once: what is written appears only when everything has been.

    The files are made in a hidden folder beside it, which then changes places with the one that is there, in one step;
    after an error or an interrupt the folder is as it was before. Where the process is killed, at any moment, the
    folder is the one from before or the new one; what else it leaves is put in order by the next writing or loading of
    this name, see `settle`. Other processes that write the same folder wait.

    A link is followed and stays. A folder that must stay itself (the working directory or one above it, a mounted file
    system, a folder in one without permission to write), or that the system has no such step for, is filled by
    renaming: an earlier `config.json` goes first and the new one comes last, so that no mixture of two checkpoints can
    be loaded.

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
    """As `check_place` of a folder, before any work is done; what killed processes left there is settled."""
    settle(folder)
    check_place(folder)


def settle(folder: str | os.PathLike) -> None:
    """Finishes or takes back what a killed process has left of writing a folder; nothing happens where nothing was.

    Files that were on their way to the folder arrive, and half-written ones go. What a living process writes is left
    alone, and so is what was left on another machine. Ids of the Hub have nothing to put in order.
    """
    with contextlib.suppress(OSError, ValueError):
        place = Path(os.path.realpath(folder))
        if _left(place, _NEW, _READY, _MOVING, _PROBE):
            with alone(place, wait=False):
                _settle(place)


def _settle(place: Path) -> None:
    """Puts in order what is left of writing a folder; only for who has it `alone`."""
    _discard(*_left(place, _NEW, _PROBE))
    with contextlib.suppress(OSError):
        for path in _left(place, _READY, _MOVING):
            _pour(path, place)


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
    """Puts a finished draft in the place of a folder; files of others in that get a second name in the new one."""
    if not place.exists():
        new.rename(place)
        return
    written = set(os.listdir(new))

    def stays(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if name in written or _is_ours(Path(name))} if Path(folder) == place else set()

    try:
        shutil.copytree(place, new, symlinks=True, ignore=stays, copy_function=os.link, dirs_exist_ok=True)
        with contextlib.suppress(OSError, AttributeError):
            os.chown(new, -1, place.stat().st_gid)
        _exchange(new, place)
    except OSError as error:
        if not isinstance(error, shutil.Error) and error.errno not in _CANNOT_MOVE:
            raise
        _discard(*(path for path in new.iterdir() if path.name not in written))
        _pour(new, place)


def _pour(path: Path, place: Path) -> None:
    """Moves the files of a finished draft to their names in a folder, however much of it was done before."""
    if path.suffix == f".{_NEW}":
        path = path.rename(path.with_suffix(f".{_READY}"))
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


def _exchange(one: Path, other: Path) -> None:
    """Two folders change places in one step; an `OSError` if they cannot, or the system has no such step."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
    if function is None or function(here, os.fsencode(one), here, os.fsencode(other), exchange) != 0:
        number = errno.ENOSYS if function is None else ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(one), None, os.fspath(other))


def check_place(path: str | os.PathLike, *, file: bool = False) -> None:
    """Refuses a folder, or a file if `file`, that cannot be written; it need not exist yet, and nothing is left there.

    Raises:
        PlaceError: The name is empty, too long or has a NUL in it, is that of a link to nothing, or of a file
            where a folder is meant (or the other way round), a parent is a file, or there is no permission to write.
    """
    if file and is_device(path):
        return
    place = resolve(path, file=file)
    try:
        there = _existing(place)
        inside = there == place and not file
        _try_out(draft(place if there == place else there / place.name, _PROBE, inside=inside))
    except OSError as error:
        raise PlaceError(f"{said(path)} cannot be written: {reason(error)}.") from error


def check_room(path: str | os.PathLike, size: int, *, file: bool = False) -> None:
    """As `check_place`; refuses to write more bytes than the disk of a place has left, too."""
    check_place(path, file=file)
    there = _existing(resolve(path, file=file))
    free = shutil.disk_usage(there if there.is_dir() else there.parent).free
    if size > free:
        raise PlaceError(f"{said(path)} needs {_in_words(size)}, but the disk has {_in_words(free)} left.")


_in_words = partial(tqdm.format_sizeof, suffix="B")


def resolve(path: str | os.PathLike, *, file: bool = False) -> Path:
    """The place itself, behind all links; a `PlaceError` where there can be none, or something of another kind is."""
    name, kind = os.fsdecode(path), "file" if file else "folder"
    if not name.strip():
        raise PlaceError(f"The name of the {kind} to write is empty: give one (`.` is the working directory).")
    if "\0" in name:
        raise PlaceError(f"{said(path)} is no name of a {kind}: there is a NUL in it.")
    try:
        for part in (Path(name), *Path(name).parents):
            if part.is_symlink() and not part.exists():
                raise PlaceError(f"{said(part)} is a link to {said(os.readlink(part))}, where nothing is.")
        place = Path(os.path.realpath(name))
        found = place.stat().st_mode if os.path.lexists(name) else None
    except (OSError, RuntimeError) as error:
        raise PlaceError(f"{said(path)} cannot be written: {reason(error)}.") from error
    if found is not None and not file and not stat.S_ISDIR(found):
        raise PlaceError(f"{said(path)} is a file; give the name of a folder.")
    if found is not None and file and stat.S_ISDIR(found):
        raise PlaceError(f"{said(path)} is a folder; give the name of a file.")
    if found is not None and file and not stat.S_ISREG(found):
        raise PlaceError(f"{said(path)} is neither a file nor a folder.")
    return place


def is_device(path: str | os.PathLike) -> bool:
    """Whether something is there that takes what is written, and is neither a file nor a folder, as `/dev/stdout`."""
    try:
        found = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(found) or stat.S_ISDIR(found))


def must_stay(folder: Path) -> bool:
    """Whether a folder cannot change places with another one.

    It holds the working directory or a mounted file system, or is one, or there is no permission in its parent.
    """
    in_use = _mounts()
    with contextlib.suppress(OSError):  # the working directory may be gone
        in_use.append(Path(os.path.realpath(os.getcwd())))
    if any(folder in (path, *path.parents) for path in in_use):
        return True
    try:
        _try_out(draft(folder, _PROBE))
    except OSError:
        return True
    return False


@contextlib.contextmanager
def parents_of(place: Path) -> Iterator[None]:
    """Makes the folders above a place; those that it has made go again if there is an error."""
    missing = [path for path in place.parents if not os.path.lexists(path)]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def said(path: str | os.PathLike) -> str:
    """A path as it stands in a message: on one line, and not longer than one can read."""
    name = os.fsdecode(path)
    name = name if name.isprintable() and name.strip() == name else repr(name)
    return name if len(name) <= 300 else f"{name[:140]} ... {name[-140:]}"


def of_the_system(error: BaseException | None) -> OSError | None:
    """What the system said, also where safetensors and tokenizers say `(os error 28)` in errors of theirs."""
    if isinstance(error, OSError):
        return error
    found = _OS_ERROR.search(str(error))
    return None if found is None else OSError(int(found[1]), os.strerror(int(found[1])))


def reason(error: BaseException) -> str:
    """What the system says, in one line."""
    error = of_the_system(error) or error
    if isinstance(error, OSError) and error.strerror:
        words = error.strerror[0].lower() + error.strerror[1:]
        return words if error.errno not in _REFUSED else f"{words}; choose another place"
    return " ".join(str(error).split()) or type(error).__name__


def _existing(place: Path) -> Path:
    """The place, or the nearest folder above it that is there; an `OSError` if it cannot be made below that."""
    there = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if there != place:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{said(there)} is no folder")
        for name in place.relative_to(there).parts:
            with contextlib.suppress(FileNotFoundError):
                (there / name).lstat()
    return there


def _mounts() -> list[Path]:
    """Where file systems are mounted, also folders that are mounted elsewhere once more."""
    return [Path(one.mountpoint) for one in psutil.disk_partitions(all=True)]


def _try_out(probe: Path) -> None:
    with contextlib.suppress(FileExistsError):  # by another process that asks the same
        probe.mkdir()
    with contextlib.suppress(OSError):
        probe.rmdir()


def _digits(text: str, number: int = 8) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:number]


# Drafts of other users and machines have other names: nothing here tells whether somebody still writes them.
_HERE = _digits(f"{platform.node()} {os.getuid() if hasattr(os, 'getuid') else ''}")
_LONGEST = 60


def draft(place: Path, kind: str, *, inside: bool = False) -> Path:
    """The hidden name, beside a place or inside it, of what will be there or was there: for who has it `alone`."""
    if inside:
        return place / f".{_HERE}.{kind}"
    name = place.name
    name = name if len(os.fsencode(name)) <= _LONGEST else f"{name[:12]}-{_digits(name)}"  # room for the rest
    return place.parent / f".{name}.{_HERE}.{kind}"


@contextlib.contextmanager
def alone(place: Path, *, wait: bool = True) -> Iterator[None]:
    """No other process of this user and machine has the same place while the block runs; a killed one gives it free.

    Where another one has it and should not be waited for, `filelock.Timeout` is raised.
    """
    lock = FileLock(Path(tempfile.gettempdir(), f"hf_structprune-{_HERE}-{_digits(os.fspath(place), 32)}.lock"))
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise
    except OSError:  # no room for a lock: better written without one than not at all
        pass
    try:
        yield
    finally:
        lock.release()
