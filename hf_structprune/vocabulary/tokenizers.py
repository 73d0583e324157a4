"""Tokenizers of Transformers with fewer tokens, and the ids in configurations that follow."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, UnsupportedModelError
from .trimming import Vocabulary, template_texts


_TOKENIZER_FILE = "tokenizer.json"
# Keys of configurations that hold ids: in lists, in lists of lists, as the last of pairs, as the first of pairs.
_SUFFIXES = ("_token_id", "_token_ids", "_token_index")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_WORDS = ("bad_words_ids", "force_words_ids")
_LAST, _FIRST = ("forced_decoder_ids",), ("sequence_bias",)
_CHATS = (
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}],
)


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Raises:
        ConfigurationError: There is no tokenizer.
        UnsupportedModelError: It has no `tokenizer.json`, or is of a type that cannot be trimmed.
    """
    if tokenizer is None:
        raise ConfigurationError(
            "Which tokens go is decided with the tokenizer, and there is none: give it, "
            "`StructuredPruner(model, config, tokenizer=...)`."
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} is not of the library `tokenizers` (no tokenizer.json), and cannot be "
            "trimmed. If there is a fast tokenizer for this model, load that one."
        )
    return Vocabulary(json.loads(backend.to_str()))


def must_stay(tokenizer: Any, *configurations: Any) -> set[int]:
    """Ids of special tokens, of those that the chat template writes, and of those that configurations name."""
    stay = set(tokenizer.all_special_ids)
    for text in _template_texts(tokenizer):
        stay.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    for configuration in configurations:
        stay.update(named_ids(configuration.to_dict()) if configuration is not None else ())
    return stay


def _template_texts(tokenizer: Any) -> Iterator[str]:
    """What a tokenizer's chat templates write: in whole chats, and each of their texts alone."""
    templates = getattr(tokenizer, "chat_template", None) or {}
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        yield from template_texts(template)
        for chat in _CHATS:
            for prompt in (False, True):
                try:
                    yield tokenizer.apply_chat_template(
                        chat, chat_template=template, tokenize=False, add_generation_prompt=prompt
                    )
                except Exception:  # noqa: S112, BLE001, a template is a program that need not take every chat
                    continue


def named_ids(values: Mapping[str, Any]) -> set[int]:
    """Ids of tokens that a configuration names."""
    found: set[int] = set()

    class _Seen(dict):
        def get(self, key: int, default: Any = None) -> int:
            found.add(key)
            return key

    renumbered(values, _Seen())
    return found


def renumbered(values: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Those values of a configuration that hold ids of tokens, with the new ids.

    An id without a token (of a row that only fills up the embedding) is left out of lists, and `None` alone; negative
    ones, which stand for none, stay.

    Args:
        values: Of a model's or of a generation configuration.
        new: New ids by old ones.
    """
    result = {}
    for key, value in values.items():
        if value is None or isinstance(value, bool):
            continue
        if key.endswith(_SUFFIXES) or key in _LISTS:
            result[key] = _mapped(value, new)
        elif key in _WORDS:
            result[key] = [_mapped(word, new) for word in value]
        elif key in _LAST:
            result[key] = [[*rest, _mapped(last, new)] for *rest, last in value]
        elif key in _FIRST and isinstance(value, (list, tuple)):
            result[key] = [[_mapped(word, new), *rest] for word, *rest in value]
        elif key in _FIRST:
            result[key] = {tuple(_mapped(list(word), new)): bias for word, bias in value.items()}
    return result


def _mapped(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, (list, tuple)):
        inner = [_mapped(one, new) for one in value]
        return [one for one in inner if one is not None] or None
    return value if not isinstance(value, int) or value < 0 else new.get(value)


def trimmed_tokenizer(
    tokenizer: Any, kept: Collection[int], vocabulary: Vocabulary | None = None
) -> tuple[Any, list[int]]:
    """The tokenizer with these tokens alone, as it is loaded from the folder that it is saved in.

    Args:
        kept: Ids, see `Vocabulary.trimmed`.
        vocabulary: Of the tokenizer, if it has been read already.

    Returns:
        The new tokenizer of the same class, and the old ids in the order of the new ones.

    Raises:
        UnsupportedModelError: The class makes another tokenizer of its files.
    """
    state, order = (vocabulary or vocabulary_of(tokenizer)).trimmed(kept)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path, config = Path(folder, _TOKENIZER_FILE), Path(folder, "tokenizer_config.json")
        for file in Path(folder).iterdir():  # of the dense vocabulary: *.model, vocab.json, merges.txt, ...
            if file not in (path, config) and file.suffix in (".json", ".model", ".txt", ".tiktoken"):
                file.unlink()
        path.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        values = json.loads(config.read_text(encoding="utf-8"))
        values.pop("added_tokens_decoder", None)  # Transformers takes them from the other file
        config.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        result = type(tokenizer).from_pretrained(folder)
    _check(tokenizer, result, order)
    result.name_or_path = tokenizer.name_or_path
    return result, order


def _check(dense: Any, small: Any, order: list[int]) -> None:
    """Refuses a tokenizer that gives its tokens other ids than it should, or other parts around them."""
    wanted = {token: number for number, token in enumerate(dense.convert_ids_to_tokens(order))}
    parts = [json.loads(one.backend_tokenizer.to_str()) for one in (dense, small)]
    differs = next((k for k in ("normalizer", "pre_tokenizer", "decoder") if parts[0][k] != parts[1][k]), None)
    if small.get_vocab() != wanted or differs:
        raise UnsupportedModelError(
            f"{type(dense).__name__} makes another tokenizer of the files of the trimmed one"
            f"{f' ({differs} differs)' if differs else ''}. Load it as a `PreTrainedTokenizerFast` and give that."
        )
