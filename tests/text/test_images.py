"""Rows of text and images, as files, data sets and lists give them, and what a processor makes of them."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_processors import make_processor, picture

from hf_structprune.config import CalibrationConfig
from hf_structprune.errors import CalibrationError, ConfigurationError
from hf_structprune.text.calibration import load_tokens
from hf_structprune.text.images import load_image_rows


PROCESSOR = make_processor()
IMAGE = PROCESSOR.tokenizer.convert_tokens_to_ids("<image>")


def load(processor=PROCESSOR, **options):
    return load_image_rows(CalibrationConfig(**{"image_column": "images", "num_samples": 2} | options), processor)


def spelled(row):
    """The text of a row, with one `#` for each token of a picture."""
    return "".join("#" if i == IMAGE else PROCESSOR.tokenizer.decode([i]) for i in row["input_ids"][0].tolist())


def shades(row):
    """Which pictures a row has, by their numbers."""
    mean, std = (np.array(getattr(PROCESSOR.image_processor, name)) for name in ("image_mean", "image_std"))
    return [round(float((one[:, 0, 0].numpy() * std + mean).mean() * 25.5)) for one in row.get("pixel_values", [])]


def test_texts_with_placeholders_are_taken_as_they_are():
    rows = [{"text": f"<image>shade {i}", "images": [picture(i)]} for i in (1, 2)]
    found = load(texts=rows)
    assert [spelled(row) for row in found] == ["####shade 1", "####shade 2"]
    assert [shades(row) for row in found] == [[1], [2]]
    single = load(texts=[{"text": "<image>a", "image": picture(3)}, {"text": "none"}], image_column="image")
    assert [shades(row) for row in single] == [[3], []] and spelled(single[1]) == "none"


def test_chats_get_their_pictures_where_they_say_or_first():
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "image", "image": picture(2)}, {"type": "text", "text": "c"}]},
    ]
    plain = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    found = load(
        texts=[{"messages": chat, "images": [picture(1)]}, {"messages": plain, "images": [picture(3), picture(4)]}],
        column="messages", chat_template=True,
    )  # fmt: skip
    assert spelled(found[0]) == "[user]a####[assistant]b[user]####c" and shades(found[0]) == [1, 2]
    assert spelled(found[1]) == "[system]s[user]########u" and shades(found[1]) == [3, 4]
    assert "image" in chat[2]["content"][0]  # what was given is left as it is
    caption = load(texts=[{"text": "u", "images": [picture(1)]}], chat_template=True, num_samples=1)
    assert spelled(caption[0]) == "[user]####u"
    inline = load(
        texts=[{"messages": chat[2:]}], column="messages", image_column="messages", chat_template=True, num_samples=1
    )
    assert shades(inline[0]) == [2]


def test_files_name_pictures_relative_to_themselves(tmp_path, monkeypatch):
    (tmp_path / "shots").mkdir()
    for i in range(1, 5):
        picture(i).save(tmp_path / "shots" / f"{i}.png")
    rows = [{"text": f"<image>{i}", "images": f"shots/{i}.png"} for i in range(1, 5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir("/")
    found = load(dataset=str(tmp_path / "rows.jsonl"), num_samples=4)
    assert [(spelled(row)[4:], shades(row)) for row in found] == [(str(i), [i]) for i in range(1, 5)]
    turned = Image.fromarray(np.tile(np.arange(0, 256, 16, dtype=np.uint8)[:, None, None], (1, 16, 3)))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    rows = [{"text": "<image>", "images": str(tmp_path / "turned.png")}]
    shown = load(texts=rows, num_samples=1)[0]["pixel_values"]
    assert torch.equal(
        shown, load(texts=[{**rows[0], "images": turned.rotate(180)}], num_samples=1)[0]["pixel_values"]
    )
    few = load(dataset=str(tmp_path / "rows.jsonl"))
    assert [shades(row)[0] in part for row, part in zip(few, ((1, 2), (3, 4)), strict=True)] == [True, True]
    both = load(dataset=[str(tmp_path / "rows.jsonl")] * 2, num_samples=4)
    assert [shades(row) for row in both[::2]] == [shades(row) for row in both[1::2]]


def test_datasets_hold_their_pictures(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), images=datasets.List(datasets.Image()))
    rows = {"text": ["<image>a", "<image>b"], "images": [[picture(1)], [picture(2)]]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "table")
    for given in (dict(texts=table), dict(dataset=str(tmp_path / "table"))):
        assert [shades(row) for row in load(**given)] == [[1], [2]]
    undecoded = table.cast_column("images", datasets.List(datasets.Image(decode=False)))
    assert [shades(row) for row in load(texts=undecoded)] == [[1], [2]]


def test_no_path_of_the_hub_is_opened_and_no_address_fetched(tmp_path, monkeypatch):
    picture(1).save(tmp_path / "1.png")
    table = datasets.Dataset.from_dict({"text": ["<image>"], "images": [str(tmp_path / "1.png")]})
    monkeypatch.setattr("hf_structprune.text.reading._load", lambda *args: table)
    with pytest.raises(CalibrationError, match="paths of datasets of the Hub are not opened"):
        load(dataset="some/rows", num_samples=1)
    for address in ("https://example.org/1.png", "file:///etc/passwd", "data:image/png;base64,AA"):
        with pytest.raises(CalibrationError, match="nothing is fetched"):
            load(texts=[{"text": "<image>", "images": address}], num_samples=1)


def test_what_is_wrong_is_named_with_the_row(tmp_path):
    buffer = io.BytesIO()
    picture(1).save(buffer, "png")
    (tmp_path / "half.png").write_bytes(buffer.getvalue()[:60])
    chat = [{"role": "user", "content": [{"type": "image"}]}]
    row = {"text": "<image>a", "images": [picture(1)]}
    for options, message in (
        (dict(texts=[row]), "There are 1 rows in `texts`, and 2 are wanted"),
        (dict(texts=[{"text": "a"}, {"text": "b", "pics": 1}]), "No calibration row has a picture under 'images'"),
        (dict(texts=["a", "b"]), "Row 0 of `texts` has no 'text', which `column` names; it is a str"),
        (dict(texts=[{"messages": chat, "images": [picture(1)]}] * 2), "has no 'text'.*it has 'messages', 'images'"),
        (dict(texts=[{"text": chat, "images": [picture(1)]}] * 2), "Set `chat_template=True`"),
        (dict(texts=[{"text": chat, "images": []}] * 2, chat_template=True), "1 places for pictures and 0 pictures"),
        (dict(texts=[{"text": chat, "images": [picture(1)] * 2}] * 2, chat_template=True), "1 places .* and 2"),
        (dict(texts=[{"text": "a", "images": [picture(1)]}] * 2), "refused by the processor|placeholder"),
        (dict(texts=[{"text": "<image>", "images": str(tmp_path / "half.png")}] * 2), "cannot be read"),
        (dict(texts=[{"text": "<image>", "images": str(tmp_path / "no.png")}] * 2), "cannot be read"),
        (dict(), "no rows with pictures are: the packaged sample is text alone"),
        (dict(dataset=str(tmp_path / "a.txt")), "plain text"),
    ):
        (tmp_path / "a.txt").write_text("a\n")
        with pytest.raises(CalibrationError, match=message):
            load(**options)
    with pytest.raises(CalibrationError, match="no chat template"):
        load(make_processor(None), texts=[row] * 2, chat_template=True)
    with pytest.raises(ConfigurationError, match="token ids hold no pictures"):
        CalibrationConfig(tokens=torch.ones(2, 8, dtype=torch.long), image_column="images")
    with pytest.raises(CalibrationError, match="pruning of models that see"):
        load_tokens(CalibrationConfig(texts=[row], image_column="images"), PROCESSOR.tokenizer)


def test_fingerprints_are_of_pixels_and_text():
    def fingerprint(number, text="a"):
        return CalibrationConfig(
            texts=[{"text": text, "images": [picture(number)]}], image_column="images"
        ).fingerprint

    assert fingerprint(1) == fingerprint(1) and len({fingerprint(1), fingerprint(2), fingerprint(1, "b")}) == 3
    saved = CalibrationConfig(texts=[{"text": "a", "images": [picture(1)]}], image_column="images").to_dict()
    assert json.loads(json.dumps(saved))["texts"] is None and saved["image_column"] == "images"
