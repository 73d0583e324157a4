"""Rows of every kind of source and format, alone and mixed."""

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict

from hf_structprune.errors import ConfigurationError, TextError
from hf_structprune.recovery.rows import (
    COMMON,
    FORMATS,
    load_rows,
    mix_counts,
    public_sources,
    read_example,
    recognise,
    to_common,
)


def texts(count, letter="t"):
    return [{"text": f"{letter}{i}"} for i in range(count)]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


DOLLY = [{"instruction": f"i{n}", "context": None, "response": "r", "category": "c"} for n in range(20)]


@pytest.mark.parametrize("kind", ["dataset", "rows", "jsonl", "json", "saved", "folder", "dict", "one in a list"])
def test_every_kind_of_source_keeps_its_columns(tmp_path, kind):
    table = Dataset.from_list(DOLLY)
    folder = tmp_path / "folder"
    folder.mkdir()
    if kind == "json":
        (tmp_path / "a.json").write_text(json.dumps(DOLLY))
    source = {
        "dataset": table, "rows": DOLLY, "dict": DatasetDict(train=table, test=table.select([0])),
        "jsonl": write(tmp_path / "a.jsonl", DOLLY), "json": tmp_path / "a.json", "saved": folder, "folder": folder,
        "one in a list": [tmp_path / "a.jsonl"],
    }[kind]  # fmt: skip
    if kind == "saved":
        table.save_to_disk(folder)
    elif kind == "folder":  # two parts, and a part to measure on that is not trained on
        write(folder / "train-00000-of-00002.jsonl", DOLLY[:15])
        write(folder / "train-00001-of-00002.jsonl", DOLLY[15:])
        write(folder / "heldout.jsonl", DOLLY)
    rows = load_rows(source)
    assert set(rows.column_names) == {"instruction", "context", "response", "category"}
    assert rows["instruction"][:] == [row["instruction"] for row in DOLLY]


def test_of_a_stream_the_first_rows_are_taken(caplog):
    stream = Dataset.from_list(texts(9)).to_iterable_dataset()
    for source in (stream, IterableDatasetDict(train=stream), [(stream, 0.5), (texts(9, "u"), 0.5)]):
        with pytest.raises(
            ConfigurationError, match="streaming data set, which may have no end: say by `max_samples`"
        ):
            load_rows(source)
    assert load_rows(stream, max_samples=4)["text"][:] == ["t0", "t1", "t2", "t3"]
    assert "its first 4 rows are taken, in their order" in caplog.text
    assert len(load_rows(IterableDatasetDict(train=stream), max_samples=20)) == 9
    mixed = load_rows([(stream, 0.5), (texts(9, "u"), 0.5)], max_samples=6)
    taken = sorted(json.loads(example)["text"] for example in mixed["example"])
    assert [one[0] for one in taken] == ["t"] * 3 + ["u"] * 3
    with pytest.raises(TextError, match="no split 'test'"):
        load_rows(IterableDatasetDict(train=stream), split="test", max_samples=1)
    with pytest.raises(TextError, match="There are no rows"):
        load_rows(stream.filter(lambda row: False), max_samples=1)


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert load_rows(tmp_path / "a.txt")[:] == {"text": ["one\n\ntwo\n"]}


def test_keys_that_only_later_rows_have_are_kept():
    rows = load_rows([{"text": "a"}, {"text": "b", "url": "u"}])
    assert rows[:] == {"text": ["a", "b"], "url": [None, "u"]}


def test_max_samples_draws_by_the_seed():
    drawn = [load_rows(texts(50), max_samples=7, seed=seed)["text"][:] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 7
    assert len(load_rows(texts(3), max_samples=7)) == 3


def test_the_data_set_that_was_given_is_not_changed():
    table = Dataset.from_list(texts(3))
    name = table.info.dataset_name
    load_rows([table, texts(2)])
    assert table.info.dataset_name == name and table.column_names == ["text"]


def test_formats_are_mixed_row_for_row(tmp_path):
    chats = [{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}]
    pairs = [{"prompt": "p", "completion": "c"}]
    sources = [write(tmp_path / "dolly.jsonl", DOLLY), texts(5), chats, pairs]
    mix = load_rows(sources, seed=3)
    assert mix.column_names == list(COMMON) and len(mix) == 27
    names = set(zip(mix["source"][:], mix["format"][:], strict=True))
    assert names == {
        ("dolly.jsonl", "instruction"), ("data", "text"), ("data (2)", "prompt-completion"),
        ("data (3)", "prompt-completion"),
    }  # fmt: skip
    examples = [json.loads(text) for text in mix["example"][:]]
    assert chat(chats[0]["prompt"] + chats[0]["completion"], 1) in examples
    assert pairs[0] in examples and {"text": "t4"} in examples and task("i19", "", "r") in examples
    assert examples != sorted(examples, key=repr), "not shuffled"
    assert mix[:] == load_rows(sources, seed=3)[:]
    assert mix[:] != load_rows(sources, seed=4)[:]
    assert to_common(mix) is mix


def test_empty_rows_stay_to_be_counted():
    assert to_common(Dataset.from_list([{"text": ""}, {"text": "x"}]))["example"][0] == ""


@pytest.mark.parametrize(
    ("rows", "shares", "most", "counts"),
    [
        ([10, 30], [None, None], None, [10, 30]),
        ([10, 30], [None, None], 20, [5, 15]),
        ([1000, 60], [0.7, 0.3], None, [140, 60]),
        ([1000, 60], [None, 0.3], None, [140, 60]),
        ([1000, 500, 60], [None, None, 0.25], None, [120, 60, 60]),
        ([70, 1000], [0.7, 0.3], 10, [7, 3]),
        ([5, 5, 5], [None, None, None], 10, [4, 3, 3]),
        ([5], [None], 3, [3]),
    ],
)
def test_mix_counts(rows, shares, most, counts):
    assert mix_counts(rows, shares, most) == counts


@pytest.mark.parametrize("shares", [[0.5, 0.3], [0.7, 0.7], [None, 1.0]])
def test_impossible_shares(shares):
    with pytest.raises(ConfigurationError, match="add up to"):
        mix_counts([5, 5], shares)


def test_shares_in_names_and_pairs(tmp_path, caplog):
    first, second = write(tmp_path / "a.jsonl", texts(100, "a")), write(tmp_path / "b.jsonl", texts(12, "b"))
    for sources in ([f"{first}@0.75", f"{second}@0.25"], [first, (second, 0.25)]):
        mix = load_rows(sources)["source"][:]
        assert (mix.count("a.jsonl"), mix.count("b.jsonl")) == (36, 12)
    odd = write(tmp_path / "c@2.jsonl", texts(4, "c"))  # not a share
    assert len(load_rows([odd, first])) == 104


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ([], TextError, "list of sources is empty"),
        (Dataset.from_dict({"text": []}), TextError, "no rows in data"),
        ([{"body": "x"}], TextError, "data has the columns 'body'"),
        ([{"text": "x"}, {"text": {"a": 1}}], TextError, "values of different kinds"),
        (3, ConfigurationError, "is a int; give a `datasets.Dataset`"),
        ("no/such/file.jsonl", TextError, "There is no file"),
        ("./nothing", TextError, "There is no file or folder"),
        (DatasetDict(test=Dataset.from_list(texts(1))), TextError, "no split 'train'; it has 'test'"),
        ("rows.jsonl@0.5", ConfigurationError, "no other source"),
        (["rows.jsonl@1.5", "more.jsonl"], ConfigurationError, "share of rows.jsonl is 1.5"),
    ],
)
def test_faults(source, error, match):
    with pytest.raises(error, match=match):
        load_rows(source)


def test_public_sources_are_names_with_their_shares(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    assert public_sources([f"{tmp_path}/a.jsonl@0.25", "some/data@0.75"]) == ["a.jsonl@0.25", "some/data@0.75"]
    assert public_sources(tmp_path / "a.jsonl") == ["a.jsonl"]
    assert public_sources([{"text": "a"}]) == ["data"]


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


def task(instruction, context, answer):
    return {"instruction": instruction, "input": context, "output": answer}


def chat(messages, prompt_turns=None):
    return {"messages": messages, "prompt_turns": prompt_turns, "template": {}}


def test_examples():
    assert read(text="x", url="u") == {"text": "x"}
    assert read(prompt="p", completion="c") == {"prompt": "p", "completion": "c"}
    assert read(instruction="i", context="c", response="r") == task("i", "c", "r")
    assert read(instruction="i", output="r") == read(question="i", answer="r") == task("i", "", "r")
    assert read(messages=[USER, BOT, USER]) == chat([USER, BOT])
    assert read(prompt=[USER], completion=[BOT]) == chat([USER, BOT], 1)
    turns = [{"from": "human", "value": "q", "weight": None}, {"from": "gpt", "value": "a", "weight": None}]
    assert read(conversations=turns) == chat([USER, BOT])
    parts = [{"type": "text", "text": "a", "image": None}, {"type": None, "text": ""}, "b"]
    assert read(messages=[USER, {"role": "assistant", "content": parts}]) == chat([USER, {**BOT, "content": "ab"}])
    assert read(messages=[USER, BOT], tools="[]")["template"] == {"tools": "[]"}


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
