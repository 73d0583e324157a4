"""The teacher's predictions on disk: the same losses, one run, and refusal of what does not fit."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_distillation import assert_equal_states, make_llama, make_rows, make_trainer, state, trl

from hf_structprune.errors import CheckpointError, ConfigurationError
from hf_structprune.recovery.configuration import DistillationConfig
from hf_structprune.recovery.distillation import teacher as cache_module
from hf_structprune.recovery.distillation.fewer_tokens import split_batch
from hf_structprune.recovery.distillation.teacher import ModelTeacher, cached_teacher, sequence_key


ROWS = ((3, 2), (7, 1), (2, 9), (5, 4), (1, 1), (4, 4))


@pytest.fixture
def calls(monkeypatch):
    """Sequences of each batch the teacher was asked for."""
    seen, lesson = [], ModelTeacher.lesson

    def counted(self, inputs, positions):
        seen.append(len(inputs["input_ids"]))
        return lesson(self, inputs, positions)

    monkeypatch.setattr(ModelTeacher, "lesson", counted)
    return seen


def run(
    tmp_path, tokenizer, cache, *, top_k=128, label_weight=0.3, temperature=2.0, rows=None, max_steps=4, **options
):
    config = DistillationConfig(label_weight=label_weight, temperature=2.0, top_k=top_k, cache=cache and str(cache))
    trainer = make_trainer(
        tmp_path / "out", tokenizer, make_llama(24, 0), make_llama(48, 1), make_rows(ROWS) if rows is None else rows,
        config=config, max_steps=max_steps, per_device_train_batch_size=2, **options,
    )  # fmt: skip
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], state(trainer.model)


def test_the_whole_vocabulary_gives_the_losses_of_the_live_teacher(tmp_path, tiny_tokenizer, calls, monkeypatch):
    monkeypatch.setattr(cache_module, "LOG_PROB_TYPE", torch.float32)
    live, live_state = run(tmp_path, tiny_tokenizer, None)
    calls.clear()
    first, first_state = run(tmp_path, tiny_tokenizer, tmp_path / "cache")
    assert sum(calls) == len(ROWS)  # once, though it trained for more than an epoch
    again, again_state = run(tmp_path, tiny_tokenizer, tmp_path / "cache")
    assert sum(calls) == len(ROWS)
    assert first == pytest.approx(live, rel=1e-5)
    assert_equal_states(first_state, live_state, 1e-5)
    assert again == first
    assert_equal_states(again_state, first_state, 0.0)


def test_fewer_tokens_are_a_lower_bound(tmp_path, tiny_tokenizer):
    losses = []
    for top_k in (None, 64, 4):
        cache = None if top_k is None else tmp_path / f"cache{top_k}"
        losses.append(run(tmp_path, tiny_tokenizer, cache, top_k=top_k or 1, label_weight=0.0, max_steps=1)[0][0])
    assert losses[0] > losses[1] > losses[2] > 0


def test_padding_free_batches_find_their_examples(tmp_path, tiny_tokenizer):
    """Examples in one row; the model separates them by their positions."""
    packed = trl.data_utils.pack_dataset(make_rows(ROWS), 24, "bfd")
    assert "seq_lengths" in packed.column_names and len(packed) < len(ROWS)
    options = dict(rows=packed, padding_free=True, max_length=None, max_steps=2)
    live, _ = run(tmp_path, tiny_tokenizer, None, **options)
    cached, _ = run(tmp_path, tiny_tokenizer, tmp_path / "cache", **options)
    assert cached == pytest.approx(live, rel=2e-3)


def test_an_interrupted_cache_goes_on(tmp_path, monkeypatch, calls):
    monkeypatch.setattr(cache_module, "BATCH_TOKENS", 16)
    monkeypatch.setattr(cache_module, "PART_TOKENS", 1)
    teacher, config = ModelTeacher(make_llama(48, 1)), DistillationConfig(top_k=4)
    counted = ModelTeacher.lesson

    def interrupted(self, *args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return counted(self, *args)

    monkeypatch.setattr(ModelTeacher, "lesson", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_teacher(teacher, [make_rows(ROWS)], config, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert len(before) == 2 and 0 < sum(calls) < len(ROWS)
    monkeypatch.setattr(ModelTeacher, "lesson", counted)
    cached = cached_teacher(teacher, [make_rows(ROWS)], config, tmp_path)
    assert sum(calls) == len(ROWS) and all(sequence_key(np.array(r["input_ids"])) in cached for r in make_rows(ROWS))
    assert all(path.read_bytes() == content for path, content in before.items())
    cached_teacher(teacher, [make_rows((*ROWS, (9, 9)))], config, tmp_path)  # more data: only that is asked for
    assert sum(calls) == len(ROWS) + 1


@pytest.mark.parametrize(
    ("seed", "changes", "rows", "named"),
    [
        (2, {}, ROWS, "teacher"),
        (1, {"top_k": 5}, ROWS, "top_k 4, and now it is 5"),
        (1, {"temperature": 3.0}, ROWS, "temperature 1.0, and now it is 3.0"),
    ],
)
def test_another_cache_is_refused(tmp_path, seed, changes, rows, named):
    def make(seed, changes, rows):
        teacher = ModelTeacher(make_llama(48, seed))
        cached_teacher(teacher, [make_rows(rows)], DistillationConfig(**{"top_k": 4} | changes), tmp_path / "cache")

    make(1, {}, ROWS)
    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    with pytest.raises(ConfigurationError, match=named):
        make(seed, changes, rows)
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before
    make(1, {}, ROWS[:2])  # a part of the data is fine


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds something else"):
        cached_teacher(ModelTeacher(make_llama(48, 1)), [make_rows()], DistillationConfig(top_k=4), tmp_path)


def test_damaged_files_are_named(tmp_path):
    teacher, config = ModelTeacher(make_llama(48, 1)), DistillationConfig(top_k=4)
    cached_teacher(teacher, [make_rows()], config, tmp_path / "cache")
    [part] = (tmp_path / "cache").glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="delete it"):
        cached_teacher(teacher, [make_rows()], config, tmp_path / "cache")


def test_too_little_room_is_said_before(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(CheckpointError, match="top_k"):
        cached_teacher(ModelTeacher(make_llama(48, 1)), [make_rows()], DistillationConfig(top_k=4), tmp_path / "cache")


def test_rows_that_are_not_there_are_named(tmp_path):
    cached = cached_teacher(
        ModelTeacher(make_llama(48, 1)), [make_rows()], DistillationConfig(top_k=4), tmp_path / "c"
    )
    with pytest.raises(ConfigurationError, match="not in the cache"):
        cached.lesson({"input_ids": torch.tensor([[9, 8, 7]])}, torch.tensor([[True, True, False]]))


def test_streamed_data_is_refused(tmp_path):
    stream = Dataset.from_list([{"input_ids": [1, 2, 3]}]).to_iterable_dataset()
    with pytest.raises(ConfigurationError, match="known length"):
        cached_teacher(ModelTeacher(make_llama(48, 1)), [stream], DistillationConfig(top_k=4), tmp_path / "c")


def test_split_batch_undoes_padding_and_packing():
    rows = [[5, 6, 7], [8, 9]]
    collator = trl.trainer.sft_trainer.DataCollatorForLanguageModeling
    for free in (False, True):
        batch = collator(pad_token_id=0, padding_free=free)([{"input_ids": row} for row in rows])
        assert [ids.tolist() for _, _, ids in split_batch(batch)] == rows


def test_the_index_names_no_paths(tmp_path):
    cached_teacher(ModelTeacher(make_llama(48, 1)), [make_rows()], DistillationConfig(top_k=4), tmp_path / "c")
    index = json.loads((tmp_path / "c" / "cache.json").read_text())
    assert index["top_k"] == 4 and str(tmp_path) not in json.dumps(index)
