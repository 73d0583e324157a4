"""Whole checkpoints of a training are told from half-written ones, whichever file is damaged and how."""

import json
import shutil

import pytest
from training_setup import build, quick_picture  # noqa: F401
from transformers import TrainerCallback

from hf_structprune.errors import ConfigurationError
from hf_structprune.recovery.callback import STATE_NAME
from hf_structprune.recovery.configuration import DistillationConfig, RecoveryConfig
from hf_structprune.recovery.recovering import (
    flaw,
    in_order,
    newest_whole,
    refuse_other_settings,
    settings_of,
)


SETTINGS = {"rank": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a training of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    trainer, callback = build(folder, max_steps=2)
    callback.merge, callback.settings = False, SETTINGS
    trainer.train()
    return folder / "checkpoint-2"


def test_every_file_is_needed_whole(trained, tmp_path):
    assert flaw(trained) is None
    weights = [path.name for path in trained.glob("*model.safetensors")]
    needed = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "recovery_state.json"]
    for name in [*weights, "recovery_best.safetensors", *needed]:
        for number, damage in enumerate((cut_in_half, empty, zeros_at_the_end, remove)):
            copy = tmp_path / name / str(number) / "checkpoint-2"
            shutil.copytree(trained, copy)
            damage(copy / name)
            assert flaw(copy) is not None, (name, damage.__name__)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def zeros_at_the_end(path):
    """What a power cut leaves: the length is right, the content is not there. Of safetensors only the header tells."""
    content = path.read_bytes()
    half = 0 if path.suffix == ".safetensors" else len(content) // 2
    path.write_bytes(content[:half] + bytes(len(content) - half))


def remove(path):
    path.unlink()


@pytest.mark.parametrize("content", ["[]", '{"settings": {}}'])
def test_a_state_that_says_nothing(trained, tmp_path, content):
    copy = tmp_path / "checkpoint-2"
    shutil.copytree(trained, copy)
    (copy / STATE_NAME).write_text(content)
    assert "does not say what the training was begun with" in flaw(copy)


def test_the_newest_whole_one_is_found(trained, tmp_path):
    assert newest_whole(tmp_path / "nothing") == (None, {})
    for step in (2, 10, 9):
        copy = tmp_path / f"checkpoint-{step}"
        shutil.copytree(trained, copy)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-10" / "optimizer.pt").unlink()
    whole, flaws = newest_whole(tmp_path)
    assert whole == tmp_path / "checkpoint-9"
    assert flaws == {tmp_path / "checkpoint-10": "optimizer.pt is missing"}


def test_a_whole_checkpoint_is_there_while_the_next_one_is_written(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append([(path.name, flaw(path)) for path in in_order(tmp_path)])

    trainer, callback = build(tmp_path, callbacks=[Look()], max_steps=6, save_total_limit=2)
    callback.merge, callback.settings = False, SETTINGS
    trainer.train()
    missing = "recovery_state.json is missing"
    assert seen[1:] == [[(f"checkpoint-{n}", None), (f"checkpoint-{n + 2}", missing)] for n in (2, 4)]


def test_all_settings_are_compared_but_those_that_change_nothing(tmp_path):
    begun = settings_of(RecoveryConfig(precision="fp32"), DistillationConfig(), model="m")
    (tmp_path / STATE_NAME).write_text(json.dumps({"settings": begun}))
    same = RecoveryConfig(precision="fp32", report_to=["wandb"], save_steps=3, gradient_checkpointing=True)
    refuse_other_settings(tmp_path, settings_of(same, DistillationConfig(), model="m"))
    other = settings_of(RecoveryConfig(precision="fp32", seed=1), DistillationConfig(temperature=2.0), model="n")
    with pytest.raises(
        ConfigurationError,
        match=r"`model` is 'n', it was 'm'; `seed` is 1, it was 42; `temperature` is 2.0, it was 1.0. Give the same",
    ):
        refuse_other_settings(tmp_path, other)


def test_an_option_that_has_come_since_had_its_default(tmp_path):
    now = settings_of(RecoveryConfig(), DistillationConfig(), model="m", training_rows="3 sequences")
    begun = {name: now[name] for name in now if name not in ("dual_space", "packing")}
    (tmp_path / STATE_NAME).write_text(json.dumps({"settings": begun}))
    refuse_other_settings(tmp_path, now)
    default = now["packing"]
    with pytest.raises(ConfigurationError, match=f"`packing` is {not default}, it was {default}. Give the same"):
        refuse_other_settings(tmp_path, {**now, "packing": not default})
    (tmp_path / STATE_NAME).write_text(json.dumps({"settings": {"seed": 42}}))
    with pytest.raises(ConfigurationError, match="`model` is 'm', it was None; `training_rows` is '3 seq"):
        refuse_other_settings(tmp_path, now)
