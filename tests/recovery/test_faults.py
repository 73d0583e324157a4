"""What is left of a training that is killed, and that it can be gone on with as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from killed_training import Die, build
from training_setup import (
    HELD_OUT,
    losses,
    make_callback,
    make_lora,
    make_tiny,
    make_trainer,
    quick_picture,  # noqa: F401
    script_environment,
)

from hf_structprune.errors import CheckpointError, ConfigurationError
from hf_structprune.recovery.session import BEST_NAME, STATE_NAME


HERE = Path(__file__).parent


def run_script(name, *arguments, launcher=()):
    command = [sys.executable, *launcher, str(HERE / name), *map(str, arguments)]
    return subprocess.run(command, env=script_environment(), capture_output=True, text=True, timeout=300)


def measured(callback):
    curve = callback.report["curve"]
    return [curve["pruned"], curve["dense"], *[point["log_perplexity"] for point in curve["points"]]]


def history(trainer):
    return {logs["step"]: logs["loss"] for logs in trainer.state.log_history if "loss" in logs}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_killed_in_the_middle_and_resumed(tmp_path, kind):
    whole, watched = build(tmp_path / "whole", kind)
    whole.train()
    killed = run_script("killed_training.py", tmp_path / "killed", kind, 5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "recovered").exists()
    resumed, callback = build(tmp_path / "killed", kind)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == pytest.approx(history(whole), abs=1e-5) and len(history(whole)) == 8
    assert measured(callback) == pytest.approx(measured(watched), abs=1e-5) and len(measured(watched)) == 10
    assert callback.report["best_step"] == watched.report["best_step"]
    assert HELD_OUT.measure(resumed.model) == pytest.approx(HELD_OUT.measure(whole.model), abs=1e-5)
    seconds = [point["seconds"] for point in callback.report["curve"]["points"]]
    assert seconds == sorted(seconds)


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    killed = run_script("killed_training.py", tmp_path, "lora", "save")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "recovered").exists()
    json.loads((tmp_path / "recovery.json").read_text())
    trainer, callback = build(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / "recovered" / "model.safetensors").stat().st_size > 1000
    assert len(callback.report["curve"]["points"]) == 8


@pytest.mark.slow
def test_two_processes(tmp_path):
    # `--cpu` would start one process; without a GPU `--multi_gpu` starts several that talk through gloo.
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launcher = [*launcher.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    done = run_script("two_processes.py", tmp_path, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
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


class Halt(Die):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


def interrupted(folder, step=5, **options):
    trainer, callback = build(folder, callbacks=[Halt(step)], **options)
    with pytest.raises(Stop):
        trainer.train()
    return folder / f"checkpoint-{step - 1}"


def test_checkpoints_carry_curve_and_best(tmp_path):
    folder = interrupted(tmp_path)
    state = json.loads((folder / STATE_NAME).read_text())
    assert [point["step"] for point in state["curve"]["points"]] == [1, 2, 3, 4]
    assert state["kept"]["step"] == 4 and (folder / BEST_NAME).is_file()
    assert json.loads((tmp_path / "checkpoint-2" / STATE_NAME).read_text())["kept"]["step"] == 2
    first, last = ((tmp_path / name / BEST_NAME).read_bytes() for name in ("checkpoint-2", "checkpoint-4"))
    assert first != last  # a later best does not change what an earlier checkpoint has


def test_resumes_from_a_checkpoint_elsewhere(tmp_path):
    folder = interrupted(tmp_path / "a")
    folder.rename(tmp_path / "moved")
    trainer, callback = build(tmp_path / "b")
    trainer.train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert [point["step"] for point in callback.report["curve"]["points"]] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_resumed_training_does_not_measure_the_ends_again(tmp_path, monkeypatch):
    interrupted(tmp_path)
    trainer, callback = build(tmp_path)
    callback.dense = object()  # would be refused
    trainer.train(resume_from_checkpoint=True)
    assert callback.report["curve"]["dense"] is not None


def test_refuses_the_curve_of_another_text(tmp_path):
    interrupted(tmp_path)
    trainer, callback = build(tmp_path)
    callback.window = 16
    with pytest.raises(ConfigurationError, match="window"):
        trainer.train(resume_from_checkpoint=True)


def test_refuses_a_state_that_is_no_json(tmp_path):
    (interrupted(tmp_path) / STATE_NAME).write_text("{")
    with pytest.raises(CheckpointError, match=STATE_NAME):
        build(tmp_path)[0].train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_checkpoint_of_a_training_without_the_callback(tmp_path, kind, caplog):
    make = make_lora if kind == "lora" else make_tiny
    options = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, None, model=make(), max_steps=4, **options).train()
    callback = make_callback()
    trainer = make_trainer(tmp_path, callback, model=make(), max_steps=8, **options)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=True)
    curve = callback.session.curve
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
    kept.keep(model, 3)
    before = kept.path.read_bytes()

    def half(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(weights, "save_file", half)
    with pytest.raises(CheckpointError, match="no space left"):
        kept.keep(model, 4)
    assert os.listdir(tmp_path) == ["weights.safetensors"] and kept.path.read_bytes() == before
    with pytest.raises(CheckpointError, match="another model"):
        kept.restore(make_tiny())
