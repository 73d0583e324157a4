import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation.perplexity import encode


TEXTS = ["two words", " \n = Title = \n\n one\ttwo  three \n", "café 東京 😀 x", "x", " ", "a  b", "😀"]


def byte_tokenizer():
    """Merges of bytes, with whitespace in front of the words: several tokens in one character, as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["two words and three words"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_tokenizer():
    """Words only: no token covers the whitespace."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
def test_the_whole_text_has_the_words_and_bytes_of_lm_eval(text, make_tokenizer):
    for tokenizer in (byte_tokenizer(), make_tokenizer(bos=True), word_tokenizer()):
        encoded = encode(tokenizer, text, None, True)
        if not encoded.ids:
            continue
        assert encoded.words[0] == encoded.bytes[0] == 0
        assert encoded.words[-1] == len(re.split(r"\s+", text))
        assert encoded.bytes[-1] == len(text.encode())
        assert (np.diff(encoded.words) >= 0).all() and (np.diff(encoded.bytes) >= 0).all()


def test_words_and_bytes_of_single_tokens(make_tokenizer):
    encoded = encode(make_tokenizer(bos=True), "ab é\n c", None, True)
    assert encoded.ids[0] == 1 and encoded.bos == 1
    assert np.diff(encoded.words).tolist() == [0, 0, 1, 0, 1, 0, 0, 1]  # at `b`, `é` and `c`
    assert np.diff(encoded.bytes).tolist() == [0, 1, 1, 1, 2, 1, 1, 1]


def test_a_character_of_several_tokens_belongs_to_the_first():
    encoded = encode(byte_tokenizer(), "😀 x", None, True)
    assert len(encoded.ids) == 6
    assert np.diff(encoded.bytes).tolist() == [4, 0, 0, 0, 1, 1]
    assert np.diff(encoded.words).tolist() == [1, 0, 0, 0, 0, 1]


def test_what_no_token_covers_goes_to_the_next_token_or_the_last():
    encoded = encode(word_tokenizer(), " one  two ", None, True)
    assert np.diff(encoded.bytes).tolist() == [4, 6]
    assert np.diff(encoded.words).tolist() == [2, 2]  # `re.split` finds an empty word at both ends


def test_bos(make_tokenizer):
    with_bos, without = make_tokenizer(bos=True), make_tokenizer()
    ids = without("xy")["input_ids"]

    def pair(tokenizer, bos, everywhere):
        encoded = encode(tokenizer, "xy", bos, everywhere)
        return encoded.ids, encoded.bos

    for everywhere in (True, False):
        assert pair(with_bos, None, everywhere) == ([1, *ids], 1)
        assert pair(without, None, everywhere) == (ids, None)
        assert pair(with_bos, False, everywhere) == (ids, None)
    for tokenizer in (with_bos, without):
        assert pair(tokenizer, True, True) == (ids, 1)  # the caller puts it before every window
        assert pair(tokenizer, True, False) == ([1, *ids], 1)
    assert np.diff(encode(without, "xy", True, False).bytes).tolist() == [0, 1, 1]


def test_no_bos_token(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    assert encode(tokenizer, "x", None, True).bos is None
    with pytest.raises(ConfigurationError, match="`bos` is True, but the tokenizer has no"):
        encode(tokenizer, "x", True, True)


def test_a_tokenizer_without_offsets_has_no_words(tiny_tokenizer):
    class Slow:
        bos_token_id, is_fast = 1, False

        def __call__(self, text, *, return_offsets_mapping, **options):
            assert not return_offsets_mapping
            return tiny_tokenizer(text, **options)

    encoded = encode(Slow(), "one two", True, False)
    assert encoded.ids == [1, *tiny_tokenizer("one two")["input_ids"]]
    assert encoded.words is None and encoded.bytes is None


def test_no_text(tiny_tokenizer):
    assert encode(tiny_tokenizer, "", None, True).ids == []
