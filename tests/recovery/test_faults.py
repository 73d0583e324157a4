"""What is left of a training that is killed, and that it can be gone on with as if nothing had been."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from processes import forked
from training_setup import (
    HELD_OUT,
    Spoil,
    build,
    losses,
    make_callback,
    make_lora,
    make_tiny,
    make_trainer,
    quick_picture,  # noqa: F401
)
from transformers import PreTrainedModel, TrainerCallback

from hf_structprune.errors import CheckpointError, ConfigurationError
from hf_structprune.recovery.callback import BEST_NAME, STATE_NAME


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Die(TrainerCallback):
    """Kills its process after a step, or, without one, in the middle of saving the recovered model.

    It stands before the recovery callback, so that only the last save is hit.
    """

    def __init__(self, step=None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()

    def on_train_end(self, args, state, control, **kwargs):
        def save_half(self, folder, **kwargs):
            (Path(folder) / "model.safetensors").write_bytes(b"half a checkpoint")
            die()

        PreTrainedModel.save_pretrained = save_half


def killed(folder, step=None):
    """Trains in another process until that is killed."""
    assert forked(lambda: build(folder, callbacks=[Die(step)])[0].train()) == [-signal.SIGKILL]


def measured(callback):
    curve = callback.report["curve"]
    return [curve["pruned"], curve["dense"], *[point["log_perplexity"] for point in curve["points"]]]


def history(trainer):
    return {logs["step"]: logs["loss"] for logs in trainer.state.log_history if "loss" in logs}


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed(tmp_path):
    whole, watched = build(tmp_path / "whole")
    whole.train()
    killed(tmp_path / "killed", 5)
    assert not (tmp_path / "killed" / "recovered").exists()
    resumed, callback = build(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == pytest.approx(history(whole), abs=1e-5) and len(history(whole)) == 8
    assert measured(callback) == pytest.approx(measured(watched), abs=1e-5) and len(measured(watched)) == 10
    assert callback.report["best_step"] == watched.report["best_step"]
    assert HELD_OUT.measure(resumed.model) == pytest.approx(HELD_OUT.measure(whole.model), abs=1e-5)
    seconds = [point["seconds"] for point in callback.report["curve"]["points"]]
    assert seconds == sorted(seconds)


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    killed(tmp_path)
    assert not (tmp_path / "recovered").exists()
    json.loads((tmp_path / "recovery.json").read_text())
    trainer, callback = build(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / "recovered" / "model.safetensors").stat().st_size > 1000
    assert len(callback.report["curve"]["points"]) == 8


def one_of_two(folder):
    """A training in one of two processes, which leaves what it measured."""
    trainer, callback = build(folder / "out", max_steps=4, gradient_accumulation_steps=1, callbacks=[Spoil(3, 3.0)])
    trainer.train()
    end, best = HELD_OUT.measure(trainer.model), callback.report["best_step"]
    content = {"curve": callback.report["curve"], "best": best, "end": end}
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_two_processes(tmp_path):
    assert forked(one_of_two, tmp_path, count=2) == [0, 0]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for content in (first, second):
        for point in content["curve"]["points"]:
            point.pop("seconds")
    assert first == second and first["best"] == 2
    values = {point["step"]: point["log_perplexity"] for point in first["curve"]["points"]}
    assert len(values) == 4 and first["end"] == pytest.approx(values[2], abs=1e-6)
    reports = [path for path in (tmp_path / "out").rglob("recovery.json") if path.parent.name == "out"]
    assert len(reports) == 1 and json.loads(reports[0].read_text())["training"]["processes"] == 2


class Stop(Exception):
    pass


class Halt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a training that was interrupted in its fifth step."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(Stop):
        build(folder, callbacks=[Halt(5)])[0].train()
    return folder


@pytest.fixture
def interrupted(begun, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(begun, tmp_path / "interrupted"))


def test_checkpoints_carry_curve_and_best(begun):
    folder = begun / "checkpoint-4"
    state = json.loads((folder / STATE_NAME).read_text())
    assert [point["step"] for point in state["curve"]["points"]] == [1, 2, 3, 4]
    assert state["kept"]["step"] == 4 and (folder / BEST_NAME).is_file()
    assert json.loads((begun / "checkpoint-2" / STATE_NAME).read_text())["kept"]["step"] == 2
    first, last = ((begun / name / BEST_NAME).read_bytes() for name in ("checkpoint-2", "checkpoint-4"))
    assert first != last  # a later best does not change what an earlier checkpoint has


def test_resumes_from_a_checkpoint_elsewhere_and_does_not_measure_the_ends_again(begun, tmp_path):
    trainer, callback = build(tmp_path / "b")
    callback.dense = object()  # would be refused
    trainer.train(resume_from_checkpoint=str(begun / "checkpoint-4"))
    assert [point["step"] for point in callback.report["curve"]["points"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert callback.report["curve"]["dense"] is not None


def test_refuses_the_curve_of_another_text(interrupted):
    trainer, callback = build(interrupted)
    callback.window = 16
    with pytest.raises(ConfigurationError, match="window"):
        trainer.train(resume_from_checkpoint=True)


def test_refuses_a_state_that_is_no_json(interrupted):
    (interrupted / "checkpoint-4" / STATE_NAME).write_text("{")
    with pytest.raises(CheckpointError, match=STATE_NAME):
        build(interrupted)[0].train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_checkpoint_of_a_training_without_the_callback(tmp_path, kind, caplog):
    make = make_lora if kind == "lora" else make_tiny
    options = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, None, model=make(), max_steps=4, **options).train()
    callback = make_callback()
    trainer = make_trainer(tmp_path, callback, model=make(), max_steps=8, **options)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=True)
    curve = callback.curve
    assert "no recovery_state.json" in caplog.text and [point.step for point in curve.points] == [4, 6, 8]
    if kind == "lora":
        assert curve.pruned == HELD_OUT.measure(make_tiny()) > curve.points[0].log_perplexity
    else:
        assert curve.pruned == curve.points[0].log_perplexity
    assert len(losses(trainer)) == 8


def test_a_failed_write_leaves_the_earlier_best(tmp_path, monkeypatch):
    from hf_structprune.recovery import weights
    from hf_structprune.recovery.weights import BestWeights

    kept, model = BestWeights(tmp_path), make_lora()
    kept.keep(model)
    before = kept.path.read_bytes()

    def half(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(weights, "save_file", half)
    with pytest.raises(CheckpointError, match="no space left"):
        kept.keep(model)
    assert os.listdir(tmp_path) == ["weights.safetensors"] and kept.path.read_bytes() == before
    with pytest.raises(CheckpointError, match="another model"):
        kept.restore(make_tiny())
