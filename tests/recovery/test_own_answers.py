"""What the dense model answers to the prompts of a data set."""

import json
import time
from itertools import count
from types import SimpleNamespace

import pytest
import torch


pytest.importorskip("trl")

from hf_structprune.errors import ConfigurationError  # noqa: E402
from hf_structprune.recovery import (  # noqa: E402
    DistillationConfig,
    LoraRecoveryCallback,
    RecoveryConfig,
    kept_batches,
    own_answers,
    recover,
)
from hf_structprune.recovery.data import load_rows  # noqa: E402
from hf_structprune.recovery.own_answers import ANSWERS, answered_rows, with_answers  # noqa: E402


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
QUESTIONS = ["What does the fox do?", "Where?", "Is the dog lazy or is it quick, and does it jump?", "Who jumps?"]
PLAIN = [word * n for word in ("fox ", "dog ", "the ", "quick ", "lazy ", "over ") for n in (1, 2)]
LIMITS = {"length": 192, "seed": 0}


@pytest.fixture
def dense(monkeypatch, tmp_path, tiny_llama):
    """A model that ends its answers early: every third token is an end."""
    monkeypatch.setattr(own_answers, "batch_of", lambda *_: 3)
    monkeypatch.setattr(own_answers, "NEW_TOKENS", 6)
    monkeypatch.setattr(kept_batches, "cached_assets_path", lambda *_, subfolder, **__: tmp_path / "cache" / subfolder)
    tiny_llama.generation_config.eos_token_id = list(range(0, tiny_llama.config.vocab_size, 3))
    return tiny_llama


def instructions():
    return load_rows([{"instruction": text, "output": "An answer of the data."} for text in [*QUESTIONS, "Where?"]])


@torch.no_grad()
def greedy(model, ids):
    """The answer to one prompt alone, token by token; `None` if no end comes."""
    said = []
    for _ in range(6):
        token = int(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax())
        if token in model.generation_config.eos_token_id:
            return said
        said.append(token)
    return None


def test_every_prompt_gets_the_answer_that_it_gets_alone(dense, make_tokenizer):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    expected = {}
    for text in QUESTIONS:
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        said = greedy(dense, ids)
        if said is not None and (words := tokenizer.decode(said, skip_special_tokens=True).strip()):
            expected[text] = words
    rows = answered_rows(dense, tokenizer, instructions(), 10, **LIMITS)
    assert {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in rows} == expected
    assert 0 < len(rows) == len(expected)  # each question once


def test_what_was_answered_is_kept_and_gone_on_with(dense, make_tokenizer, monkeypatch):
    tokenizer, made = make_tokenizer(chat_template=TEMPLATE), []
    batch = own_answers.Answers.batch
    monkeypatch.setattr(own_answers.Answers, "batch", lambda self, n, until: made.append(n) or batch(self, n, until))
    short = answered_rows(dense, tokenizer, instructions(), 10, seconds=0, **LIMITS)
    assert made == [0]  # one batch in any case
    rows = answered_rows(dense, tokenizer, instructions(), 10, **LIMITS)
    assert rows[: len(short)] == short and made == [0, 1]
    assert answered_rows(dense, tokenizer, instructions(), 10, **LIMITS) == rows and made == [0, 1]
    assert len(answered_rows(dense, tokenizer, instructions(), 2, **LIMITS)) <= 2 and made[2:] == [0]  # others drawn


def test_answers_for_which_there_was_no_time_are_not_ended(dense, make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    dense.generation_config.eos_token_id = dense.config.vocab_size - 1
    about = own_answers.Answers(dense, tokenizer, [[5, 6, 7], [8, 9]], 6, 2)
    assert [(len(ids), ended) for ids, ended in about.said(0)] == [(6, False)] * 2
    assert [(len(ids), ended) for ids, ended in about.said(0, time.monotonic() - 1)] == [(1, False)] * 2
    with pytest.raises(ConfigurationError, match="within 6 tokens and about 7 seconds: give more `minutes`, or leave"):
        answered_rows(dense, tokenizer, instructions(), 4, seconds=7.0, **LIMITS)


def test_chats_and_texts_to_go_on_from_are_sources_of_their_own(dense, make_tokenizer):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    turns = [
        {"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "It jumps."},
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is quick."},
    ]  # fmt: skip
    texts = [{"prompt": text, "completion": "yes"} for text in PLAIN]
    rows = load_rows([[{"messages": turns}], texts, [{"text": "No prompt at all."}]])
    mixed = with_answers(rows, dense, tokenizer, 20, **LIMITS)
    assert list(mixed)[: len(rows)] == list(rows) and all(mixed[name] is rows[name] for name in rows)
    chats, plain = mixed[ANSWERS], mixed[f"{ANSWERS}, plain"]
    assert chats["prompt"][0] == turns[:1]  # up to the first answer
    assert {*plain["prompt"]} <= {*PLAIN} and all(isinstance(text, str) for text in plain["completion"])


def test_data_without_prompts_and_answers_without_end_are_refused(dense, make_tokenizer):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    with pytest.raises(ConfigurationError, match="`dense_answers` is 4, but there is no prompt of at most 96 tokens"):
        answered_rows(dense, tokenizer, load_rows([{"text": "Plain text."}]), 4, **LIMITS)
    dense.generation_config.eos_token_id = dense.config.vocab_size - 1
    with pytest.raises(ConfigurationError, match="ends none of its answers to 4 prompts within 6 tokens"):
        answered_rows(dense, tokenizer, instructions(), 4, **LIMITS)
    with pytest.raises(ConfigurationError, match="`dense_answers` is 4, but the teacher of `dual_space`"):
        DistillationConfig(dense_answers=4, dual_space=True)


@pytest.mark.parametrize(
    ("method", "dataset", "match"),
    [
        ("lora", [{"text": "Plain text."}], "`method` is 'lora', and `label_weight`, `dense_answers` .* do nothing"),
        ("distill", None, "`dense_answers` is 4, but there is no data set"),
    ],
)
def test_options_that_would_do_nothing_are_refused(method, dataset, match, tmp_path):
    config, distillation = RecoveryConfig(method=method), DistillationConfig(label_weight=0.5, dense_answers=4)
    with pytest.raises(ConfigurationError, match=match):
        recover(tmp_path / "none", dataset, tmp_path / "out", config, distillation=distillation)
    assert not list(tmp_path.iterdir())


def test_a_training_learns_them_too(dense, make_tokenizer, tmp_path, caplog):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    for folder in ("dense", "pruned"):
        dense.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    rows = [{"instruction": text, "output": "An answer of the data."} for text in QUESTIONS]
    config = RecoveryConfig(
        method="distill", max_steps=1, max_length=192, precision="fp32", max_windows=1, window=16, evaluations=1
    )
    result = recover(
        tmp_path / "pruned", rows, tmp_path / "out", config, teacher=tmp_path / "dense",
        distillation=DistillationConfig(dense_answers=4),
    )  # fmt: skip
    sources = {one["name"]: one["rows"] for one in result.report["data"]["sources"]}
    assert sources["data"] == 4 and 0 < sources[ANSWERS] <= 4
    assert json.loads((tmp_path / "out" / "recovery.json").read_text())["distillation"]["dense_answers"] == 4
    assert "padding-free" not in caplog.text  # TRL advises against one sequence at a time


def test_a_training_by_time_goes_on_with_the_answers_that_it_was_begun_with(
    dense, make_tokenizer, tmp_path, monkeypatch
):
    for folder in ("dense", "pruned"):
        dense.save_pretrained(tmp_path / folder)
        make_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path / folder)
    config = RecoveryConfig(
        method="distill", minutes=10, max_steps=2, save_steps=1, max_length=192, precision="fp32", max_windows=1,
        window=16, evaluations=1,
    )  # fmt: skip

    def train(resume):
        return recover(
            tmp_path / "pruned", [{"instruction": text, "output": "An answer."} for text in QUESTIONS],
            tmp_path / "out", config, teacher=tmp_path / "dense", resume=resume,
            distillation=DistillationConfig(dense_answers=4),
        )  # fmt: skip

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(kept_batches, "time", SimpleNamespace(monotonic=count(step=1000).__next__))  # one batch alone
        patched.setattr(kept_batches, "SHORTEST", 1e6)
        patched.setattr(LoraRecoveryCallback, "on_step_begin", interrupt)
        train(False)
    (answers,) = (tmp_path / "cache").glob("**/*.jsonl")
    assert len(answers.read_text().splitlines()) == 1
    assert train(True).report["training"]["steps"] == 2 and len(answers.read_text().splitlines()) == 1
