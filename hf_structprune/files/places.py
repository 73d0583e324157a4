"""Whether a file or folder can be written where a user asked for it, and the hidden names beside it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from ..errors import PlaceError


try:
    import fcntl
except ImportError:  # not on Windows, where nothing tells whether a process still writes
    fcntl = None


_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Kind of the draft that tries whether there can be one.
PROBE = "gone"
# No permission, or no such thing in this file system.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def can_only_be_a_path(name: str) -> bool:
    """Whether a name is no id of the Hub: those have at most one slash, within, and begin with a letter or digit."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def check_place(path: str | os.PathLike, *, file: bool = False) -> None:
    """Refuses a place that cannot be written; nothing is left there.

    Args:
        path: The folder, which need not exist yet.
        file: It is the name of a file instead.

    Raises:
        PlaceError: The name is empty, too long or has a NUL in it, is that of a link to nothing, or of a file
            where a folder is meant (or the other way round), a parent is a file, or there is no permission to write.
    """
    if file and is_device(path):
        return
    place = resolve(path, file=file)
    try:
        there = _existing(place)
        inside = there == place and not file and must_stay(place)
        _try_out(draft(place if there == place else there / place.name, PROBE, inside=inside))
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise PlaceError(f"{said(path)} cannot be written: {reason(error)}.") from error


def check_room(path: str | os.PathLike, size: int, *, file: bool = False) -> None:
    """Refuses to write more bytes than the disk of a place has left; the place need not exist yet.

    Raises:
        PlaceError: There is too little room, or nothing can be written there at all, see `check_place`.
    """
    check_place(path, file=file)
    there = _existing(resolve(path, file=file))
    free = shutil.disk_usage(there if there.is_dir() else there.parent).free
    if size > free:
        raise PlaceError(f"{said(path)} needs {in_words(size)}, but the disk has {in_words(free)} left.")


def resolve(path: str | os.PathLike, *, file: bool = False) -> Path:
    """The place itself, behind all links.

    Raises:
        PlaceError: There can be no such place, or something of another kind is there.
    """
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
    """Whether a folder cannot change places with another one: it would be in the way of the user or the system.

    It holds the working directory or a mounted file system, or is one, or there is no permission in its parent.
    """
    in_use = _mounts()
    with contextlib.suppress(OSError):  # the working directory may be gone
        in_use.append(Path(os.path.realpath(os.getcwd())))
    if any(folder in (path, *path.parents) for path in in_use):
        return True
    try:
        _try_out(draft(folder, PROBE))
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
    """What the system said, also where a library has put it into an exception of its own; `None` if it was not that.

    The libraries `safetensors` and `tokenizers` say `(os error 28)` in the text of theirs.
    """
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


def in_words(size: int) -> str:
    """A number of bytes with a unit that leaves something of it."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


def _existing(place: Path) -> Path:
    """The place, or the nearest folder above it that is there.

    Raises:
        OSError: Something on the way is no folder, or has a name that cannot be.
    """
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
    """Makes a folder and removes it.

    Raises:
        OSError: It cannot be made.
    """
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
    """The hidden name of what will be in a place or was there, written by who has it `alone`.

    Args:
        place: The file or folder.
        kind: Lower-case letters: what is to be done with it if its process has died.
        inside: In the folder instead of beside it.
    """
    if inside:
        return place / f".{_HERE}.{kind}"
    name = place.name
    name = name if len(os.fsencode(name)) <= _LONGEST else f"{name[:12]}-{_digits(name)}"  # room for the rest
    return place.parent / f".{name}.{_HERE}.{kind}"


@contextlib.contextmanager
def alone(place: Path, *, wait: bool = True) -> Iterator[None]:
    """No other process of this user and machine has the same place while the block runs; a killed one gives it free.

    Args:
        place: The file or folder.
        wait: Until another one is ready.

    Raises:
        BlockingIOError: Another one has it, and `wait` is false.
    """
    lock = Path(tempfile.gettempdir(), f"hf_structprune-{_HERE}-{_digits(os.fspath(place), 32)}.lock")
    held = None
    try:
        held = _locked(lock, wait) if fcntl is not None else None
    except BlockingIOError:
        raise
    except OSError:  # no room for a lock: better written without one than not at all
        pass
    try:
        yield
    finally:
        if held is not None:
            lock.unlink(missing_ok=True)
            os.close(held)


def _locked(lock: Path, wait: bool) -> int:
    """A descriptor of the file, locked."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if lock.exists() and os.path.samestat(os.fstat(file), os.stat(lock)):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # who had it before has removed it
