"""A training that kills itself: `python killed_training.py FOLDER KIND WHEN`, see `test_faults`.

KIND is `lora` or `full`; WHEN is a step, `save` (in the middle of the last save), or `never`.
"""

import os
import signal
import sys
from pathlib import Path

from training_setup import make_callback, make_lora, make_tiny, make_trainer
from transformers import PreTrainedModel, TrainerCallback


OPTIONS = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 8}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Die(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def build(folder, kind="lora", callbacks=(), **options):
    model = make_lora(dropout=0.2) if kind == "lora" else make_tiny(dropout=0.2)
    callback = make_callback(dense=20.0, merge=True, patience=None, evaluations=8)
    return make_trainer(folder, callback, model=model, callbacks=callbacks, **{**OPTIONS, **options}), callback


def die_while_saving():
    def save_half(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half a checkpoint")
        die()

    PreTrainedModel.save_pretrained = save_half


class DieAtTheEnd(TrainerCallback):
    """Stands before the recovery callback, so that only its save is hit."""

    def on_train_end(self, args, state, control, **kwargs):
        die_while_saving()


if __name__ == "__main__":
    folder, kind, when = sys.argv[1:]
    stop = {"save": [DieAtTheEnd()], "never": []}.get(when)
    build(folder, kind, callbacks=[Die(int(when))] if stop is None else stop)[0].train()
