"""Kills, full disks and damaged files, as often as one likes: `python tests/stress kills --count 1000 --seed 0`.

Nothing here is run by `make test`. A run prints how often each outcome was seen. If one of them may not be, it says
which, keeps the folder and ends with 1.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path


os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import damaged  # noqa: E402
import full_disks  # noqa: E402
import kills  # noqa: E402
from transformers.utils import logging  # noqa: E402


WHAT = {"kills": kills.run, "disks": full_disks.run, "damage": damaged.run}


def main() -> int:
    """Runs one of the three."""
    parser = argparse.ArgumentParser(prog="python tests/stress", description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--count", type=int, default=100, help="how often (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    root, started = Path(tempfile.mkdtemp(prefix="stress-")), time.monotonic()
    try:
        seen, wrong = WHAT[arguments.what](root, arguments.count, arguments.seed)
    finally:
        os.chdir("/")
    for outcome, times in sorted(seen.items()):
        print(f"{times:7d}  {outcome}")
    print(f"{sum(seen.values())} runs in {time.monotonic() - started:.0f} s, {len(wrong)} wrong")
    for line in wrong:
        print("WRONG:", line)
    if not wrong:
        shutil.rmtree(root, ignore_errors=True)
    elif root.exists():
        print("kept:", root)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
