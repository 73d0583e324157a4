"""Disks that become full while something is written, or can only be read: one line, and what was there is there.

Needs Linux and the right to mount: root, or `unshare --user --map-root-user --mount python tests/stress disks`.
"""

import contextlib
import ctypes
import os
import random
import shutil
from collections import Counter
from pathlib import Path

from checkpoints import NOTES, contents, leftovers, make_pruners

from hf_structprune.errors import StructPruneError
from hf_structprune.export.deci import export_deci
from hf_structprune.export.gguf import export_gguf
from hf_structprune.files import writing


def run(root: Path, count: int, seed: int) -> tuple[Counter, list[str]]:
    """Writes `count` times to disks of random sizes."""
    _own_mounts()
    pruners, rng, seen, wrong = make_pruners(), random.Random(seed), Counter(), []
    pruners[0].save_pretrained(root / "whole")
    actions = {
        "save_pretrained": lambda target: pruners[1].save_pretrained(target / "out"),
        "save into the mounted folder": lambda target: pruners[1].save_pretrained(target),
        "export deci": lambda target: export_deci(root / "whole", target / "out"),
        "export gguf": lambda target: export_gguf(root / "whole", target / "model.gguf", quant="f32"),
        "plan": lambda target: pruners[1].last_plan.save(target / "plan.json"),
    }
    check_room = writing.check_room
    for number in range(count):
        name, action = list(actions.items())[number % len(actions)]
        blind = rng.random() < 0.5  # as if another process took the room after it was looked at
        size = rng.randrange(96, 600) * 1024
        disk = root / f"disk-{number}"
        disk.mkdir()
        with _disk(disk, size):
            writing.check_room = (lambda *_, **__: None) if blind else check_room
            before = _fill(disk, pruners[0], name)
            only_read = number % 7 == 6
            if only_read:
                _mount("none", disk, None, 32 | 1, "")  # MS_REMOUNT, MS_RDONLY
            outcome = _outcome(action, disk)
            writing.check_room = check_room
            seen[f"{name}: {outcome.split(':')[0]}"] += 1
            faults = [outcome] if outcome.startswith("raw") else []
            if only_read and ("GB" in outcome or "read-only" not in outcome):
                faults.append(f"only to be read, but: {outcome}")
            if outcome != "done" and _there(disk) != before:
                faults.append(f"what was there has changed: {sorted(set(_there(disk)) ^ set(before))}")
            if leftovers(disk / "out") or leftovers(disk / "in"):
                faults.append(f"left: {leftovers(disk / 'out')}")
            where = f"disk {number}, {size // 1024} KiB, {name}, {'not ' * blind}looked at"
            wrong += [f"{where}: {fault}" for fault in faults]
    return seen, wrong


def _fill(disk: Path, pruner, name: str) -> dict[str, bytes]:
    """An earlier checkpoint, if it fits, and a file of the user."""
    with contextlib.suppress(StructPruneError):
        pruner.save_pretrained(disk if "mounted" in name else disk / "out")
    with contextlib.suppress(OSError):
        (disk / NOTES).write_text("mine")
    return _there(disk)


def _there(disk: Path) -> dict[str, bytes]:
    return {**contents(disk), NOTES: (disk / NOTES).read_bytes() if (disk / NOTES).exists() else b""}


def _outcome(action, disk: Path) -> str:
    try:
        action(disk)
    except StructPruneError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"
    return "done"


@contextlib.contextmanager
def _disk(folder: Path, size: int):
    _mount("none", folder, "tmpfs", 0, f"size={size}")
    places_seen = writing._mounts()
    assert folder in places_seen
    try:
        yield
    finally:
        os.sync()
        ctypes.CDLL(None).umount2(os.fsencode(folder), 2)  # MNT_DETACH
        shutil.rmtree(folder, ignore_errors=True)


def _own_mounts() -> None:
    """Mounts of this process are seen by no other one."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        raise SystemExit("stress disks: no right to mount; say `unshare --user --map-root-user --mount` before it.")
    _mount("none", Path("/"), None, 0x40000 | 0x4000, "")  # MS_PRIVATE, MS_REC


def _mount(source: str, target: Path, kind: str | None, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    encoded = kind.encode() if kind else None
    if libc.mount(source.encode(), os.fsencode(target), encoded, ctypes.c_ulong(flags), options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
