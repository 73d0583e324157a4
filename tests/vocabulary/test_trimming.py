"""Tokenizers with fewer tokens: every string decodes as before, and what lost no token is split as before."""

import json
import random

import pytest
from kinds_of_tokenizers import BYTES, MAKERS, SPECIAL, TEMPLATE, strings, tokenizer_of, wrapped
from tiny_tokenizers import build_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer

from hf_structprune.errors import ConfigurationError, UnsupportedModelError
from hf_structprune.vocabulary.tokenizers import must_stay, named_ids, renumbered, trimmed_tokenizer, vocabulary_of
from hf_structprune.vocabulary.trimming import Vocabulary, template_texts


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _round_trip(tokenizer, text):
    return tokenizer.decode(_ids(tokenizer, text), clean_up_tokenization_spaces=False)


def _kept(tokenizer, share, seed=0):
    """A random choice: of all tokens that may go, this share stays, and more than it in their closure."""
    vocabulary = vocabulary_of(tokenizer)
    numbers = list(vocabulary.tokens)
    random.Random(seed).shuffle(numbers)
    least = len(vocabulary.closure(vocabulary.fixed | must_stay(tokenizer)))
    keep = least + round(share * (len(numbers) - least))
    return vocabulary.choose(numbers, keep, must_stay(tokenizer)), keep


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("kind", MAKERS)
def test_every_string_decodes_as_before_and_is_split_as_before_where_no_token_went(kind, share, tmp_path):
    dense = tokenizer_of(kind)
    kept, keep = _kept(dense, share)
    assert len(kept) == keep < len(dense)
    small, order = trimmed_tokenizer(dense, kept)
    assert len(small) == keep and sorted(order) == kept
    new, same, other = {old: number for number, old in enumerate(order)}, 0, 0
    for text in strings(400):
        before, after = _ids(dense, text), _ids(small, text)
        assert _round_trip(small, text) == _round_trip(dense, text)
        if new.keys() >= set(before):
            same += len(before) > 3
            assert after == [new[number] for number in before], text
        other += len(after) != len(before)
    assert other > 10 and (same > 20 or share < 0.5)
    small.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [_ids(again, text) for text in strings(40)] == [_ids(small, text) for text in strings(40)]
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.mark.parametrize("kind", MAKERS)
def test_ten_thousand_strings_decode_as_before(kind):
    dense = tokenizer_of(kind)
    small, _ = trimmed_tokenizer(dense, _kept(dense, 0.2)[0])
    texts = list(strings(10_000))
    decoded = []
    for one in (dense, small):
        ids = one(texts, add_special_tokens=False)["input_ids"]
        decoded.append(one.batch_decode(ids, clean_up_tokenization_spaces=False))
    assert len({*texts}) > 9_000 and decoded[0] == decoded[1]


@pytest.mark.parametrize("kind", MAKERS)
def test_what_must_stay_stays_and_keeps_its_meaning(kind):
    dense = tokenizer_of(kind)
    small, order = trimmed_tokenizer(dense, _kept(dense, 0.0)[0])
    tokens = dense.convert_ids_to_tokens(order)
    assert {*SPECIAL} <= set(tokens) and small.convert_ids_to_tokens(range(len(small))) == tokens
    for name in ("bos_token", "eos_token", "unk_token"):
        assert getattr(small, name) == getattr(dense, name)
        assert getattr(small, f"{name}_id") == tokens.index(getattr(dense, name))
    for text in ("<s>", "Sincerely"):  # of the template
        assert dense.convert_ids_to_tokens(_ids(dense, text)) == small.convert_ids_to_tokens(_ids(small, text))
    chat = [{"role": "user", "content": ""}]
    ids = [one.apply_chat_template(chat, tokenize=True, return_dict=False) for one in (dense, small)]
    assert [order[number] for number in ids[1]] == ids[0]
    around = [one("")["input_ids"] for one in (dense, small)]  # what the post-processor adds
    assert [order[number] for number in around[1]] == around[0]
    assert around[0] == {"byte_level": [1, 2], "ignore_merges": [1, 2]}.get(kind, [1, 2] * (len(around[0]) == 2))
    if kind in ("byte_level", "ignore_merges"):
        assert {*pre_tokenizers.ByteLevel.alphabet(), "  ", "[added]"} <= set(tokens)
    if kind in ("byte_fallback", "unigram_bytes"):
        characters = {token for token in dense.get_vocab() if len(token) == 1}
        ascii_ = {token for token in characters if token.isascii()}
        # A byte in the place of a digit makes no text longer, and nobody has taught the model what it means.
        assert {*BYTES, "▁", *ascii_} <= set(tokens) and {*"qzZ"} & ascii_
        assert not (characters - ascii_ - {"▁"}) & {*tokens}


def test_the_parents_of_a_token_are_those_that_the_merges_make_of_it_alone():
    """The two before the last merge, by the library itself, which is given one merge fewer each time."""
    vocabulary = vocabulary_of(tokenizer_of("byte_fallback"))
    model = vocabulary.state["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    ways = [token for token in {a + b for a, b in merges} if sum(a + b == token for a, b in merges) > 1]
    assert len(ways) > 100
    for token in sorted(ways)[::7]:
        others = [merge for merge in merges if "".join(merge) != token]
        without = models.BPE(vocab=model["vocab"], merges=others, byte_fallback=True, unk_token="<unk>")
        parts = [part.value for part in without.tokenize(token)]
        number = next(iter(vocabulary.ids_of(token)))
        expected = [vocabulary.tokens[one] for one in vocabulary.parents.get(number, ())]
        assert parts == expected or (not expected and tuple(parts) not in merges)


def test_a_token_goes_alone_but_never_what_another_is_made_from():
    dense = tokenizer_of("byte_level")
    vocabulary = vocabulary_of(dense)
    child, (left, right) = max(vocabulary.parents.items())
    assert {child, left, right} <= vocabulary.closure([child])
    inner = next(pair for pair in vocabulary.parents.values() if set(pair) & vocabulary.parents.keys())
    gone = next(iter(set(inner) & vocabulary.parents.keys()))
    with pytest.raises(ValueError, match="have to stay"):
        vocabulary.trimmed(vocabulary.tokens.keys() - {gone})
    small, _ = trimmed_tokenizer(dense, vocabulary.tokens.keys() - {child})
    assert len(small) == len(dense) - 1


def test_padding_and_post_processors_are_renumbered():
    tokenizer = wrapped(MAKERS["unigram"]())
    tokenizer.backend_tokenizer.enable_padding(pad_id=2, pad_token="</s>")
    vocabulary = vocabulary_of(tokenizer)
    state, order = vocabulary.trimmed(vocabulary.fixed)
    assert state["padding"]["pad_id"] == order.index(2)
    assert state["post_processor"]["sep"] == ["</s>", order.index(2)]
    assert state["model"]["unk_id"] == order.index(vocabulary.state["model"]["unk_id"])
    scores = [score for _, score in vocabulary.state["model"]["vocab"]]
    assert min(scores) == min(score for _, score in state["model"]["vocab"])


@pytest.mark.parametrize("cls", [LlamaTokenizer, GPT2Tokenizer])
def test_classes_that_build_their_own_tokenizer(cls, tmp_path):
    """They take vocabulary and merges from the file, and the rest from their code."""
    wrapped(MAKERS["byte_fallback" if cls is LlamaTokenizer else "byte_level"]()).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls.__name__}))
    dense = AutoTokenizer.from_pretrained(tmp_path)
    assert type(dense) is cls
    small, order = trimmed_tokenizer(dense, _kept(dense, 0.5)[0])
    assert type(small) is cls and len(small) == len(order) < len(dense)
    for text in strings(100):
        assert _round_trip(small, text) == _round_trip(dense, text)


def test_ids_in_configurations():
    new = {1: 0, 2: 1, 5: 2, 7: 3}
    values = dict(
        bos_token_id=1, eos_token_id=[2, 5, 6], pad_token_id=-1, sep_token_id=6, decoder_start_token_id=None,
        vocab_size=8, suppress_tokens=[5, 7], begin_suppress_tokens=[1], forced_eos_token_id=2,
        bad_words_ids=[[5, 7], [1]], forced_decoder_ids=[[1, 5]], sequence_bias=[[[5, 7], -1.5]], boi_token_index=7,
    )  # fmt: skip
    assert renumbered(values, new) == dict(
        bos_token_id=0, eos_token_id=[1, 2], pad_token_id=-1, sep_token_id=None, suppress_tokens=[2, 3],
        begin_suppress_tokens=[0], forced_eos_token_id=1, bad_words_ids=[[2, 3], [0]], forced_decoder_ids=[[1, 2]],
        sequence_bias=[[[2, 3], -1.5]], boi_token_index=3,
    )  # fmt: skip
    assert named_ids(values) == {1, 2, 5, 6, 7}


def test_texts_of_templates():
    texts = template_texts(TEMPLATE)
    assert {"<s>", "role", "\n", "Sincerely"} <= set(texts) and not any("{" in text for text in texts)


def test_what_cannot_be_trimmed_is_refused():
    with pytest.raises(UnsupportedModelError, match="WordLevel"):
        vocabulary_of(build_tokenizer())
    with pytest.raises(ConfigurationError, match="there is none"):
        vocabulary_of(None)
    with pytest.raises(UnsupportedModelError, match="no tokenizer.json"):
        vocabulary_of(object())


def test_ids_of_tokens_at_the_end_move_in_padding_and_around_texts():
    tokenizer = MAKERS["byte_level"]()
    number = tokenizer.token_to_id("[added]")
    tokenizer.enable_padding(pad_id=number, pad_token="[added]")
    for around in (
        processors.TemplateProcessing(single="$A [added]", special_tokens=[("[added]", number)]),
        processors.BertProcessing(("[added]", number), ("<s>", 1)),
    ):
        tokenizer.post_processor = around
        vocabulary = vocabulary_of(wrapped(tokenizer))
        state, order = vocabulary.trimmed(vocabulary.fixed)
        small, new = Tokenizer.from_str(json.dumps(state)), order.index(number)
        assert new < number and small.encode("a").ids[-1] == new == state["padding"]["pad_id"]


def test_spaces_and_the_lowest_score_stay_without_a_template():
    vocabulary = vocabulary_of(wrapped(MAKERS["byte_fallback"]()))
    assert vocabulary.ids_of("▁") <= vocabulary.fixed
    state = vocabulary_of(wrapped(MAKERS["unigram"]())).state
    lowest = next(number for number, (token, _) in enumerate(state["model"]["vocab"]) if token.isalpha() and token[3:])
    state["model"]["vocab"][lowest][1] = -99.0
    assert lowest in Vocabulary(state).fixed
