"""A training that kills itself: `python killed_training.py FOLDER KIND WHEN`, see `test_faults`.

KIND is `lora` or `full`; WHEN is a step, `save` (in the middle of the last save), or `never`.
"""

import copy
import os
import signal
import sys
import types
from pathlib import Path

from training_setup import make_callback, make_lora, make_tiny, make_trainer
from transformers import PreTrainedModel, TrainerCallback

from hf_structprune.checkpoint import write_folder


OPTIONS = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 8}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Die(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def install_saving():
    """Stand-ins for merging and saving where the package has none."""
    try:
        import hf_structprune.recovery.merge
        import hf_structprune.recovery.save  # noqa: F401
    except ImportError:
        merge, save = (types.ModuleType(f"hf_structprune.recovery.{name}") for name in ("merge", "save"))
        merge.merge_adapter = lambda model, dtype=None: (
            copy.deepcopy(model).merge_and_unload() if hasattr(model, "peft_config") else model
        )
        save.save_recovered = lambda model, tokenizer, folder, **kwargs: write_folder(folder, model.save_pretrained)
        save.card_section = lambda report: "<!-- a -->\n## Recovery\n<!-- z -->"
        sys.modules.update({module.__name__: module for module in (merge, save)})


def build(folder, kind="lora", callbacks=(), **options):
    install_saving()
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
