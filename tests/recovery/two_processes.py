"""A training in several processes: `accelerate launch two_processes.py FOLDER`; each leaves what it measured."""

import json
import sys
from pathlib import Path

from killed_training import build
from training_setup import HELD_OUT, Spoil


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    trainer, callback = build(folder / "out", max_steps=4, gradient_accumulation_steps=1, callbacks=[Spoil(3, 3.0)])
    trainer.train()
    end, best = HELD_OUT.measure(trainer.model), callback.report["best_step"]
    content = {"curve": callback.report["curve"], "best": best, "end": end}
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(content))
