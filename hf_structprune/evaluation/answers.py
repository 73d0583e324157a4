"""How a model answers: closed questions, whether it ends and repeats itself, and how far it says what another says."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..errors import ConfigurationError
from ..model.measuring import measuring
from ..model.writing import for_text, padding_of
from ..progress import tqdm
from .comparison import Parts, fingerprint
from .generation import encode_prompt
from .questions import Question, closed_questions, open_requests
from .results import Figure


QUESTION_TOKENS, REQUEST_TOKENS = 24, 64  # generated at most
BATCH = 16
PLAIN = "Question: {}\nAnswer:"  # where there is no chat template
GRAM = 4  # tokens of a repetition
_FAMILY = "generation"
ANSWERS = f"{_FAMILY}/length"  # the figure that holds the answers
_SENTENCE = re.compile(r"(?<=[.!?])\s|\n")


class Generated(NamedTuple):
    """What a model wrote: its text, the token ids, and whether it ended by itself."""

    text: str
    ids: tuple[int, ...]
    ended: bool


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether the first sentence of a text names one of the answers, as whole words, in whatever case."""
    first = _SENTENCE.split(text.strip(), maxsplit=1)[0]
    said = f" {' '.join(words_of(first))} "
    return any(f" {' '.join(words_of(answer))} " in said for answer in answers)


def words_of(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def repetition(ids: Sequence[int], size: int = GRAM) -> float:
    """The share of runs of `size` tokens that were there before: `1 - different runs / runs`; 0 of fewer tokens.

    seq-rep-n of Welleck et al., 2019, https://huggingface.co/papers/1908.04319.
    """
    runs = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def agreement(text: str, dense: str) -> float:
    """The share of the dense model's words that a text repeats before it says the first other one; 1 for the same.

    Words, since models with other vocabularies have other tokens. Of the longer of both texts.
    """
    one, other = text.split(), dense.split()
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return alike / max(len(one), len(other)) if one or other else 1.0


@torch.no_grad()
def answer_all(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], new_tokens: int, desc: str = "Answers"
) -> list[Generated]:
    """Greedy answers to prompts, by the chat template where there is one; batches are of prompts equally long.

    So nothing is padded, and each answer is the one that the prompt alone gets.

    Args:
        prompts: The prompts.
        new_tokens: Tokens of an answer at most.
        desc: Label of the progress bar.
    """
    plain = not tokenizer.chat_template
    encoded = [encode_prompt(model, tokenizer, PLAIN.format(prompt) if plain else prompt) for prompt in prompts]
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, inputs in enumerate(encoded):
        by_length[inputs["input_ids"].shape[1]].append(number)
    found: dict[int, Generated] = {}
    options = {"do_sample": False, "num_beams": 1, "pad_token_id": padding_of(tokenizer), "max_new_tokens": new_tokens}
    ends = _ends(model, tokenizer)
    model = for_text(model)
    with measuring(model), tqdm(total=len(prompts), desc=desc) as bar:
        for length in sorted(by_length):
            numbers = by_length[length]
            for start in range(0, len(numbers), BATCH):
                some = numbers[start : start + BATCH]
                inputs = {name: torch.cat([encoded[n][name] for n in some]) for name in encoded[some[0]]}
                for number, ids in zip(some, model.generate(**inputs, **options)[:, length:].tolist(), strict=True):
                    own = list(takewhile(lambda token: token not in ends, ids))
                    text = tokenizer.decode(own, skip_special_tokens=True).strip()
                    found[number] = Generated(text, tuple(own), len(own) < len(ids))
                bar.update(len(some))
    return [found[number] for number in range(len(prompts))]


def _ends(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """The tokens after which generation ends."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = tokenizer.eos_token_id if own is None else own
    return set(own) if isinstance(own, (list, tuple)) else {own}


def measure_answers(
    model: PreTrainedModel, tokenizer: Any, questions: Sequence[Question] | None = None,
    requests: Sequence[str] | None = None,
) -> list[Figure]:  # fmt: skip
    """Lets a model answer closed questions and open requests, greedily; it gets its modes back.

    Figures, all named `generation/...`:

    - `questions`: share of the closed questions whose answer is in the first sentence (`is_right`); by what they are
      about in the details.
    - `ended`: share of the answers to open requests that say something and end by themselves within 64 tokens.
    - `repetition`: mean share of repeated runs of 4 tokens in them (`repetition`).
    - `length`: their mean number of tokens; the answers themselves are in the details, for `agreement_with`.

    Args:
        model, tokenizer: The model, on the device it is to run on, and its tokenizer.
        questions, requests: Default: `closed_questions()` and `open_requests()`.
    """
    questions = closed_questions() if questions is None else questions
    requests = open_requests() if requests is None else requests
    if not questions or not requests:
        raise ConfigurationError("There are no questions or no requests; give at least one of each.")
    closed = answer_all(model, tokenizer, [one.text for one in questions], QUESTION_TOKENS, "Questions")
    opened = answer_all(model, tokenizer, requests, REQUEST_TOKENS, "Requests")
    right = [is_right(one.text, question.answers) for one, question in zip(closed, questions, strict=True)]
    how = "chat template" if tokenizer.chat_template else "no chat template"
    protocol = f"{len(questions)} short closed questions, greedy, {how}: the answer is in the first sentence"
    wrong = [[question.text, one.text] for question, one, hit in zip(questions, closed, right, strict=True) if not hit]
    about = Counter(question.about for question, hit in zip(questions, right, strict=True) if hit)
    share = fmean(right)
    details = {
        "samples": len(questions), "right": {name: about[name] for name in dict.fromkeys(q.about for q in questions)},
        "wrong": wrong,
    }  # fmt: skip
    figures = [
        Figure(
            f"{_FAMILY}/questions", share, "", math.sqrt(share * (1 - share) / len(right)), True, protocol, details,
            Parts.of(fingerprint([question.text for question in questions]), [float(hit) for hit in right]),
        )
    ]  # fmt: skip
    key, protocol = fingerprint(list(requests)), f"{len(requests)} open requests, greedy, {how}, 64 tokens at most"
    counted = {"samples": len(requests)}
    for name, values, better in (
        ("ended", [float(one.ended and bool(one.text)) for one in opened], True),
        ("repetition", [repetition(one.ids) for one in opened], False),
        ("length", [float(len(one.ids)) for one in opened], None),
    ):
        more = {"answers": [one.text for one in opened]} if name == "length" else {}
        unit = "tokens" if name == "length" else ""
        parts = Parts.of(key, values)
        figures.append(
            Figure(f"{_FAMILY}/{name}", fmean(values), unit, None, better, protocol, {**counted, **more}, parts)
        )
    return figures


def agreement_with(figure: Figure, dense: Figure) -> list[Figure]:
    """How far a model says what the dense one says, by the figures `generation/length` of both.

    `generation/agreement` is the mean of `agreement` over all requests, `generation/same` the share of answers that
    are the same. Nothing if the requests differ, or a figure lacks the answers.
    """
    ours, theirs = figure.details.get("answers"), dense.details.get("answers")
    same_requests = figure.parts is not None and dense.parts is not None and figure.parts.pairs_with(dense.parts)
    if not ours or not theirs or not same_requests:
        return []
    shares = [agreement(one, other) for one, other in zip(ours, theirs, strict=True)]
    same = [float(one.split() == other.split()) for one, other in zip(ours, theirs, strict=True)]
    about = {"samples": len(shares)}
    how = "answers to open requests, greedy: "
    return [
        Figure(
            f"{_FAMILY}/agreement", fmean(shares), "", None, True,
            f"{how}words like the dense model's until the first other one", about,
        ),
        Figure(f"{_FAMILY}/same", fmean(same), "", None, True, f"{how}all words like the dense model's", about),
    ]  # fmt: skip
