"""Generation: each metric by hand, answers as one prompt alone gives them, and what tables make of them."""

import dataclasses

import pytest
import torch
from greedy import END, greedy

from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation import EvaluationConfig, EvaluationResult, ResultTable, answers, evaluate
from hf_structprune.evaluation.answers import agreement, agreement_with, answer_all, is_right, repetition
from hf_structprune.evaluation.questions import Question, closed_questions, open_requests


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The capital of France is Paris.", True), ("paris", True), ("**Paris**!", True), ("Lyon. Or Paris.", False),
        ("Parisian food", False), ("I do not know\nParis", False), ("", False), ("It is new york city, I think", True),
    ],
)  # fmt: skip
def test_an_answer_is_right_if_its_first_sentence_says_it(text, right):
    assert is_right(text, ("Paris", "New York")) is right


def test_repetition_counts_runs_that_were_there_before():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0 and repetition([1, 2, 3]) == 0
    assert repetition([7] * 10) == pytest.approx(6 / 7)  # seven runs, one of them different
    assert repetition([1, 2, 1, 2, 1], size=2) == 0.5  # 12 21 12 21


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [("a b c", "a b c", 1), ("a b x d", "a b c d", 0.5), ("a b", "a b c d", 0.5), ("x", "a", 0), ("", "", 1)],
)
def test_agreement_is_until_the_first_other_word(one, other, share):
    assert agreement(one, other) == agreement(other, one) == share


def test_there_are_a_hundred_of_each_and_no_two_alike():
    questions, requests = closed_questions(), open_requests()
    assert len({one.text for one in questions}) == len(questions) == 100 == len(set(requests)) == len(requests)
    known = {one.text: one.answers for one in questions}
    assert known["What is 7 plus 8?"] == ("15", "fifteen") and known["What month comes after December?"] == (
        "January",
    )
    for one in questions:  # each accepts a plain answer, and no question answers itself
        assert is_right(f"It is {one.answers[0]}.", one.answers) and not is_right(one.text, one.answers)


def test_answers_are_those_of_each_prompt_alone(model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(answers, "BATCH", 2)

    def sometimes_end(module, args, options, output):
        last = options["input_ids"][:, -1]
        output.logits[:, -1, 2] = torch.where(last % 5 == 0, 1e4, -1e4)

    model.register_forward_hook(sometimes_end, with_kwargs=True)
    prompts = ["The cat", "2 + 2", "Hello", "A dog", "abcde", "Moon and stars"]
    found = answer_all(model, tiny_tokenizer, prompts, 12)
    for prompt, one in zip(prompts, found, strict=True):
        ids = greedy(model, tiny_tokenizer, f"Question: {prompt}\nAnswer:", 12)
        ended = ids[-1] == END
        ids = tuple(ids[:-1] if ended else ids)
        assert (one.ids, one.ended) == (ids, ended)
        assert one.text == tiny_tokenizer.decode(list(ids), skip_special_tokens=True).strip()
    assert all(one.ended for one in found)


def scripted(monkeypatch, said):
    """A model that says what a dictionary holds for each prompt; the ids of a text are its characters."""

    def answer(model, tokenizer, prompts, new_tokens, desc=""):
        texts = [said.get(prompt, "nothing") for prompt in prompts]
        return [answers.Generated(text, tuple(map(ord, text)), not text.endswith("-")) for text in texts]

    monkeypatch.setattr(answers, "answer_all", answer)


def test_figures_count_what_was_said(monkeypatch, model, tiny_tokenizer):
    questions = [Question("a?", ("yes",), "x"), Question("b?", ("no",), "x"), Question("c?", ("1", "one"), "y")]
    scripted(monkeypatch, {"a?": "Yes!", "b?": "Maybe. No.", "c?": "one", "r": "ab cd", "s": "zzzzzzzz-"})
    found = {f.name: f for f in answers.measure_answers(model, tiny_tokenizer, questions, ["r", "s"])}
    assert found["generation/questions"].value == pytest.approx(2 / 3)
    assert found["generation/questions"].details["right"] == {"x": 1, "y": 1}
    assert found["generation/questions"].details["wrong"] == [["b?", "Maybe. No."]]
    assert found["generation/ended"].value == 0.5 and found["generation/length"].value == 7
    assert found["generation/repetition"].value == pytest.approx((0 + 4 / 6) / 2)
    scripted(monkeypatch, {"r": "ab x", "s": "zzzzzzzz-"})
    other = {f.name: f for f in answers.measure_answers(model, tiny_tokenizer, questions, ["r", "s"])}
    agree, same = agreement_with(other["generation/length"], found["generation/length"])
    assert (agree.value, same.value) == (0.75, 0.5)
    scripted(monkeypatch, {"r": "", "s": "ab"})  # to say nothing is no answer that ends
    silent = {f.name: f for f in answers.measure_answers(model, tiny_tokenizer, questions, ["r", "s"])}
    assert silent["generation/ended"].value == 0.5
    strange = {f.name: f for f in answers.measure_answers(model, tiny_tokenizer, questions, ["r", "t"])}
    assert agreement_with(strange["generation/length"], found["generation/length"]) == []
    with pytest.raises(ConfigurationError, match="no questions or no requests"):
        answers.measure_answers(model, tiny_tokenizer, questions, [])


def test_evaluate_measures_it_and_tables_compare_it(monkeypatch, model, tiny_tokenizer, tmp_path):
    config = EvaluationConfig(texts=["none"], efficiency=False, samples=False, generation=True)
    scripted(monkeypatch, {one.text: one.answers[0] for one in closed_questions()})
    evaluate(model, tiny_tokenizer, config, name="m", output=tmp_path / "dense.json")
    scripted(monkeypatch, {one.text: one.answers[0] for one in closed_questions()[:50]})
    pruned = evaluate(model, tiny_tokenizer, config, name="p", state="pruned")
    table = ResultTable([EvaluationResult.load(tmp_path / "dense.json"), pruned])
    rows = {row.name: row for row in table.rows()}
    questions = rows["generation/questions"].cells
    assert (questions[0].value, questions[1].value) == (1, 0.5) and questions[1].significant
    assert questions[1].comparison.test == "mcnemar"
    assert rows["generation/agreement"].cells[0] is None and rows["generation/agreement"].cells[1].value == 1
    text = table.to_markdown()
    assert "| closed questions answered ↑ | 100.00 %" in text and "answers all the dense model's ↑" in text
    assert [row["figure"] for row in table.to_dict()["rows"]] == list(rows)
    assert "generation/agreement" not in dataclasses.replace(pruned).figures  # what was measured stays as it was
