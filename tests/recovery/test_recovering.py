"""`recover` and its command: from a pruned checkpoint to a recovered one, on tiny models."""

import copy
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_setup import quick_picture  # noqa: F401
from transformers import AutoModelForCausalLM, Trainer


pytest.importorskip("trl")
pytest.importorskip("peft")

import families  # noqa: E402

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner  # noqa: E402
from hf_structprune.commands import cli  # noqa: E402
from hf_structprune.errors import ConfigurationError, StructPruneError, TextError  # noqa: E402
from hf_structprune.hub.words import PICTURE_NAME, RECOVERY_NAME  # noqa: E402
from hf_structprune.recovery import (  # noqa: E402
    DistillationConfig,
    LoraRecoveryCallback,
    RecoveryConfig,
    kept_batches,
    recover,
    time_limit,
)
from hf_structprune.recovery.learning_rate import peak_learning_rate  # noqa: E402
from hf_structprune.recovery.measuring import HeldOutText  # noqa: E402
from hf_structprune.recovery.recovering import _check_folders  # noqa: E402


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SENTENCE = "The quick brown fox jumps over the lazy dog. "
ROWS = [{"instruction": f"Say {n}.", "context": "", "response": f"It is {n}, and {SENTENCE}"} for n in range(24)]
SMALL = dict(
    rank=4, alpha=8, dropout=0.0, max_length=64, batch_size=4, micro_batch_size=2, max_steps=4, evaluations=2,
    max_windows=2, window=32, precision="fp32", learning_rate=3e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_builders, tmp_path_factory):
    """A dense model that knows one sentence a little, its pruned child, data, and a text to measure on."""
    folder, (build_llama, build_tokenizer) = tmp_path_factory.mktemp("made"), tiny_builders
    model, tokenizer = build_llama(), build_tokenizer(chat_template=TEMPLATE)
    teach(model, tokenizer)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    config = PruningConfig(
        criterion="l2", compensation=False, round_to=1, calibration=CalibrationConfig(num_samples=4, length=16)
    )
    pruner = StructuredPruner.from_pretrained(folder / "dense", config=config)
    pruner.prune(0.4)
    pruner.save_pretrained(folder / "pruned")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "watched.txt").write_text(SENTENCE * 10)
    return folder


@pytest.fixture
def checkpoints(made, tmp_path):
    """A copy of these."""
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


def teach(model, tokenizer):
    ids = torch.tensor([tokenizer(SENTENCE * 2)["input_ids"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """What a training measures that is not interrupted."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("whole"), dirs_exist_ok=True)
    return measured(run(folder))


def measured(result):
    return [point["log_perplexity"] for point in result.report["curve"]["points"]]


def run(folder, name="out", *, dense=True, distillation=None, dataset=None, overwrite=False, resume=False, **changes):
    config = RecoveryConfig(**{**SMALL, "text": str(folder / "watched.txt"), **changes})
    data = dataset or folder / "data.jsonl"
    return recover(
        folder / "pruned", data, folder / name, config, dense=folder / "dense" if dense else None,
        teacher=folder / "dense" if config.method == "distill" else None, distillation=distillation,
        overwrite=overwrite, resume=resume,
    )  # fmt: skip


def parameters(folder):
    return AutoModelForCausalLM.from_pretrained(folder).num_parameters()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full"},
        {"method": "qlora"},
        {"method": "distill", "weights": "full"},
        {"init_lora_weights": "pissa"},
        {"packing": True, "use_dora": True, "use_rslora": True},
        {
            "target_modules": ["down_proj"],
            "modules_to_save": ["lm_head"],
            "precision": "bf16",
            "gradient_checkpointing": True,
        },
    ],
    ids=["full", "qlora", "distill-full", "pissa", "packed-dora", "down-proj-and-head"],
)
def test_every_method_brings_quality_back(checkpoints, changes):
    if changes.get("method") == "qlora":
        pytest.importorskip("bitsandbytes")
    texts = [{"text": SENTENCE * (1 + n % 2)} for n in range(24)]
    result = run(checkpoints, max_steps=12, dataset=texts, **changes)
    assert 0.05 < result.recovered < 2
    assert parameters(result.folder) == parameters(checkpoints / "pruned") < parameters(checkpoints / "dense")
    assert (result.folder / PICTURE_NAME).is_file() and (result.folder / "pruning_plan.json").is_file()
    report = json.loads((result.folder / RECOVERY_NAME).read_text())
    assert result.report.items() <= report.items()
    assert report["configuration"]["max_steps"] == 12
    assert str(checkpoints) not in json.dumps(report)  # published: names, no paths
    card = (result.folder / "README.md").read_text()
    assert "## Recovery" in card and f"{result.recovered:.1%}".rstrip("%") in card.replace(" %", "")


def test_distillation_from_a_cache_keeps_the_cache(checkpoints):
    cached = DistillationConfig(cache=str(checkpoints / "cache"), top_k=128)
    result = run(checkpoints, method="distill", distillation=cached)
    assert any((checkpoints / "cache").glob("*.safetensors")) and result.report["distillation"]["cache"] == "cache"


def test_the_result_is_saved_in_the_dtype_of_the_checkpoint(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "pruned").to(torch.bfloat16)
    model.save_pretrained(checkpoints / "pruned")
    result = run(checkpoints, max_steps=1)
    assert AutoModelForCausalLM.from_pretrained(result.folder).dtype == torch.bfloat16


def test_training_that_makes_it_worse_gives_the_pruned_model_back(checkpoints):
    result = run(checkpoints, learning_rate=5.0, max_steps=3, evaluations=3, patience=2)
    assert result.report["best_step"] == 0
    pruned, kept = (AutoModelForCausalLM.from_pretrained(f) for f in (checkpoints / "pruned", result.folder))
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), kept.parameters(), strict=True))
    assert "**Training did not help.**" in (result.folder / "README.md").read_text()


def test_nothing_is_written_over_without_being_asked(checkpoints):
    run(checkpoints, max_steps=1)
    with pytest.raises(ConfigurationError, match="is not empty"):
        run(checkpoints, max_steps=1)
    run(checkpoints, max_steps=2, overwrite=True)
    (checkpoints / "out-training" / "mine.txt").write_text("mine")
    run(checkpoints, max_steps=1, overwrite=True)
    steps = sorted(path.name for path in (checkpoints / "out-training").glob("checkpoint-*"))
    assert steps == ["checkpoint-1"]  # none of an earlier training, which `resume` would take
    assert (checkpoints / "out-training" / "mine.txt").is_file()


def test_an_interrupted_training_is_not_started_anew_without_being_asked(checkpoints, whole, monkeypatch, caplog):
    monkeypatch.setattr(LoraRecoveryCallback, "on_train_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints)
    monkeypatch.undo()
    assert "`resume` (--resume) goes on from step 4" in caplog.text
    assert not (checkpoints / "out").exists()
    with pytest.raises(ConfigurationError, match="holds a training that was interrupted"):
        run(checkpoints)
    steps = []
    monkeypatch.setattr(Trainer, "training_step", lambda self, *args: steps.append(args))
    result = run(checkpoints, resume=True)  # nothing is left to train
    assert measured(result) == pytest.approx(whole, abs=1e-5) and result.report["training"]["steps"] == 4
    assert not steps


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_training_goes_on_from_the_newest_whole_checkpoint_and_as_it_was_begun(
    checkpoints, whole, monkeypatch, caplog
):
    """Interrupted in the middle of writing the checkpoint of step 3: that of step 2 is whole."""
    save = Trainer._save_rng_state
    monkeypatch.setattr(
        Trainer, "_save_rng_state", lambda self, to: interrupt() if to.endswith("-3") else save(self, to)
    )
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints)
    monkeypatch.undo()
    half = checkpoints / "out-training" / "checkpoint-3"
    assert half.is_dir() and "goes on from step 2" in caplog.text
    for changes, message in (
        ({"rank": 8, "alpha": 16}, "`rank` is 8, it was 4; `alpha` is 16, it was 8"),
        ({"dataset": ROWS[:8]}, r"`dataset` is \['data'\], it was \['data.jsonl'\]"),
        ({"dense": False}, "`dense` is None, it was 'dense'"),
        ({"method": "full"}, "`method` is 'full', it was 'lora'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            run(checkpoints, resume=True, **changes)
    data = (checkpoints / "data.jsonl").read_text()
    (checkpoints / "data.jsonl").write_text(data.replace("It is 3", "It is 7"))  # of the same name, not the same
    with pytest.raises(ConfigurationError, match="`training_rows` is '24 sequences, .*', it was '24 sequences, "):
        run(checkpoints, resume=True)
    (checkpoints / "data.jsonl").write_text(data)
    assert half.is_dir()  # nothing is removed before all is checked
    result = run(checkpoints, resume=True, save_steps=2)  # no part of what is learned
    assert "checkpoint-3 is not whole: recovery_state.json is missing. Going on from" in caplog.text
    left = sorted(path.name for path in (checkpoints / "out-training").glob("checkpoint-*"))
    assert left[-1] == "checkpoint-4" and len(left) == 2
    assert measured(result) == pytest.approx(whole, abs=1e-5)


def test_only_half_written_checkpoints_are_nothing_to_go_on_from(tmp_path, caplog):
    (tmp_path / "t" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="checkpoint-2 is not whole: recovery_state.json is missing.; leave"):
        _check_folders(tmp_path / "out", tmp_path / "t", resume=True, overwrite=False)
    assert _check_folders(tmp_path / "out", tmp_path / "t", resume=False, overwrite=False) is None
    assert "The training starts anew" in caplog.text


def test_resuming_needs_a_checkpoint(checkpoints):
    with pytest.raises(ConfigurationError, match="no checkpoint in .*out-training"):
        run(checkpoints, resume=True)


def test_unknown_columns_are_named_before_training(checkpoints):
    with pytest.raises(TextError, match="colour"):
        run(checkpoints, dataset=[{"colour": "blue"}])
    assert not (checkpoints / "out").exists()


def test_distilling_needs_to_know_the_dense_model(checkpoints):
    config = RecoveryConfig(**SMALL, method="distill")
    with pytest.raises(ConfigurationError, match="give `teacher`"):
        recover(checkpoints / "pruned", checkpoints / "data.jsonl", checkpoints / "out", config)


def test_no_data_set_is_needed_to_distil(checkpoints, monkeypatch, capsys):
    """On the calibration text and on what the dense model writes; the command of the card does the same."""
    monkeypatch.setattr(kept_batches, "cached_assets_path", lambda *_, **__: checkpoints / "cache")
    argv = ["recover", str(checkpoints / "pruned"), "--dense", str(checkpoints / "dense"), "--method", "distill"]
    argv += ["--generated-tokens", "1200", "--max-samples", "60", f"--text={checkpoints / 'watched.txt'}", "--json"]
    argv += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert cli.main([*argv, "--output-dir", str(checkpoints / "out")]) == 0
    said = capsys.readouterr()
    assert f"{checkpoints / 'out-training'} (" in said.err and "they may be deleted" in said.err
    report = json.loads(said.out)
    assert [source["name"] for source in report["data"]["sources"]] == [
        "calibration text",
        "packaged chats",
        "generated text",
    ]
    assert report["dataset"] == [] and report["teacher"] == "dense" and report["training"]["steps"] == 4
    card = (checkpoints / "out" / "README.md").read_text()
    assert "--generated-tokens 1200" in card and "--dataset " not in card


def test_the_rate_goes_by_the_model_and_is_compared_when_the_training_goes_on(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "pruned")
    rate = peak_learning_rate(RecoveryConfig(), model)
    begun = {"max_steps": 2, "save_steps": 1}
    assert run(checkpoints, learning_rate=None, **begun).report["training"]["learning_rate"] == rate
    run(checkpoints, learning_rate=rate, resume=True, **begun)
    with pytest.raises(ConfigurationError, match=f"`learning_rate` is 0.5, it was {rate}"):
        run(checkpoints, learning_rate=0.5, resume=True, **begun)


def test_a_training_with_a_time_limit_ends_in_time_with_its_learning_rate(checkpoints, monkeypatch, caplog):
    """A clock that goes on by six seconds with every optimiser step."""
    now, rates = [0.0], []
    monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=lambda: now[0]))
    step = LoraRecoveryCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        now[0] += 6.0
        rates.append(kwargs["lr_scheduler"].get_last_lr()[0])
        step(self, args, state, control, **kwargs)

    monkeypatch.setattr(LoraRecoveryCallback, "on_step_end", on_step_end)
    rate = 1e-5  # by which it becomes no worse: it would be lowered otherwise
    given = {"minutes": 1.0, "max_steps": None, "evaluations": 5, "warmup": 0.0, "patience": None}
    result = run(checkpoints, learning_rate=rate, **given)
    assert result.report["training"]["steps"] == 10 and result.report["stopped"] == "time"
    assert [point["step"] for point in result.report["curve"]["points"]] == [2, 4, 6, 8, 10]
    half_cosine = [rate * (1 + math.cos(math.pi * n / 10)) / 2 for n in range(10)]
    assert rates == pytest.approx(half_cosine, abs=1e-3 * rate)
    assert "Training was stopped" not in (result.folder / "README.md").read_text()


@pytest.mark.parametrize(("each", "left"), [(0.1, 6), (1.2, 5), (100.0, 4)])
def test_measuring_takes_a_tenth_of_the_time_or_four_windows(checkpoints, monkeypatch, caplog, each, left):
    """Also when the training goes on: its curve is of the same windows."""
    monkeypatch.setattr(HeldOutText, "seconds_of_a_window", lambda *given: each)
    sizes = {"minutes": 1.0, "max_steps": 2, "save_steps": 1, "max_windows": 6}
    with caplog.at_level("INFO"):
        text = run(checkpoints, **sizes).report["text"]
    assert text["windows"] == left and text["tokens"] == left * (text["window"] - 1)
    assert (f"{left} of 6 windows are measured" in caplog.text) == (left < 6)
    assert run(checkpoints, resume=True, **sizes).report["text"] == text


def test_a_window_is_timed_as_it_is_measured(checkpoints, make_tokenizer):
    tokenizer, model = make_tokenizer(), AutoModelForCausalLM.from_pretrained(checkpoints / "pruned")
    text = HeldOutText(tokenizer, window=32, max_windows=9, batch_size=2)
    ids, value = text.ids, text.measure(model)
    assert 0 < text.seconds_of_a_window(model) < 60 and text.ids is ids and text.measure(model) == value
    text.shorten(3)
    assert torch.equal(text.ids, ids[[0, 4, 8]])
    assert text.measure(model) == pytest.approx(sum(one.measure(model) for one in alone(text)) / 3)


def alone(text):
    """A held-out text of each window."""
    for number in range(len(text.ids)):
        one = copy.copy(text)
        one.ids, one.tokens = text.ids[number : number + 1], text.tokens // len(text.ids)
        yield one


def test_the_time_is_up_in_the_middle_of_a_step(checkpoints, monkeypatch, caplog):
    """A clock that goes on by six seconds with every micro-batch, four of which make a step: 12 in 66 seconds."""
    now = [0.0]
    monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for name in ("on_substep_end", "on_step_end"):
        event = getattr(LoraRecoveryCallback, name)

        def later(self, *args, event=event, **kwargs):
            now[0] += 6.0
            event(self, *args, **kwargs)

        monkeypatch.setattr(LoraRecoveryCallback, name, later)
    sizes = {"batch_size": 8, "micro_batch_size": 2, "max_steps": None, "patience": None}
    with caplog.at_level("WARNING"):
        result = run(checkpoints, minutes=1.0, **sizes)
    assert result.report["training"]["steps"] == 2 and result.report["stopped"] == "time" and now == [66.0]
    assert result.report["curve"]["points"][-1]["step"] == 2  # measured, although its time did not ask for it
    assert "in the middle of step 3, which is not taken: 8 sequences" in caplog.text
    now[0] = 0.0
    result = run(checkpoints, "none", minutes=0.25, **sizes)
    assert result.report["training"]["steps"] == 0 and result.report["best_step"] == 0
    assert parameters(checkpoints / "none") == parameters(checkpoints / "pruned")


@pytest.mark.parametrize(("until", "seconds"), [(None, 60.0), (100.0, 60.0), (45.0, 37.0), (-5.0, 1.0)])
def test_a_time_limit_is_over_by_then(monkeypatch, until, seconds):
    now = [8.0]
    monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=lambda: now[0]))
    limit = time_limit.TimeLimit(1.0, 4, until)
    limit.begin(None, 10)
    assert limit.seconds == seconds
    now[0] += seconds / 2
    assert limit.progress == 0.5 and limit.next_part() and not limit.next_part()


@pytest.mark.parametrize("warmup", [0, 100])
def test_a_schedule_by_time_warms_up_for_ten_steps_at_least(monkeypatch, warmup):
    """A step of six seconds of a minute: a tenth of the time, for which the schedule warms up, is one step."""
    now = [0.0]
    monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=lambda: now[0]))
    schedule = lambda step: min(1.0, step / warmup if warmup else 1.0)  # noqa: E731
    scheduler, factors = SimpleNamespace(lr_lambdas=[schedule]), []
    time_limit.TimeLimit(2.0, 1).begin(scheduler, 1000)
    for step in range(14):
        factors.append(scheduler.lr_lambdas[0](step))
        now[0] += 6.0
    by_time = [min(1.0, 0.5 * step) for step in range(14)]
    slower = [min(1.0, (step + 1) / 10) for step in range(14)]
    assert factors == pytest.approx([*map(min, by_time, slower)] if warmup else [1.0] * 14)
    now[0] = 0.0
    quick = SimpleNamespace(lr_lambdas=[schedule])
    time_limit.TimeLimit(200.0, 1).begin(quick, 1000)  # the schedule itself takes longer
    now[0] += 60.0
    assert quick.lr_lambdas[0](4) == (0.05 if warmup else 1.0)


def test_a_model_in_memory(checkpoints, make_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "pruned")
    config = RecoveryConfig(**{**SMALL, "text": str(checkpoints / "watched.txt"), "max_steps": 1})
    with pytest.raises(ConfigurationError, match="give its `tokenizer`"):
        recover(model, ROWS, checkpoints / "out", config)
    recover(model, ROWS, checkpoints / "out", config, tokenizer=make_tokenizer(chat_template=TEMPLATE))
    assert parameters(checkpoints / "out") == parameters(checkpoints / "pruned")
    assert (checkpoints / "out" / "pruning_plan.json").is_file()  # of the folder it came from


def test_a_missing_extra_is_named(checkpoints, monkeypatch):
    monkeypatch.setattr("hf_structprune.installed.find_spec", lambda name: None)
    with pytest.raises(StructPruneError, match=r'pip install "hf-structprune\[recover\]"'):
        run(checkpoints)


def test_the_command_prints_one_object(checkpoints, capsys):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    argv = ["recover", str(checkpoints / "pruned"), "--dataset", str(checkpoints / "data.jsonl"), "--output-dir"]
    argv += [str(checkpoints / "out"), "--dense", str(checkpoints / "dense"), "--json", *arguments]
    assert cli.main([*argv, f"--text={checkpoints / 'watched.txt'}"]) == 0
    printed = capsys.readouterr()
    assert "data.jsonl (instruction): 24 rows, 24 sequences" in printed.err and "Before training" in printed.err
    data = json.loads(printed.out)
    assert data["curve"]["dense"] < data["curve"]["pruned"] and math.isfinite(data["curve"]["pruned"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pruned", "--output-dir", "out"], "--dataset is missing"),
        (["pruned", "--dataset", "d.jsonl"], "--output-dir is missing"),
        (["pruned", "--dataset", "d.jsonl", "--output-dir", "out", "--rank", "0"], "`rank` is 0"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(argv, message, capsys):
    assert cli.main(["recover", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_embeddings_are_held_in_distillation_unless_asked_for(tiny_builders, tmp_path, tied, checkpointing):
    _, build_tokenizer = tiny_builders
    dense = families.make_model("llama", vocab_size=128, tie_word_embeddings=tied)
    teach(dense, build_tokenizer())
    student, sides = copy.deepcopy(dense), ("model.embed_tokens.weight", "lm_head.weight")
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if name not in sides:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    (tmp_path / "watched.txt").write_text(SENTENCE * 10)
    rows, changed = [{"text": SENTENCE} for _ in range(16)], {}
    for trains in (None, True):
        config = RecoveryConfig(
            **SMALL | {"rank": None, "alpha": None}, method="distill", weights="full", train_embeddings=trains,
            gradient_checkpointing=checkpointing, text=str(tmp_path / "watched.txt"),
        )  # fmt: skip
        before = copy.deepcopy(student.state_dict())
        model = copy.deepcopy(student)
        recover(model, rows, tmp_path / f"{trains}", config, tokenizer=build_tokenizer(), teacher=dense)
        now = AutoModelForCausalLM.from_pretrained(tmp_path / f"{trains}").state_dict()
        changed[trains] = {name for name, value in now.items() if not torch.equal(value, before[name])}
    assert changed[None] and not changed[None] & set(sides)
    assert changed[True] == changed[None] | set(sides)
