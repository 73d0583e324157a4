"""Tokenizers with fewer tokens: every string decodes as before, and what lost no token is split as before."""

import json
import random
from functools import cache

import pytest
from tiny_tokenizers import build_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from hf_structprune.data import calibration_sample
from hf_structprune.errors import ConfigurationError, UnsupportedModelError
from hf_structprune.vocabulary.tokenizers import must_stay, named_ids, renumbered, trimmed_tokenizer, vocabulary_of
from hf_structprune.vocabulary.trimming import template_texts


SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEXTS = [json.loads(line)["text"][:4000] for line in calibration_sample().read_text().splitlines()[:24]]
FOREIGN = ["Größe, naïve café ½ ²", "東京タワー и немного русского", "🙂🙂 e\u0301 \u200b\ufeff", "a\n\n\tb  c   d"]
TEMPLATE = "{% for m in messages %}{{ '<s>' + m['role'] + \"\\n\" + m.content }}{% endfor %}Sincerely{# none #}"


def _wrapped(tokenizer, cls=PreTrainedTokenizerFast, **options):
    return cls(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **options)


def _trained(model, trainer, normalizer=None, split=None, decoder=None):
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if split is not None:
        tokenizer.pre_tokenizer = split
    tokenizer.train_from_iterator(TEXTS + FOREIGN[:1] * 3, trainer)
    return tokenizer


def _changed(tokenizer, change):
    state = json.loads(tokenizer.to_str())
    change(state)
    return Tokenizer.from_str(json.dumps(state))


def _trainer(size=1000, **options):
    return trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False, **options)


def _bytes(ignore=False):
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = _trainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer = _trained(models.BPE(ignore_merges=ignore), trainer, split=split, decoder=decoders.ByteLevel())
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]),
        ]
    )
    tokenizer.add_tokens(["  ", "[added]"])
    return tokenizer


def _fallback():
    """As converters write Llama 2's: of all ways to make a token, each is a merge."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    trainer = _trainer(limit_alphabet=70)
    options = {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    split = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = _trained(models.BPE(**options), trainer, normalizer, split, decoders.Sequence(steps))

    def change(state):
        model = state["model"]
        words = [*SPECIAL, *BYTES, *(token for token in model["vocab"] if token not in SPECIAL)]
        vocab = {token: number for number, token in enumerate(words)}
        ways = [(t, t[:i], t[i:]) for t in words if t not in SPECIAL + BYTES for i in range(1, len(t))]
        model["merges"] = [[a, b] for t, a, b in ways if a in vocab and b in vocab]
        model["vocab"], state["pre_tokenizer"] = vocab, None
        state["post_processor"] = None

    return _changed(tokenizer, change)


def _unigram(fallback=False):
    special = SPECIAL + (BYTES if fallback else [])
    trainer = trainers.UnigramTrainer(
        vocab_size=900 + len(special), special_tokens=special, unk_token="<unk>", show_progress=False
    )
    steps = [decoders.ByteFallback(), decoders.Metaspace()] if fallback else [decoders.Metaspace()]
    tokenizer = _trained(models.Unigram(), trainer, None, pre_tokenizers.Metaspace(), decoders.Sequence(steps))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))

    def change(state):
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
        state["model"]["byte_fallback"] = fallback

    return _changed(tokenizer, change)


def _wordpiece():
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False)
    model, split = models.WordPiece(unk_token="<unk>"), pre_tokenizers.BertPreTokenizer()
    tokenizer = _trained(model, trainer, normalizers.NFC(), split, decoders.WordPiece())
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return tokenizer


def _suffix():
    """Words end in `</w>`, as those of the first GPT."""
    trainer = _trainer(end_of_word_suffix="</w>")
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return _trained(model, trainer, None, pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder("</w>"))


MAKERS = {
    "byte_level": _bytes,
    "ignore_merges": lambda: _bytes(ignore=True),
    "byte_fallback": _fallback,
    "unigram": _unigram,
    "unigram_bytes": lambda: _unigram(fallback=True),
    "wordpiece": _wordpiece,
    "suffix": _suffix,
}


@cache
def _tokenizer(kind):
    return _wrapped(MAKERS[kind](), chat_template=TEMPLATE)


def _strings(count, seed=0):
    """Text, changed text, and random characters of all planes."""
    rng = random.Random(seed)
    for _ in range(count):
        text = rng.choice(TEXTS)
        start = rng.randrange(len(text))
        text = text[start : start + rng.randrange(1, 60)]
        for _ in range(rng.choice((0, 0, 1, 3))):
            place = rng.randrange(len(text) + 1)
            points = rng.choice(((32, 127), (0, 0x250), (0x400, 0x500), (0x4E00, 0x9FFF), (0x1F300, 0x1F700)))
            more = rng.choice((chr(rng.randrange(*points)), " ", "[added]", "</s>", "\n", rng.choice(FOREIGN)))
            text = text[:place] + more + text[place:]
        yield text


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
    dense = _tokenizer(kind)
    kept, keep = _kept(dense, share)
    assert len(kept) == keep < len(dense)
    small, order = trimmed_tokenizer(dense, kept)
    assert len(small) == keep and sorted(order) == kept
    new, same, other = {old: number for number, old in enumerate(order)}, 0, 0
    for text in _strings(400):
        before, after = _ids(dense, text), _ids(small, text)
        assert _round_trip(small, text) == _round_trip(dense, text)
        if new.keys() >= set(before):
            same += len(before) > 3
            assert after == [new[number] for number in before], text
        other += len(after) != len(before)
    assert other > 10 and (same > 20 or share < 0.5)
    small.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [_ids(again, text) for text in _strings(40)] == [_ids(small, text) for text in _strings(40)]
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_must_stay_stays_and_keeps_its_meaning(kind):
    dense = _tokenizer(kind)
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
        assert {*BYTES, "▁"} <= set(tokens) and not {"q", "z", "Z"} & set(tokens) - {*"Sincerelysu"}


def test_the_parents_of_a_token_are_those_that_the_merges_make_of_it_alone():
    """The two before the last merge, by the library itself, which is given one merge fewer each time."""
    vocabulary = vocabulary_of(_tokenizer("byte_fallback"))
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
    dense = _tokenizer("byte_level")
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
    tokenizer = _wrapped(_unigram())
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
    _wrapped(MAKERS["byte_fallback" if cls is LlamaTokenizer else "byte_level"]()).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls.__name__}))
    dense = AutoTokenizer.from_pretrained(tmp_path)
    assert type(dense) is cls
    small, order = trimmed_tokenizer(dense, _kept(dense, 0.5)[0])
    assert type(small) is cls and len(small) == len(order) < len(dense)
    for text in _strings(100):
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
