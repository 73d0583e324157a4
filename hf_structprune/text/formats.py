"""Formats of rows, known by their columns: chats, instructions, questions with answers, plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import TextError


# Formats by the names that the column of each part may have; `None` says that it may be missing. In the order in which
# they are looked for: rows of chats and instructions often have their text once more.
FORMATS: dict[str, dict[str, tuple[str | None, ...]]] = {
    "messages": {"messages": ("messages",)},
    "conversations": {"messages": ("conversations",)},
    "prompt-completion": {"prompt": ("prompt",), "completion": ("completion",)},
    "instruction": {
        "instruction": ("instruction",), "input": ("input", "context", None), "output": ("output", "response"),
    },
    "question-answer": {"instruction": ("question",), "output": ("answer",)},
    "text": {"text": ("text",)},
}  # fmt: skip
# Names of the speakers in chats, and the roles that chat templates know.
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "function": "tool",
    "developer": "developer",
}  # fmt: skip
# The prompt of Stanford Alpaca, with the line break at its end that Alpaca-LoRA added.
ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)

NO_TEMPLATE = (
    "is a chat, but the tokenizer has no chat template: set `tokenizer.chat_template`, use the tokenizer of an "
    "instruction-tuned model, or give the rows as `prompt` and `completion` or as `text`."
)


def recognise(columns: Sequence[str], where: str) -> tuple[str, dict[str, str | None]]:
    """The format of rows with these columns, the first of `FORMATS` whose columns are all there, and its columns.

    Raises:
        TextError: They are of none.
    """
    there = {*columns, None}
    for name, parts in FORMATS.items():
        found = {part: next((one for one in names if one in there), "") for part, names in parts.items()}
        if "" not in found.values():
            return name, found
    words = [
        f"{name}: " + ", ".join("|".join(filter(None, one)) + " (optional)" * (None in one) for one in parts.values())
        for name, parts in FORMATS.items()
    ]
    raise TextError(
        f"{where} has the columns {', '.join(map(repr, columns)) or 'none'}; known are those of one of these "
        f"formats: {'; '.join(words)}. Rename the columns, or make one `text` of them."
    )


def parts_of(row: Mapping[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    """The parts of a row by name, as `recognise` says which column has which."""
    return {part: row.get(column) for part, column in columns.items()}


def example_of(parts: Mapping[str, Any], has_chats: bool) -> dict[str, Any] | None:
    """A row as TRL's trainer takes it: `text`, `prompt` and `completion`, or `messages`; `None` if it is empty.

    Args:
        parts: The row, see `parts_of`.
        has_chats: Whether there is a chat template: instructions are chats then, else texts as of Stanford Alpaca.

    Raises:
        TextError: A part is of another kind.
    """
    if "text" in parts:
        text = text_of(parts["text"], "text")
        return {"text": text} if text.strip() else None
    if "instruction" in parts:
        task, context, answer = (text_of(parts.get(name), name) for name in ("instruction", "input", "output"))
        if not answer.strip() or not (task + context).strip():
            return None
        if not has_chats:
            more = ", paired with an input that provides further context" if context.strip() else ""
            given = f"### Input:\n{context}\n\n" if more else ""
            return {"prompt": ALPACA.format(more=more, instruction=task, input=given), "completion": answer}
        question = f"{task}\n\n{context}" if context.strip() else task
        parts = {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
    if "prompt" in parts:
        prompt, completion = parts["prompt"], parts["completion"]
        if isinstance(prompt, list) != isinstance(completion, list):
            raise TextError("`prompt` and `completion` must both be texts or both be lists of messages.")
        if not isinstance(prompt, list):
            prompt, completion = text_of(prompt, "prompt"), text_of(completion, "completion")
            return {"prompt": prompt, "completion": completion} if completion.strip() else None
        prompt, completion = messages_of(prompt), messages_of(completion)
        said = prompt and any(map(says, completion))
        return {"prompt": prompt, "completion": completion} if said else None
    messages = messages_of(parts["messages"])
    return {"messages": messages} if any(map(says, messages)) else None


def text_of(value: Any, name: str) -> str:
    """A part that is a text; none is an empty one."""
    if value is not None and not isinstance(value, str):
        raise TextError(f"`{name}` is a {type(value).__name__}, not a text.")
    return value or ""


def says(message: Mapping[str, Any]) -> bool:
    """Whether there is something in a message."""
    return bool(message["content"] or message.get("tool_calls"))


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Messages with roles that chat templates know; of content in parts (`[{"type": "text", ...}]`) the text."""
    if value is not None and not (isinstance(value, list) and all(isinstance(one, Mapping) for one in value)):
        raise TextError("the messages are no list of objects with `role` and `content`.")
    messages = []
    for given in value or []:
        # Tables fill up with `None`; chats of ShareGPT have other keys.
        message = {_KEYS.get(key, key): one for key, one in given.items() if one is not None}
        if message.get("role") not in ROLES:
            raise TextError(f"a message is by {message.get('role')!r}; known are {', '.join(ROLES)}.")
        content = message.get("content")
        if isinstance(content, list):
            some = [part if isinstance(part, Mapping) else {"text": part} for part in content]
            other = next((kind for part in some if (kind := part.get("type") or "text") != "text"), None)
            if other is not None:
                raise TextError(f"a message has a part of type {other!r}; only text can be learned.")
            content = "".join(text_of(part.get("text"), "text") for part in some)
        messages.append({**message, "role": ROLES[message["role"]], "content": text_of(content, "content")})
    return messages


_KEYS = {"from": "role", "value": "content"}


class Documents(Sequence[Any]):
    """Rows of known formats as documents, each made when it is asked for: texts, or chats for the chat template.

    An empty row is an empty text.

    Args:
        rows: The rows, with all their columns.
        where: What they are called in messages.
        has_chats: Whether there is a chat template.

    Raises:
        TextError: They are of no known format, or a row is not.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], where: str, has_chats: bool) -> None:
        self._rows, self._where, self._has_chats = rows, where, has_chats
        recognise([*rows[0]] if len(rows) else [], where)

    def __len__(self) -> int:
        return len(self._rows)

    def are_chats(self) -> bool:
        """Whether the first one that is not empty is a chat."""
        return isinstance(next(filter(None, self), ""), list)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        row, where = self._rows[number], f"Row {number} of {self._where}"
        kind, columns = recognise([*row], where)  # the keys of lines of JSON may differ
        try:
            example = example_of(parts_of(row, columns), self._has_chats)
        except TextError as error:
            raise TextError(f"{where}, format {kind}: {error}") from error
        if example is None:
            return ""
        document = example.get("text") or example.get("messages") or example["prompt"] + example["completion"]
        if isinstance(document, list) and not self._has_chats:
            raise TextError(f"{where} {NO_TEMPLATE}")
        return document
