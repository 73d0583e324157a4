import json

import datasets
import pytest

from hf_structprune.errors import ConfigurationError, TextError
from hf_structprune.evaluation import EvaluationText, load_text, read_text
from hf_structprune.evaluation.perplexity import TEXTS


ROWS = ["", " = T = \n", "", " Body . \n"]


@pytest.fixture
def hub(monkeypatch):
    """Stands for the Hub: records what is asked for, answers with three rows of any column."""
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name, options))
        rows = [f"{options['split']} {i}" for i in range(3)]
        return datasets.Dataset.from_dict({column: rows for column in ("text", "sentence", "other")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


# --------------------------------------------------------------------------------------------- named texts


def test_sample():
    from hf_structprune.data import wikitext2_sample

    text = load_text("sample")
    assert (text.name, text.source) == ("sample", "leading articles of WikiText-2 raw, test split")
    assert text.text == read_text(wikitext2_sample())


def test_wikitext2(hub):
    text = load_text("wikitext2")
    assert text == EvaluationText(
        "wikitext2", "test 0\n\ntest 1\n\ntest 2", "Salesforce/wikitext, wikitext-2-raw-v1, test split"
    )
    assert load_text("wikitext2", split="validation").name == "wikitext2-validation"
    assert hub == [("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": s}) for s in ("test", "validation")]


def test_rows_of_the_hub_and_a_text_file_are_the_same_text(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ROWS})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    (tmp_path / "a.txt").write_text(" \n = T = \n \n Body . \n", encoding="utf-8")
    assert load_text("wikitext2").text == load_text(str(tmp_path / "a.txt")).text == "\n\n".join(ROWS)


def test_ptb(hub):
    text = load_text("ptb")
    assert (text.name, text.text) == ("ptb", "test 0\n\ntest 1\n\ntest 2")
    assert text.source == "ptb-text-only/ptb_text_only, test split"
    assert load_text("ptb", split="validation").name == "ptb-validation"
    options = [{"split": split, "revision": "refs/convert/parquet"} for split in ("test", "validation")]
    assert hub == [("ptb-text-only/ptb_text_only", None, given) for given in options]


def test_c4(hub, monkeypatch):
    text = load_text("c4")
    assert (text.name, text.text) == ("c4", "validation 0 validation 1 validation 2")
    assert text.source == "allenai/c4, validation split, first 1,100 rows"
    file = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert hub == [("allenai/c4", None, {"split": "validation", "data_files": file})]
    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(2000)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    assert load_text("c4").text == " ".join(str(i) for i in range(1100))


@pytest.mark.parametrize("name", TEXTS)
def test_without_a_network_the_message_says_what_is_needed(name):
    match = rf"The text '{name}' needs .*cannot load '{TEXTS[name].dataset}'.*HF_HUB_OFFLINE is set.*Local text"
    with pytest.raises(TextError, match=match):
        load_text(name)


@pytest.mark.parametrize(
    ("spec", "options", "match"),
    [
        ("sample", {"split": "test"}, "`split` is 'test', but the text 'sample' has none to choose"),
        ("wikitext2", {"config_name": "wikitext-103-raw-v1"}, "`config_name` is .* 'wikitext2' has none"),
        ("ptb", {"column": "text"}, "`column` is 'text', but the text 'ptb' has none"),
        ("ptb", {"split": "valid"}, "made of 'test', 'validation', 'train'; .*id, 'ptb-text-only/ptb_text_only'"),
        ("c4", {"split": "train"}, "`split` is 'train', but the text 'c4' is made of 'validation'"),
    ],
)
def test_named_texts_are_what_they_are(spec, options, match, hub):
    with pytest.raises(ConfigurationError, match=match):
        load_text(spec, **options)
    assert not hub


# ------------------------------------------------------------------------------------------- files, folders, ids


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert load_text(str(tmp_path / "a.txt")) == EvaluationText("a", "one\n\n\n\n\ntwo\n", "a.txt")
    rows = [{"text": "one", "body": "1"}, {"text": "two", "body": "2"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    for name in ("b.jsonl", "c.json"):
        text = load_text(str(tmp_path / name))
        assert text == EvaluationText(name[0], "one\n\ntwo", name)
        assert load_text(str(tmp_path / name), column="body").text == "1\n\n2"
        assert read_text(tmp_path / name, "body") == "1\n\n2"


def test_folders(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": ["one", "two"], "body": ["1", "2"]})
    datasets.DatasetDict(test=dataset, valid=dataset.select([1])).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    dataset.to_parquet(tmp_path / "files" / "test.parquet")
    for name in ("saved", "files"):
        assert load_text(str(tmp_path / name)) == EvaluationText(name, "one\n\ntwo", f"{name}, test split")
        assert load_text(str(tmp_path / name), column="body").text == "1\n\n2"
    text = load_text(str(tmp_path / "saved"), split="valid")
    assert (text.name, text.text, text.source) == ("saved-valid", "two", "saved, valid split")


def test_a_folder_with_the_name_of_a_named_text(tmp_path, monkeypatch):
    datasets.Dataset.from_dict({"text": ["mine"]}).save_to_disk(tmp_path / "ptb")
    monkeypatch.chdir(tmp_path)
    assert load_text("./ptb").text == "mine"
    with pytest.raises(TextError, match="needs a data set of the Hub"):
        load_text("ptb")


def test_any_data_set_of_the_hub(hub):
    text = load_text("org/data", config_name="en", split="dev[:10]", column="other")
    assert text == EvaluationText(
        "data-en-dev[:10]-other", "\n\n".join(f"dev[:10] {i}" for i in range(3)), "org/data, en, dev[:10] split"
    )
    assert load_text("org/data").name == "data"
    assert hub == [("org/data", "en", {"split": "dev[:10]"}), ("org/data", None, {"split": "test"})]


def test_errors(tmp_path, hub):
    def check(match, spec, error=TextError, **options):
        with pytest.raises(error, match=match):
            load_text(str(spec), **options)

    check("There is no file", tmp_path / "no.txt")
    check("There is no file or folder", tmp_path / "no")
    (tmp_path / "a.csv").write_text("text\nx\n")
    check("neither a .txt nor a .jsonl or .json", tmp_path / "a.csv")
    check(r"org/data has no column 'body'; it has 'text', 'sentence', 'other'", "org/data", column="body")
    (tmp_path / "a.txt").write_text(" \n\n")
    check("There is no text in .*a.txt", tmp_path / "a.txt")
    check("`column` is 'x', but the text", tmp_path / "a.txt", ConfigurationError, column="x")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ["y"]}')
    check("Row 1 of .*a.jsonl is a list, not a text", tmp_path / "a.jsonl")
    check("`split` is 'test', but the text", tmp_path / "a.jsonl", ConfigurationError, split="test")
    check("no column 'body'; it has 'text'", tmp_path / "a.jsonl", column="body")
    (tmp_path / "empty.jsonl").write_text("")
    check("There is no text in .*empty.jsonl: it has no rows", tmp_path / "empty.jsonl")
    saved = datasets.DatasetDict(valid=datasets.Dataset.from_dict({"text": ["x"]}))
    saved.save_to_disk(tmp_path / "saved")
    check("has no split 'test'; it has 'valid'", tmp_path / "saved")


def test_a_misspelt_name_lists_the_names():
    with pytest.raises(TextError, match=r"Texts that have a name here are sample, wikitext2, ptb, c4; .*'wikitxt2'"):
        load_text("wikitxt2")


def test_read_text(tmp_path):
    (tmp_path / "a.txt").write_text(" \n = T = \n \n Body . \n", encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == "\n\n".join(["", " = T = \n", "", " Body . \n"])
    (tmp_path / "a.jsonl").write_text('{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n', encoding="utf-8")
    assert read_text(tmp_path / "a.jsonl") == "one\n\ntwo"
    with pytest.raises(TextError, match="There is no file"):
        read_text(tmp_path / "b.txt")
