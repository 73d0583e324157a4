"""Distillation without a data set: what the dense model writes, kept, and the text of the calibration."""

import json
import time

import pytest
import torch


pytest.importorskip("trl")

from hf_structprune import CalibrationConfig, PruningConfig  # noqa: E402
from hf_structprune.config import CONFIG_NAME  # noqa: E402
from hf_structprune.errors import TextError  # noqa: E402
from hf_structprune.recovery import kept_batches, own_text  # noqa: E402
from hf_structprune.recovery.own_text import Writer, calibration_rows, generated_rows  # noqa: E402


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
OPENINGS = ["The quick brown fox jumps over the lazy dog.", "A sentence of another kind."]


@pytest.fixture
def few(monkeypatch, tmp_path):
    monkeypatch.setattr(own_text, "batch_of", lambda *_: 3)
    monkeypatch.setattr(own_text, "OPENING", 4)
    monkeypatch.setattr(own_text, "QUESTION", 6)
    monkeypatch.setattr(kept_batches, "cached_assets_path", lambda *_, subfolder, **__: tmp_path / "cache" / subfolder)
    return tmp_path


def test_what_is_written_is_drawn_from_the_model_and_begins_as_it_should(few, tiny_llama, make_tokenizer):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    writer, before = Writer(tiny_llama, tokenizer, OPENINGS, 24, seed=0), torch.get_rng_state()
    plain, chats = writer.batch(0), writer.batch(1)
    starts = [tokenizer(text)["input_ids"][:4] for text in OPENINGS]
    assert len(plain) == 3 and all(ids[:4] in starts and 4 < len(ids) <= 24 for ids in plain)
    question = tokenizer("user: ", add_special_tokens=False)["input_ids"]
    texts = [tokenizer.decode(ids) for ids in chats]
    assert chats and all("user: " in text and "\nassistant: " in text for text in texts) and question
    assert Writer(tiny_llama, tokenizer, OPENINGS, 24, seed=0).batch(1) == chats  # whatever came before
    other = Writer(tiny_llama, make_tokenizer(), OPENINGS, 24, seed=1)
    assert other.batch(0) != Writer(tiny_llama, make_tokenizer(), OPENINGS, 24, seed=0).batch(1)  # nor moved by one
    assert Writer(tiny_llama, tokenizer, OPENINGS, 24, seed=1).batch(1) != chats
    assert torch.equal(torch.get_rng_state(), before)
    assert Writer(tiny_llama, make_tokenizer(), OPENINGS, 24, seed=0).before is None  # no template, no chats


def test_padding_on_the_left_changes_nothing(few, tiny_llama, make_tokenizer, monkeypatch):
    """Greedily, sequences are gone on from as each alone."""
    writer = Writer(tiny_llama, make_tokenizer(), OPENINGS, 16, seed=0)
    generate = tiny_llama.generate
    monkeypatch.setattr(tiny_llama, "generate", lambda **given: generate(**{**given, "do_sample": False}))
    starts = [[5, 6, 7, 8, 9, 10], [11, 12]]
    with torch.no_grad():
        together = writer._go_on(starts, 16)
        alone = [writer._go_on([start], 16)[0] for start in starts]
    assert together == [one[: len(row)] for one, row in zip(alone, together, strict=True)] and len(together[1]) > 2


def test_writing_stops_when_its_time_is_over(few, tiny_llama, make_tokenizer, monkeypatch):
    """A slow model's first batch would else take all the time that there is to train."""
    writer = Writer(tiny_llama, make_tokenizer(chat_template=TEMPLATE), OPENINGS, 24, seed=0)
    over = time.monotonic() - 1
    cut = writer.batch(0, over)
    assert len(cut) == 3 and all(ids[:-1] in writer.openings for ids in cut)  # an opening, and one token
    assert writer.batch(0, time.monotonic() + 600) == writer.batch(0) and writer.batch(1, over) == []
    given = []
    kept = kept_batches.KeptBatches("kind", tiny_llama, "time")
    kept.fill(lambda number, until: given.append(until - time.monotonic()) or [number], lambda: len(given) < 3, 1000.0)
    assert kept.batches == [[0], [1], [2]] and all(990 < left <= 1000 for left in given)
    late = kept_batches.KeptBatches("kind", tiny_llama, "late")
    late.fill(lambda number, until: given.append(until - time.monotonic()) or [number], lambda: True, 0.0)
    assert late.batches == [[0]] and 20 < given[-1] <= kept_batches.SHORTEST  # one is always begun
    assert not late.cut
    monkeypatch.setattr(kept_batches, "SHORTEST", -1.0)
    rows = generated_rows(tiny_llama, writer.tokenizer, OPENINGS, 10_000, length=24, seed=5, seconds=0)
    assert len(rows) == 3  # what there was time for, and no error
    about = {"length": 24, "seed": 5}
    assert generated_rows(tiny_llama, writer.tokenizer, OPENINGS, 10_000, seconds=0, **about) == rows  # gone on with
    whole = generated_rows(tiny_llama, writer.tokenizer, OPENINGS, 60, **about)  # a training with time: written anew
    fresh = Writer(tiny_llama, writer.tokenizer, OPENINGS, 24, seed=5).batch(0)
    assert [row["text"] for row in whole[:3]] == [own_text._as_text(writer.tokenizer, ids) for ids in fresh]
    assert generated_rows(tiny_llama, writer.tokenizer, OPENINGS, 60, **about) == whole  # and kept


def test_what_was_written_is_kept_and_gone_on_with(few, tiny_llama, make_tokenizer, monkeypatch):
    tokenizer, written = make_tokenizer(chat_template=TEMPLATE), []
    batch = Writer.batch
    monkeypatch.setattr(Writer, "batch", lambda self, n, until: written.append(n) or batch(self, n, until))
    about = {"length": 24, "seed": 0}
    short = generated_rows(tiny_llama, tokenizer, OPENINGS, 10_000, seconds=0, **about)
    assert written == [0]  # one batch in any case
    rows = generated_rows(tiny_llama, tokenizer, OPENINGS, 200, **about)
    assert rows[: len(short)] == short and written == list(range(len(written)))
    count = len(written)
    assert generated_rows(tiny_llama, tokenizer, OPENINGS, 200, **about) == rows and len(written) == count
    generated_rows(tiny_llama, tokenizer, OPENINGS, 10, length=24, seed=1, seconds=0)
    assert written[count:] == [0]  # another seed, another text
    with torch.no_grad():
        tiny_llama.lm_head.weight.add_(1.0)
    generated_rows(tiny_llama, tokenizer, OPENINGS, 10, seconds=0, **about)
    assert written[count:] == [0, 0]  # another model
    ids = [len(tokenizer(row["text"])["input_ids"]) for row in rows]
    assert sum(ids) >= 150


def test_text_of_the_calibration(tmp_path, make_tokenizer, caplog):
    tokenizer = make_tokenizer()
    plain, chats = calibration_rows(None, tokenizer)
    assert len(plain) == 344 and not chats  # of the packaged sample
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": OPENINGS[0] * 9}) + "\n" for _ in range(9)))
    own = CalibrationConfig(dataset=str(tmp_path / "mine.jsonl"), num_samples=4, length=16)
    for calibration, count in ((own, 4), (CalibrationConfig(texts=OPENINGS), 344)):
        PruningConfig(calibration=calibration).save(tmp_path / CONFIG_NAME)
        plain, chats = calibration_rows(tmp_path, tokenizer)
        assert len(plain) == count and not chats
    assert "was in memory" in caplog.text
    tokenizer.chat_template = TEMPLATE
    assert len(calibration_rows(tmp_path, tokenizer)[1]) == 240
    PruningConfig(calibration=own).save(tmp_path / CONFIG_NAME)
    assert not calibration_rows(tmp_path, tokenizer)[1]
    (tmp_path / "mine.jsonl").unlink()
    with pytest.raises(TextError, match="There is no file .*mine.jsonl. Give a `dataset`"):
        calibration_rows(tmp_path, tokenizer)
