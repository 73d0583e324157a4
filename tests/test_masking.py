"""No secret is shown or written: in errors, in the output of commands, in files."""

import logging
import sys
import traceback

import pytest
from transformers import AutoConfig, AutoTokenizer

from hf_structprune.commands import cli
from hf_structprune.errors import CheckpointError, ConfigurationError
from hf_structprune.files.writing import write_text
from hf_structprune.masking import MASK, MaskedStream, is_masked, masked, remember
from hf_structprune.model.loading import load_config, load_tokenizer


TOKEN = "hf_" + "aB3" * 11
GIVEN = "my-own-" + "secret"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"401: token {TOKEN} is wrong", f"401: token {MASK} is wrong"),
        ("{'Authorization': 'Bearer abc123def'}", "{'Authorization': 'Bearer " + MASK + "'}"),
        ("authorization: basic YWxhZGRpbjpvcGVu", f"authorization: basic {MASK}"),
        ("sent with bearer abc.def-123", f"sent with bearer {MASK}"),
        ("https://me:pass@example.org/a", f"https://{MASK}@example.org/a"),
        ("https://a.b/c?x=1&X-Amz-Signature=0123&y=2", f"https://a.b/c?x=1&X-Amz-Signature={MASK}&y=2"),
        ("https://a.b/c?access_token=xyz", f"https://a.b/c?access_token={MASK}"),
    ],
)
def test_what_looks_like_a_secret_is_masked(text, shown):
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "hf_structprune of user@example.org, tokens: 12, https://huggingface.co/a/b?split=train, `keep` is 3",
        "authorization is missing; the bearer of it", '{"max_tokens": 12345678, "path": "/a/b@c"}',
    ],
)  # fmt: skip
def test_what_does_not_stays(text):
    assert masked(text) == text


def test_values_of_secret_variables_are_masked(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse")
    monkeypatch.setenv("HF_TOKEN", "own-token-of-mine")
    assert masked("correct-horse, own-token-of-mine") == f"{MASK}, {MASK}"
    for name, value in (
        ("SOME_KEY", "short"), ("MY_TOKEN", "1234567890"), ("CREDENTIALS", str(tmp_path)), ("KEYBOARD", "some-layout"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
        assert masked(f"it says {value}") == f"it says {value}"


def test_a_token_that_was_given_is_masked(monkeypatch):
    monkeypatch.setattr("hf_structprune.masking._given", set())
    remember(None), remember(True), remember("given-as-argument\n")
    assert masked("True given-as-argument") == f"True {MASK}"


def test_a_token_that_a_server_echoes_is_not_repeated(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(f"401 Client Error: the token {GIVEN} is wrong. Authorization: Bearer {TOKEN}")

    monkeypatch.setattr("hf_structprune.masking._given", set())
    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(CheckpointError, match="401 Client Error") as error:
        load_config("me/model", token=GIVEN)
    shown = "".join(traceback.format_exception(error.value))
    assert TOKEN not in shown and GIVEN not in shown and MASK in shown
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("hf_structprune.model.loading")
    logger.addHandler(handler)
    try:
        assert load_tokenizer("me/model", token=GIVEN) is None
    finally:
        logger.removeHandler(handler)
    assert MASK in records[0].getMessage() and GIVEN not in records[0].getMessage()


def test_causes_are_looked_at():
    try:
        try:
            raise OSError(TOKEN)
        except OSError as inner:
            raise ValueError("harmless") from inner
    except ValueError as error:
        assert not is_masked(error) and is_masked(error.__cause__.__class__("harmless"))


def test_a_value_of_a_recipe_from_a_secret_variable(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MY_SECRET", "swordfish-7")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\noutput_dir: o\nprune:\n  ratio: 0.1\n  criterion: ${MY_SECRET}\n")
    assert cli.main(["run", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "swordfish" not in said and f"`criterion` is '{MASK}'" in said


def test_everything_that_a_command_prints_is_masked(monkeypatch, capsys):
    def talk(argv):
        print(f"out {TOKEN}")
        print(f"err {TOKEN}", file=sys.stderr)
        sys.stdout.writelines([f"{TOKEN}\n"])
        logging.getLogger("some.library").addHandler(handler := logging.StreamHandler())
        logging.getLogger("some.library").error(TOKEN)
        logging.getLogger("some.library").removeHandler(handler)
        raise ConfigurationError(f"wrong: {TOKEN}")

    monkeypatch.setattr("hf_structprune.commands.prune.inspect_command", talk)
    assert cli.main(["inspect", "m"]) == 2
    captured = capsys.readouterr()
    assert "hf_a" not in captured.out + captured.err
    assert captured.out == f"out {MASK}\n{MASK}\n" and captured.err.count(MASK) == 3


def test_the_traceback_of_a_bug_is_masked(monkeypatch, capsys):
    def fail(argv):
        raise RuntimeError(TOKEN)

    monkeypatch.setattr("hf_structprune.commands.prune.inspect_command", fail)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(RuntimeError) as error:
        cli.main(["inspect", "m"])
    sys.excepthook(error.type, error.value, error.tb)
    said = capsys.readouterr().err
    assert "Traceback" in said and f"RuntimeError: {MASK}" in said and TOKEN not in said


def test_files_hold_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "swordfish-7")
    write_text(tmp_path / "card.md", f"{TOKEN} swordfish-7 ä")
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == f"{MASK} {MASK} ä"


def test_a_masked_stream_is_the_stream_in_everything_else(tmp_path):
    with open(tmp_path / "file", "w") as file:
        stream = MaskedStream(file)
        assert stream.write(TOKEN) == len(TOKEN) and stream.fileno() == file.fileno() and not stream.isatty()
    assert (tmp_path / "file").read_text() == MASK
