import json

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict

from hf_structprune.errors import ConfigurationError, TextError
from hf_structprune.recovery.formats import Chat, Instruction, Pair, Text
from hf_structprune.recovery.sources import COMMON, dump, load_rows, mix_counts, public_sources, restore, to_common


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
    taken = sorted(restore(example).text for example in mixed["example"])
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
    examples = [restore(text) for text in mix["example"][:]]
    assert Chat(chats[0]["prompt"] + chats[0]["completion"], 1) in examples
    assert Pair("p", "c") in examples and Text("t4") in examples and Instruction("i19", "", "r") in examples
    assert examples != sorted(examples, key=repr), "not shuffled"
    assert mix[:] == load_rows(sources, seed=3)[:]
    assert mix[:] != load_rows(sources, seed=4)[:]
    assert to_common(mix) is mix


def test_empty_rows_stay_to_be_counted():
    assert to_common(Dataset.from_list([{"text": ""}, {"text": "x"}]))["example"][0] == dump(None) == ""


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
