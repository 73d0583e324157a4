"""The callback in trainings of a tiny model: what it measures, logs, keeps, stops and leaves alone."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from training_setup import (
    HELD_OUT,
    Listener,
    Spoil,
    losses,
    make_callback,
    make_lora,
    make_tiny,
    make_trainer,
    quick_picture,  # noqa: F401
    rows,
    tokenizer,
)
from transformers import TrainerCallback

from hf_structprune import PruningPlan
from hf_structprune.errors import ConfigurationError
from hf_structprune.recovery.callback import METRIC, WORSE, LoraRecoveryCallback


def run(folder, callback, **options):
    trainer = make_trainer(folder, callback, **options)
    trainer.train()
    return trainer


def steps(callback):
    return [point.step for point in callback.curve.points]


def values(callback):
    return [point.log_perplexity for point in callback.curve.points]


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """A training of eight steps: its callback, its trainer, and what is logged before and after the callback."""
    callback, before, after = make_callback(dense=20.0), Listener(), Listener()
    callback.about = {"configuration": {"method": "lora"}, "data": ["tiny"]}
    trainer = make_trainer(tmp_path_factory.mktemp("observed"), callback, callbacks=[before])
    trainer.add_callback(after)
    trainer.train()
    return callback, trainer, [before.logs, after.logs, [(line["step"], line) for line in trainer.state.log_history]]


def test_report(observed):
    callback, trainer, _ = observed
    folder = Path(trainer.args.output_dir)
    report = json.loads((folder / "recovery.json").read_text())
    assert report == callback.report
    curve = report["curve"]
    assert curve["pruned"] == HELD_OUT.measure(make_tiny()) and curve["dense"] == math.log(20)
    assert [point["step"] for point in curve["points"]] == [2, 4, 6, 8]
    assert curve["points"][-1]["log_perplexity"] == HELD_OUT.measure(trainer.model) < curve["pruned"]
    lost = curve["pruned"] - curve["dense"]
    assert report["recovered"] == pytest.approx((curve["pruned"] - curve["points"][-1]["log_perplexity"]) / lost)
    assert report["best_step"] == 8 and report["stopped"] is None
    assert report["text"]["windows"] == 4 and report["text"]["name"] == "held-out"
    assert report["configuration"] == {"method": "lora"} and report["data"] == ["tiny"]
    assert report["training"]["method"] == "lora" and report["training"]["steps"] == 8
    assert str(folder) not in json.dumps(report)
    assert sorted(path.name for path in folder.iterdir()) == ["recovery.json", "recovery.png", "recovery_best"]


def test_everyone_sees_the_logs(observed):
    callback, _, everyone = observed
    for logs in everyone:
        ours = [(step, line) for step, line in logs if "recovery/log_perplexity" in line]
        assert [step for step, _ in ours] == [0, 2, 4, 6, 8]
        assert [line["recovery/log_perplexity"] for _, line in ours[1:]] == values(callback)
        assert ours[0][1]["recovery/recovered"] == 0 and ours[-1][1]["recovery/recovered"] > 0
        assert ours[-1][1]["recovery/perplexity"] == pytest.approx(math.exp(values(callback)[-1]))


def test_evaluations_of_the_trainer(tmp_path):
    callback = make_callback()
    trainer = run(tmp_path, callback, eval_strategy="steps", eval_steps=3, max_steps=4)
    assert steps(callback) == [3, 4]
    trainer.evaluate()  # outside of training nothing is measured
    assert steps(callback) == [3, 4]


def test_evaluation_every_epoch_and_several_sets(tmp_path):
    callback = make_callback()
    trainer = make_trainer(
        tmp_path, callback, eval_strategy="epoch", max_steps=-1, num_train_epochs=2, per_device_train_batch_size=16
    )
    trainer.eval_dataset = {"a": rows(8), "b": rows(4)}
    trainer.train()
    assert steps(callback) == [2, 4]
    assert sum("recovery/perplexity" in logs for logs in trainer.state.log_history) == 3


def test_measuring_changes_nothing(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    plain = make_trainer(tmp_path / "a", model=make_lora(dropout=0.3), **options)
    plain.train()
    watched = make_trainer(tmp_path / "b", make_callback(patience=None), model=make_lora(dropout=0.3), **options)
    watched.train()
    assert losses(watched) == losses(plain) and len(losses(plain)) == 4
    for one, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)
    own = [set(logs) for logs in watched.state.log_history if "loss" in logs]
    assert own == [set(logs) for logs in plain.state.log_history if "loss" in logs]


def test_accumulated_steps_are_steps(tmp_path):
    callback = make_callback(evaluations=2)
    run(tmp_path, callback, gradient_accumulation_steps=2, max_steps=4)
    assert steps(callback) == [2, 4]


def test_stops_at_the_target(tmp_path, observed):
    free = observed[0]
    share = free.curve.recovered(values(free)[1])
    callback = make_callback(dense=20.0, target=share * 0.999)
    trainer = run(tmp_path, callback)
    assert trainer.state.global_step == 4 and callback.report["stopped"] == "target"
    assert values(callback) == values(free)[:2]


def test_stops_when_it_gets_worse_and_puts_the_best_back(tmp_path, caplog):
    callback = make_callback(patience=2)
    with caplog.at_level("INFO"):
        trainer = run(tmp_path, callback, callbacks=[Spoil(4, 1.5)], max_steps=16, logging_steps=100)
    assert trainer.state.global_step == 8 and callback.report["stopped"] == "worse"
    assert values(callback)[1] > callback.curve.pruned
    assert callback.report["best_step"] == 0
    assert HELD_OUT.measure(trainer.model) == callback.curve.pruned
    assert "worse than before training" in caplog.text and "keeping the pruned model" in caplog.text


def test_puts_the_best_of_the_middle_back(tmp_path, caplog):
    callback = make_callback(patience=None)
    with caplog.at_level("WARNING"):
        trainer = run(tmp_path, callback, callbacks=[Spoil(5, 3.0)])
    assert callback.report["best_step"] == 4
    assert HELD_OUT.measure(trainer.model) == pytest.approx(values(callback)[1], abs=1e-6)
    assert "keeping the best of step 4" in caplog.text


class Watching(TrainerCallback):
    """What each step begins with: the learning rate and the log-perplexity."""

    def __init__(self):
        self.rates, self.values = {}, {}

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        (self.rates[state.global_step + 1],) = {group["lr"] for group in optimizer.param_groups}
        self.values[state.global_step + 1] = HELD_OUT.measure(model)


def test_goes_on_from_the_best_at_a_third_of_the_rate(tmp_path, caplog):
    """At a rate that destroys the model, of which nothing comes otherwise; also after an interrupt."""
    options = {"learning_rate": 1.0, "max_steps": 24, "lr_scheduler_type": "linear", "save_strategy": "steps"}
    options["save_steps"] = 2
    model, free = make_tiny(), make_callback(patience=None, evaluations=12)
    make_trainer(tmp_path / "before", model=model, max_steps=24).train()
    run(tmp_path / "free", free, model=copy.deepcopy(model), **options)
    assert free.kept.step == 0

    def train(resumed=None):
        callback, watching = make_callback(patience=None, evaluations=12, back_off=True), Watching()
        trainer = make_trainer(tmp_path / "a", callback, copy.deepcopy(model), callbacks=[watching], **options)
        trainer.train(resume_from_checkpoint=resumed)
        return callback, watching

    with caplog.at_level("WARNING"):
        callback, watching = train()
    lowered = callback.report["training"]["lowered"]
    assert lowered[0] == 2 and max(lowered) < callback.kept.step and callback.kept.log_perplexity < free.curve.pruned
    assert [p.step for p in callback.curve.points if p.log_perplexity > callback.curve.pruned + WORSE] == lowered
    assert watching.rates == pytest.approx(
        {step: (1 - (step - 1) / 24) / 3 ** sum(one < step for one in lowered) for step in range(1, 25)}
    )
    assert {watching.values[step + 1] for step in lowered} == {callback.curve.pruned}
    assert "from here on a third of it, keeping the pruned model" in caplog.text
    again, watched = train(str(tmp_path / "a" / f"checkpoint-{lowered[0]}"))
    assert watched.rates == {step: rate for step, rate in watching.rates.items() if step > lowered[0]}
    assert again.report["training"]["lowered"] == lowered and values(again) == values(callback)


def test_the_rate_stays_where_little_is_lost(tmp_path, monkeypatch):
    found = iter([3.0, 3.009, 3.011, 2.9, 3.009])  # before training, and after every second step
    monkeypatch.setattr(LoraRecoveryCallback, "_value", lambda *given, **options: next(found))
    callback = make_callback(back_off=True)
    run(tmp_path, callback)
    assert callback.report["training"]["lowered"] == [4] and callback.kept.step == 6


def test_the_rate_stays_where_nothing_is_worse(tmp_path, observed):
    callback = make_callback(back_off=True)
    run(tmp_path, callback)
    assert callback.report["training"]["lowered"] == [] and values(callback) == values(observed[0])


@pytest.mark.parametrize("name", ["model", "loss"])
def test_nan_stops_and_keeps_the_best(tmp_path, caplog, name):
    class BadLoss(Listener):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                parameter = next(p for p in model.parameters() if p.requires_grad)
                with torch.no_grad():
                    parameter.fill_(math.nan)

    callback = make_callback(evaluations=4)
    with caplog.at_level("WARNING"):
        trainer = run(
            tmp_path, callback, callbacks=[BadLoss()], logging_nan_inf_filter=False,
            logging_steps=1 if name == "loss" else 100, max_grad_norm=1.0,
        )  # fmt: skip
    assert trainer.state.global_step == 6 and callback.report["stopped"] == "nan"
    assert callback.report["best_step"] == 4 and steps(callback) == [2, 4]
    assert HELD_OUT.measure(trainer.model) == pytest.approx(values(callback)[-1], abs=1e-6)
    assert "Recovery stops after step 6" in caplog.text and "keeping the best of step 4" in caplog.text
    json.loads((tmp_path / "recovery.json").read_text())


def test_full_training(tmp_path):
    callback = make_callback(patience=None)
    trainer = run(tmp_path, callback, model=make_tiny(), callbacks=[Spoil(7, 3.0)], learning_rate=1e-2)
    assert callback.report["training"]["method"] == "full" and callback.report["best_step"] == 6
    assert HELD_OUT.measure(trainer.model) == pytest.approx(values(callback)[2], abs=1e-6)


def test_load_best_model_at_end(tmp_path, caplog):
    callback = make_callback(patience=None)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    with caplog.at_level("WARNING"):
        trainer = run(
            tmp_path, callback, callbacks=[Spoil(5, 3.0)], load_best_model_at_end=True, metric_for_best_model=METRIC,
            **options,
        )  # fmt: skip
    assert trainer.state.best_global_step == 4 == callback.report["best_step"]
    assert trainer.state.best_metric == values(callback)[1] and trainer.args.greater_is_better is False
    assert "greater_is_better" in caplog.text
    assert HELD_OUT.measure(trainer.model) == pytest.approx(values(callback)[1], abs=1e-6)


def test_the_trainers_choice_stands(tmp_path, caplog):
    callback = make_callback(patience=None)
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = run(
        tmp_path, callback, load_best_model_at_end=True, metric_for_best_model=METRIC.replace("log_", "worst_"),
        callbacks=[Spoil(5, 3.0), Worst()], greater_is_better=True, **options,
    )  # fmt: skip
    assert trainer.state.best_global_step == 8 == callback.report["best_step"]
    assert HELD_OUT.measure(trainer.model) == pytest.approx(values(callback)[-1], abs=1e-6)


class Worst(Listener):
    """Adds a metric by which the worst model is the best."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics[METRIC.replace("log_", "worst_")] = float(state.global_step)


@pytest.fixture
def saved(monkeypatch):
    """Stand-ins for merging and saving that say what they were called with."""
    calls = {}

    def merge_adapter(model, *, dtype=None):
        calls["value"], calls["model"] = HELD_OUT.measure(model), model
        return model

    def save_recovered(model, tokenizer, folder, *, pruned, report, picture=None):
        calls.update(folder=folder, pruned=pruned, report=report, picture=picture, tokenizer=tokenizer)

    monkeypatch.setattr("hf_structprune.recovery.save.merge_adapter", merge_adapter)
    monkeypatch.setattr("hf_structprune.recovery.save.save_recovered", save_recovered)
    return calls


def test_merges_and_saves_the_best(tmp_path, saved):
    callback = make_callback(merge=True, patience=None)
    trainer = run(tmp_path, callback, callbacks=[Spoil(5, 3.0)])
    assert saved["value"] == pytest.approx(values(callback)[1], abs=1e-6)
    assert saved["model"] is trainer.model
    assert saved["folder"] == tmp_path / "recovered" and saved["pruned"] is None
    assert saved["report"] == callback.report
    saved["picture"](tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "recovery.png").read_bytes()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Recovery") == 1 and "after step 4" in card


def test_source_is_the_pruned_checkpoint(tmp_path, saved):
    make_tiny().save_pretrained(tmp_path / "pruned")
    PruningPlan(0.1, "llama", "uniform", [], 10, 9, 10, 9, 0, 0, 4.0).save(tmp_path / "pruned" / "pruning_plan.json")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), LoraConfig(target_modules="all-linear")
    )
    run(tmp_path / "out", make_callback(merge=True, output_dir=tmp_path / "there"), model=model, max_steps=1)
    assert saved["pruned"] == tmp_path / "pruned" and saved["folder"] == tmp_path / "there"


def test_two_trainings_with_one_callback(tmp_path):
    callback = make_callback(evaluations=1)
    trainer = make_trainer(tmp_path, callback, max_steps=2)
    trainer.train()
    first = callback.report
    trainer.train()
    assert callback.report["curve"]["pruned"] == first["curve"]["pruned"]
    assert len(callback.report["curve"]["points"]) == 1


def test_sft_trainer(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from training_setup import LETTERS
    from trl import SFTConfig, SFTTrainer

    options = {
        "max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none", "logging_steps": 2, "bf16": False,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_length": 32, "learning_rate": 2e-2,
        "gradient_checkpointing": False,
    }  # fmt: skip
    data = Dataset.from_list([{"text": LETTERS[i : i + 30]} for i in range(16)])

    def train(name, callbacks):
        torch.manual_seed(0)
        trainer = SFTTrainer(
            make_tiny(), SFTConfig(str(tmp_path / name), **options), train_dataset=data, callbacks=callbacks,
            processing_class=tokenizer(), peft_config=LoraConfig(target_modules="all-linear"),
        )  # fmt: skip
        trainer.train()
        return trainer

    callback = make_callback(dense=20.0, evaluations=4)
    watched, plain = train("a", [callback]), train("b", [])
    assert callback.curve.pruned == HELD_OUT.measure(make_tiny())
    assert steps(callback) == [1, 2, 3, 4] and callback.report["training"]["tokens"] > 0
    own = [
        {k: v for k, v in logs.items() if not k.startswith("train_")}
        for logs in watched.state.log_history
        if "loss" in logs
    ]
    assert own == [logs for logs in plain.state.log_history if "loss" in logs]


def test_refuses_before_training(tmp_path):
    for options, message in (
        ({"evaluations": 0}, "`evaluations` is 0"),
        ({"patience": 0}, "`patience` is 0"),
        ({"target": 0.5}, "give `dense` too"),
        ({"target": 1.5, "dense": 3.0}, "`target` is 1.5"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            LoraRecoveryCallback(**options)
    trainer = make_trainer(tmp_path, make_callback())
    trainer.processing_class = trainer.callback_handler.processing_class = trainer.data_collator.tokenizer = None
    with pytest.raises(ConfigurationError, match="processing_class"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_broken_from_the_start(tmp_path):
    model = make_lora()
    torch.nn.init.constant_(model.get_base_model().lm_head.weight, math.nan)
    with pytest.raises(ConfigurationError, match="broken before training"):
        make_trainer(tmp_path, make_callback(), model=model).train()


def test_window_of_the_context(tmp_path, caplog):
    callback = make_callback(window=512)
    with caplog.at_level("WARNING"):
        run(tmp_path, callback, max_steps=1)
    assert callback.report["text"]["window"] == 64 and "context is 64 tokens" in caplog.text


def test_a_dense_model_that_is_no_better_is_said(tmp_path, caplog):
    callback = make_callback(dense=1000.0)
    with caplog.at_level("WARNING"):
        run(tmp_path, callback, max_steps=1)
    assert "no share to bring back" in caplog.text and callback.report["recovered"] is None
