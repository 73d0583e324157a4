"""Examples to token ids and labels, the ones that TRL's `SFTTrainer` makes of the same rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import TextError
from ..extras import need
from ..files.json_files import parse_json
from .formats import Chat, Example, Instruction, Pair, Text


IGNORED = -100  # label of a token that is not learned

# How the answers in chats of several turns are found.
ALL_BY_MASK = "all answers of a chat are learned; the chat template marks them"
ALL_BY_PREFIX = "all answers of a chat are learned; each is what the chat template adds after its prompt"
LAST = (
    "only the last answer of a chat is learned: the chat template writes earlier turns in another way once others "
    "follow"
)


@dataclass
class Encoded:
    """Token ids of an example and their labels, of equal length. `plain` text may be cut into pieces.

    `answers` says how the answers of a chat of several turns were found, else it is `None`; `is_chat` that the chat
    template wrote it.
    """

    input_ids: list[int]
    labels: list[int]
    plain: bool = False
    answers: str | None = None
    is_chat: bool = False


class Encoder:
    """Encodes examples with one tokenizer.

    Args:
        tokenizer: A `transformers` tokenizer with an end-of-sequence token.
        prompt_loss: Learn prompts too.
    """

    def __init__(self, tokenizer: Any, *, prompt_loss: bool = False):
        self.tokenizer = tokenizer
        self.prompt_loss = prompt_loss
        self.chats = bool(getattr(tokenizer, "chat_template", None))
        self._marked: tuple[bool, str | None] | None = None

    def __call__(self, example: Example) -> Encoded:
        """Encodes an example, in full length.

        Raises:
            TextError: It is a chat, and the tokenizer has no chat template or its template refuses the chat.
        """
        if isinstance(example, Instruction):
            example = example.as_chat() if self.chats else example.as_pair()
        if isinstance(example, Text):
            ids = self._plain(self._ended(example.text))
            return Encoded(ids, list(ids), plain=True)
        if isinstance(example, Pair):
            return self._pair(example)
        if not self.chats:
            raise TextError(
                "it is a chat, but the tokenizer has no chat template: set `tokenizer.chat_template`, use the "
                "tokenizer of an instruction-tuned model, or give the rows as `prompt` and `completion` or as `text`."
            )
        return dataclasses.replace(self._chat(example), is_chat=True)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text=text, verbose=False)["input_ids"])

    def _ended(self, text: str) -> str:
        return text if text.endswith(self.tokenizer.eos_token) else text + self.tokenizer.eos_token

    def _pair(self, pair: Pair) -> Encoded:
        ids = self._plain(pair.prompt + self._ended(pair.completion))
        start = common_prefix(self._plain(pair.prompt), ids)
        return Encoded(ids, self._labels(ids, [(start, len(ids))]))

    def _chat(self, chat: Chat) -> Encoded:
        prompts = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        one = chat.prompt_turns if chat.prompt_turns is not None else prompts[0] if len(prompts) == 1 else None
        ids = self._render(chat)
        if one is not None:
            return Encoded(ids, self._labels(ids, [(self._start(chat, one, ids), len(ids))]))
        if self.prompt_loss:
            return Encoded(ids, list(ids), answers=None)
        marked, template = self._generation_marks()
        if marked:
            return self._by_marks(chat, template)
        spans = self._turns(chat, prompts, ids)
        answers = ALL_BY_PREFIX
        if spans is None:
            spans, answers = [(self._start(chat, prompts[-1], ids), len(ids))], LAST
        return Encoded(ids, self._labels(ids, spans), answers=answers)

    def _by_marks(self, chat: Chat, template: str | None) -> Encoded:
        rendered = self._apply(chat.messages, chat, chat_template=template, return_assistant_tokens_mask=True)
        ids, mask = rendered["input_ids"], rendered["assistant_masks"]
        labels = [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]
        return Encoded(list(ids), labels, answers=ALL_BY_MASK)

    def _turns(self, chat: Chat, prompts: list[int], ids: list[int]) -> list[tuple[int, int]] | None:
        """Where the answers are, or `None` if the chat up to some turn is not the beginning of the whole."""
        spans = []
        for turn in prompts:
            before = self._render(chat, turn, prompt=True)
            after = self._render(chat, turn + 1)
            if ids[: len(before)] != before or ids[: len(after)] != after:
                return None
            spans.append((len(before), len(after)))
        return spans

    def _start(self, chat: Chat, turns: int, ids: list[int]) -> int:
        return common_prefix(self._render(chat, turns, prompt=True), ids)

    def _render(self, chat: Chat, turns: int | None = None, prompt: bool = False) -> list[int]:
        return list(self._apply(chat.messages[:turns], chat, add_generation_prompt=prompt)["input_ids"])

    def _apply(self, messages: list[dict[str, Any]], chat: Chat, **options: Any) -> Any:
        more = dict(chat.template or {})
        if isinstance(more.get("tools"), str):
            more["tools"] = parse_json(more["tools"], "The value of `tools`", TextError, repeats=True)
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options, **more)
        except Exception as error:  # a template is a program of the model's author and fails as it likes
            raise TextError(f"the chat template cannot write it: {error}") from error

    def _labels(self, ids: list[int], learned: list[tuple[int, int]]) -> list[int]:
        if self.prompt_loss:
            return list(ids)
        labels = [IGNORED] * len(ids)
        for start, end in learned:
            labels[start:end] = ids[start:end]
        return labels

    def _generation_marks(self) -> tuple[bool, str | None]:
        """Whether the answers are marked in the chat template, or in TRL's version of it, which is then given too."""
        if self._marked is None:
            need("trl", extra="recover")
            from trl.chat_template_utils import get_training_chat_template, has_generation_markers

            try:
                marked = has_generation_markers(self.tokenizer.chat_template)
                self._marked = (True, None) if marked else (True, get_training_chat_template(self.tokenizer))
            except ValueError:  # TRL has no version of this template with marks
                self._marked = (False, None)
        return self._marked


def common_prefix(ids: list[int], other: list[int]) -> int:
    """Number of leading ids that two sequences share. A prompt may merge with what follows, and ends there."""
    return next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
