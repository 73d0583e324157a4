"""The Trainer is found, logs through it reach everyone, and its card keeps the section."""

from training_setup import make_callback, make_trainer, quick_picture  # noqa: F401
from transformers import TrainerCallback

from hf_structprune.recovery import callback as module
from hf_structprune.recovery.callback import _with_section, calling_trainer, keep_in_card


class Finder(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.deeper()

    def on_step_end(self, args, state, control, **kwargs):
        self.deeper()

    def deeper(self):
        self.found.append(calling_trainer(self))


def test_finds_the_trainer_that_calls(tmp_path):
    finder, other = Finder(), Finder()
    trainer = make_trainer(tmp_path, finder, max_steps=1)
    make_trainer(tmp_path, other)
    trainer.train()
    assert [found[0] for found in finder.found] == [trainer, trainer]
    assert calling_trainer(other) == (None, None)


def test_a_trainer_of_another_callback_is_not_taken(tmp_path):
    finder = Finder()

    class Outer(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            finder.deeper()

    make_trainer(tmp_path, Outer(), max_steps=1).train()
    assert finder.found == [(None, None)]


def test_without_a_trainer_the_report_has_the_curve(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "calling_trainer", lambda callback: (None, None))
    callback = make_callback()
    trainer = make_trainer(tmp_path, callback, max_steps=4)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert caplog.text.count("was not found") == 1
    assert [point["step"] for point in callback.report["curve"]["points"]] == [1, 2, 3, 4]
    assert not any("recovery/perplexity" in logs for logs in trainer.state.log_history)


def section(share):
    return f"<!-- recovery -->\n\n## Recovery\n\n{share} back\n\n<!-- end -->"


def test_section():
    card = "---\nlicense: mit\n---\n\n# A model\n"
    once = _with_section(card, section("10 %"))
    assert once == f"{card}\n{section('10 %')}\n"
    assert _with_section(once + "\nbehind\n", section("20 %")) == f"{card}\n{section('20 %')}\n\nbehind\n"


def test_card_of_a_trainer(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    shares = iter(["10 %", "20 %"])
    for _ in range(2):  # a second training must not wrap the first one's wrapper
        keep_in_card(trainer, lambda: section(next(shares)))
    trainer.train()
    for expected in ("10 %", "20 %"):
        trainer.create_model_card(model_name="tiny")
        card = (tmp_path / "README.md").read_text()
        assert card.startswith("---") and card.count("## Recovery") == 1 and f"{expected} back" in card


def test_card_that_is_pushed(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1, hub_model_id="someone/tiny")
    keep_in_card(trainer, lambda: section("10 %"))
    trainer.train()
    pushed = {}

    class Api:
        def upload_folder(self, folder_path, **kwargs):
            pushed["card"] = (tmp_path / "README.md").read_text()

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    monkeypatch.setattr(trainer, "init_hf_repo", lambda **kwargs: None)
    trainer.hub_model_id = "someone/tiny"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nan old card\n")
    trainer.push_to_hub()
    assert "10 % back" in pushed["card"] and "an old card" not in pushed["card"]
