"""Calibration text: `CalibrationConfig` says which, `load_tokens` makes full token sequences of one length of it.

Rows with images, for models that see, are in `images`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from ..checks import Count, Limits, Number, check_fields, check_keys
from ..data import calibration_sample, chat_sample, code_sample
from ..errors import CalibrationError, ConfigurationError, TextError
from .formats import Documents
from .reading import beginning_of, column_of, read_objects, read_rows, token_ids


if TYPE_CHECKING:
    import torch

_COLUMN = "text"  # where there is none, rows may be in other formats
CHARACTERS_PER_TOKEN = 64  # that are tokenised of a source with far more text than needed, for each needed token
# In the place of the function of the same name; the day is that of Llama 3.1's template where it knows no other.
_SAME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"  # templates drop the break after a tag
PACKAGED = "packaged"  # names the packaged sample beside other sources
OF_QUESTIONS = 4  # every so many sequences one is of the model's own questions, where it is asked for some
PEEK_ROWS = 1000  # looked at to tell lines of one text from documents
# No text has more tokens: a character has four bytes at most; a row gets some special tokens or a separator.
_TOKENS_PER_CHARACTER, _SEPARATORS = 8, 16
_FIRST_WORD = re.compile(r"^\S{0,1000}\s")


def digest_of(value: Any) -> str:
    """A short name for rows in memory that depends on their text and pixels alone."""
    sha = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict):
            for key in sorted(part):
                sha.update(f"\0{key}\0".encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            for one in part:
                add(one)
        else:
            sha.update(part.tobytes() if hasattr(part, "tobytes") else f"\0{part}".encode())

    add(value)
    return sha.hexdigest()[:16]


@dataclass
class CalibrationConfig:
    """Which text the statistics are computed on. The default is a small sample that travels with the package.

    Args:
        dataset (`str` or list of `str`, *optional*):
            A `.txt`, `.jsonl` or `.json` file, a folder made by `datasets.save_to_disk` or a dataset id of the Hub. A
            list mixes several sources in equal shares, interleaved. `None` is the packaged sample (half Wikipedia
            articles, half web pages; English); every sixteenth sequence is of code, and with a chat template every
            fourth of chats. In a list it is `"packaged"` (an eighth of its sequences are of code then), and takes the
            place of what the others have too little text for.
        name (`str`, *optional*): Configuration name of a Hub dataset, for example `"wikitext-2-raw-v1"`.
        split (`str`): Split of a dataset.
        column (`str`): Column of a dataset or key of a JSONL row; a text, or chat messages with `chat_template`. Where
            there is no column `text`, rows may be in any format that `recover` trains on: `messages`, `prompt` and
            `completion`, instructions, questions with answers; the chat template writes their chats.
        texts (list of `str`, *optional*): Texts given in memory instead of a dataset; with `image_column` a list of
            rows such as `{"text": "...", "images": [...]}`, or a `datasets.Dataset`.
        tokens (`torch.Tensor`, *optional*): Token ids of shape `(num_samples, length)` given in memory.
        image_column (`str`, *optional*): Column of the picture, or list of pictures, of a row: a model that sees is
            then calibrated on what its decoder gets of text and pictures, each of `num_samples` rows a sequence of
            its own length. Chat messages may hold their pictures themselves. Paths are relative to the file.
        num_samples (`int`): Number of sequences.
        length (`int`): Tokens in a sequence. Sequences are full: no padding is ever calibrated on.
        batch_size (`int`): Sequences that go through the model at once.
        seed (`int`): Seed of the draw of documents.
        chat_template (`bool`): Render rows that are lists of chat messages (or plain texts, as one user turn) with
            the tokenizer's chat template.
        dense_questions (`int`): So many short questions, in English, that the model makes up and answers before
            anything is cut are every fourth sequence: as lists and, where there is a chat template, as chats, half of
            them each. Pruned by them a model keeps more of its answers, for a little of its perplexity. About a
            minute for 200 questions of a small model on a processor core; they are kept for the next time. A model
            that makes up none is calibrated on the rest alone.
    """

    dataset: str | list[str] | None = None
    name: str | None = None
    split: str = "train"
    column: str = "text"
    texts: list[Any] | None = None
    tokens: Any = None
    image_column: str | None = None
    num_samples: Count = 256
    length: Annotated[int, Limits(2)] = 256
    batch_size: Count = 8
    seed: Number = 0
    chat_template: bool = False
    dense_questions: Number = 0
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):
            raise ConfigurationError("`texts` is one string; it must be a list of strings. Use `dataset` for a file.")
        table = self.texts if self.image_column is not None and hasattr(self.texts, "column_names") else None
        self.texts = None if table is not None else self.texts
        check_fields(self)
        self.texts = self.texts if table is None else table  # pictures of a `datasets.Dataset` are decoded when asked
        given = [n for n in ("dataset", "texts", "tokens") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigurationError(f"`{given[0]}` and `{given[1]}` both give calibration data; give one of them.")
        if self.image_column is not None and self.tokens is not None:
            raise ConfigurationError("`tokens` and `image_column` are both given; token ids hold no pictures.")
        beside = [name for name in ("image_column", "tokens") if getattr(self, name) is not None]
        if self.dense_questions and beside:
            raise ConfigurationError(
                f"`{beside[0]}` and `dense_questions` are both given; questions go beside text alone. Leave one out."
            )
        if self.image_column is not None and self.texts is not None:
            self.fingerprint = getattr(self.texts, "_fingerprint", None) or digest_of(self.texts)
        elif self.texts is not None:
            self.fingerprint = hashlib.sha256("\0".join(map(str, self.texts)).encode()).hexdigest()[:16]
        if self.tokens is not None:
            if getattr(self.tokens, "ndim", None) != 2 or self.tokens.dtype.is_floating_point:
                raise ConfigurationError("`tokens` must be an integer tensor of shape (num_samples, length).")
            self.num_samples, self.length = self.tokens.shape
            self.fingerprint = hashlib.sha256(self.tokens.cpu().numpy().tobytes()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Values that fit in JSON; data given in memory is represented by its `fingerprint` only."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "texts": None, "tokens": None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CalibrationConfig:
        check_keys(cls, values)
        return cls(**values)


def load_tokens(config: CalibrationConfig, tokenizer: Any, questions: Sequence[Any] | None = None) -> torch.LongTensor:
    """Token ids to calibrate on, of shape `(num_samples, length)`: the same ones for the same config and data.

    Documents are joined by the tokenizer's end-of-sequence token, or by two line breaks if the model is a chat model
    (has a chat template), where that token ends a turn; lines of one running text (a `.txt` file, or rows as WikiText
    has them) by two line breaks. The result is cut into full sequences without padding, and one is drawn in each of
    `num_samples` equal stretches of it; with several datasets, sequence `i` is of dataset `i % len(datasets)`. What
    the tokenizer puts before every text (a beginning-of-sequence token) also begins every sequence, as one of its
    tokens: models lean on it, and some are lost without (of 256 tokens of WikiText-2 without it, Gemma-3-270M has 4.5
    times the perplexity).

    The tokenizer may be `None` when `config.tokens` is given. `questions` are what `config.dense_questions` asks for.

    Raises:
        CalibrationError: The data cannot be found or read, is not text, or is too little.
    """
    import torch

    if config.tokens is not None:
        return config.tokens.long()
    check_given(config)
    if config.image_column is not None:
        raise CalibrationError(
            "`image_column` is given: rows with pictures calibrate the pruning of models that see, and nothing else. "
            "Leave it out to use the text alone."
        )
    if tokenizer is None:
        raise CalibrationError("Calibration text needs a tokenizer and there is none: give one, or give `tokens`.")
    if config.dense_questions and questions is None:
        raise CalibrationError(
            f"`dense_questions` is {config.dense_questions}, but no dense model is here to make them up: they are for "
            "pruning. Leave it out."
        )
    try:
        return torch.from_numpy(_all_tokens(config, tokenizer, questions or ())).long()
    except CalibrationError:
        raise
    except TextError as error:  # also from the middle of a file
        raise CalibrationError(str(error)) from error


def packaged_chats(tokenizer: Any) -> Sequence[list[dict[str, str]]]:
    """Chats for a model with a chat template that can write them; none for others."""
    if not getattr(tokenizer, "chat_template", None):
        return ()
    rows = read_rows(chat_sample(), column="messages")
    try:
        rendered("A packaged chat", rows[0], tokenizer, "")
    except CalibrationError as error:
        from transformers.utils import logging

        logger = logging.get_logger(__name__)
        logger.warning(f"{error}. There are no chats in the packaged text, then: give chats of your own as `dataset`.")
        return ()
    return rows


def check_given(config: CalibrationConfig) -> None:
    """Raises `CalibrationError` if the data was in memory when the configuration was saved, and is not here."""
    if config.fingerprint is not None and config.texts is None and config.dataset is None:
        raise CalibrationError(
            "The calibration data was given in memory and is not part of a saved configuration "
            f"(fingerprint {config.fingerprint}): give `texts`, `tokens` or `dataset` again."
        )


def respelled(tokens: torch.LongTensor, dense: Any, small: Any) -> torch.LongTensor:
    """Tokens of one tokenizer as another one spells their text, in sequences of the same length.

    Sequences are joined first; there may be some more or fewer of them afterwards.

    Raises:
        CalibrationError: Not one full sequence comes out.
    """
    import torch

    texts = dense.batch_decode(without_beginning(tokens, dense), clean_up_tokenization_spaces=False)
    rows = small(texts, add_special_tokens=False, verbose=False)["input_ids"]
    begins, length = beginning_of(small), tokens.shape[1]
    begins = begins if _begin_with(tokens, beginning_of(dense)) else []
    ids, step = np.fromiter(chain.from_iterable(rows), np.int32), length - len(begins)
    if len(ids) < step:
        raise CalibrationError(f"The calibration tokens are {len(ids)} after tokens went: fewer than one sequence.")
    return torch.from_numpy(_sequences(ids, np.arange(len(ids) // step) * step, length, begins)).long()


def without_beginning(tokens: torch.LongTensor, tokenizer: Any) -> torch.LongTensor:
    """Sequences without the special tokens that begin every one, if they all begin with them."""
    begins = beginning_of(tokenizer)
    return tokens[:, len(begins) :] if _begin_with(tokens, begins) else tokens


def _begin_with(tokens: torch.LongTensor, begins: list[int]) -> bool:
    return bool((tokens[:, : len(begins)] == tokens.new_tensor(begins)).all())


def _sequences(ids: np.ndarray, starts: np.ndarray, length: int, begins: list[int]) -> np.ndarray:
    """Sequences of so many tokens from `starts` on, behind those that are to begin each, if they do not already."""
    first, sequences = np.array(begins, ids.dtype), []
    for start in starts:
        row = ids[start : start + length]
        begun = len(row) == length and (row[: len(first)] == first).all()
        sequences.append(row if begun else np.concatenate([first, row[: length - len(first)]]))
    return np.stack(sequences)


def check_token_ids(tokens: torch.LongTensor, vocab_size: int) -> None:
    """Raises `CalibrationError` if an id has no row in an embedding of `vocab_size` rows."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(
            f"The calibration tokens have ids from {low} to {high}, but the model's vocabulary has {vocab_size} "
            f"entries (0 to {vocab_size - 1}): were they made with the tokenizer of another model?"
        )


def open_documents(source: str, config: CalibrationConfig, has_chats: bool) -> Sequence[Any]:
    """The texts or chats of a dataset: of its column, or of rows in a format that is known.

    Args:
        source: A file, a folder or the id of a dataset.
        config: Names the rest.
        has_chats: Whether there is a chat template.

    Raises:
        TextError: There is no such source, or it cannot be read.
    """
    if source.endswith(".txt"):
        return read_rows(source)
    rows = read_objects(source, name=config.name, split=config.split)
    if config.column == _COLUMN and len(rows) and _COLUMN not in rows[0]:
        try:
            return Documents(rows, source, has_chats)
        except TextError as error:
            raise TextError(f"{error} Or say by `column` which of them has the text.") from error
    return column_of(rows, config.column, source)


@dataclass(frozen=True, eq=False)
class _Source:
    """Rows, those of a dataset read only when asked for.

    Attributes:
        name: For messages.
        rows: Texts, or chats.
        chats: Whether the chat template writes them.
        turns: Whether texts are chats, too, with one turn of the user.
        packaged: Whether it takes the place of what others have too little text for.
    """

    name: str
    rows: Sequence[Any]
    chats: bool
    turns: bool = False
    packaged: bool = False


def _all_tokens(config: CalibrationConfig, tokenizer: Any, questions: Sequence[Any]) -> np.ndarray:
    """Sequences of all sources in turns, shape `(num_samples, length)`."""
    turns = _turns(config, tokenizer, questions)
    count = {source: 0 for source in turns}
    for i, source in enumerate(turns):
        count[source] += len(range(i, config.num_samples, len(turns)))
    packaged = [source for source in turns if source.packaged]
    others = [source for source in count if count[source] and not source.packaged]
    found, missing = {}, 0
    for source in others:
        found[source] = _source_tokens(source, count[source], config, tokenizer, fewer=bool(packaged))
        missing += count[source] - len(found[source])
    for i, source in enumerate(packaged):
        count[source] += len(range(i, missing, len(packaged)))
    found |= {one: _source_tokens(one, count[one], config, tokenizer) for one in dict.fromkeys(packaged) if count[one]}
    # There is text for all: only now is memory set aside.
    tokens, left = np.empty((config.num_samples, config.length), np.int64), []
    places: dict[_Source, list[int]] = {source: [] for source in turns}
    for place in range(config.num_samples):
        places[turns[place % len(turns)]].append(place)
    for source in others:
        own, some = places[source], len(found[source])
        filled = [own[i * len(own) // some] for i in range(some)]
        tokens[filled] = found[source]
        left += sorted({*own} - {*filled})
    for number, place in enumerate(sorted(left)):
        places[packaged[number % len(packaged)]].append(place)
    for source in (one for one in dict.fromkeys(packaged) if count[one]):
        tokens[sorted(places[source])] = found[source]
    return tokens


def _turns(config: CalibrationConfig, tokenizer: Any, questions: Sequence[Any]) -> list[_Source]:
    """What the configuration names, in the order of the sequences, and from the beginning again after the last one.

    Without anything the packaged text, with chats that the tokenizer can write. Every fourth sequence is of questions
    where there are some; chats of them and lists take turns where there are both.
    """
    asked = []
    for chats in (True, False):
        if rows := [row for row in questions if isinstance(row, list) is chats]:
            asked.append(_Source("what the model asks itself", rows, chats))
    others = _named(config, tokenizer, len(asked[:1]))
    if not asked:
        return others
    times = math.lcm(len(others) // math.gcd(len(others), OF_QUESTIONS - 1), len(asked))  # until all begin anew
    turns, further = [], cycle(others)
    for number in range(times):
        turns += [asked[number % len(asked)], *islice(further, OF_QUESTIONS - 1)]
    return turns


def _named(config: CalibrationConfig, tokenizer: Any, beside: int) -> list[_Source]:
    """The same without questions; `beside` so many sources of them there are to be sequences of each."""
    if config.texts is not None:
        return [_Source("`texts`", config.texts, config.chat_template, config.chat_template)]
    datasets = [config.dataset] if isinstance(config.dataset, str) else config.dataset
    datasets = [PACKAGED] if datasets is None else datasets
    if not datasets:
        raise CalibrationError("`dataset` is an empty list: name at least one, or None for the packaged sample.")
    several, room = len(datasets) + beside, config.num_samples - beside * -(-config.num_samples // OF_QUESTIONS)
    if room < len(datasets):
        raise CalibrationError(
            f"`num_samples` is {config.num_samples}, but there are {several} datasets to take a sequence of."
            + (f" (Every {OF_QUESTIONS}th is of its own questions.)" if beside else "")
        )
    has_chats, others = bool(getattr(tokenizer, "chat_template", None)), []
    for one in datasets:
        if one != PACKAGED:
            rows = open_documents(str(one), config, has_chats)
            known = isinstance(rows, Documents)
            chats = rows.are_chats() if known else config.chat_template
            others.append(_Source(str(one), rows, chats, config.chat_template and not known))
    if PACKAGED not in datasets:
        return others
    written, chats = config.chat_template, packaged_chats(tokenizer)
    plain = _Source("the packaged sample", read_rows(calibration_sample()), written, written, packaged=True)
    code = _Source("the packaged code", read_rows(code_sample()), written, written, packaged=True)
    chats = _Source("the packaged chats", chats, True, packaged=True) if chats else plain
    own = [plain, code, plain, chats, plain, plain, plain, chats]
    if not others:  # one sequence in sixteen, as beside another source
        own += [plain, plain, plain, chats, plain, plain, plain, chats]
    return [source for one in own for source in (*others, one)]


def _source_tokens(
    source: _Source, count: int, config: CalibrationConfig, tokenizer: Any, fewer: bool = False
) -> np.ndarray:
    """`count` sequences of one source, shape `(count, config.length)`; as many as there are, if `fewer` will do."""
    name, rows, chats, rng = source.name, source.rows, source.chats, random.Random(config.seed)
    running = not chats and _is_running_text(rows)
    drawn = _draw(rows, count, config.length * CHARACTERS_PER_TOKEN, rng)
    texts = [_as_text(f"Row {index} of {name}", row, source, tokenizer) for index, row in drawn]
    if not any(text.strip() for text in texts):
        raise CalibrationError(f"There is no text in {name}: it has no rows, or all of them are empty.")
    most = sum(map(len, texts)) * _TOKENS_PER_CHARACTER + len(texts) * _SEPARATORS
    if not fewer:
        _check_enough(most, f"at most {most}", name, count, config.length)
    ids = _tokenize(texts, running, chats, tokenizer)
    begins = beginning_of(tokenizer)
    if chats and ids[: len(begins)].tolist() != begins:  # the template begins chats in another way
        begins = []
    step = config.length - len(begins)
    if step < 1:
        raise CalibrationError(
            f"`length` is {config.length}, but the tokenizer begins every text with {len(begins)} tokens: raise it."
        )
    found = len(ids) // step
    if fewer and found < count:
        from transformers.utils import logging

        logging.get_logger(__name__).warning(
            f"{name} has text for {found} of {count} sequences to calibrate on; the others are of the packaged sample."
        )
        count = found
    _check_enough(len(ids), str(len(ids)), name, count, step)
    # One random sequence out of each of `count` equal stretches.
    chosen = [rng.randrange(i * found // count, (i + 1) * found // count) for i in range(count)]
    starts = np.array(chosen, dtype=int) * step
    return _sequences(ids, starts, config.length, begins) if count else np.empty((0, config.length), int)


def _is_running_text(rows: Sequence[Any]) -> bool:
    """Whether rows are lines of one text, as those of WikiText: some are blank, all others end in a line break."""
    blank = set()
    for row in islice(rows, PEEK_ROWS):
        if not isinstance(row, str) or (row.strip() and not row.endswith("\n")):
            return False
        blank.add(not row.strip())
    return len(blank) == 2


def _draw(rows: Sequence[Any], parts: int, characters: int, rng: random.Random) -> list[tuple[int, Any]]:
    """Numbered rows in order: all of them if short, else a run from each of `parts` equal parts of them.

    A run begins at a random row of its part and goes round; what a part has too little of, the next ones may take. The
    runs have `parts * characters` characters in all. A row with more than that is not taken whole, but `characters` of
    it from a random place in each of `parts` equal stretches, beginning with a word if there is one soon.
    """
    drawn, total, wanted, runs = [], 0, parts * characters, min(parts, len(rows))
    for part in range(runs):
        low, high = part * len(rows) // runs, (part + 1) * len(rows) // runs
        start, run = rng.randrange(low, high), []
        for index in chain(range(start, high), range(low, start)):
            if total * runs >= wanted * (part + 1):
                break
            row = rows[index]
            if not isinstance(row, str) or len(row) <= wanted:
                run.append((index, row))
                total += len(str(row))
                continue
            total += wanted
            for number in range(parts):
                first, end = number * len(row) // parts, (number + 1) * len(row) // parts
                begin = first + rng.randrange(max(1, end - first - characters + 1))
                text = row[begin : min(begin + characters, end)]
                run.append((index, _FIRST_WORD.sub("", text, count=1) if begin else text))
        drawn += sorted(run, key=itemgetter(0))
    return drawn


def _as_text(where: str, row: Any, source: _Source, tokenizer: Any) -> str:
    """A row that is text, or chat messages as the tokenizer's template renders them."""
    chats = source.chats
    if isinstance(row, str) and (not source.turns or not row.strip()):
        return row
    chat = [{"role": "user", "content": row}] if isinstance(row, str) else row
    is_chat = (
        isinstance(chat, list) and chat and all(isinstance(m, dict) and {"role", "content"} <= {*m} for m in chat)
    )
    if not (chats and is_chat):
        kinds = "a text or a list of {role, content} messages" if chats else "a text"
        hint = " Set `chat_template=True` to render chat messages." if is_chat else ""
        raise CalibrationError(f"{where} is a {type(row).__name__}, not {kinds}.{hint}")
    return rendered(
        where, chat, tokenizer, "the tokenizer has no chat template: use an instruction-tuned model's tokenizer, set "
        "`tokenizer.chat_template`, or set `chat_template=False`."
    )  # fmt: skip


def rendered(where: str, chat: list[dict[str, Any]], owner: Any, if_none: str) -> str:
    """A chat as text, by the template of its `owner`, a tokenizer or a processor; `if_none` is said if it has none."""
    if not getattr(owner, "chat_template", None):
        raise CalibrationError(f"`chat_template` is True, but {if_none}")
    try:
        return owner.apply_chat_template(chat, tokenize=False, **same_day(owner))
    except Exception as error:  # a template is a program of the model's author and fails as it likes
        raise CalibrationError(f"{where} cannot be rendered by the chat template: {error}") from error


def same_day(owner: Any) -> dict[str, Any]:
    """What lets a chat template that writes the day (Llama 3, SmolLM3) write the same one whenever it runs."""
    found = owner.chat_template
    template = found.get("default") if isinstance(found, dict) else found
    return {"chat_template": f"{_SAME_DAY}{template}"} if "strftime_now" in str(template) else {}


def _tokenize(texts: list[str], running: bool, rendered: bool, tokenizer: Any) -> np.ndarray:
    """Token ids of all texts, shape `(tokens,)`, int32."""
    # The end token of a chat model ends a turn; between documents of plain text it would be a surprise.
    chat = bool(getattr(tokenizer, "chat_template", None)) and not rendered
    eos = None if chat else tokenizer.eos_token_id
    # A line break that comes with a row of running text is part of it, as in WikiText; a blank row is an empty one.
    texts = [text if text.strip() else "" for text in texts if running or text.strip()]
    special = not rendered  # a chat template writes the special tokens itself
    if running or eos is None:
        return token_ids(tokenizer, "\n\n".join(texts), add_special_tokens=special)
    parts = []
    for text in texts:
        ids = token_ids(tokenizer, text, add_special_tokens=special)
        ended = (rendered and text.rstrip().endswith(tokenizer.eos_token)) or ids[-1:].tolist() == [eos]
        parts += [ids] if ended else [ids, np.array([eos], dtype=np.int32)]
    return np.concatenate(parts)


def _check_enough(tokens: int, words: str, name: str, count: int, length: int) -> None:
    found = tokens // length
    if found < count:
        raise CalibrationError(
            f"There are {words} tokens in {name}, but {count} sequences of {length} need {count * length}: "
            f"give more text, lower `num_samples` (there are {found} full sequences here) or lower `length`."
        )
