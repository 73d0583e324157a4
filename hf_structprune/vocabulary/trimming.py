"""A tokenizer with fewer tokens: pure functions on what `tokenizers` writes as `tokenizer.json`.

Text whose tokens all stay is split as before, and all other text is spelled by what stays:

* BPE: a token stays with the tokens that it is merged from (`Vocabulary.closure`). Where a token ends up in a word, no
  merge has crossed its borders, so that inside of it the merges were those of the token alone: all of them are still
  there, in the same order, and there are no new ones. Merges that make or need a dropped token go: a stale one cannot
  be loaded.
* Unigram: the best of all splits stays the best of those that are left. The token with the lowest score stays, which
  sets the penalty of unknown characters.
* WordPiece: the longest match stays the longest.

What spells the rest stays as well: symbols of one character (with byte-level BPE those are the 256 bytes), or, where
it falls back to bytes, the 256 byte tokens, characters of one byte (text is no longer without a digit's token, but the
model has hardly ever seen its byte) and what the tokenizer writes for a space.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any

from ..errors import UnsupportedModelError


_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
# Processors that put tokens around a text, and those that put none.
_WITHOUT_IDS = ("ByteLevel",)
_WITH_IDS = ("BertProcessing", "RobertaProcessing")


class Vocabulary:
    """The tokens of a tokenizer, and which of them need which.

    Args:
        state: What `Tokenizer.to_str()` gives, read as JSON.

    Attributes:
        tokens: Every token by its id, the added ones too, ascending.

    Raises:
        UnsupportedModelError: The model of the tokenizer is none of BPE, Unigram and WordPiece, or ids are not clear.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.state, self._model = state, state["model"]
        self.kind: str = self._model.get("type") or ""
        if self.kind not in ("BPE", "Unigram", "WordPiece"):
            raise UnsupportedModelError(
                f"A tokenizer of the type {self.kind or 'that its file does not name'} cannot be trimmed: without a "
                "word it could not write the word at all. BPE, Unigram and WordPiece can."
            )
        self._own = self._own_tokens()
        self.tokens = dict(sorted({**self._own, **{t["id"]: t["content"] for t in state["added_tokens"]}}.items()))
        self._ids = {token: number for number, token in self.tokens.items()}
        if len(self._ids) != len(self.tokens):
            raise UnsupportedModelError("Two ids of the tokenizer are the same token, so that neither can go alone.")

    def _own_tokens(self) -> dict[int, str]:
        """Tokens of the model itself by id."""
        vocab = self._model["vocab"]
        if self.kind == "Unigram":
            return {number: token for number, (token, _) in enumerate(vocab)}
        return {number: token for token, number in vocab.items()}

    @property
    def falls_back(self) -> bool:
        """Whether a character without a token is written as bytes."""
        decodes = any(part.get("type") == "ByteFallback" for part in _parts(self.state["decoder"]))
        return bool(self._model.get("byte_fallback")) and decodes and self._ids.keys() >= _BYTES

    @cached_property
    def fixed(self) -> set[int]:
        """Ids of the tokens that no choice can drop, with all that they are made from."""
        stay = {self._ids[token["content"]] for token in self.state["added_tokens"]}
        unknown = self._model.get("unk_id") if self.kind == "Unigram" else self._ids.get(self._model.get("unk_token"))
        stay |= {unknown} - {None} | set(_ids_around(self.state["post_processor"]))
        padding = self.state.get("padding")
        stay |= {padding["pad_id"]} if padding else set()
        if self.kind == "Unigram":
            stay.add(min(self._own, key=lambda number: self._model["vocab"][number][1]))
        return self.closure(stay & self.tokens.keys() | self._spelling())

    def _spelling(self) -> set[int]:
        """Ids of the tokens that write what others no longer do."""
        own = {token: number for number, token in self._own.items()}
        if self.falls_back:
            written = {char for text in _texts(self.state) for char in text}
            return {
                number for token, number in own.items()
                if token in _BYTES or token in written or len(token.encode()) == 1
            }  # fmt: skip
        letters = {token: number for token, number in own.items() if len(self.symbols(token)) == 1}
        # A token of characters that have none of their own stays.
        return {
            number for token, number in own.items() if any(part not in letters for part in self.symbols(token))
        } | {*letters.values()}

    def symbols(self, token: str) -> list[str]:
        """What a token is merged from, or spelled by: characters with the marks of their place in a word."""
        prefix, suffix = (self._model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        inner = bool(prefix) and token.startswith(prefix) and token != prefix
        body = token[len(prefix) :] if inner else token
        last = bool(suffix) and body.endswith(suffix) and body != suffix
        parts = list(body[: -len(suffix)] if last else body)
        parts = [prefix * (inner or number > 0) + part for number, part in enumerate(parts)]
        return [*parts[:-1], parts[-1] + suffix] if last else parts

    @cached_property
    def _merges(self) -> list[tuple[str, str]]:
        merges = self._model.get("merges") or []
        return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]

    def _merged(self, left: str, right: str) -> str:
        return left + right[len(self._model.get("continuing_subword_prefix") or "") :]

    @cached_property
    def parents(self) -> dict[int, tuple[int, int]]:
        """Of every token that merges make the two that it is made of, when it stands alone."""
        pairs: dict[str, list[tuple[str, str]]] = {}
        for merge in self._merges:
            pairs.setdefault(self._merged(*merge), []).append(merge)
        found = {token: self._last_merge(token) if len(ways) > 1 else ways[0] for token, ways in pairs.items()}
        return {self._ids[token]: tuple(map(self._ids.get, pair)) for token, pair in found.items() if pair}

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {merge: rank for rank, merge in enumerate(self._merges)}

    def _merge(self, parts: list[str], least: int) -> list[str]:
        """What merges make of parts, the first ones first, until `least` are left or none fits."""
        parts, never = [*parts], len(self._ranks)
        while len(parts) > least:
            pairs = enumerate(itertools.pairwise(parts))
            rank, place = min((self._ranks.get(pair, never), place) for place, pair in pairs)
            if rank == never:
                break
            parts[place : place + 2] = [self._merged(*parts[place : place + 2])]
        return parts

    def _last_merge(self, token: str) -> tuple[str, str] | None:
        """The merge that makes a token out of two; `None` where merges never make it."""
        pair = tuple(self._merge(self.symbols(token), 2))
        return pair if pair in self._ranks else None

    def spelled(self, token: str) -> list[int]:
        """Ids of the tokens that write what a token of another vocabulary with the same rules does; none: not at all.

        That is how the token stands alone: beside others, the last of these may become one with what follows.
        """
        return [self._ids[token]] if token in self._ids else self._ids_of_parts(token)

    def pieces(self, number: int) -> list[int]:
        """Ids of the tokens that write another one if it alone is not there; none: nothing does."""
        found = list(self.parents.get(number, ())) or self._ids_of_parts(self.tokens[number])
        return [] if number in found else found

    def _ids_of_parts(self, token: str) -> list[int]:
        """Ids of the parts that a token is split into where there is no such token."""
        if self.kind == "BPE":
            parts = self._merge(self.symbols(token), 1)
            if self.falls_back:
                written = ([part] if part in self._ids and part != token else _bytes_of(part) for part in parts)
                parts = [*itertools.chain.from_iterable(written)]
        else:
            parts = self._best_split(token) if self.kind == "Unigram" else self._longest_matches(token)
        return [self._ids[part] for part in parts] if all(part in self._ids for part in parts) else []

    @cached_property
    def _scores(self) -> dict[str, float]:
        return dict(self._model["vocab"])

    @cached_property
    def _worst(self) -> float:
        """The score of a character without a piece, before the library's own penalty."""
        return min(self._scores.values()) - 10

    def _best_split(self, token: str) -> list[str]:
        """The pieces with the highest sum of scores; characters without a piece cost most, and become bytes."""
        scores, worst = self._scores, self._worst
        best: list[tuple[float, list[str]]] = [(0.0, [])]
        for end in range(1, len(token) + 1):
            ways = []
            for start in range(end):
                part, (score, before) = token[start:end], best[start]
                if part in scores and part != token:
                    ways.append((score + scores[part], [*before, part]))
                elif len(part) == 1:
                    ways.append((score + worst, [*before, *(_bytes_of(part) if self.falls_back else [part])]))
            best.append(max(ways, key=lambda way: way[0]))
        return best[-1][1]

    def _longest_matches(self, token: str) -> list[str]:
        prefix, parts, left = self._model.get("continuing_subword_prefix") or "", [], token
        while left:
            ways = (left[:end] for end in range(len(left), 0, -1))
            part = next((way for way in ways if way in self._ids and way != token), left)
            parts, rest = [*parts, part], left[len(part) :]
            left = prefix + rest if rest else ""
        return parts

    def closure(self, kept: Collection[int]) -> set[int]:
        """These tokens and all that they are made from."""
        found, rest = set(kept), list(kept)
        while rest:
            for number in self.parents.get(rest.pop(), ()):
                if number not in found:
                    found.add(number)
                    rest.append(number)
        return found

    def ids_of(self, text: str) -> set[int]:
        """Ids of tokens with exactly this text."""
        return {self._ids[text]} if text in self._ids else set()

    def order(self, number: int) -> float:
        """Where a token is in the tokenizer's own order, the most frequent first: by score, or as it was made."""
        return -self._model["vocab"][number][1] if self.kind == "Unigram" and number in self._own else number

    def choose(self, ranked: Collection[int], keep: int, stay: Collection[int] = ()) -> list[int]:
        """The first tokens of a ranking, with all that they are made from and all that must stay: `keep` in all.

        A token that does not fit with what it is made from is left out, and the next one is looked at.

        Args:
            ranked: All ids, the most useful first.
            keep: How many stay: not fewer than `fixed` with `stay`, and not more than there are.
            stay: What else must stay.

        Returns:
            Their ids, ascending.
        """
        chosen = self.closure({*self.fixed, *stay})
        while len(chosen) < keep:  # what did not fit does, once others have brought what it is made from
            for number in ranked:
                if number not in chosen and len(more := self.closure([number]) - chosen) <= keep - len(chosen):
                    chosen |= more
        return sorted(chosen)

    def trimmed(self, kept: Collection[int]) -> tuple[dict[str, Any], list[int]]:
        """The tokenizer with these tokens alone, in their order, numbered from 0.

        Args:
            kept: Ids, closed (`closure`) and with everything that is `fixed`.

        Returns:
            What `Tokenizer.from_str` reads, as JSON, and the old ids in the order of the new ones.

        Raises:
            ValueError: Something that has to stay, or that a kept token is made from, is not among them.
        """
        kept = set(kept)
        if lacking := (self.fixed | self.closure(kept)) - kept:
            raise ValueError(f"{len(lacking)} tokens have to stay and are not among those kept: {sorted(lacking)[:5]}")
        added = [token["id"] for token in self.state["added_tokens"] if token["id"] not in self._own]
        order = sorted(kept & self._own.keys()) + sorted(added)
        new = {old: number for number, old in enumerate(order)}
        state = {**self.state, "model": self._trimmed_model(new)}
        state["added_tokens"] = sorted(
            ({**token, "id": new[token["id"]]} for token in self.state["added_tokens"]), key=lambda token: token["id"]
        )
        state["post_processor"] = _renumbered(self.state["post_processor"], new)
        if state.get("padding"):
            state["padding"] = {**state["padding"], "pad_id": new[state["padding"]["pad_id"]]}
        return state, order

    def _trimmed_model(self, new: dict[int, int]) -> dict[str, Any]:
        model, vocab = self._model, self._model["vocab"]
        if self.kind == "Unigram":
            unknown = model.get("unk_id")
            pieces = [piece for number, piece in enumerate(vocab) if number in new]
            return {**model, "vocab": pieces, "unk_id": None if unknown is None else new[unknown]}
        words = {token: new[number] for token, number in vocab.items() if number in new}
        words = dict(sorted(words.items(), key=lambda item: item[1]))
        if self.kind == "WordPiece":
            return {**model, "vocab": words}
        merges = [[a, b] for a, b in self._merges if a in words and b in words and self._merged(a, b) in words]
        return {**model, "vocab": words, "merges": merges}


def _bytes_of(text: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text.encode()]


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer, decoder or processor, and those that it is a sequence of."""
    if not isinstance(part, dict):
        return
    yield part
    for name in ("normalizers", "pretokenizers", "decoders", "processors"):
        for inner in part.get(name) or ():
            yield from _parts(inner)


def _texts(state: dict[str, Any]) -> Iterator[str]:
    """What normalizer, pre-tokenizer and decoder write or look for, as `▁` for a space."""
    for part in itertools.chain.from_iterable(map(_parts, map(state.get, ("normalizer", "pre_tokenizer", "decoder")))):
        for name in ("prepend", "content", "pattern", "replacement", "str_rep"):
            value = part.get(name)
            yield from value.values() if isinstance(value, dict) else [value] if isinstance(value, str) else ()


def _ids_around(processor: Any) -> Iterator[int]:
    """Ids of the tokens that a processor puts around a text."""
    for part in _parts(processor):
        kind = part.get("type")
        if kind in _WITH_IDS:
            yield from (part["sep"][1], part["cls"][1])
        elif kind == "TemplateProcessing":
            for special in part["special_tokens"].values():
                yield from special["ids"]
        elif kind not in (*_WITHOUT_IDS, "Sequence"):
            raise UnsupportedModelError(f"The tokenizer's post-processor {kind!r} is not understood.")


def _renumbered(processor: Any, new: dict[int, int]) -> Any:
    """A processor with the new ids of its tokens."""
    processor = copy.deepcopy(processor)
    for part in _parts(processor):
        if part.get("type") in _WITH_IDS:
            for name in ("sep", "cls"):
                part[name] = [part[name][0], new[part[name][1]]]
        for special in part.get("special_tokens", {}).values():
            special["ids"] = [new[number] for number in special["ids"]]
    return processor


_STATEMENT = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
_STRING = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)


def template_texts(template: str) -> list[str]:
    """The texts that a chat template can write: what stands outside of its statements, and in their strings."""
    strings = (one or other for statement in _STATEMENT.findall(template) for one, other in _STRING.findall(statement))
    texts = (text.replace("\\n", "\n") for text in (*_STATEMENT.split(template), *strings))
    return list(dict.fromkeys(filter(None, texts)))
