"""Rows of every kind of source and format, alone and mixed."""

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict

from hf_structprune.errors import ConfigurationError, TextError
from hf_structprune.recovery.data import Encoder, load_rows, mix_counts, public_sources
from hf_structprune.text.formats import FORMATS, recognise


def texts(count, letter="t"):
    return [{"text": f"{letter}{i}"} for i in range(count)]


def only(found):
    """The rows of the only source."""
    [rows] = found.values()
    return rows


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
    rows = only(load_rows(source))
    assert set(rows.column_names) == {"instruction", "context", "response", "category"}
    assert rows["instruction"][:] == [row["instruction"] for row in DOLLY]


def test_of_a_stream_the_first_rows_are_taken(caplog):
    stream = Dataset.from_list(texts(9)).to_iterable_dataset()
    for source in (stream, IterableDatasetDict(train=stream), [(stream, 0.5), (texts(9, "u"), 0.5)]):
        with pytest.raises(
            ConfigurationError, match="streaming data set, which may have no end: say by `max_samples`"
        ):
            load_rows(source)
    assert only(load_rows(stream, max_samples=4))["text"][:] == ["t0", "t1", "t2", "t3"]
    assert "its first 4 rows are taken, in their order" in caplog.text
    assert len(only(load_rows(IterableDatasetDict(train=stream), max_samples=20))) == 9
    mixed = load_rows([(stream, 0.5), (texts(9, "u"), 0.5)], max_samples=6)
    assert {name: len(rows) for name, rows in mixed.items()} == {"data": 3, "data (2)": 3}
    with pytest.raises(TextError, match="no split 'test'"):
        load_rows(IterableDatasetDict(train=stream), split="test", max_samples=1)
    with pytest.raises(TextError, match="There are no rows"):
        load_rows(stream.filter(lambda row: False), max_samples=1)


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert only(load_rows(tmp_path / "a.txt"))[:] == {"text": ["one\n\ntwo\n"]}


def test_keys_that_only_later_rows_have_are_kept():
    rows = only(load_rows([{"text": "a"}, {"text": "b", "url": "u"}]))
    assert rows[:] == {"text": ["a", "b"], "url": [None, "u"]}


def test_max_samples_draws_by_the_seed():
    drawn = [only(load_rows(texts(50), max_samples=7, seed=seed))["text"][:] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 7
    assert len(only(load_rows(texts(3), max_samples=7))) == 3


@pytest.mark.parametrize(
    ("rows", "shares", "most", "counts"),
    [
        ([10, 30], [None, None], None, [10, 30]),
        ([10, 30], [None, None], 20, [5, 15]),
        ([1000, 60], [0.7, 0.3], None, [140, 60]),
        ([1000, 60], [None, 0.3], None, [140, 60]),
        ([1000, 500, 60], [None, None, 0.25], None, [120, 60, 60]),
        ([70, 1000], [0.7, 0.3], 10, [7, 3]),
        ([5, 5, 5], [None, None, None], 10, [3, 3, 3]),
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
        mix = load_rows(sources)
        assert {name: len(rows) for name, rows in mix.items()} == {"a.jsonl": 36, "b.jsonl": 12}
        assert len(set(mix["a.jsonl"]["text"][:])) == 36, "a row is there twice"
    odd = write(tmp_path / "c@2.jsonl", texts(4, "c"))  # not a share
    assert list(load_rows([odd, first])) == ["c@2.jsonl", "a.jsonl"]


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
        (([{"text": "x"}], 0.5), ConfigurationError, "The shares 0.5 add up to 0.5, not to 1"),
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
    assert recognise(columns, "x")[0] == name


def test_unknown_columns_name_what_is_there_and_what_is_known():
    with pytest.raises(TextError, match="rows.jsonl has the columns 'prompt', 'chosen'") as error:
        recognise(["prompt", "chosen"], "rows.jsonl")
    assert all(name in str(error.value) for name in FORMATS)
    assert "input|context (optional)" in str(error.value)


@pytest.fixture
def read(make_tokenizer):
    """What TRL is given of a row."""
    encoder = Encoder(make_tokenizer(chat_template="{{ messages }}"), 99, False, set())

    def read(**row):
        _, parts = recognise(list(row), "x")
        return encoder.examples({part: row.get(column) for part, column in parts.items()}, row)

    return read


def pair(*turns, **more):
    return [{"prompt": list(turns[:-1]), "completion": [turns[-1]], **more}]


def test_examples(read):
    assert read(text="x", url="u") == [{"text": "x"}]
    assert read(prompt="p", completion="c") == [{"prompt": "p", "completion": "c"}]
    asked = {"role": "user", "content": "i\n\nc"}
    assert read(instruction="i", context="c", response="a") == pair(asked, BOT)
    assert read(instruction="q", output="a") == read(question="q", answer="a") == pair(USER, BOT)
    assert read(messages=[USER, BOT, USER]) == read(prompt=[USER], completion=[BOT]) == pair(USER, BOT)
    turns = [{"from": "human", "value": "q", "weight": None}, {"from": "gpt", "value": "a", "weight": None}]
    assert read(conversations=turns) == pair(USER, BOT)
    assert read(messages=[USER, BOT, USER, BOT]) == pair(USER, BOT) + pair(USER, BOT, USER, BOT)
    parts = [{"type": "text", "text": "a", "image": None}, {"type": None, "text": ""}, "b"]
    assert read(messages=[USER, {"role": "assistant", "content": parts}]) == pair(USER, {**BOT, "content": "ab"})
    assert read(messages=[USER, BOT], tools="[]") == pair(USER, BOT, tools="[]")


@pytest.mark.parametrize(
    "row",
    [
        {"text": " \n"}, {"text": None}, {"prompt": "p", "completion": " "}, {"instruction": "i", "output": None},
        {"instruction": "", "output": "o"}, {"messages": []}, {"messages": [USER]}, {"messages": None},
        {"prompt": [], "completion": [BOT]}, {"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]},
    ],
)  # fmt: skip
def test_nothing_to_learn(row, read):
    assert read(**row) == []


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"text": 3}, "`text` is a int, not a text"),
        ({"messages": "hi"}, "the messages are no list of objects with `role`"),
        ({"messages": ["hi"]}, "the messages are no list of objects with `role`"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "a message is by 'alien'; known are human"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type 'image'; only text can be"),
        ({"messages": [{"role": "user", "content": [3]}]}, "`text` is a int, not a text"),
        ({"messages": [{"role": "user", "content": {}}]}, "`content` is a dict, not a text"),
        ({"prompt": [USER], "completion": "x"}, "must both be texts or both be lists"),
    ],
)
def test_values_of_the_wrong_kind(row, match, read):
    with pytest.raises(TextError, match=match):
        read(**row)
