"""Short questions that the dense model makes up and answers."""

import json
from collections import Counter
from itertools import takewhile

import pytest
import torch


pytest.importorskip("trl")

from hf_structprune.errors import ConfigurationError  # noqa: E402
from hf_structprune.evaluation.answers import words_of  # noqa: E402
from hf_structprune.evaluation.questions import closed_questions  # noqa: E402
from hf_structprune.recovery import (  # noqa: E402
    DistillationConfig,
    RecoveryConfig,
    kept_batches,
    own_questions,
    recover,
)
from hf_structprune.recovery.data import load_rows  # noqa: E402
from hf_structprune.recovery.own_questions import (  # noqa: E402
    CHATS,
    LISTS,
    ROUNDS,
    SHOTS,
    TOGETHER,
    Writer,
    chats_of,
    is_packaged,
    lists_of,
    made_up,
    own_documents,
    pairs_in,
    whole_sentences,
    with_questions,
)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
# Three batches of a model: the second has one question anew, with another answer, the third nothing else.
BATCHES = [
    [("What does the fox do?", "jumps"), ("Who is lazy?", "the dog")],
    [("Who is lazy?", "nobody"), ("How quick is it?", "very")],
    [("Who is lazy?", "the fox")],
]


@pytest.fixture
def place(monkeypatch, tmp_path):
    monkeypatch.setattr(kept_batches, "cached_assets_path", lambda *_, subfolder, **__: tmp_path / "cache" / subfolder)
    monkeypatch.setattr(own_questions, "batch_of", lambda *_: 3)
    monkeypatch.setattr(own_questions, "WRITTEN", 8)
    monkeypatch.setattr(own_questions, "ANSWERED", 6)
    return tmp_path


@pytest.fixture
def written(place, monkeypatch):
    """The numbers of the batches that are written; what they hold is given."""
    numbers = []

    def batch(self, number, until=None):
        numbers.append(number)
        return BATCHES[number] if number < len(BATCHES) else []

    monkeypatch.setattr(Writer, "batch", batch)
    return numbers


def test_whole_questions_with_whole_answers_are_read_and_no_packaged_ones():
    packaged = closed_questions()[0].text
    text = (
        f"Question: Where is it?\nAnswer: here\n\nQuestion:  Why? \nAnswer:  for fun. \nQuestion: So.\nAnswer: no\n\n"
        f"Question: {packaged}\nAnswer: Paris\n\nQuestion: {'a' * 200}?\nAnswer: long\n\nQuestion: \nAnswer: none\n\n"
        f"Question: Who?\nAnswer:\n\nQuestion: Which one?\nAnswer: cut o"
    )
    assert pairs_in(text) == [("Where is it?", "here"), ("Why?", "for fun.")]


@pytest.mark.parametrize(
    ("question", "packaged"),
    [
        ("What is the capital city of France?", True), ("What's the capital of Canada?", True),
        ("Which planet is the largest one in our solar system?", True), ('Say the opposite of "Hot"?', True),
        ("What is the capital of Australia?", False), ("What is the largest mammal on Earth?", False),
        ("How many legs does a horse have?", False), ("What is the opposite?", False),
    ],
)  # fmt: skip
def test_packaged_questions_are_known_in_other_words_too(question, packaged):
    assert is_packaged(question) is packaged
    assert bool(pairs_in(f"Question: {question}\nAnswer: this\n")) is not packaged


def test_every_packaged_question_is_told_by_two_words_at_least():
    assert all(is_packaged(question.text) for question in closed_questions())
    assert min(map(len, own_questions._asked())) >= 2


def test_no_example_is_among_the_questions_that_are_asked():
    asked = {tuple(words_of(question.text)) for question in closed_questions()}
    assert not [question for question, _ in SHOTS if tuple(words_of(question)) in asked]
    assert pairs_in(own_questions._listed(list(SHOTS)) + "\n") == list(SHOTS)  # they are read as they are written


def test_lists_are_gone_on_with_as_the_seed_says(place, tiny_llama, make_tokenizer, monkeypatch):
    given, generate = [], tiny_llama.generate
    monkeypatch.setattr(tiny_llama, "generate", lambda **more: given.append(more) or generate(**more))
    monkeypatch.setattr(own_questions, "pairs_in", lambda text: [(text, "")])
    tiny_llama.config.max_position_embeddings = 4096
    tokenizer, before = make_tokenizer(), torch.get_rng_state()
    first, second = (Writer(tiny_llama, tokenizer, 0).batch(number) for number in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first) == 3 and first != second and all(text.startswith("Question:") for text, _ in first)
    assert Writer(tiny_llama, tokenizer, 0).batch(1) == second
    assert all(Writer(tiny_llama, tokenizer, 1).batch(number) != second for number in (0, 1))  # nor moved by one
    assert given[0]["do_sample"] and given[0]["temperature"] == own_questions.TEMPERATURE == 0.8
    prompts = tokenizer.batch_decode(given[0]["input_ids"], skip_special_tokens=True)
    assert all(text.count("Answer: ") == own_questions.BEFORE and text.endswith("\n\nQuestion:") for text in prompts)
    tiny_llama.config.max_position_embeddings = given[0]["input_ids"].shape[1] + 7
    assert Writer(tiny_llama, tokenizer, 0).batch(0) == []  # no room for what would be written


def test_questions_are_made_up_until_there_are_enough_or_no_new_ones_come(written, tiny_llama, make_tokenizer):
    tokenizer = make_tokenizer()
    assert made_up(tiny_llama, tokenizer, 100, seed=0, seconds=0) == dict(BATCHES[0]) and written == [0]
    every = {"What does the fox do?": "jumps", "Who is lazy?": "the dog", "How quick is it?": "very"}
    assert made_up(tiny_llama, tokenizer, 100, seed=0) == every and written == [0, 1, 2]  # the third brings nothing
    assert made_up(tiny_llama, tokenizer, 2, seed=0) == dict(BATCHES[0]) and written == [0, 1, 2]  # they are kept
    assert len(made_up(tiny_llama, tokenizer, 2, seed=1)) == 2 and written[3:] == [0]


def test_every_question_is_in_two_lists_in_other_places():
    pairs = {f"What is {n}?": f"number {n}" for n in range(2 * TOGETHER + 3)}
    rows = lists_of(pairs, seed=0)
    read = [pairs_in(row["text"] + "\n") for row in rows]
    assert Counter(pair for some in read for pair in some) == dict.fromkeys(pairs.items(), ROUNDS)
    assert [len(some) for some in read] == [TOGETHER, TOGETHER, 3] * ROUNDS and read[:3] != read[3:]
    assert lists_of(pairs, seed=0) == rows != lists_of(pairs, seed=1)


@pytest.mark.parametrize(
    ("text", "left"),
    [("One. Two! And thr", "One. Two!"), ("Is it? ", "Is it?"), ("no end 3.14 of", ""), ("", ""), ("A.\nB", "A.")],
)
def test_an_answer_without_end_is_cut_after_its_last_sentence(text, left):
    assert whole_sentences(text) == left


@pytest.mark.parametrize("ended", [True, False])
@torch.no_grad()
def test_a_chat_has_the_answer_that_its_question_gets_alone(ended, place, tiny_llama, make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    tiny_llama.config.max_position_embeddings = 4096
    monkeypatch.setattr(own_questions, "whole_sentences", lambda text: f"cut: {text}")
    questions, alone = [f"{word}{' really' * n}?" for n in range(4) for word in ("Why", "Where", "Who")], {}
    for question in questions:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        said = []
        for _ in range(6):
            said.append(int(tiny_llama(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
        alone[question] = said
    never = ({*range(tiny_llama.config.vocab_size)} - {token for said in alone.values() for token in said}).pop()
    end = alone[questions[0]][-1] if ended else never
    tiny_llama.generation_config.eos_token_id = end
    expected = {}
    for question, said in alone.items():
        text = tokenizer.decode([*takewhile(lambda token: token != end, said)], skip_special_tokens=True).strip()
        if text := text if end in said else f"cut: {text}":
            expected[question] = text
    rows = chats_of(tiny_llama, tokenizer, questions)
    assert {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in rows} == expected
    assert expected and ended != all(text.startswith("cut: ") for text in expected.values())
    tiny_llama.config.max_position_embeddings = 30
    few = chats_of(tiny_llama, tokenizer, questions)
    assert 0 < len(few) < len(rows) and all(row in rows for row in few)  # the context has no room for the others


def test_they_are_sources_beside_the_others(written, tiny_llama, make_tokenizer):
    rows = load_rows([{"text": "Plain text."}])
    mixed = with_questions(rows, tiny_llama, make_tokenizer(chat_template=TEMPLATE), 3, seed=0)
    assert list(mixed)[: len(rows)] == list(rows) and LISTS in mixed and len(mixed[LISTS]) == ROUNDS
    asked = {question for batch in BATCHES for question, _ in batch}
    assert CHATS not in mixed or {row["prompt"][0]["content"] for row in mixed[CHATS]} <= asked
    plain = with_questions(rows, tiny_llama, make_tokenizer(), 3, seed=0)
    assert list(plain) == [*rows, LISTS]  # no chat template, no chats


def test_they_can_be_calibrated_on(written, tiny_llama, make_tokenizer, monkeypatch):
    asked = {question: answer for batch in reversed(BATCHES[:2]) for question, answer in reversed(batch)}
    texts = own_documents(tiny_llama, make_tokenizer(), 3, seed=0)
    read = [pair for text in texts for pair in pairs_in(text + "\n")]
    assert Counter(read) == dict.fromkeys(asked.items(), ROUNDS)
    found = [{"prompt": [{"content": question}], "completion": [{"content": "this"}]} for question in asked]
    monkeypatch.setattr(own_questions, "chats_of", lambda model, tokenizer, questions: found[: len(questions)])
    chats = own_documents(tiny_llama, make_tokenizer(chat_template=TEMPLATE), 3, seed=0)
    assert chats == [*([{"content": question}, {"content": "this"}] for question in asked), *texts]
    found.clear()  # it has nothing to say to any of them
    assert own_documents(tiny_llama, make_tokenizer(chat_template=TEMPLATE), 3, seed=0) == texts


def test_a_model_that_makes_none_up_is_not_calibrated_on_any(place, tiny_llama, make_tokenizer, caplog):
    assert own_documents(tiny_llama, make_tokenizer(), 3, seed=0) == []
    assert "makes up no questions: there are none to calibrate on" in caplog.text


def test_a_model_that_makes_none_up_is_trained_without(place, tiny_llama, make_tokenizer, caplog):
    rows = load_rows([{"text": "Plain text."}])
    assert with_questions(rows, tiny_llama, make_tokenizer(), 3, seed=0) is rows
    assert "makes up no questions" in caplog.text


def test_another_tokenizer_or_method_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="`dense_questions` is 4, but the teacher of `dual_space`"):
        DistillationConfig(dense_questions=4, dual_space=True)
    with pytest.raises(ConfigurationError, match="`method` is 'lora', and `dense_questions` .* do nothing"):
        recover(
            tmp_path / "none", [{"text": "Plain text."}], tmp_path / "out", RecoveryConfig(),
            distillation=DistillationConfig(dense_questions=4),
        )  # fmt: skip


@pytest.mark.parametrize("data", [[{"text": "The quick brown fox jumps."}] * 4, None])
def test_a_training_learns_them_with_and_without_data(data, written, place, tiny_llama, make_tokenizer):
    for folder in ("dense", "pruned"):
        tiny_llama.save_pretrained(place / folder)
        make_tokenizer().save_pretrained(place / folder)
    config = RecoveryConfig(
        method="distill", max_steps=1, max_length=64, precision="fp32", max_windows=1, window=16, evaluations=1,
        max_samples=4, text="sample",
    )  # fmt: skip
    result = recover(
        place / "pruned", data, place / "out", config, teacher=place / "dense",
        distillation=DistillationConfig(dense_questions=3, generated_tokens=0),
    )  # fmt: skip
    sources = {one["name"]: one["rows"] for one in result.report["data"]["sources"]}
    assert sources[LISTS] == ROUNDS and len(sources) > 1
    assert json.loads((place / "out" / "recovery.json").read_text())["distillation"]["dense_questions"] == 3
