"""Short questions that the dense model makes up and answers, to be learned beside other text.

Facts go before perplexity does, and little text asks for them: after a training on chats, web pages and Wikipedia a
pruned model has the dense one's perplexity back sooner than its answers. Who can ask for what the dense model knows is
the dense model: it goes on with a list of questions and answers (Self-Instruct, Wang et al., arXiv:2212.10560, has a
model write its own instructions). What it writes is learned as such lists; a model with a chat template is asked each
question once more, as a chat, and its greedy answers are learned as well. The packaged questions, which `evaluation`
asks, are left out, in other words too, so that its figure stays one of questions that were not trained on.
"""

from __future__ import annotations

import random
import re
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..evaluation.answers import words_of
from ..evaluation.questions import closed_questions
from ..hardware import cuda_devices, process_state
from ..model.measuring import context_length, measuring
from ..model.writing import for_text, padding_of
from ..progress import tqdm
from .kept_batches import KeptBatches, batch_of, batch_seed, until_then
from .own_answers import Answers


logger = logging.get_logger(__name__)

LISTS, CHATS = "the dense model's questions", "the dense model's questions, as chats"  # names of the sources
# Questions to go on from.
SHOTS = (
    ("What is the largest animal on Earth?", "the blue whale"),
    ("How many strings does a violin have?", "four"),
    ("Who wrote the Odyssey?", "Homer"),
    ("Which planet is known for its rings?", "Saturn"),
    ("What language is spoken in Egypt?", "Arabic"),
    ("What do you call a young dog?", "a puppy"),
    ("In which continent is the Sahara?", "Africa"),
    ("What is the square root of 81?", "9"),
)
BEFORE = 4  # of them before what is written
WRITTEN, ANSWERED = 96, 40  # tokens at most: of a continued list, of an answer in a chat
TOP_K = 50  # of the tokens to draw from
TEMPERATURE = 0.8  # at 1 six tenths as many a second are whole, of SmolLM2-135M, and more of them make no sense
TOGETHER, ROUNDS = 8, 2  # questions of a list to learn, and in how many lists each of them is
LONGEST = 120  # characters of a question, and of an answer
_BLOCK = re.compile(r"Question:[ \t]*(\S[^\n]*\?)[ \t]*\nAnswer:[ \t]*(\S[^\n]*)\n")
_SENTENCES = re.compile(r".*[.!?](?=\s|$)", re.DOTALL)
# Words by which a question is not told from others.
_COMMON = {
    "a", "an", "and", "are", "at", "by", "called", "can", "city", "do", "does", "for", "from", "get", "has",
    "have", "how", "i", "in", "is", "it", "many", "most", "of", "often", "on", "or", "s", "the", "their",
    "there", "to", "used", "was", "we", "what", "when", "where", "which", "who", "with", "you", "your",
}  # fmt: skip
_VERSION = 3  # of what is written by the same model and seed


def _listed(pairs: list[Any]) -> str:
    return "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in pairs)


class Writer:
    """A model that makes up questions with their answers; batch `n` is the same whatever was written before it.

    Args:
        model, tokenizer: The dense model and its own tokenizer.
        seed: Of all batches.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, seed: int) -> None:
        self.model, self.tokenizer, self.seed = for_text(model), tokenizer, seed
        self.size = batch_of(model, 4 * WRITTEN)
        self.pad = padding_of(tokenizer)

    @torch.no_grad()
    def batch(self, number: int, until: float | None = None) -> list[tuple[str, str]]:
        """The whole questions and answers of `size` continued lists; none by a model whose context is too short.

        With a time, by `time.monotonic`, the lists are cut off then.
        """
        rng = random.Random(batch_seed(self.seed, number))
        starts = [f"{_listed(rng.sample(SHOTS, BEFORE))}\n\nQuestion:" for _ in range(self.size)]
        encoded = [self.tokenizer(text)["input_ids"] for text in starts]
        longest = max(map(len, encoded))
        if longest + WRITTEN > (context_length(self.model) or longest + WRITTEN):
            return []
        ids = torch.tensor([[self.pad] * (longest - len(one)) + one for one in encoded], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in encoded], device=ids.device)
        with measuring(self.model), torch.random.fork_rng(cuda_devices([self.model.device])):
            torch.manual_seed(batch_seed(self.seed, number))
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=WRITTEN, do_sample=True, temperature=TEMPERATURE,
                top_k=TOP_K, top_p=1.0, pad_token_id=self.pad, **until_then(until),
            )  # fmt: skip
        found = []
        for row in output[:, longest:].tolist():
            found += pairs_in(f"Question:{self.tokenizer.decode(row, skip_special_tokens=True)}")
        return found


def pairs_in(text: str) -> list[tuple[str, str]]:
    """The questions of a list that end as such, each with its whole answer; none of the packaged ones."""
    pairs = [(question.strip(), answer.strip()) for question, answer in _BLOCK.findall(text)]
    return [pair for pair in pairs if max(map(len, pair)) <= LONGEST and not is_packaged(pair[0])]


def is_packaged(question: str) -> bool:
    """Whether a question has all words that tell one of the packaged ones from others."""
    words = set(words_of(question))
    return any(asked <= words for asked in _asked())


@cache
def _asked() -> list[set[str]]:
    """The words of the packaged questions without common ones."""
    return [set(words_of(question.text)) - _COMMON for question in closed_questions()]


def made_up(
    model: PreTrainedModel, tokenizer: Any, count: int, *, seed: int, seconds: float | None = None
) -> dict[str, str]:
    """Up to `count` different questions with what the dense model wrote behind them; kept, see `KeptBatches`.

    Args:
        model, tokenizer: The dense model and its own tokenizer.
        count: Questions at most; fewer where a batch brings no new one.
        seed: Of what is written.
        seconds: Stop after so many; a batch gets `kept_batches.SHORTEST` at least.
    """
    writer = Writer(model, tokenizer, seed)
    kept = KeptBatches("questions", model, [_VERSION, seed, writer.size, WRITTEN, TOP_K, LONGEST, SHOTS, TEMPERATURE])

    def found(batches: list[Any]) -> dict[str, str]:
        pairs: dict[str, str] = {}
        for question, answer in (pair for batch in batches for pair in batch):
            pairs.setdefault(question, answer)
        return pairs

    def wanted() -> bool:
        now = len(found(kept.batches))
        return now < count and (not kept.batches or now > len(found(kept.batches[:-1])))

    with tqdm(total=count, initial=min(count, len(found(kept.batches))), desc="Dense model asks itself") as progress:

        def write(number: int, until: float | None) -> list[tuple[str, str]]:
            batch = writer.batch(number, until)
            progress.update(min(len({**dict(batch), **found(kept.batches)}), count) - progress.n)
            return batch

        kept.fill(write, wanted, seconds)
    return dict(list(found(kept.batches).items())[:count])


def lists_of(pairs: dict[str, str], seed: int) -> list[dict[str, str]]:
    """Rows `{"text": ...}` of some questions each, all of them in `ROUNDS` orders."""
    rows = []
    for turn in range(ROUNDS):
        order = list(pairs.items())
        random.Random(seed + turn).shuffle(order)
        rows += [{"text": _listed(order[i : i + TOGETHER])} for i in range(0, len(order), TOGETHER)]
    return rows


def whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; nothing if there is none."""
    found = _SENTENCES.match(text)
    return found[0].strip() if found else ""


def chats_of(
    model: PreTrainedModel, tokenizer: Any, questions: list[str], *, seconds: float | None = None
) -> list[dict[str, Any]]:
    """Rows of chats: each question and the dense model's greedy answer, whole sentences of it where it has no end.

    Args:
        model, tokenizer: The dense model and its own tokenizer, which has a chat template.
        questions: What is asked, where the context has room for it.
        seconds: Stop after so many; a batch gets `kept_batches.SHORTEST` at least.
    """
    options, context = {"add_generation_prompt": True, "return_dict": True}, context_length(model)
    encoded = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, **options)["input_ids"]
        if context is None or len(ids) + ANSWERED <= context:
            encoded.append((chat, ids))
    prompts = [ids for _, ids in encoded]
    about = Answers(model, tokenizer, prompts, ANSWERED, batch_of(model, 4 * ANSWERED))
    kept = KeptBatches("asked", model, [_VERSION, ANSWERED, prompts])
    with tqdm(total=len(prompts), initial=sum(map(len, kept.batches)), desc="Dense model answers") as progress:

        def answer(number: int, until: float | None) -> list[Any]:
            batch = about.said(number, until)
            progress.update(len(batch))
            return batch

        kept.fill(answer, lambda: len(kept.batches) < len(about.batches), seconds)
    rows = []
    for numbers, said in zip(about.batches, kept.batches, strict=False):
        for number, (ids, ended) in zip(numbers, said, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            if text := text if ended else whole_sentences(text):
                rows.append({"prompt": encoded[number][0], "completion": [{"role": "assistant", "content": text}]})
    return rows


def own_documents(model: PreTrainedModel, tokenizer: Any, count: int, *, seed: int) -> list[Any]:
    """Questions with their answers to calibrate on: texts, lists of some, and chats where there is a chat template.

    Args:
        model, tokenizer: The dense model and its own tokenizer.
        count: Questions at most. Of a model that writes none there is nothing, and a warning says so.
        seed: Of what is written.
    """
    pairs, found = made_up(model, tokenizer, count, seed=seed), []
    if pairs and getattr(tokenizer, "chat_template", None):
        found = [row["prompt"] + row["completion"] for row in chats_of(model, tokenizer, list(pairs))]
    found += [row["text"] for row in lists_of(pairs, seed)]
    if not found:
        logger.warning("The model makes up no questions: there are none to calibrate on (`dense_questions`).")
    return found


def with_questions(
    rows: Any, model: PreTrainedModel, tokenizer: Any, count: int, *, seed: int, seconds: float | None = None
) -> Any:
    """A `datasets.DatasetDict` with a source of lists more, and one of chats where there is a chat template.

    The first process writes, the others read.

    Args:
        rows: Data sets by name, of `data.load_rows`.
        model, tokenizer: The dense model and its own tokenizer.
        count: Questions at most. A model that writes none adds nothing, and a warning says so.
        seed: Of what is written.
        seconds: Stop after so many, two thirds of them for the questions; see `KeptBatches.fill`.
    """
    import datasets

    state = process_state()
    with state.main_process_first():
        seconds = seconds if state.is_main_process else 0
        pairs = made_up(model, tokenizer, count, seed=seed, seconds=None if seconds is None else seconds * 2 / 3)
        if not pairs:
            logger.warning("The dense model makes up no questions: there are none to learn (`dense_questions`).")
            return rows
        more: dict[str, list[dict[str, Any]]] = {LISTS: lists_of(pairs, seed)}
        if getattr(tokenizer, "chat_template", None):
            left = None if seconds is None else seconds / 3
            more[CHATS] = chats_of(model, tokenizer, list(pairs), seconds=left)
    logger.info(
        f"The dense model has made up {len(pairs):,} questions; lists of them and its answers are learned too."
    )
    new = {name: datasets.Dataset.from_list(some) for name, some in more.items() if some}
    return datasets.DatasetDict({**rows, **new})
