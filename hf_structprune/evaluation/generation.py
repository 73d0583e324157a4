"""Text that a model writes: samples to read, and the five-question protocol for speed and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..checks import Count, checked
from ..errors import ConfigurationError
from ..files.writing import write_text
from ..hardware import cuda_devices, synchronize
from ..model.measuring import context_length, measuring
from ..model.writing import for_text, padding_of
from ..progress import tqdm
from ..text.calibration import same_day
from .efficiency import devices_of, memory_in_use, where
from .results import Figure, csv_text


PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a robot that learns to paint.",
)
QUESTIONS = (
    "What causes the seasons on Earth?",
    "How does a vaccine protect the body from a disease?",
    "Why did the Roman Empire fall?",
    "What is the difference between supervised and unsupervised machine learning?",
    "How can I save money on groceries without eating worse?",
)
_WARMUP_TOKENS = 8  # generated before the first question, so that it does not pay for setting things up
# Of the numbers in a row of the questions' table.
_DIGITS = {"prompt_tokens": 1, "total_tokens": 1, "seconds": 4, "tokens_per_second": 2, "memory_gib": 2}


class Answer(NamedTuple):
    """One answer to a question: its text, tokens of both, time of the generation, and bytes in use right after it."""

    question: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    memory: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens of question and answer over the time of the generation."""
        return (self.prompt_tokens + self.new_tokens) / self.seconds


@dataclass(frozen=True)
class QuestionResult:
    """The answers to all questions, and how they were measured in words."""

    answers: list[Answer]
    protocol: str

    def rows(self) -> list[dict[str, Any]]:
        """One row a question, and one named `"mean"` with the means over them; memory in GiB to two decimals."""
        rows = [
            {
                "question": a.question, "prompt_tokens": a.prompt_tokens,
                "total_tokens": a.prompt_tokens + a.new_tokens, "seconds": a.seconds,
                "tokens_per_second": a.tokens_per_second, "memory_gib": a.memory / 2**30, "answer": a.text,
            }
            for a in self.answers
        ]  # fmt: skip
        means = {key: fmean(row[key] for row in rows) for key in _DIGITS}
        rows.append({**rows[0], **means, "question": "mean", "answer": ""})
        return [{**row, **{key: round(row[key], digits) for key, digits in _DIGITS.items()}} for row in rows]

    def figures(self) -> list[Figure]:
        """`efficiency/question_throughput` and `efficiency/question_memory`: the means over the questions."""
        speeds, memory = [a.tokens_per_second for a in self.answers], [a.memory for a in self.answers]
        name, after = "efficiency/question_", f"{self.protocol}; memory in use after each answer"
        counted = f"{self.protocol}; prompt tokens counted"
        return [
            Figure(f"{name}throughput", fmean(speeds), "tokens/s", None, True, counted, {"values": speeds}),
            Figure(f"{name}memory", fmean(memory), "B", None, False, after, {"values": memory}),
        ]

    def write_csv(self, path: str | os.PathLike) -> None:
        """`rows()` as a file."""
        write_text(path, csv_text(self.rows()))


def generate_samples(
    model: PreTrainedModel, tokenizer: Any, prompts: str | Sequence[str] | None = None, *, max_new_tokens: int = 64,
    seed: int = 0, **options: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Lets a model continue prompts, or answer them if its tokenizer has a chat template; it gets its modes back.

    Args:
        model, tokenizer: The model, on the device it is to run on, and its tokenizer.
        prompts: One or several. Default: `PROMPTS`.
        max_new_tokens: Tokens at most.
        seed: Seed for each prompt, for sampling; the state of torch's generators is as before afterwards.
        options: Given to `generate`, for example `do_sample=True, temperature=0.7`. Default: greedy.

    Returns:
        One dictionary a prompt: `prompt`, `text` (what was generated), `tokens` (how many) and `seconds`.
    """
    max_new_tokens = checked("max_new_tokens", max_new_tokens, Count)
    prompts = PROMPTS if prompts is None else [prompts] if isinstance(prompts, str) else prompts
    model = for_text(model)
    with measuring(model):
        answers = [
            _answer(model, tokenizer, prompt, encode_prompt(model, tokenizer, prompt), max_new_tokens, seed, **options)
            for prompt in tqdm(prompts, desc="Samples")
        ]
    return [{"prompt": a.question, "text": a.text, "tokens": a.new_tokens, "seconds": a.seconds} for a in answers]


def question_protocol(
    model: PreTrainedModel, tokenizer: Any, questions: Sequence[str] = QUESTIONS, *, max_length: int = 200
) -> QuestionResult:
    """Speed and memory while a model answers five questions, greedily, one after another; it gets its modes back.

    The protocol of a study of pruned and quantised chat models: for each question at most `max_length` tokens,
    **prompt included** (an answer may end earlier), tokens of prompt and answer over the seconds of the generation,
    memory in use after it (CUDA: `memory_allocated`; else the resident memory of the process), and the mean over the
    questions. The study does not print its questions: these five are ours. A few tokens are generated before the
    first question and not counted. A chat template of the tokenizer is applied.

    Raises:
        ConfigurationError: A question leaves no room for an answer, or `max_length` is beyond the model's context.
    """
    if not questions:
        raise ConfigurationError("`questions` is empty; give at least one.")
    context = context_length(model)
    if context is not None and max_length > context:
        raise ConfigurationError(f"`max_length` is {max_length}, but the model's context is {context} tokens.")
    encoded = [encode_prompt(model, tokenizer, question) for question in questions]
    room = [max_length - inputs["input_ids"].shape[1] for inputs in encoded]
    if min(room) < 1:
        longest = questions[room.index(min(room))]
        raise ConfigurationError(f"`max_length` is {max_length}, and {longest!r} alone has {max_length - min(room)}.")
    model = for_text(model)
    with measuring(model):
        _answer(model, tokenizer, questions[0], encoded[0], min(_WARMUP_TOKENS, room[0]))
        runs = tqdm(list(zip(questions, encoded, room, strict=True)), desc="Questions")
        answers = [_answer(model, tokenizer, *run) for run in runs]
    protocol = f"{len(questions)} questions, at most {max_length} tokens with the prompt, greedy, {where(model)}"
    return QuestionResult(answers, protocol)


def encode_prompt(model: PreTrainedModel, tokenizer: Any, prompt: str) -> dict[str, torch.Tensor]:
    """Token ids and mask of a prompt, as a user's message if the tokenizer has a chat template."""
    if tokenizer.chat_template:
        messages, options = [{"role": "user", "content": prompt}], {"return_dict": True, "return_tensors": "pt"}
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options, **same_day(tokenizer))
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigurationError(f"The prompt {prompt!r} has no token; write something in it.")
    return {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}


def _answer(
    model: PreTrainedModel, tokenizer: Any, prompt: str, inputs: dict[str, torch.Tensor], max_new_tokens: int,
    seed: int = 0, **options: Any,
) -> Answer:  # fmt: skip
    devices = devices_of(model)
    options = {"do_sample": False, "pad_token_id": padding_of(tokenizer), "max_new_tokens": max_new_tokens, **options}
    with torch.random.fork_rng(cuda_devices(devices)):
        torch.manual_seed(seed)
        synchronize(devices)
        start = time.perf_counter()
        output = model.generate(**inputs, **options)
        synchronize(devices)
        seconds = time.perf_counter() - start
    given = inputs["input_ids"].shape[1]
    text = tokenizer.decode(output[0, given:], skip_special_tokens=True).strip()
    return Answer(prompt, text, given, output.shape[1] - given, seconds, memory_in_use(devices))
