import pytest

from hf_structprune.errors import TextError
from hf_structprune.recovery.formats import FORMATS, Chat, Instruction, Pair, Text, read_example, recognise


USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["messages", "prompt", "prompt_id"], "messages"),  # UltraChat
        (["id", "conversations"], "conversations"),  # ShareGPT
        (["completion", "prompt"], "prompt-completion"),
        (["instruction", "input", "output", "text"], "instruction"),  # Alpaca
        (["instruction", "context", "response", "category"], "instruction"),  # Dolly
        (["question", "answer"], "question-answer"),
        (["text", "timestamp", "url"], "text"),  # C4
    ],
)
def test_formats_are_recognised_by_their_columns(columns, name):
    assert recognise(columns, "x").name == name


def test_unknown_columns_name_what_is_there_and_what_is_known():
    with pytest.raises(TextError, match="rows.jsonl has the columns 'prompt', 'chosen'") as error:
        recognise(["prompt", "chosen"], "rows.jsonl")
    assert all(known.name in str(error.value) for known in FORMATS)
    assert "input|context (optional)" in str(error.value)


def read(**row):
    return read_example(row, recognise(list(row), "x"), "Row 0 of x")


def test_examples():
    assert read(text="x", url="u") == Text("x")
    assert read(prompt="p", completion="c") == Pair("p", "c")
    assert read(instruction="i", context="c", response="r") == Instruction("i", "c", "r")
    assert read(instruction="i", output="r") == Instruction("i", "", "r")
    assert read(question="i", answer="r") == Instruction("i", "", "r")
    assert read(messages=[USER, BOT, USER]) == Chat([USER, BOT])
    assert read(prompt=[USER], completion=[BOT]) == Chat([USER, BOT], 1)
    turns = [{"from": "human", "value": "q", "weight": None}, {"from": "gpt", "value": "a", "weight": None}]
    assert read(conversations=turns) == Chat([USER, BOT])
    parts = [{"type": "text", "text": "a", "image": None}, {"type": None, "text": ""}, "b"]
    assert read(messages=[USER, {"role": "assistant", "content": parts}]) == Chat([USER, {**BOT, "content": "ab"}])
    assert read(messages=[USER, BOT], tools="[]").template == {"tools": "[]"}


@pytest.mark.parametrize(
    "row",
    [
        {"text": " \n"}, {"text": None}, {"prompt": "p", "completion": " "}, {"instruction": "i", "output": None},
        {"instruction": "", "output": "o"}, {"messages": []}, {"messages": [USER]}, {"messages": None},
        {"prompt": [], "completion": [BOT]}, {"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]},
    ],
)  # fmt: skip
def test_nothing_to_learn(row):
    assert read(**row) is None


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"text": 3}, "Row 0 of x, format text: the text is a int"),
        ({"messages": "hi"}, "the messages are a str, not a list"),
        ({"messages": ["hi"]}, "a message is a str, not an object with `role`"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "a message is by 'alien'; known are human"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type 'image'; only text can be"),
        ({"messages": [{"role": "user", "content": [3]}]}, "a part of a message is a int, not a text"),
        ({"messages": [{"role": "user", "content": {}}]}, "a message is a dict, not a text"),
        ({"prompt": [USER], "completion": "x"}, "must both be texts or both be lists"),
    ],
)
def test_values_of_the_wrong_kind(row, match):
    with pytest.raises(TextError, match=match):
        read(**row)


def test_an_instruction_as_chat_and_as_alpaca_prompt():
    assert Instruction("do", " ", "o").as_chat() == Chat(
        [{"role": "user", "content": "do"}, {"role": "assistant", "content": "o"}], 1
    )
    assert Instruction("do", "it", "o").as_chat().messages[0]["content"] == "do\n\nit"
    pair = Instruction("do", "it", "o").as_pair()
    assert pair.completion == "o"
    assert pair.prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert pair.prompt.endswith("### Instruction:\ndo\n\n### Input:\nit\n\n### Response:\n")
    assert "### Input" not in Instruction("do", "", "o").as_pair().prompt
