"""Text to distil on where there is no data set: what the pruning was calibrated on, and what the dense model writes.

A model's own text shows what it knows: no data has to be found (LLM-QAT, Liu et al., arXiv:2305.17888). Half of it
goes on from openings of the calibration text. The other half, of models with a chat template, are chats: the model is
given the beginning of a user's turn and writes the question itself, then the answer (Magpie, Xu et al.,
arXiv:2406.08464). Both are drawn from the model's distribution as it is, at temperature 1.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import CONFIG_NAME, PruningConfig
from ..data import calibration_sample, code_sample
from ..errors import CalibrationError, TextError
from ..hardware import cuda_devices, process_state
from ..model.measuring import context_length, measuring
from ..model.writing import for_text, padding_of
from ..progress import tqdm
from ..text.calibration import load_tokens, packaged_chats, without_beginning
from ..text.reading import read_rows
from .kept_batches import KeptBatches, batch_of, batch_seed, until_then


logger = logging.get_logger(__name__)

# Names of the sources.
CALIBRATION, CHATS, GENERATED = "calibration text", "packaged chats", "generated text"
OPENING = 16  # tokens of the calibration text that are gone on from
QUESTION = 64  # tokens of a question at most
PLAIN = 15  # rows of English for each of code, as in the calibration; with all of them code would be a fifth
_MARK = "QUESTION"  # a user's turn, to see what the template writes before it
_VERSION = 2  # of what is generated from the same model, seed and settings


def calibration_rows(
    pruned: str | os.PathLike | None, tokenizer: Any
) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """The text that a pruned checkpoint was calibrated on, as its configuration says, else the packaged sample.

    The second are chats, of the packaged sample, where the model can write them.
    """
    path = None if pruned is None else Path(pruned) / CONFIG_NAME
    config = PruningConfig.load(path.parent).calibration if path is not None and path.is_file() else None
    if config is not None and config.image_column is None and config.fingerprint is None and config.dataset:
        try:
            tokens = load_tokens(replace(config, tokens=None, dense_questions=0), tokenizer)
        except CalibrationError as error:  # of files a checkpoint has the names alone
            raise TextError(
                f"The pruning was calibrated on text that cannot be read here: {error} Give a `dataset`."
            ) from error
        return [{"text": text} for text in tokenizer.batch_decode(without_beginning(tokens, tokenizer))], []
    if config is not None and (config.fingerprint is not None or config.image_column is not None):
        logger.warning(
            "The calibration data was in memory, or has pictures: the packaged sample of English text takes its place."
        )
    english, code = list(read_rows(calibration_sample())), list(read_rows(code_sample()))
    few = code[:: max(1, len(code) * PLAIN // len(english))]  # of all languages: they lie one after the other
    return [{"text": text} for text in [*english, *few]], [{"messages": chat} for chat in packaged_chats(tokenizer)]


class Writer:
    """A model that writes text, batch after batch; batch `n` is the same whatever was written before it.

    Args:
        model, tokenizer: The dense model and its own tokenizer.
        openings: Texts to go on from.
        length: Tokens of a sequence at most.
        seed: Of all batches.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, openings: Sequence[str], length: int, seed: int
    ) -> None:
        self.model, self.tokenizer, self.seed = for_text(model), tokenizer, seed
        self.length = min(length, context_length(model) or length)
        self.size = batch_of(model, self.length)
        encoded = (tokenizer(text, verbose=False)["input_ids"][:OPENING] for text in openings)
        self.openings = [ids for ids in encoded if ids]
        self.before = _before_question(tokenizer)
        self.pad = padding_of(tokenizer)

    def batch(self, number: int, until: float | None = None) -> list[list[int]]:
        """Token ids of `size` sequences: chats if the number is odd and there is a template, else plain text.

        With a time, by `time.monotonic`, they are cut off then; chats whose questions took that long are left out.
        """
        with measuring(self.model), torch.random.fork_rng(cuda_devices([self.model.device])):
            torch.manual_seed(batch_seed(self.seed, number))
            if self.before is None or number % 2 == 0:
                drawn = random.Random(batch_seed(self.seed, number)).choices(self.openings, k=self.size)
                return self._go_on(drawn, self.length, until)
            starts = [self.before] * self.size
            asked = self._go_on(starts, len(self.before) + QUESTION, until)
            if until is not None and time.monotonic() > until:
                return []
            chats = [self._as_chat(ids[len(self.before) :]) for ids in asked]
            return self._go_on([ids for ids in chats if ids and len(ids) < self.length], self.length, until)

    def _as_chat(self, question: list[int]) -> list[int] | None:
        """The ids of a chat up to where its answer begins; `None` without a question."""
        text = self.tokenizer.decode(question, skip_special_tokens=True).strip()
        if not text:
            return None
        chat = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

    def _go_on(self, starts: list[list[int]], length: int, until: float | None = None) -> list[list[int]]:
        """Sequences that begin with those given, to their end, a length or a time; padded on the left meanwhile."""
        if not starts:
            return []
        longest = max(map(len, starts))
        ids = torch.tensor([[self.pad] * (longest - len(one)) + list(one) for one in starts])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in starts])
        device = self.model.device
        output: Tensor = self.model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), max_length=max(length, longest + 1),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=self.pad, **until_then(until),
        )  # fmt: skip
        stops = self.model.generation_config.eos_token_id
        stops = {stops} if isinstance(stops, int) else {*(stops or ()), self.tokenizer.eos_token_id}
        rows = []
        for start, row in zip(starts, output.tolist(), strict=True):
            written = row[longest:]
            end = next((i + 1 for i, token in enumerate(written) if token in stops), len(written))
            rows.append(list(start) + written[:end])
        return rows


def _before_question(tokenizer: Any) -> list[int] | None:
    """Token ids of what the chat template writes before a user's first message; `None` without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    before, mark, _ = text.partition(_MARK)
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    return ids if mark and ids else None


def generated_rows(
    model: PreTrainedModel, tokenizer: Any, openings: Sequence[str], tokens: int, *, length: int, seed: int,
    seconds: float | None = None,
) -> list[dict[str, str]]:  # fmt: skip
    """At least `tokens` tokens of text that a model writes, as rows `{"text": ...}`.

    What is written is kept, see `KeptBatches`: the next training reads it, and one that was interrupted goes on.

    Args:
        model, tokenizer, openings, length, seed: See `Writer`.
        tokens: How many, of the model's tokenizer.
        seconds: Stop writing after so many; a batch gets `kept_batches.SHORTEST` at least.

    Raises:
        TextError: The model writes nothing.
    """
    writer = Writer(model, tokenizer, openings, length, seed)
    about = [_VERSION, length, seed, writer.size, OPENING, QUESTION, writer.before, writer.openings]
    kept = KeptBatches("generated", model, about)

    def found() -> int:
        return sum(len(ids) for batch in kept.batches for ids in batch)

    with tqdm(total=tokens, initial=min(found(), tokens), desc="Dense model writes", unit="token") as progress:

        def write(number: int, until: float | None) -> list[list[int]]:
            batch = writer.batch(number, until)
            new = sum(map(len, batch))
            if not new and number > 1 and (until is None or time.monotonic() < until):
                raise TextError("The dense model ends its texts before it has begun them: give a `dataset`.")
            progress.update(min(new, max(0, tokens - found())))
            return batch

        kept.fill(write, lambda: found() < tokens, seconds)
    rows, count = [], 0
    for batch in kept.batches:
        for ids in batch:
            if count < tokens:
                rows.append({"text": _as_text(tokenizer, ids)})
                count += len(ids)
    logger.info(f"The dense model has written {count:,} tokens, kept in {kept.file.name} of huggingface_hub's cache.")
    return rows


def _as_text(tokenizer: Any, ids: list[int]) -> str:
    """The text that gives these ids, with its special tokens but for one that every text begins with anyway."""
    first = tokenizer("")["input_ids"][:1]
    return tokenizer.decode(ids[1:] if first == ids[:1] == [tokenizer.bos_token_id] else ids)


def own_rows(
    model: PreTrainedModel, tokenizer: Any, pruned: str | os.PathLike | None, tokens: int, *, length: int, seed: int,
    seconds: float | None = None,
) -> list[Any]:  # fmt: skip
    """Sources for `load_rows`: what it was calibrated on, and `tokens` tokens that the dense model writes, if any.

    The first process writes, the others read; arguments as of `calibration_rows` and `generated_rows`.
    """
    import datasets

    calibration, chats = calibration_rows(pruned, tokenizer)
    sources: dict[str, list[dict[str, Any]]] = {CALIBRATION: calibration, **({CHATS: chats} if chats else {})}
    if tokens:
        openings, state = [row["text"] for row in calibration], process_state()
        with state.main_process_first():
            sources[GENERATED] = generated_rows(
                model, tokenizer, openings, tokens, length=length, seed=seed,
                seconds=seconds if state.is_main_process else 0,
            )  # fmt: skip
    found = []
    for name, rows in sources.items():
        found.append(datasets.Dataset.from_list(rows))
        found[-1].info.dataset_name = name
    return found
