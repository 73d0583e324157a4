"""A training in several processes: `accelerate launch two_processes.py FOLDER`; each leaves what it measured."""

import json
import sys
from pathlib import Path

from killed_training import build
from training_setup import Spoil
from watching import WATCH


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    trainer, callback = build(folder / "out", max_steps=4, gradient_accumulation_steps=1, callbacks=[Spoil(3, 3.0)])
    trainer.train()
    content = {
        "curve": callback.report["curve"], "best": callback.report["best_step"], "end": WATCH.measure(trainer.model)
    }  # fmt: skip
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(content))
