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
import uuid
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path

import psutil

from ..errors import PlaceError


_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Kind of the draft that tries whether there can be one.
PROBE = "gone"
# No permission, or no such thing in this file system.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


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
        if there == place and not file and must_stay(place):
            try_out(place, place)
        else:
            if there == place:
                there = place.parent
            try_out(place, there)
            if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise PlaceError(f"{said(path)} cannot be written: {reason(error)}.") from error


def check_room(path: str | os.PathLike, size: int, *, file: bool = False) -> None:
    """Refuses to write more bytes than the disk of a place has left; the place need not exist yet.

    Args:
        path: The folder.
        size: Bytes that will be written.
        file: It is the name of a file instead.

    Raises:
        PlaceError: There is too little room, or nothing can be written there at all.
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
    try:
        here = Path(os.path.realpath(os.getcwd()))
    except OSError:
        here = None
    if here is not None and folder in (here, *here.parents):
        return True
    if any(folder in (mounted, *mounted.parents) for mounted in _mounts()) or os.path.ismount(folder):
        return True
    if _is_sticky(folder):
        return True
    try:
        try_out(folder, folder.parent)
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


def try_out(place: Path, within: Path) -> None:
    """Makes a folder of a hidden name and removes it.

    Raises:
        OSError: It cannot be made.
    """
    probe = draft(place, PROBE, within)
    try:
        probe.mkdir()
        probe.rmdir()
    finally:
        release(probe)


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


def _is_sticky(folder: Path) -> bool:
    """Whether only its owner may rename a folder, and that is somebody else."""
    if not hasattr(os, "geteuid"):
        return False
    parent, me = folder.parent.stat(), os.geteuid()
    return bool(parent.st_mode & stat.S_ISVTX) and me not in (0, parent.st_uid, folder.stat().st_uid)


def _mounts() -> list[Path]:
    """Where file systems are mounted; `os.path.ismount` does not see folders that are mounted elsewhere once more."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    return [Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4])) for line in lines]


# `.NAME.host-boot-pid-start-number.kind`: the machine, when it was started, the process, when that was started.
_DRAFT = re.compile(
    r"\.(?P<name>.*)\.(?P<host>[0-9a-f]{8})-(?P<boot>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-(?P<number>[0-9a-f]{8})"
    r"\.(?P<kind>[a-z]+)",
    re.DOTALL,
)
_LONGEST = 60
# Numbers of the drafts that this process is writing.
_held: set[str] = set()


def draft(place: Path, kind: str, within: Path | None = None) -> Path:
    """A new hidden name for what will take the place of another file or folder, held until `release`.

    Args:
        place: What it will be.
        kind: Lower-case letters: what is to be done with it if this process dies.
        within: The folder of the draft. Default: beside the place.
    """
    number = uuid.uuid4().hex[:8]
    _held.add(number)
    return _ours(within or place.parent, _shortened(place.name), number, kind)


def release(path: Path) -> None:
    """Says that this process no longer writes a draft."""
    _held.discard(number_of(path))


def number_of(path: Path) -> str:
    """What all drafts of one writing have in common."""
    return _DRAFT.fullmatch(path.name)["number"]


def kind_of(path: Path) -> str:
    """The kind of a draft."""
    return path.suffix[1:]


def as_kind(path: Path, kind: str) -> Path:
    """The name of a draft with another kind."""
    return path.with_suffix(f".{kind}")


def drafts(place: Path, within: Path | None = None, *, kinds: Collection[str]) -> list[Path]:
    """The drafts of a place that nobody writes any more, of processes of this machine that are dead.

    What processes of other machines have left is not among them: nothing here tells whether they live.

    Args:
        place: What they would have been.
        within: The folder they are in. Default: beside the place.
        kinds: Those that are asked for.
    """
    folder, name = within or place.parent, _shortened(place.name)
    return sorted(
        folder / found.string
        for found in _matches(folder)
        if found["name"] == name and found["kind"] in kinds and _is_dead(found)
    )


def claim(path: Path) -> Path | None:
    """Takes over a draft of a dead process, so that one of several finishes it; `None` if another was faster."""
    found = _DRAFT.fullmatch(path.name)
    mine = _ours(path.parent, found["name"], found["number"], found["kind"])
    try:
        path.rename(mine)
    except FileNotFoundError:
        return None
    _held.add(found["number"])
    return mine


def _ours(folder: Path, name: str, number: str, kind: str) -> Path:
    host, boot = _machine()
    return folder / f".{name}.{host}-{boot}-{os.getpid()}-{_started(os.getpid()) or 0}-{number}.{kind}"


def _matches(folder: Path) -> Iterator[re.Match]:
    try:
        names = os.listdir(folder)
    except OSError:
        return
    yield from filter(None, map(_DRAFT.fullmatch, names))


def _is_dead(found: re.Match) -> bool:
    host, boot = _machine()
    if found["host"] != host:
        return False
    if found["boot"] != boot:
        return True
    pid = int(found["pid"])
    if pid == os.getpid() and found["start"] == (_started(pid) or "0"):
        return found["number"] not in _held
    return not psutil.pid_exists(pid) or _started(pid) not in (None, found["start"])


@lru_cache(maxsize=1)
def _machine() -> tuple[str, str]:
    """Eight digits for the machine, eight for its start.

    Containers number their processes themselves: each is a machine of its own.
    """
    parts = [platform.node(), _read("/etc/machine-id")]
    try:
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        parts.append("")
    boot = _read("/proc/sys/kernel/random/boot_id") or str(round(psutil.boot_time() / 60))
    return _digits("\n".join(parts)), _digits(boot)


def _started(pid: int) -> str | None:
    """When a process was started, as its system counts; `None` if that cannot be seen."""
    status = _read(f"/proc/{pid}/stat")
    if status:
        return status.rpartition(")")[2].split()[19]
    try:
        return str(round(psutil.Process(pid).create_time()))
    except psutil.Error:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _shortened(name: str) -> str:
    """The name, if there is room for an owner behind it."""
    return name if len(os.fsencode(name)) <= _LONGEST else f"{name[:12]}-{_digits(name)}"


def _digits(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]
