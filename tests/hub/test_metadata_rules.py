"""The rules for metadata that can be checked without the Hub."""

import pytest

from hf_structprune.hub.card import is_ours, read_sections, section
from hf_structprune.hub.metadata import violations
from hf_structprune.hub.origin import attribution


RESULT = {
    "task": {"type": "text-generation"},
    "dataset": {"type": "a/b", "name": "B"},
    "metrics": [{"type": "acc", "value": 0.5}],
}
VALID = {
    "license": "apache-2.0", "language": ["en", "zh-Hant", "code"], "library_name": "transformers", "tags": ["a"],
    "pipeline_tag": "text-generation", "datasets": ["a/b", "squad"], "base_model": "org/model", "own": {"field": 1},
    "base_model_relation": "finetune", "model-index": [{"name": "m", "results": [RESULT]}],
}  # fmt: skip


def test_valid():
    assert violations(VALID) == [] and violations({}) == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"license": "Apache 2.0"}, "`license` is 'Apache 2.0'"),
        ({"license": "other"}, "`license_name` and `license_link`"),
        ({"language": "English"}, "`language` is 'English'"),
        ({"language": [False]}, "`language` is [False]; it must be text"),  # YAML reads `no` so
        ({"datasets": ["a/b/c"]}, "`datasets` is 'a/b/c'; it must be an id of the Hub"),
        ({"base_model": "../model"}, "`base_model` is '../model'; it must be an id of the Hub"),
        ({"base_model_relation": "pruned"}, "`base_model_relation` is 'pruned'"),
        ({"tags": [1]}, "`tags` is [1]; it must be text"),
        ({"pipeline_tag": "Text Generation"}, "`pipeline_tag` is 'Text Generation'"),
        ({"library_name": ["transformers"]}, "`library_name` is ['transformers']; it must be text"),
        ({"model-index": {"name": "m"}}, "`model-index` cannot be read"),
        ({"model-index": [{"results": []}]}, "`model-index` cannot be read: KeyError('name')"),
        ({"model-index": [{"name": "m", "results": [{**RESULT, "dataset": {"type": "b"}}]}]}, "KeyError('name')"),
        ({"model-index": [{"name": "m", "results": [{**RESULT, "metrics": [{"type": "a"}]}]}]}, "KeyError('value')"),
    ],
)
def test_violations(change, words):
    (found,) = violations({**VALID, **change})
    assert words in found


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
