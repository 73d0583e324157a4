"""Kills the writing of a folder before each of its changes: `killed_writing.py WAY FOLDER` says how many there are."""

import errno
import itertools
import os
import sys
from pathlib import Path

from hf_structprune.files import writing
from hf_structprune.files.writing import check_folder, settle, write_folder


OLD = {"config.json": "old", "model.safetensors": "old", "old.txt": "mine", "recovery.json": "old"}
NEW = {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new"}
AFTER = {**NEW, "old.txt": "mine"}
# Everything that changes a folder; the hook is called before it is done.
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link", "shutil.copyfile"}


def fill(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def write_new(folder):
    fill(folder, NEW)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def left(folder):
    """What is hidden in a folder or beside it."""
    within = folder.iterdir() if folder.is_dir() else ()
    return [path.name for path in (*folder.parent.iterdir(), *within) if path.name.startswith(".")]


def cannot_move(patch, folder):
    def refuse(one, other):
        raise OSError(errno.EXDEV, "of a lower layer")

    patch.setattr(writing, "_exchange", refuse)


def mounted(patch, folder):
    patch.setattr(writing, "_mounts", lambda: [folder])


WAYS = {"exchange": lambda *_: None, "lower layer": cannot_move, "mounted": mounted}
STAYS = ("lower layer", "mounted")


class Patch:
    """What pytest calls `monkeypatch`, for ever."""

    setattr = staticmethod(setattr)


def dies_at(step, action):
    """Whether a process that is killed before its change number `step` gets there at all."""
    pid = os.fork()
    if pid == 0:
        count = itertools.count()
        sys.addaudithook(lambda event, _: event in EVENTS and next(count) == step and os._exit(9))
        action()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9), code
    return code == 9


def check_at_once(way, out):
    """Without any help there is the old folder or the new one, or one that cannot be loaded."""
    if not out.exists():
        assert way == "fresh"
        return
    now = contents(out)
    if way in STAYS:
        assert "config.json" not in now or now["config.json"] == now["model.safetensors"], now
    else:
        assert all(now.get(name) == text for name, text in (OLD if now["config.json"] == "old" else NEW).items()), now


def kill(way, root):
    """Every change of every way, and then: it is settled, checked or written again."""
    before, after = ({}, NEW) if way == "fresh" else (OLD, AFTER)
    for again in (settle, check_folder, None):
        seen = []
        for step in itertools.count():
            out = root / f"{again and again.__name__}-{step}" / "out"
            fill(out.parent if way == "fresh" else out, before)
            if not dies_at(step, lambda out=out: write_folder(out, write_new)):
                break
            check_at_once(way, out)
            if again is None:
                write_folder(out, write_new)
            else:
                again(out)
            now = contents(out) if out.exists() else {}
            assert now in ((before, after) if again else (after,)) and not left(out), (step, now, left(out))
            seen.append(now.get("config.json"))
        assert again is None or way == "fresh" or {"old", "new"} == set(seen), seen
    return step


def kill_settling(root):
    """The process that puts in order what a killed one has left is killed, too."""
    cannot_move(Patch, None)
    for first in itertools.count():
        for second in itertools.count():
            out = root / f"{first}-{second}" / "out"
            fill(out, OLD)
            if not dies_at(first, lambda out=out: write_folder(out, write_new)):
                return first
            if all(name.endswith((".new", ".gone")) for name in left(out)):
                break  # nothing that could go wrong
            again = dies_at(second, lambda out=out: settle(out))
            settle(out)
            assert contents(out) in (OLD, AFTER) and not left(out), (first, second, contents(out), left(out))
            if not again:
                break


if __name__ == "__main__":
    chosen, where = sys.argv[1], Path(sys.argv[2])
    WAYS.get(chosen, WAYS["exchange"])(Patch, Path(os.devnull))
    if chosen == "mounted":
        writing.must_stay = lambda folder: True
    print(kill_settling(where) if chosen == "settling" else kill(chosen, where))
