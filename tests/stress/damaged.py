"""Files of a checkpoint are damaged in every way: each command gives a result or one line, never a traceback."""

import contextlib
import io
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from checkpoints import make_pruners

from hf_structprune.commands import cli


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(3):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut off": lambda content, rng: content[: rng.randrange(len(content))],
    "empty": lambda content, rng: b"",
    "flipped": _flip,
    "[]": lambda content, rng: b"[]",
    "null": lambda content, rng: b"null",
    "{}": lambda content, rng: b"{}",
    "a number": lambda content, rng: b"3",
    "not UTF-8": lambda content, rng: b"\xff\xfe" + content,
    "deep": lambda content, rng: b"[" * 100_000,
    "zeros": lambda content, rng: bytes(len(content)),
    "twice": lambda content, rng: content * 2,
}
# Not damages of the content.
MISSING, FOLDER = "missing", "a folder"

FEW = ["--calibration-num-samples", "2", "--calibration-length", "16", "--round-to", "1"]
COMMANDS = {
    "inspect": ["inspect", "IN"],
    "plan": ["plan", "IN", "--ratio", "0.1", "--round-to", "1"],
    "prune": ["prune", "IN", "--ratio", "0.1", "--output-dir", "OUT", *FEW],
    "perplexity": ["perplexity", "IN", "--window", "32", "--max-windows", "1"],
    "benchmark": ["benchmark", "IN", "--rounds", "1", "--no-speed", "--output", "OUT/results.json"],
    "evaluate": ["evaluate", "IN", "--window", "32", "--max-windows", "1", "--no-efficiency", "--no-samples"],
    "card": ["card", "IN"],
    "compare": ["compare", "IN"],
    "export deci": ["export", "IN", "--format", "deci", "--output", "OUT"],
    "export gguf": ["export", "IN", "--format", "gguf", "--output", "OUT/model.gguf"],
    "quantize": ["quantize", "IN", "--output-dir", "OUT"],
}


def run(root: Path, count: int, seed: int) -> tuple[Counter, list[str]]:
    """Damages `count` files, at random, and runs a random command on each."""
    rng, seen, wrong = random.Random(seed), Counter(), []
    make_pruners()[0].save_pretrained(root / "whole")
    _main(["evaluate", str(root / "whole"), *COMMANDS["evaluate"][2:]])
    names = sorted(str(path.relative_to(root / "whole")) for path in (root / "whole").rglob("*") if path.is_file())
    for number in range(count):
        folder, out = root / f"{number}-in", root / f"{number}-out"
        shutil.copytree(root / "whole", folder)
        name, damage = rng.choice(names), rng.choice([*DAMAGES, MISSING, FOLDER])
        _damage(folder / name, damage, rng)
        command, argv = rng.choice(list(COMMANDS.items()))
        argv = [word.replace("IN", str(folder), 1) if word == "IN" else word for word in argv]
        argv = [word.replace("OUT", str(out), 1) if word.startswith("OUT") else word for word in argv]
        outcome = _main(argv)
        seen[f"{command}: {outcome.split(':')[0]}"] += 1
        if outcome.startswith(("traceback", "lines")):
            wrong.append(f"{number}: {command}, {name} is {damage}: {outcome}")
        for path in (folder, out):
            shutil.rmtree(path, ignore_errors=True)
    return seen, wrong


def _damage(path: Path, damage: str, rng: random.Random) -> None:
    content = path.read_bytes()
    path.unlink()
    if damage == FOLDER:
        path.mkdir()
    elif damage != MISSING:
        path.write_bytes(DAMAGES[damage](content, rng))


def _main(argv: list[str]) -> str:
    """What a command line comes to."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(argv)
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if code == 0:
        return "done"
    said = [line for line in err.getvalue().splitlines() if line.startswith("hf-structprune: error:")]
    return "one line" if code == 2 and len(said) == 1 else f"lines: {code} {err.getvalue()[-300:]!r}"


if os.name != "posix":
    raise SystemExit("these runs need a POSIX system")
