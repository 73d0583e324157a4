"""The vocabulary of a GGUF file: tokens, merges, special tokens and chat template of a Transformers tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from ..errors import ExportError


if TYPE_CHECKING:
    from gguf import GGUFWriter

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
# Ways to split text before byte-pair encoding, and whether whole words of the vocabulary skip the merges: the name of
# the same in llama.cpp. `byte-level` is the expression built into the tokenizers library.
_SPLITS = {
    (("byte-level",), False): "gpt-2",
    (("digits", "byte-level"), False): "smollm",
    ((rf"{_CONTRACTIONS}|{_LETTERS}{{1,3}}{_TAIL}",), True): "llama-bpe",
    ((rf"{_CONTRACTIONS}|{_LETTERS}{{1,3}}{_TAIL}",), False): "smaug-bpe",
    ((rf"{_CONTRACTIONS}|{_LETTERS}{_TAIL}",), False): "qwen2",
    (
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        True,
    ): "tekken",
}  # fmt: skip
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}


def write_vocabulary(writer: GGUFWriter, tokenizer: Any, config: PreTrainedConfig) -> list[str]:
    """Writes the vocabulary.

    Args:
        writer: The file.
        tokenizer: A fast tokenizer: byte-level BPE (Llama 3, Qwen, SmolLM, Mistral Nemo), or BPE with byte fallback
            as SentencePiece has it (Llama 2, Mistral).
        config: Configuration of the model, for the number of rows of its embedding.

    Returns:
        What llama.cpp does otherwise, in words.

    Raises:
        ExportError: llama.cpp has no tokenizer that gives the same tokens.
    """
    description = _describe(tokenizer)
    kind, split = _kind_of(description)
    tokens, types = _tokens(tokenizer, description, config.vocab_size)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = _merges(description)
    if kind == "llama":
        writer.add_token_scores(_scores(tokens, types, merges))
        first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False)[:1])
        writer.add_add_space_prefix(first[0].startswith(_SPACE))
    else:
        writer.add_token_merges([" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in merges])
    _write_special(writer, tokenizer)
    normalises = "NFC" in json.dumps(description["normalizer"])
    return ["Text is not normalised to NFC by llama.cpp, as this tokenizer does it."] if normalises else []


def _describe(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{type(tokenizer).__name__} is no fast tokenizer; llama.cpp's vocabulary is made from one.")
    return json.loads(backend.to_str())


def _kind_of(description: dict[str, Any]) -> tuple[str, str]:
    """Kind of tokenizer and kind of splitting, by llama.cpp's names."""
    model, normalizer = description["model"], description["normalizer"]
    if model["type"] != "BPE":
        raise ExportError(f"The tokenizer is a {model['type']} model; what can be written as GGUF is BPE.")
    steps = {step["type"] for step in _sequence(normalizer, "normalizers")}
    splits = _splitting(description["pre_tokenizer"])
    if model.get("byte_fallback") and steps <= {"Prepend", "Replace"} and splits in ((), ("unknown Metaspace",)):
        return "llama", "default"
    key = (splits, bool(model.get("ignore_merges")))
    if model.get("byte_fallback") or key not in _SPLITS or not steps <= {"NFC"}:
        raise ExportError(
            f"llama.cpp has no tokenizer like this one, whose text is normalised by {json.dumps(normalizer)} and "
            f"split by {json.dumps(description['pre_tokenizer'])}; known are {', '.join(_SPLITS.values())}, and "
            "SentencePiece's BPE."
        )
    return "gpt2", _SPLITS[key]


def _splitting(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The steps that split text, in words of `_SPLITS`; what is not understood gives a step that is not there."""
    steps = []
    for step in _sequence(pre_tokenizer, "pretokenizers"):
        kind = step["type"]
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            steps += ["byte-level"] if step["use_regex"] else []
        elif kind == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(step["pattern"].get("Regex", "?"))
        else:
            steps.append(f"unknown {kind}")
    return tuple(steps)


def _sequence(description: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    return [] if description is None else description.get(name, [description])


def _tokens(tokenizer: Any, description: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token and its type; rows of the embedding without a token get one that is never used."""
    from gguf import TokenType

    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(texts) >= size:
        raise ExportError(
            f"The tokenizer has a token {max(texts)}, but the embedding only {size} rows; resize the embedding."
        )
    added = {token["id"]: token["special"] for token in description["added_tokens"]}
    fallback = bool(description["model"].get("byte_fallback"))
    tokens, types = [], []
    for number in range(size):
        text = texts.get(number, f"[PAD{number}]")
        if number not in texts:
            kind = TokenType.UNUSED
        elif fallback and text == description["model"].get("unk_token"):
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number] else TokenType.USER_DEFINED
            text = text.replace(_SPACE, " ") if fallback and not added[number] else text
        elif fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _merges(description: dict[str, Any]) -> list[list[str]]:
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in description["model"]["merges"]]


def _scores(tokens: list[str], types: list[int], merges: list[list[str]]) -> list[float]:
    """SentencePiece's scores: of two possible merges the one whose result has the higher score comes first."""
    from gguf import TokenType

    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    lowest = len(ranks)  # single characters, which no merge gives
    return [
        float(-ranks.get(token, lowest)) if kind == int(TokenType.NORMAL) else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def _write_special(writer: GGUFWriter, tokenizer: Any) -> None:
    """Special tokens, which of them are put around a text, and the chat template."""
    for name, attribute in _SPECIAL.items():
        number = getattr(tokenizer, attribute)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    bare, full = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    around = (full[:start], full[start + len(bare) :])
    known = ([tokenizer.bos_token_id], [tokenizer.eos_token_id])
    if any(tokens and tokens != token for tokens, token in zip(around, known, strict=True)):
        raise ExportError(
            f"The tokenizer puts {tokenizer.convert_ids_to_tokens(around[0] + around[1])} around a text; llama.cpp "
            "puts the tokens for begin and end only."
        )
    writer.add_add_bos_token(bool(around[0]))
    writer.add_add_eos_token(bool(around[1]))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
