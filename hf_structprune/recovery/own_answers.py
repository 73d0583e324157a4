"""What the dense model answers to the prompts of a data set, to be learned beside the answers that the data has.

Distillation of sequences (Kim and Rush, arXiv:1606.07947): a pruned model is to say again what the dense one says, and
those words are easier for it to learn than others. Answers are greedy, and only those that the dense model ends
are taken: an answer that is cut off would teach to stop anywhere.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigurationError
from ..hardware import process_state
from ..model.measuring import measuring
from ..model.writing import for_text, padding_of
from ..progress import tqdm
from ..text.formats import parts_of, recognise
from .data import Encoder
from .kept_batches import KeptBatches, batch_of, until_then


logger = logging.get_logger(__name__)

ANSWERS = "the dense model's answers"  # name of the source
NEW_TOKENS = 128  # of an answer at most
_VERSION = 1  # of what is written for the same model and prompts


@dataclass(frozen=True)
class Prompt:
    """What is asked: the messages of a chat, or a text; and its token ids, up to where the answer begins."""

    asked: list[dict[str, Any]] | str
    ids: list[int]

    def answered(self, text: str) -> dict[str, Any]:
        """A row to train on."""
        chat = isinstance(self.asked, list)
        return {"prompt": self.asked, "completion": [{"role": "assistant", "content": text}] if chat else text}


def prompts_of(rows: Mapping[str, Any], encoder: Encoder, longest: int) -> list[Prompt]:
    """Every prompt of a data set, once: chats up to their first answer, and texts to go on from; none of plain text.

    Args:
        rows: Data sets by name, of `data.load_rows`.
        encoder: Writes chats, with the tokenizer of who is to answer.
        longest: Tokens of a prompt at most.
    """
    found: dict[str, Prompt] = {}
    for name, table in rows.items():
        _, parts = recognise(table.column_names, name)
        for row in table:
            for example in encoder.examples(parts_of(row, parts), row):
                if "text" in example or example.get("tools"):
                    continue
                asked = example["prompt"] if "prompt" in example else _before_answer(example["messages"])
                if (key := json.dumps(asked)) not in found:
                    found[key] = Prompt(asked, encoder.prompt_ids(asked, example))
    return [one for one in found.values() if 0 < len(one.ids) <= longest]


def _before_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return messages[: next(i for i, one in enumerate(messages) if one["role"] == "assistant")]


class Answers:
    """The greedy answers of a model to prompts, some at once, the shortest prompts first.

    Args:
        model, tokenizer: The dense model and its own tokenizer.
        prompts: Token ids of the prompts.
        new_tokens: Of an answer at most.
        size: Prompts that are answered at once.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, prompts: list[list[int]], new_tokens: int, size: int
    ) -> None:
        self.model, self.prompts, self.new_tokens = for_text(model), prompts, new_tokens
        self.pad = padding_of(tokenizer)
        ends = model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, (list, tuple)) else [ends]), tokenizer.eos_token_id} - {None}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        self.batches = [order[i : i + size] for i in range(0, len(order), size)]

    def batch(self, number: int, until: float | None = None) -> list[list[int] | None]:
        """The answers to the prompts of a batch, without what ended them; `None` where that did not come."""
        return [ids if ended else None for ids, ended in self.said(number, until)]

    @torch.no_grad()
    def said(self, number: int, until: float | None = None) -> list[tuple[list[int], bool]]:
        """What is said to the prompts of a batch until a time, and whether it was ended, without what ended it."""
        some = [self.prompts[i] for i in self.batches[number]]
        longest = max(map(len, some))
        ids = torch.tensor([[self.pad] * (longest - len(one)) + one for one in some], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in some], device=self.model.device)
        with measuring(self.model):
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=self.new_tokens, do_sample=False, num_beams=1,
                pad_token_id=self.pad, eos_token_id=sorted(self.ends), **until_then(until),
            )  # fmt: skip
        found = []
        for row in output[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in self.ends), None)
            found.append((row[:end], end is not None))
        return found


def answered_rows(
    model: PreTrainedModel, tokenizer: Any, rows: Mapping[str, Any], count: int, *, length: int, seed: int,
    seconds: float | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows `{"prompt": ..., "completion": ...}` of prompts of a data set and the dense model's answers to them.

    What is answered is kept, see `KeptBatches`.

    Args:
        model, tokenizer: The dense model and its own tokenizer.
        rows: Data sets by name, of `data.load_rows`.
        count: Prompts, drawn at random by `seed`; all of them if there are fewer.
        length: Tokens of prompt and answer together at most; a prompt takes half of them at most.
        seed: Of the draw.
        seconds: Stop answering after so many; a batch gets `kept_batches.SHORTEST` at least.

    Raises:
        ConfigurationError: There is no prompt in the data, or no answer ends.
    """
    encoder = Encoder(tokenizer, length, True, {tokenizer.eos_token_id})
    prompts = prompts_of(rows, encoder, length // 2)
    if not prompts:
        raise ConfigurationError(
            f"`dense_answers` is {count}, but there is no prompt of at most {length // 2} tokens in the data set for "
            "the dense model to answer: leave it out, raise `max_length`, or give chats or instructions."
        )
    prompts = random.Random(seed).sample(prompts, min(count, len(prompts)))
    size = batch_of(model, length)
    about = Answers(model, tokenizer, [one.ids for one in prompts], min(NEW_TOKENS, length // 2), size)
    kept = KeptBatches("answered", model, [_VERSION, about.new_tokens, size, about.prompts])
    found = kept.batches
    with tqdm(total=len(prompts), initial=sum(map(len, found)), desc="Dense model answers") as progress:

        def answer(number: int, until: float | None) -> list[list[int] | None]:
            batch = about.batch(number, until)
            progress.update(len(batch))
            return batch

        kept.fill(answer, lambda: len(found) < len(about.batches), seconds)
    answered = []
    for batch, said in zip(about.batches, found, strict=False):
        for number, ids in zip(batch, said, strict=True):
            text = "" if ids is None else tokenizer.decode(ids, skip_special_tokens=True).strip()
            if text:
                answered.append(prompts[number].answered(text))
    asked = sum(map(len, found))
    if not answered:
        timed = "" if seconds is None else f" and about {seconds:.0f} seconds"
        more = "" if seconds is None else "give more `minutes`, or "
        raise ConfigurationError(
            f"The dense model ends none of its answers to {asked:,} prompts within {about.new_tokens} tokens{timed}: "
            f"{more}leave `dense_answers` out."
        )
    logger.info(f"The dense model has answered {asked:,} prompts; {len(answered):,} answers end and are learned too.")
    return answered


def with_answers(
    rows: Any, model: PreTrainedModel, tokenizer: Any, count: int, *, length: int, seed: int,
    seconds: float | None = None,
) -> Any:  # fmt: skip
    """A `datasets.DatasetDict` with one source more, or two where some prompts are chats and some are texts.

    The first process writes, the others read; arguments as of `answered_rows`.
    """
    import datasets

    state = process_state()
    with state.main_process_first():
        found = answered_rows(
            model, tokenizer, rows, count, length=length, seed=seed, seconds=seconds if state.is_main_process else 0
        )
    more = {ANSWERS: [row for row in found if isinstance(row["prompt"], list)]}
    more[f"{ANSWERS}, plain" if more[ANSWERS] else ANSWERS] = [row for row in found if isinstance(row["prompt"], str)]
    new = {name: datasets.Dataset.from_list(some) for name, some in more.items() if some}
    return datasets.DatasetDict({**rows, **new})
