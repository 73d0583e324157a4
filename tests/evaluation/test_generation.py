import csv

import pytest
import torch
from families import cut, random_units
from greedy import greedy
from transformers.utils import logging

from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation import generate_samples, generation, question_protocol
from hf_structprune.evaluation.generation import PROMPTS, QUESTIONS, Answer, QuestionResult
from hf_structprune.model.structure import ModelStructure


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %} > {% endif %}"
)


def written(model, tokenizer, text, new):
    ids = greedy(model, tokenizer, text, new)
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids)


def test_samples_are_greedy_and_beside_their_prompts(model, tiny_tokenizer):
    prompts = ["The cat", "2 + 2 ="]
    samples = generate_samples(model, tiny_tokenizer, prompts, max_new_tokens=12)
    assert [sample["prompt"] for sample in samples] == prompts
    for sample in samples:
        assert (sample["text"], sample["tokens"]) == written(model, tiny_tokenizer, sample["prompt"], 12)
        assert sample["seconds"] > 0 and set(sample) == {"prompt", "text", "tokens", "seconds"}
    assert samples[0]["text"] != samples[1]["text"]
    assert generate_samples(model, tiny_tokenizer, "The cat", max_new_tokens=12)[0]["text"] == samples[0]["text"]


def test_the_chat_template_is_applied(model, make_tokenizer):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    (sample,) = generate_samples(model, tokenizer, ["Hello"], max_new_tokens=8)
    assert sample["prompt"] == "Hello"
    assert (sample["text"], sample["tokens"]) == written(model, tokenizer, "[user] Hello > ", 8)


def test_default_prompts_and_layers_of_different_widths(model, tiny_tokenizer):
    kept, counts = random_units(ModelStructure.of(model), ("kv_groups", "mlp_neurons"), uniform=False)
    model = cut(model, kept, counts, "per_layer")
    samples = generate_samples(model, tiny_tokenizer, max_new_tokens=5)
    assert [sample["prompt"] for sample in samples] == list(PROMPTS)
    assert samples[1]["text"] == written(model, tiny_tokenizer, PROMPTS[1], 5)[0]


def test_the_end_of_the_text_ends_a_sample(model, tiny_tokenizer):
    def end(module, args, output):
        output.logits[..., 2] = 1e4

    model.register_forward_hook(end)
    (sample,) = generate_samples(model, tiny_tokenizer, "Hello", max_new_tokens=20)
    assert (sample["text"], sample["tokens"]) == ("", 1)


def test_sampling_is_seeded_and_leaves_the_generator_alone(model, tiny_tokenizer):
    def sample(seed, prompts=("a", "b")):
        options = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "temperature": 5.0}
        return [s["text"] for s in generate_samples(model, tiny_tokenizer, list(prompts), seed=seed, **options)]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sample(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample(0) == first and sample(0, ["b"]) == first[1:] and sample(1) != first


def test_modes_are_restored(model, tiny_tokenizer):
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    generate_samples(model, tiny_tokenizer, "a", max_new_tokens=2)
    question_protocol(model, tiny_tokenizer, ["a"], max_length=10)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize(
    ("prompts", "tokens", "match"), [("a", 0, "`max_new_tokens` is 0"), ("", 5, "The prompt '' has no token")]
)
def test_wrong_samples(model, tiny_tokenizer, prompts, tokens, match):
    with pytest.raises(ConfigurationError, match=match):
        generate_samples(model, tiny_tokenizer, prompts, max_new_tokens=tokens)


def test_question_protocol(model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "memory_in_use", lambda devices: 3 * 2**29)
    result = question_protocol(model, tiny_tokenizer, max_length=90)
    assert [answer.question for answer in result.answers] == list(QUESTIONS) and len(QUESTIONS) == 5
    for answer in result.answers:
        assert answer.prompt_tokens == len(answer.question)
        expected = written(model, tiny_tokenizer, answer.question, 90 - len(answer.question))
        assert (answer.text, answer.new_tokens) == expected
        assert answer.prompt_tokens + answer.new_tokens <= 90 and answer.seconds > 0 and answer.memory == 3 * 2**29
    assert result.protocol.startswith("5 questions, at most 90 tokens with the prompt, greedy, float32 on cpu")


def test_the_first_question_does_not_pay_for_warming_up(model, tiny_tokenizer):
    lengths = []
    model.register_forward_pre_hook(lambda _, args, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True)
    question_protocol(model, tiny_tokenizer, ["abc", "de"], max_length=5)
    assert lengths == [3, 1, 3, 1, 2, 1, 1]


RESULT = QuestionResult(
    [Answer("one?", 'says "yes",\nthen no', 4, 6, 2.0, 2**30), Answer("two?", "ok", 5, 25, 4.0, 2**31)], "how"
)


def test_rows_and_figures_by_hand():
    first, second, mean = RESULT.rows()
    assert first == {
        "question": "one?", "prompt_tokens": 4, "total_tokens": 10, "seconds": 2.0, "tokens_per_second": 5.0,
        "memory_gib": 1.0, "answer": 'says "yes",\nthen no',
    }  # fmt: skip
    assert second["tokens_per_second"] == 7.5
    assert mean == {
        "question": "mean", "prompt_tokens": 4.5, "total_tokens": 20.0, "seconds": 3.0, "tokens_per_second": 6.25,
        "memory_gib": 1.5, "answer": "",
    }  # fmt: skip
    throughput, memory = RESULT.figures()
    assert (throughput.name, throughput.value, throughput.unit) == ("efficiency/question_throughput", 6.25, "tokens/s")
    assert (memory.name, memory.value, memory.unit) == ("efficiency/question_memory", 1.5 * 2**30, "B")


def test_csv(tmp_path):
    RESULT.write_csv(tmp_path / "new" / "questions.csv")
    with open(tmp_path / "new" / "questions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["question"] for row in rows] == ["one?", "two?", "mean"]
    assert rows[0]["answer"] == 'says "yes",\nthen no' and rows[2]["memory_gib"] == "1.5"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"questions": []}, "`questions` is empty"),
        ({"max_length": 513}, "`max_length` is 513, but the model's context is 512"),
        ({"questions": ["abc", "abcdefgh"], "max_length": 8}, "`max_length` is 8, and 'abcdefgh' alone has 8"),
    ],
)
def test_wrong_questions(model, tiny_tokenizer, options, match):
    with pytest.raises(ConfigurationError, match=match):
        question_protocol(model, tiny_tokenizer, **options)


def test_progress_bars_follow_transformers(model, tiny_tokenizer, capfd):
    was_enabled = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar()
        generate_samples(model, tiny_tokenizer, "a", max_new_tokens=2)
        question_protocol(model, tiny_tokenizer, ["a"], max_length=5)
        shown = capfd.readouterr().err
        assert "Samples" in shown and "Questions" in shown
        logging.disable_progress_bar()
        generate_samples(model, tiny_tokenizer, "a", max_new_tokens=2)
        question_protocol(model, tiny_tokenizer, ["a"], max_length=5)
        assert capfd.readouterr().err == ""
    finally:
        (logging.enable_progress_bar if was_enabled else logging.disable_progress_bar)()
