"""A text in pieces has the tokens of the whole text, whatever the tokenizer and wherever it is cut."""

import itertools

import numpy as np
import pytest
import vocabularies
from tiny_tokenizers import build_tokenizer

from hf_structprune.data import wikitext2_sample
from hf_structprune.text import reading
from hf_structprune.text.reading import token_ids, tokenise


TOKENIZERS = {
    **{name: vocabularies.byte_level(name, bos=name == "llama-bpe") for name in vocabularies.SPLITS},
    "llama 2": vocabularies.sentence_piece(), "no prefix": vocabularies.sentence_piece(prefix=False),
    "characters": build_tokenizer(bos=True),
}  # fmt: skip
WIKI = wikitext2_sample().read_text(encoding="utf-8")[:20_000]
TEXTS = {
    "wikitext": WIKI,
    "mixed": "\n".join(vocabularies.TEXTS) * 20,
    # Nothing to cut at, and runs in which tokens depend on where they begin.
    "odd": "x" * 1501 + " " * 1003 + "\n" * 805 + "ab" * 1007 + "東京タワー" * 300 + "=-" * 700 + "🙂" * 300,
    "short": "two words", "empty": "",
}  # fmt: skip


class Counting:
    """A tokenizer that remembers how much text it was given at once."""

    is_fast = True

    def __init__(self, tokenizer):
        self.tokenizer, self.sizes = tokenizer, []

    def __call__(self, text, **options):
        self.sizes.append(len(text))
        return self.tokenizer(text, **options)


def in_pieces(monkeypatch, piece, overlap):
    monkeypatch.setattr(reading, "PIECE", piece)
    monkeypatch.setattr(reading, "OVERLAP", overlap)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_have_the_tokens_of_the_whole(name, text, special, monkeypatch):
    tokenizer, text = TOKENIZERS[name], TEXTS[text]
    whole = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ends = list(itertools.accumulate((end for _, end in whole["offset_mapping"]), max))
    for piece, overlap in ((1 << 16, 1 << 11), (1500, 400), (300, 120)):
        in_pieces(monkeypatch, piece, overlap)
        parts = list(tokenise(tokenizer, text, add_special_tokens=special))
        assert np.concatenate([part.ids for part in parts]).tolist() == whole["input_ids"]
        assert np.concatenate([part.ends for part in parts]).tolist() == ends


def test_only_a_piece_is_tokenised_at_once(monkeypatch):
    in_pieces(monkeypatch, 1500, 400)
    tokenizer = Counting(TOKENIZERS["smollm"])
    parts = list(tokenise(tokenizer, WIKI))
    assert len(parts) > 10 and max(tokenizer.sizes) <= 2 * 1500 + 400
    assert np.concatenate([part.ids for part in parts]).tolist() == TOKENIZERS["smollm"](WIKI)["input_ids"]
    assert sum(tokenizer.sizes) < 1.5 * len(WIKI)


def test_where_pieces_disagree_they_are_joined(monkeypatch):
    """Of a run of one letter the merges depend on where it begins: it is not cut."""
    tokenizer, text = Counting(TOKENIZERS["smollm"]), "the" * 1001
    in_pieces(monkeypatch, 300, 120)
    ids = np.concatenate([part.ids for part in tokenise(tokenizer, text)])
    assert ids.tolist() == tokenizer.tokenizer(text)["input_ids"]


def test_tokenizers_that_do_not_tell_take_the_text_whole():
    class Slow:
        def __call__(self, text, add_special_tokens, **_):
            return {"input_ids": [int(add_special_tokens), len(text)]}

    (tokens,) = tokenise(Slow(), "abcde")
    assert tokens.ids.tolist() == [1, 5] and tokens.ends is None
    assert token_ids(Slow(), "abc", add_special_tokens=False).tolist() == [0, 3]


def test_ids_are_small():
    assert token_ids(TOKENIZERS["smollm"], WIKI).dtype == np.int32
