"""A process that saves checkpoints is killed at any moment: there is a whole one, and nothing else."""

import errno
import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from checkpoints import NOTES, contents, leftovers, make_pruners

from hf_structprune.files import writing
from hf_structprune.files.writing import settle


# Where it is saved. Without an exchange in one step, as on some file systems, it is filled file by file.
WAYS = ("a folder", "a new folder", "a link", "the working directory", "no exchange")
# What is done to folders when one gets its place.
CHANGES = ("os.rename", "os.rmdir", "os.remove", "os.chmod", "os.chown")


def run(root: Path, count: int, seed: int) -> tuple[Counter, list[str]]:
    """Kills `count` times; the outcomes and what is wrong."""
    pruners, rng, seen, wrong = make_pruners(), random.Random(seed), Counter(), []
    expected, seconds = [], []
    for number, pruner in enumerate(pruners):
        started = time.monotonic()
        pruner.save_pretrained(root / f"whole-{number}")
        seconds.append(time.monotonic() - started)
        expected.append(contents(root / f"whole-{number}"))
    for number in range(count):
        way = WAYS[number % len(WAYS)]
        place = root / str(number) / "out"
        target = _prepare(place, way, pruners[0])
        # Half of the kills come at any moment; half before one of the changes by which a folder gets its place.
        after, moment = (None, rng.uniform(0, 4 * max(seconds))) if number // 5 % 2 else (rng.randrange(40), 60)
        _kill(target, way, pruners, moment, after)
        at_once = _state(place, expected)
        settle(target)
        settled = _state(place, expected)
        seen[f"{way}: {at_once}" + ("" if settled == at_once else f", then {settled}")] += 1
        faults = [] if at_once in _allowed(way) else [f"{at_once} at once"]
        if settled not in ("whole", "nothing" if way == "a new folder" else "whole") or leftovers(place):
            faults.append(f"{settled} when settled, {leftovers(place)}")
        _save(target, way, pruners[number % 2])
        if contents(place) != expected[number % 2] or leftovers(place):
            faults.append(f"{_state(place, expected)} when saved again, {leftovers(place)}")
        if way != "a new folder" and (place / NOTES).read_text() != "mine":
            faults.append("the user's file has changed")
        if way == "a link" and not target.is_symlink():
            faults.append("the link is none")
        wrong += [f"kill {number}, {way}: {fault}" for fault in faults]
        if not faults:
            shutil.rmtree(place.parent)
    return seen, wrong


def _prepare(place: Path, way: str, pruner) -> Path:
    place.parent.mkdir()
    if way == "a new folder":
        return place
    pruner.save_pretrained(place)
    (place / NOTES).write_text("mine")
    if way == "a link":
        (place.parent / "elsewhere").mkdir()
        target = place.parent / "elsewhere" / "link"
        target.symlink_to(place)
        return target
    return place


def no_exchange(one: Path, other: Path) -> None:
    """As where the system has no such step."""
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _kill(target: Path, way: str, pruners: list, seconds: float, after: int | None) -> None:
    child = os.fork()
    if child == 0:
        try:
            changes = itertools.count()
            if after is not None:
                sys.addaudithook(
                    lambda event, _: (
                        event in CHANGES and next(changes) == after and os.kill(os.getpid(), signal.SIGKILL)
                    )
                )
            if way == "no exchange":
                writing._exchange = no_exchange
            while True:
                for pruner in reversed(pruners):
                    _save(target, way, pruner)
        finally:
            os._exit(1)
    until = time.monotonic() + seconds
    while time.monotonic() < until and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(min(0.01, seconds))
    os.kill(child, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        raise RuntimeError("the process ended by itself")


def _save(target: Path, way: str, pruner) -> None:
    here = os.getcwd()
    if way == "the working directory":
        os.chdir(target)
        target = Path(".")
    try:
        pruner.save_pretrained(target)
    finally:
        os.chdir(here)


def _state(place: Path, expected: list) -> str:
    if not place.exists():
        return "nothing"
    found = contents(place)
    hidden = [name for name in found if name.startswith(".")]
    if "config.json" not in found:
        return "nothing that could be loaded"
    visible = {name: content for name, content in found.items() if name not in hidden}
    return "whole" if visible in expected else "a mixture"


def _allowed(way: str) -> tuple[str, ...]:
    return {
        "a new folder": ("whole", "nothing"),
        **dict.fromkeys(("the working directory", "no exchange"), ("whole", "nothing that could be loaded")),
    }.get(way, ("whole",))  # fmt: skip
