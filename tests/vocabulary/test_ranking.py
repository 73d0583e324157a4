"""The order in which tokens leave: whichever are kept, text gets less longer than by how frequent each token is."""

import json
from collections import Counter

import pytest
from kinds_of_tokenizers import TEXTS, tokenizer_of
from tokenizers import Tokenizer, models

from hf_structprune.vocabulary.ranking import least_longer
from hf_structprune.vocabulary.tokenizers import trimmed_tokenizer, vocabulary_of
from hf_structprune.vocabulary.trimming import Vocabulary


def _length(tokenizer):
    return sum(map(len, tokenizer(TEXTS, add_special_tokens=False)["input_ids"]))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram", "wordpiece"])
def test_text_gets_less_longer_than_by_frequency(kind):
    dense = tokenizer_of(kind)
    vocabulary = vocabulary_of(dense)
    counts = Counter(number for ids in dense(TEXTS, add_special_tokens=False)["input_ids"] for number in ids)
    shares = {number: counts[number] + 1e-3 for number in vocabulary.tokens}
    ranked = least_longer(vocabulary, shares, vocabulary.fixed)
    assert sorted(ranked) == [*vocabulary.tokens] and set(ranked[: len(vocabulary.fixed)]) == vocabulary.fixed
    frequent, lengths = sorted(shares, key=lambda number: -shares[number]), []
    for share in (0.3, 0.6, 0.8):
        keep = len(vocabulary.fixed) + round(share * (len(ranked) - len(vocabulary.fixed)))
        kept = sorted(ranked[:keep])
        assert vocabulary.closure(kept) == set(kept) and vocabulary.choose(ranked, keep) == kept
        both = (kept, vocabulary.choose(frequent, keep))
        lengths.append([_length(trimmed_tokenizer(dense, ids)[0]) for ids in both])
    assert all(new <= old for new, old in lengths) and sum(n for n, _ in lengths) < sum(o for _, o in lengths)


def test_what_spells_a_token_that_left_is_needed_as_often():
    letters, made = "abcd", [("a", "b"), ("c", "d"), ("ab", "c"), ("ab", "cd")]
    tokens = [*letters, *(left + right for left, right in made)]
    model = models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=made)
    vocabulary = Vocabulary(json.loads(Tokenizer(model).to_str()))
    shares = dict(enumerate([9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 4.0, 2.5]))
    # abcd leaves first (2.5, of two pieces): ab is needed 3.5 and cd 4.5 times. ab cannot go before abc, and cd can:
    # abc leaves with 4; then ab is needed 7.5 times and cd leaves with 4.5.
    assert [tokens[number] for number in least_longer(vocabulary, shares, vocabulary.fixed)] == [
        *letters, "ab", "cd", "abc", "abcd",
    ]  # fmt: skip
