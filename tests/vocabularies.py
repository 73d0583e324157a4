"""Small tokenizers of the kinds that llama.cpp knows, trained in memory."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


TEXTS = [
    "the quick brown fox jumps over the lazy dog, and the dog isn't amused",
    "In 2024 there were 12345 foxes; they'll be 1,000,000 by 3001. WE'LL SEE!",
    "def f(x):\n    return x ** 2  # squared\n\n\tprint('done')   \n",
    "Größe, naïve café, 東京タワー и немного русского 🙂🙂 ½ ² ٣",
]
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CASES + (
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How each splits text, and whether words of the vocabulary skip the merges.
SPLITS = {
    "gpt-2": (None, False),
    "smollm": ("digits", False),
    "llama-bpe": (_LLAMA3, True),
    "smaug-bpe": (_LLAMA3, False),
    "qwen2": (_LLAMA3.replace("{1,3}", ""), False),
    "tekken": (_TEKKEN, True),
}


def byte_level(split="gpt-2", size=400, bos=False, **options):
    """Byte-level BPE; `<s>` is 1 and put first if `bos`."""
    pattern, ignore_merges = SPLITS[split]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = {None: [], "digits": [pre_tokenizers.Digits(individual_digits=True)]}.get(
        pattern, [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    )
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, "digits"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    tokenizer.decoder = decoders.ByteLevel()
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return _trained(tokenizer, size, bos, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)


def sentence_piece(size=420, prefix=True, **options):
    """BPE with byte fallback, as converters make it of a SentencePiece model of Llama 2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789▁.,'")
    result = _trained(tokenizer, size, True, more=bytes_, initial_alphabet=letters, limit_alphabet=90, **options)
    # The bytes are tokens of the model, and not special.
    state = json.loads(result.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in bytes_]
    return _wrapped(Tokenizer.from_str(json.dumps(state)), **options)


def _trained(tokenizer, size, bos, more=(), initial_alphabet=(), limit_alphabet=None, **options):
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", *more], initial_alphabet=initial_alphabet,
        show_progress=False, **({"limit_alphabet": limit_alphabet} if limit_alphabet else {}),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(tokenizer, **options)


def _wrapped(tokenizer, **options):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **options
    )
