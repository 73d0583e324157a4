"""Metadata that cannot be read, the texts of people, and what licences ask."""

import pytest

from hf_structprune.errors import HubError
from hf_structprune.hub import validate_card
from hf_structprune.hub.card import is_ours, read_sections, section
from hf_structprune.hub.origin import attribution


def test_metadata_that_cannot_be_read(tmp_path):
    for metadata, words in (
        ("a: [", "while parsing"), ("- a", "should be a dict"), ("model-index: [{results: []}]", "metadata"),
    ):  # fmt: skip
        (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# A card\n")
        with pytest.raises(HubError, match=f"README.md is not valid: (?s:.*){words}"):
            validate_card(tmp_path / "README.md")


@pytest.mark.parametrize("text", ["", "one line", "  indented\n\n<!-- a comment -->\n| a | b |\n"])
def test_hand_text_comes_back(text):
    card = f"before\n{section('notes', {'notes': text})}\nafter"
    assert is_ours(card) and read_sections(card) == {"notes": text}
    assert not is_ours("# A card\n<!-- your text -->")


@pytest.mark.parametrize(
    "metadata, name, words",
    [
        ({"license": "llama2"}, "me/small", ["Llama 2 is licensed under the LLAMA 2 Community License"]),
        ({"license": "llama3"}, "me/Llama-3-small", ["Built with Meta Llama 3", 'begins with "Llama 3".']),
        ({"license": "other", "license_name": "llama-3.1-community"}, "me/x", ["Built with Llama", "rename this one"]),
        ({"license": "gemma"}, "me/x", ["ai.google.dev/gemma/terms"]),
    ],
)
def test_attribution(metadata, name, words):
    text = " ".join(attribution(metadata, name))
    assert all(word in text for word in words)


def test_no_attribution_where_none_is_known():
    assert attribution({"license": "apache-2.0"}, "me/x") == [] == attribution({}, "me/x")
