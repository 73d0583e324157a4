"""Names of what is still being written, which say whose it is: so a process that died leaves nothing for ever."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import uuid
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path

import psutil


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
