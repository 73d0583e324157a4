"""What a training row is: recognised by its columns, and brought into one of four common forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TextError


# Names of the speakers in conversations with `from` and `value`, and the roles that chat templates know.
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "function": "tool",
    "developer": "developer",
}  # fmt: skip

# The prompt of Stanford Alpaca, with the line break at its end that Alpaca-LoRA added.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Text:
    """Plain text; every token is learned."""

    text: str


@dataclass(frozen=True)
class Pair:
    """A text and how it goes on; the second part is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Instruction:
    """A task, with or without an input, and its answer; written as a chat or in the Alpaca prompt."""

    instruction: str
    input: str
    output: str

    def as_pair(self) -> Pair:
        template = ALPACA_WITH_INPUT if self.input.strip() else ALPACA
        return Pair(template.format(instruction=self.instruction, input=self.input), self.output)

    def as_chat(self) -> Chat:
        question = f"{self.instruction}\n\n{self.input}" if self.input.strip() else self.instruction
        return Chat(
            [{"role": "user", "content": question}, {"role": "assistant", "content": self.output}], prompt_turns=1
        )


@dataclass(frozen=True)
class Chat:
    """Messages with `role` and `content`.

    Args:
        messages: The messages, with whatever else the chat template reads, such as `tool_calls`.
        prompt_turns: So many messages are the prompt and the others are learned; `None`: what assistants say is.
        template: More arguments of the chat template: `tools` and those of a column `chat_template_kwargs`.
    """

    messages: list[dict[str, Any]]
    prompt_turns: int | None = None
    template: Mapping[str, Any] | None = None


Example = Text | Pair | Instruction | Chat


@dataclass(frozen=True)
class Format:
    """A kind of rows.

    Args:
        name: What it is called.
        columns: For every part, the names that its column may have.
        read: Makes an example of a row's parts and the row; `None` if there is nothing to learn in it.
        optional: Parts that may be missing.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    read: Callable[[dict[str, Any], Mapping[str, Any]], Example | None]
    optional: tuple[str, ...] = ()

    def parts(self, columns: Sequence[str]) -> dict[str, str] | None:
        """The column of every part, or `None` if rows with these columns are of another format."""
        found = {part: next((n for n in names if n in columns), None) for part, names in self.columns.items()}
        if any(column is None for part, column in found.items() if part not in self.optional):
            return None
        return {part: column for part, column in found.items() if column is not None}

    def __str__(self) -> str:
        words = ["|".join(names) + (" (optional)" if p in self.optional else "") for p, names in self.columns.items()]
        return f"{self.name}: {', '.join(words)}"


def recognise(columns: Sequence[str], where: str) -> Format:
    """The format of rows with these columns: the first of `FORMATS` whose columns are all there.

    Raises:
        TextError: None of them is.
    """
    for known in FORMATS:
        if known.parts(columns) is not None:
            return known
    raise TextError(
        f"{where} has the columns {', '.join(map(repr, columns)) or 'none'}; training needs those of one of these "
        f"formats: {'; '.join(map(str, FORMATS))}. Rename the columns, or make one `text` of them."
    )


def read_example(row: Mapping[str, Any], known: Format, where: str) -> Example | None:
    """The example in a row, or `None` if its text or its answer is empty.

    Raises:
        TextError: A value is of the wrong kind.
    """
    try:
        return known.read({part: row[column] for part, column in known.parts(list(row)).items()}, row)
    except _Wrong as error:
        raise TextError(f"{where}, format {known.name}: {error}") from error


class _Wrong(Exception):
    """What is wrong with a row, without where it is."""


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Wrong(f"{name} is a {type(value).__name__}, not a text.")
    return value


def _read_text(parts: dict[str, Any], row: Mapping[str, Any]) -> Text | None:
    text = _text(parts["text"], "the text")
    return Text(text) if text.strip() else None


def _read_pair(parts: dict[str, Any], row: Mapping[str, Any]) -> Pair | Chat | None:
    prompt, completion = parts["prompt"], parts["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise _Wrong("`prompt` and `completion` must both be texts or both be lists of messages.")
        prompt, completion = _messages(prompt), _messages(completion)
        if not prompt or not any(m["content"] or m.get("tool_calls") for m in completion):
            return None
        return Chat(prompt + completion, len(prompt), _template(row))
    prompt, completion = _text(prompt, "the prompt"), _text(completion, "the completion")
    return Pair(prompt, completion) if completion.strip() else None


def _read_instruction(parts: dict[str, Any], row: Mapping[str, Any]) -> Instruction | None:
    values = {part: _text(parts.get(part), f"the {part}") for part in ("instruction", "input", "output")}
    if not values["output"].strip() or not (values["instruction"] + values["input"]).strip():
        return None
    return Instruction(**values)


def _read_chat(parts: dict[str, Any], row: Mapping[str, Any]) -> Chat | None:
    messages = _messages(parts["messages"])
    said = [i for i, m in enumerate(messages) if m["role"] == "assistant" and (m["content"] or m.get("tool_calls"))]
    # What comes after the last answer is answered by nobody.
    return Chat(messages[: said[-1] + 1], None, _template(row)) if said else None


def _messages(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _Wrong(f"the messages are a {type(value).__name__}, not a list.")
    return [_message(message) for message in value]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _Wrong(f"a message is a {type(message).__name__}, not an object with `role` and `content`.")
    values = {key: value for key, value in message.items() if value is not None}  # tables fill up with None
    if "from" in values and "role" not in values:
        values["role"] = values.pop("from")
    if "value" in values and "content" not in values:
        values["content"] = values.pop("value")
    if values.get("role") not in ROLES:
        raise _Wrong(f"a message is by {values.get('role')!r}; known are {', '.join(ROLES)}.")
    return {**values, "role": ROLES[values["role"]], "content": _content(values.get("content"))}


def _content(value: Any) -> str:
    """The text of a message, whole or in parts: `[{"type": "text", "text": "..."}]`."""
    if not isinstance(value, list):
        return _text(value, "a message")
    return "".join(_part(part) for part in value)


def _part(part: Any) -> str:
    if isinstance(part, Mapping):
        kind = part.get("type") or "text"
        if kind != "text":
            raise _Wrong(f"a message has a part of type {kind!r}; only text can be learned.")
        part = part.get("text")
    return _text(part, "a part of a message")


def _template(row: Mapping[str, Any]) -> dict[str, Any] | None:
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {**tools, **(row.get("chat_template_kwargs") or {})} or None


_TASK = {"instruction": ("instruction",), "input": ("input", "context"), "output": ("output", "response")}
_QUESTION = {"instruction": ("question",), "output": ("answer",)}

# In the order in which they are looked for: rows of chats and instructions often have their text once more.
FORMATS = (
    Format("messages", {"messages": ("messages",)}, _read_chat),
    Format("conversations", {"messages": ("conversations",)}, _read_chat),
    Format("prompt-completion", {"prompt": ("prompt",), "completion": ("completion",)}, _read_pair),
    Format("instruction", _TASK, _read_instruction, optional=("input",)),
    Format("question-answer", _QUESTION, _read_instruction),
    Format("text", {"text": ("text",)}, _read_text),
)
