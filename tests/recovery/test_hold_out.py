"""Rows that are held out are not trained on, are as many as needed, and are watched in the place of other text."""

import json

import pytest
from training_setup import make_tiny, tokenizer

from hf_structprune.recovery import RecoveryConfig, recover
from hf_structprune.recovery.data import load_rows
from hf_structprune.recovery.hold_out import NAME, PART, hold_out


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def texts(count, start=0):
    return [{"text": f"row {i:04d} of the data, which says so in words."} for i in range(start, start + count)]


def in_rows(found):
    return {row for table in found.values() for row in table["text"]}


def parts(text):
    """Of the rows, and of the sample."""
    own, general = text.text.split("\n\n= Robert Boulter = ")
    return own, general


def test_rows_are_trained_on_or_watched():
    rows = load_rows([texts(400), texts(200, 1000)])
    asked = dict(window=32, windows=64, seed=0)
    left, text = hold_out(rows, tokenizer(), **asked)
    held = {row for row in in_rows(rows) if row in text.text}
    assert held and not held & in_rows(left) and in_rows(left) < in_rows(rows)
    assert text.name == NAME and f"{len(in_rows(rows)) - len(in_rows(left))} rows" in text.source
    own, general = (len(tokenizer()(part)["input_ids"]) for part in parts(text))
    half = 32 * 64 / 2
    assert 0.9 * half <= own <= half <= general < 1.3 * half  # what is more is in no window
    first, second = (len(rows[name]) - len(left[name]) for name in rows)
    assert first == pytest.approx(2 * second, abs=2)  # as the rows of both
    assert hold_out(rows, tokenizer(), **asked)[1] == text
    assert hold_out(rows, tokenizer(), **{**asked, "seed": 1})[1] != text
    most = hold_out(rows, tokenizer(), **{**asked, "windows": None})[0]
    assert len(in_rows(rows)) - len(in_rows(most)) == len(in_rows(rows)) // PART


def test_chats_are_watched_as_the_template_writes_them():
    chat = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "It is here."}]
    rows, own = load_rows([{"messages": chat}] * 200), tokenizer()
    own.chat_template = TEMPLATE
    chats = parts(hold_out(rows, own, window=16, windows=16, seed=0)[1])[0].split("\n\n")
    assert len(chats) > 1 and set(chats[:-1]) == {"user: Where is it?\nassistant: It is here."}


def test_a_book_loses_its_end(tmp_path):
    book = " ".join(f"word{i}" for i in range(5000))
    (tmp_path / "book.txt").write_text(book)
    rows = load_rows(str(tmp_path / "book.txt"))
    left, text = hold_out(rows, tokenizer(), window=16, windows=8, seed=0)
    [begun], own = left["book.txt"]["text"], parts(text)[0]
    assert book.startswith(begun) and own and book[len(begun) :].strip().startswith(own)
    assert len(book) - len(begun) < len(book) / PART


@pytest.mark.parametrize("rows", [texts(19), texts(40), [{"messages": [{"role": "user", "content": "x"}]}] * 400])
def test_few_rows_are_all_trained_on(rows):
    """Too few, or chats that no template writes."""
    rows = load_rows(rows)
    left, text = hold_out(rows, tokenizer(), window=256, windows=8, seed=0)
    assert left is rows and text is None


def test_a_training_is_watched_by_its_data(tmp_path):
    pytest.importorskip("trl")
    options = dict(
        window=16, max_windows=8, max_length=32, batch_size=4, micro_batch_size=4, evaluations=1, precision="fp32",
        max_samples=200,
    )  # fmt: skip
    config = RecoveryConfig(**options)
    made = recover(make_tiny(), texts(400), tmp_path / "out", config, tokenizer=tokenizer(), dense=make_tiny())
    about = json.loads((tmp_path / "out" / "recovery.json").read_text())["text"]
    assert about["name"] == NAME and "not trained on" in about["source"] and about["windows"] == 8
    assert made.report["data"]["sources"][0]["rows"] < 200
    for more, dense in (({"text": "sample"}, make_tiny()), ({}, 50.0)):  # 50 is of a text that is known
        made = recover(
            make_tiny(), texts(400), tmp_path / "sample", RecoveryConfig(**options, **more), tokenizer=tokenizer(),
            dense=dense, overwrite=True,
        )  # fmt: skip
        assert made.report["text"]["name"] == "sample" and made.report["data"]["sources"][0]["rows"] == 200
