"""Packed sequences side by side: nothing leaks, and a training is the same as with one behind the other."""

import copy

import pytest
import torch
import transformers
from training_setup import quick_picture  # noqa: F401


pytest.importorskip("trl")
pytest.importorskip("peft")

import families  # noqa: E402
from tiny_tokenizers import build_tokenizer  # noqa: E402
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # noqa: E402

from hf_structprune import hardware  # noqa: E402
from hf_structprune.recovery import DistillationConfig, RecoveryConfig, packing, recover, recovering  # noqa: E402
from hf_structprune.recovery.packing import PackedRows, collator_of, keeps_apart  # noqa: E402


LENGTHS = [[3, 5, 2], [6], [1, 4]]


def made_of(lengths, seed=0):
    """Rows as packing gives them; every token is one that families know."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 40, (sum(row),), generator=generator).tolist() for row in lengths]
    return [{"input_ids": row, "labels": row, "seq_lengths": n} for row, n in zip(ids, lengths, strict=True)]


def test_a_batch_has_rows_whose_positions_begin_anew_and_first_tokens_and_padding_are_not_learned():
    batch = PackedRows(pad_token_id=0)(made_of(LENGTHS))
    assert set(batch) == {"input_ids", "labels", "position_ids"}  # a mask would hide where examples end
    assert batch["position_ids"].tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5, 0, 0, 0, 0], [0, 0, 1, 2, 3, 0, 0, 0, 0, 0],
    ]  # fmt: skip
    learned = batch["labels"] != -100
    assert torch.equal(learned, batch["position_ids"] != 0)
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])


def worst(model, collator):
    """How far the logits of an example in a batch are from those that it has alone, at most, over the largest one."""
    batch, far = collator(made_of(LENGTHS)), 0.0
    del batch["labels"]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        flat = (
            logits.flatten(0, 1)
            if len(logits) == 1
            else logits[
                batch["position_ids"].new_ones(logits.shape[:2]).cumsum(1)
                <= torch.tensor([[sum(lengths)] for lengths in LENGTHS])
            ]
        )
        start = 0
        for example, lengths in zip(made_of(LENGTHS), LENGTHS, strict=True):
            ids = torch.tensor([example["input_ids"]]).split(lengths, 1)
            for one in ids:
                alone = model(input_ids=one, use_cache=False).logits[0]
                far = max(far, ((flat[start : start + len(alone)] - alone).abs().max() / alone.abs().max()).item())
                start += len(alone)
    return far


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_model_that_is_trained_on_packed_examples_keeps_them_apart(name):
    model = families.make_model(name)
    ways = PackedRows(pad_token_id=0), DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    mixes = name == "opt"
    for way in ways:
        assert (worst(model, way) > 0.1) == mixes and (mixes or worst(model, way) < 1e-5)
        assert keeps_apart(model, way) != mixes
        assert keeps_apart(copy.deepcopy(model).bfloat16(), way) != mixes
    found = collator_of(model, 0)
    assert found is None if mixes else isinstance(found, PackedRows)


def mamba():
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, intermediate_size=64, time_step_rank=2
    )
    return families.randomise(transformers.AutoModelForCausalLM.from_config(config)).eval()


def test_states_carry_what_came_before_and_accelerators_take_one_row(monkeypatch):
    assert collator_of(mamba(), 0) is None
    monkeypatch.setattr(hardware, "has_accelerator", lambda: True)
    found = collator_of(families.make_model("llama"), 7)
    assert type(found) is DataCollatorForLanguageModeling and found.padding_free and found.pad_token_id == 7


@pytest.mark.parametrize(
    "settings", [{"method": "distill", "weights": "full"}, {"method": "distill", "rank": 4}, {"method": "full"}],
    ids=["distilled", "adapters", "labels"],
)  # fmt: skip
def test_a_training_is_the_same_as_one_behind_the_other(tmp_path, monkeypatch, settings):
    tokenizer = build_tokenizer()
    torch.manual_seed(1)
    dense = families.make_model("llama", vocab_size=128)
    student = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    rows = [{"text": "the cat sat on the mat. "[: 6 + 3 * (n % 7)]} for n in range(40)]
    (tmp_path / "watched.txt").write_text("the cat sat on the mat. " * 20)
    config = RecoveryConfig(
        **settings, text=str(tmp_path / "watched.txt"), packing=True, dropout=0.0, batch_size=4, micro_batch_size=4,
        max_length=32, max_steps=3, learning_rate=1e-3, precision="fp32", evaluations=1, max_windows=2, window=16,
        patience=None, warmup=0.0,
    )  # fmt: skip
    distilled = config.method == "distill"
    teach = {"teacher": dense, "distillation": DistillationConfig(label_weight=0.5)} if distilled else {}
    results, calls = [], []
    for in_rows in (True, False):
        if not in_rows:
            monkeypatch.setattr(packing, "keeps_apart", lambda model, way: not isinstance(way, PackedRows))
        model, seen = copy.deepcopy(student), []
        model.base_model.register_forward_pre_hook(
            lambda module, _, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape) if module.training else None,
            with_kwargs=True,
        )
        recover(model, rows, tmp_path / f"{in_rows}", config, tokenizer=tokenizer, **teach)
        trained = recovering.load_model(tmp_path / f"{in_rows}")
        results.append(trained.state_dict())
        calls.append(seen)
    assert [len(shapes) for shapes in calls] == [3, 12] and {shape[0] for shape in calls[0]} == {4}
    changed = 0.0
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=2e-5, rtol=1e-4)
        changed = max(changed, (value - student.state_dict()[name]).abs().max().item())
    assert changed > 1e-3


def test_a_model_that_mixes_examples_is_trained_on_one_at_a_time(tmp_path, caplog):
    model = families.make_model("opt", vocab_size=128)
    rows = [{"text": "the cat sat on the mat. "[: 6 + 3 * (n % 7)]} for n in range(12)]
    config = RecoveryConfig(
        method="full", packing=True, batch_size=4, micro_batch_size=2, max_length=32, max_steps=2, precision="fp32",
        evaluations=1, max_windows=2, window=16, patience=None,
    )  # fmt: skip
    shapes = []
    model.base_model.register_forward_pre_hook(
        lambda module, _, kwargs: shapes.append(kwargs["input_ids"].shape) if module.training else None,
        with_kwargs=True,
    )
    report = recover(model, rows, tmp_path / "out", config, tokenizer=build_tokenizer()).report
    assert "Examples are not packed into sequences: in OPTForCausalLM" in caplog.text
    assert report["configuration"]["packing"] is True and report["data"]["packed"] is None  # asked, and got
    assert [shape[0] for shape in shapes] == [2] * 4
