"""Tokenizers of every kind that can be trimmed, trained on the packaged text, and strings to try them on."""

import json
import random
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_structprune.data import calibration_sample


SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEXTS = [json.loads(line)["text"][:4000] for line in calibration_sample().read_text().splitlines()[:24]]
FOREIGN = ["Größe, naïve café ½ ²", "東京タワー и немного русского", "🙂🙂 e\u0301 \u200b\ufeff", "a\n\n\tb  c   d"]
TEMPLATE = "{% for m in messages %}{{ '<s>' + m['role'] + \"\\n\" + m.content }}{% endfor %}Sincerely{# none #}"


def wrapped(tokenizer, cls=PreTrainedTokenizerFast, **options):
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
def tokenizer_of(kind):
    return wrapped(MAKERS[kind](), chat_template=TEMPLATE)


def strings(count, seed=0):
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
