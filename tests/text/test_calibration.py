import json
import tracemalloc

import datasets
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from hf_structprune.config import CalibrationConfig
from hf_structprune.data import calibration_sample, chat_sample, code_sample, wikitext2_sample
from hf_structprune.errors import CalibrationError, ConfigurationError
from hf_structprune.text import calibration, reading
from hf_structprune.text.calibration import check_token_ids, load_tokens, rendered, respelled, without_beginning
from hf_structprune.text.formats import ALPACA
from hf_structprune.text.reading import beginning_of, read_lines


CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"


def words(count, start=0):
    return [f"document {i:05d} says hello." for i in range(start, start + count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tokenizer, **options):
    return load_tokens(CalibrationConfig(**{"num_samples": 4, "length": 16} | options), tokenizer)


def load_all(tokenizer, full, **options):
    """Every sequence there is, so that the whole stream can be compared."""
    tokens = load(tokenizer, num_samples=full, **options)
    assert tokens.shape[0] == full and tokens.dtype == torch.long
    return tokens.flatten().tolist()


# ------------------------------------------------------------------------------------------- packaged data


def test_packaged_sample_works_offline_and_alternates():
    rows = [json.loads(line) for line in calibration_sample().read_text(encoding="utf-8").splitlines()]
    assert all(row["text"].strip() for row in rows) and len(rows) == 320
    assert all(row["text"].startswith("= ") for row in rows[::2])  # Wikipedia: an article or section heading
    assert not any(row["text"].startswith("= ") for row in rows[1::2])
    assert wikitext2_sample().read_text(encoding="utf-8").startswith(" \n = Robert Boulter = \n")


def test_default_shape_and_determinism(tiny_tokenizer):
    first = load_tokens(CalibrationConfig(), tiny_tokenizer)
    assert first.shape == (256, 256)
    assert torch.equal(first, load_tokens(CalibrationConfig(), tiny_tokenizer))
    assert not torch.equal(first, load_tokens(CalibrationConfig(seed=1), tiny_tokenizer))
    assert len(torch.unique(first, dim=0)) == 256


def test_packaged_code_is_of_three_languages():
    rows = [json.loads(line)["text"] for line in code_sample().read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 96 == len({*rows}) and all(text.isascii() and 900 < len(text) < 1500 for text in rows)
    assert all("def " in text or "class " in text or "self" in text for text in rows[::2])
    assert not any("Copyright" in text or "http" in text for text in rows)


def test_packaged_chats_are_questions_with_answers():
    rows = [json.loads(line) for line in chat_sample().read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 240 == len({row["messages"][0]["content"] for row in rows})
    assert all([one["role"] for one in row["messages"]] == ["user", "assistant"] for row in rows)
    assert all(one["content"].strip() == one["content"] != "" for row in rows for one in row["messages"])


@pytest.mark.parametrize("count", [3, 64, 254])
def test_every_fourth_packaged_sequence_is_of_chats_where_a_template_writes_them(make_tokenizer, caplog, count):
    """Chats alone hold the end token here: plain texts of a chat model are joined by line breaks."""
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    config = CalibrationConfig(num_samples=count, length=1000)  # more than one message
    tokens = load_tokens(config, tokenizer)
    assert (tokens == 2).any(1).tolist() == [i % 4 == 3 for i in range(count)]
    assert len(torch.unique(tokens, dim=0)) == count
    signs = torch.isin(tokens, torch.tensor(tokenizer("(){}[]=_;")["input_ids"])).sum(1)  # of code there are many
    assert all(signs[i] > 24 for i in range(1, count, 16)) and signs[2::16].float().mean() < 24
    tokenizer.chat_template = "{{ raise_exception('systems only') }}"
    assert not (load_tokens(config, tokenizer) == 2).any() and "systems only" in caplog.text
    assert not (load_tokens(config, make_tokenizer()) == 2).all(1).any()


def test_a_template_that_writes_the_day_gives_the_same_tokens_on_all_days(make_tokenizer):
    chat = [{"role": "user", "content": "Hi"}]
    template = (
        "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- endif %}\n"
        "{{ day }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    assert rendered("", chat, tokenizer, "") == "26 Jul 2024|Hi"
    tokenizer.chat_template = {"default": "\n " + template, "tools": "{{ strftime_now('%d') }}"}
    assert rendered("", chat, tokenizer, "") == "26 Jul 2024|Hi"
    tokenizer.chat_template = "\n {{ messages | length }}" + template
    assert rendered("", chat, tokenizer, "") == "\n 126 Jul 2024|Hi"
    tokenizer.chat_template = template.replace("strftime_now", "other")
    assert rendered("", chat, tokenizer, "") == "|Hi"


# ---------------------------------------------------------------------------------------- joining and cutting


def test_documents_of_a_chat_model_are_joined_by_line_breaks(make_tokenizer):
    tokenizer, texts = make_tokenizer(chat_template=CHAT_TEMPLATE), words(10)
    stream = tokenizer("\n\n".join(texts))["input_ids"]
    full = len(stream) // 16
    assert load_all(tokenizer, full, texts=texts) == stream[: full * 16]


def test_documents_are_joined_by_eos(tiny_tokenizer):
    texts = words(10)
    stream = [i for text in texts for i in [*tiny_tokenizer(text)["input_ids"], 2]]
    full = len(stream) // 16
    assert load_all(tiny_tokenizer, full, texts=texts) == stream[: full * 16]


def test_empty_rows_between_documents_are_dropped(tiny_tokenizer):
    texts = words(10)
    expected = load(tiny_tokenizer, texts=texts)
    assert torch.equal(load(tiny_tokenizer, texts=[" ", *texts[:5], "", *texts[5:]]), expected)


def test_documents_are_joined_by_blank_lines_without_eos(make_tokenizer):
    tokenizer = make_tokenizer(eos=False)
    stream = tokenizer("\n\n".join(words(10)))["input_ids"]
    full = len(stream) // 16
    assert load_all(tokenizer, full, texts=words(10)) == stream[: full * 16]


def test_what_begins_every_text_begins_every_sequence_once(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    stream = [i for text in words(10) for i in [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]]
    full = len(stream) // 15
    starts = range(0, full * 15, 15)
    # A sequence that starts with a document has its token already, and one more of the text instead.
    rows = [stream[s : s + 16] if stream[s] == 1 else [1, *stream[s : s + 15]] for s in starts]
    assert rows[0][0] == 1 and rows[0][1] != 1 and all(row[0] == 1 and row[1] != 1 for row in rows)
    assert load_all(tokenizer, full, texts=words(10)) == sum(rows, [])
    chats = [[{"role": "user", "content": text}] for text in words(10)]
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokens = load(tokenizer, texts=chats, chat_template=True, num_samples=4)
    assert (tokens[:, 0] == 1).all() and (tokens[:, 1] != 1).all()
    with pytest.raises(CalibrationError, match="`length` is 2, but the tokenizer begins every text with 2 tokens"):
        load(with_two(make_tokenizer), texts=words(10), length=2)


def with_two(make_tokenizer):
    """A tokenizer that begins every text with two tokens and ends it with one, as GLM's and BERT's do together."""
    tokenizer = make_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} {tokenizer.unk_token} $A {tokenizer.eos_token}",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in tokenizer.all_special_tokens],
    )
    return tokenizer


def test_beginnings(make_tokenizer, tiny_tokenizer):
    assert beginning_of(tiny_tokenizer) == [] and beginning_of(make_tokenizer(bos=True)) == [1]
    assert beginning_of(with_two(make_tokenizer)) == [1, 0]


def test_respelled_sequences_begin_as_before(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    tokens = load(tokenizer, texts=words(10), num_samples=6)
    inside = without_beginning(tokens, tokenizer).flatten()
    again = respelled(tokens, tokenizer, tokenizer)
    assert (again[:, 0] == 1).all() and torch.equal(again[:, 1:].flatten(), inside[: again[:, 1:].numel()])
    given = torch.randint(3, 20, (4, 16), generator=torch.Generator().manual_seed(0))  # not begun: as they were given
    assert torch.equal(respelled(given, tokenizer, tokenizer), given)


def test_sequences_are_spread_evenly(tiny_tokenizer):
    text = "".join(f"{i:04d}" for i in range(1600))  # 400 sequences of 16 characters; a sequence starts with its place
    for seed in range(3):
        tokens = load(tiny_tokenizer, texts=[text], seed=seed, num_samples=40)
        numbers = [int(tiny_tokenizer.decode(row)[:4]) // 4 for row in tokens]
        assert [n // 10 for n in numbers] == list(range(40))


def test_long_sources_are_read_in_part_but_everywhere(tiny_tokenizer):
    read = []

    class Rows(list):
        def __getitem__(self, index):
            if isinstance(index, int):
                read.append(index)
            return super().__getitem__(index)

    config = CalibrationConfig(num_samples=10, length=16)
    config.texts = Rows(words(20_000))
    assert load_tokens(config, tiny_tokenizer).shape == (10, 16)
    assert 350 < len(set(read)) < 450  # 10 x 16 x 64 characters, 26 a document
    assert {index // 2000 for index in read} == set(range(10))


def test_short_parts_leave_their_share_to_others(tiny_tokenizer):
    texts = [*words(1), *["x" * 20_000], *words(2, start=1)]
    assert load(tiny_tokenizer, texts=texts, num_samples=64).shape == (64, 16)


class Counting:
    """A tokenizer that counts the characters it is given: in all, and the most at once."""

    is_fast, chat_template = True, None

    def __init__(self, tokenizer):
        self.tokenizer, self.eos_token_id, self.all, self.most = tokenizer, tokenizer.eos_token_id, 0, 0

    def __call__(self, text, **options):
        self.all, self.most = self.all + len(text), max(self.most, len(text))
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("kind", ["one line", "in memory", "jsonl"])
def test_of_a_document_as_much_is_read_as_is_asked_for(tmp_path, tiny_tokenizer, kind):
    """4 sequences of 16 tokens: 64 characters for each, of 5 million."""
    text = " ".join(f"word{i:06d}" for i in range(450_000))
    if kind == "jsonl":
        options = {"dataset": write_jsonl(tmp_path / "a.jsonl", [{"text": text}])}
    elif kind == "one line":
        (tmp_path / "a.txt").write_text(text)
        options = {"dataset": str(tmp_path / "a.txt")}
    else:
        options = {"texts": [text]}
    tokenizer = Counting(tiny_tokenizer)
    tracemalloc.start()
    try:
        tokens = load(tokenizer, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tokens.shape == (4, 16) and tokenizer.all <= 4 * 16 * 64
    assert peak < {"one line": 16e6, "in memory": 7e6, "jsonl": 30e6}[kind]  # what is in memory is hashed, JSON parsed
    words = [int(tiny_tokenizer.decode(row).split("word")[1][:6].ljust(6, "0")) for row in tokens]
    assert [word * 4 // 450_000 for word in words] == [0, 1, 2, 3]
    assert torch.equal(load(tiny_tokenizer, **options), tokens)
    assert not torch.equal(load(tiny_tokenizer, seed=1, **options), tokens)


@pytest.mark.parametrize("rows", ["running", "documents"])
def test_texts_are_tokenised_in_pieces(tmp_path, tiny_tokenizer, monkeypatch, rows):
    """As much is asked for as there is; a tokenizer takes some hundred bytes for each character it gets at once."""
    text = wikitext2_sample().read_text(encoding="utf-8")
    texts = list(read_lines(wikitext2_sample())) if rows == "running" else text.split(" \n = ")
    expected = load(tiny_tokenizer, texts=texts, num_samples=1000, length=64)

    monkeypatch.setattr(reading, "PIECE", 2000)
    monkeypatch.setattr(reading, "OVERLAP", 400)
    tokenizer = Counting(tiny_tokenizer)
    assert torch.equal(load(tokenizer, texts=texts, num_samples=1000, length=64), expected)
    assert tokenizer.most <= 2 * 2000 + 400 and tokenizer.all < 1.4 * len(text)


def test_more_than_a_text_can_hold_is_refused_before_it_is_tokenised():
    class Never:
        is_fast, chat_template, eos_token_id = True, None, 2

        def __call__(self, *_, **__):
            pytest.fail("tokenised")

    check_error(
        r"at most \d+ tokens in `texts`, but 1000000000 sequences of 256",
        Never(),
        texts=words(100),
        num_samples=10**9,
        length=256,
    )


def test_what_is_too_much_for_a_text_is_not_set_aside(tiny_tokenizer):
    match = r"270 tokens in `texts`, but 100000000000 sequences of 2 "
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_TOKENS_PER_CHARACTER", 10**12)
        check_error(match, tiny_tokenizer, texts=words(10), num_samples=10**11, length=2)


# ------------------------------------------------------------------------------------------------- sources


def test_txt_follows_the_row_protocol(tmp_path, tiny_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(" \n = Title = \n \n Some text here . \n More .\n" * 20, encoding="utf-8")
    rows = list(read_lines(path))
    assert rows[:5] == ["", " = Title = \n", "", " Some text here . \n", " More .\n"] and len(rows) == 100
    stream = tiny_tokenizer("\n\n".join(rows))["input_ids"]
    full = len(stream) // 16
    assert load_all(tiny_tokenizer, full, dataset=path) == stream[: full * 16]
    assert load_all(tiny_tokenizer, full, texts=rows) == stream[: full * 16]  # rows of WikiText from the Hub


def test_jsonl_and_dataset_folders_equal_texts(tmp_path, tiny_tokenizer):
    texts = words(10)
    expected = load(tiny_tokenizer, texts=texts)
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"body": text} for text in texts])
    assert torch.equal(load(tiny_tokenizer, dataset=jsonl, column="body"), expected)
    dataset = datasets.Dataset.from_dict({"body": texts})
    dataset.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(valid=dataset).save_to_disk(tmp_path / "splits")
    (tmp_path / "plain").mkdir()
    dataset.to_parquet(tmp_path / "plain" / "train.parquet")
    for folder, split in (("single", "train"), ("splits", "valid"), ("plain", "train")):
        tokens = load(tiny_tokenizer, dataset=str(tmp_path / folder), column="body", split=split)
        assert torch.equal(tokens, expected), folder


def test_hub_dataset_gets_id_name_and_split(monkeypatch, tiny_tokenizer):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_dict({"text": words(10)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tokens = load(tiny_tokenizer, dataset="org/data", name="en", split="validation")
    assert asked == [("org/data", "en", "validation")]
    assert torch.equal(tokens, load(tiny_tokenizer, texts=words(10)))


def test_several_datasets_are_interleaved(tmp_path, tiny_tokenizer):
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", [{"text": str(i) * 100}] * 3) for i in range(2)]
    tokens = load(tiny_tokenizer, dataset=paths, num_samples=5)
    texts = [tiny_tokenizer.decode(row).replace("</s>", "") for row in tokens]
    assert [set(text) for text in texts] == [{"0"}, {"1"}, {"0"}, {"1"}, {"0"}]
    alone = [load(tiny_tokenizer, dataset=path, num_samples=n) for path, n in zip(paths, (3, 2), strict=True)]
    assert torch.equal(tokens[::2], alone[0]) and torch.equal(tokens[1::2], alone[1])


def test_tokens_in_memory_need_no_tokenizer():
    tokens = torch.arange(12, dtype=torch.int32).view(3, 4)
    loaded = load_tokens(CalibrationConfig(tokens=tokens), None)
    assert loaded.dtype == torch.long and torch.equal(loaded, tokens.long())


def test_chat_template_renders_messages_and_texts(make_tokenizer):
    tokenizer = make_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    text = "[user]hello</s>[assistant]hi</s>[user]plain</s>" * 5  # no second eos and no bos: the template has its own
    stream = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = len(stream) // 16
    tokens = load_all(tokenizer, full, texts=[chat, "plain"] * 5, chat_template=True)
    assert tokens == stream[: full * 16] and stream.count(2) == 15


def test_lines_of_a_text_file_are_user_turns_with_a_chat_template(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    (tmp_path / "a.txt").write_text("hello\n\nhow are you\n", encoding="utf-8")
    stream = tokenizer("[user]hello\n</s>[user]how are you\n</s>")["input_ids"]
    tokens = load_all(tokenizer, 2, dataset=str(tmp_path / "a.txt"), chat_template=True)
    assert tokens == stream[:32]


# -------------------------------------------------------------------------------------------------- errors


def check_error(match, tokenizer, **options):
    with pytest.raises(CalibrationError, match=match):
        load(tokenizer, **options)


def test_too_little_text_says_how_much_there_is(tiny_tokenizer):
    match = r"35 tokens in `texts`, but 4 sequences of 16 need 64.*there are 2 full"
    check_error(match, tiny_tokenizer, texts=["x" * 34])


def test_wrong_columns_are_named(tmp_path, tiny_tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "title": "y"}])
    known = "known are .* question-answer: question, answer.* by `column`"
    check_error(f"has the columns 'body', 'title'; {known}", tiny_tokenizer, dataset=path)
    check_error("no column 'words'; it has 'body', 'title'", tiny_tokenizer, dataset=path, column="words")
    datasets.Dataset.from_dict({"body": ["x"]}).save_to_disk(tmp_path / "d")
    check_error(f"has the columns 'body'; {known}", tiny_tokenizer, dataset=str(tmp_path / "d"))
    check_error("no column 'words'; it has 'body'", tiny_tokenizer, dataset=str(tmp_path / "d"), column="words")


def test_wrong_split_is_named(tmp_path, tiny_tokenizer):
    dataset = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict(valid=dataset, test=dataset).save_to_disk(tmp_path / "d")
    check_error(r"no split 'train'; it has 'valid', 'test'", tiny_tokenizer, dataset=str(tmp_path / "d"))


def test_rows_that_are_not_text(tiny_tokenizer):
    chat = [{"role": "user", "content": "x"}]
    check_error(r"no text in `texts`", tiny_tokenizer, texts=[])
    check_error(r"no text in `texts`", tiny_tokenizer, texts=["", " \n"])
    check_error(r"Row 1 of `texts` is a NoneType, not a text\.$", tiny_tokenizer, texts=["x", None])
    check_error(r"is a list, not a text\. Set `chat_template=True`", tiny_tokenizer, texts=[chat])


def test_chat_errors(make_tokenizer):
    check_error("has no chat template", make_tokenizer(), texts=["x"], chat_template=True)
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    check_error("Row 0 .* cannot be rendered.*alternate", tokenizer, texts=["x"], chat_template=True)
    check_error("is a int, not a text or a list of", tokenizer, texts=[3], chat_template=True)


def test_files_that_cannot_be_read(tmp_path, tiny_tokenizer):
    missing = tmp_path / "missing"
    for name in (f"{missing}.txt", f"{missing}.jsonl", f"{missing}/deep", "./missing"):
        check_error("There is no file", tiny_tokenizer, dataset=name)
    (tmp_path / "a.csv").write_text("text\nx\n")
    check_error("neither a .txt nor a .jsonl", tiny_tokenizer, dataset=str(tmp_path / "a.csv"))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nnot json\n')
    check_error("Line 2 of .* is not JSON", tiny_tokenizer, dataset=str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text('["x"]\n')
    check_error("Line 1 of .* is not an object", tiny_tokenizer, dataset=str(tmp_path / "b.jsonl"))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    check_error("not UTF-8", tiny_tokenizer, dataset=str(tmp_path / "a.txt"))
    (tmp_path / "empty").mkdir()
    check_error("cannot be read as a dataset", tiny_tokenizer, dataset=str(tmp_path / "empty"))


def test_unreachable_hub_names_the_dataset_and_the_way_out(tiny_tokenizer):
    match = r"cannot load 'org/nothing': it is no file or folder, .*HF_HUB_OFFLINE is set"
    check_error(match, tiny_tokenizer, dataset="org/nothing")


def test_number_of_datasets(tmp_path, tiny_tokenizer):
    check_error("empty list", tiny_tokenizer, dataset=[])
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 200}])
    check_error("`num_samples` is 1, but there are 2", tiny_tokenizer, dataset=[path, path], num_samples=1)


def test_no_tokenizer():
    check_error("needs a tokenizer", None)


def test_saved_configuration_without_its_data(tiny_tokenizer):
    saved = CalibrationConfig(texts=words(10)).to_dict()
    with pytest.raises(CalibrationError, match="was given in memory.*give `texts`, `tokens` or `dataset`"):
        load_tokens(CalibrationConfig.from_dict(saved), tiny_tokenizer)


# ------------------------------------------------------------------------------------------------- helpers


def test_check_token_ids():
    check_token_ids(torch.tensor([[0, 127]]), 128)
    for ids in ([[0, 128]], [[-1, 5]]):
        with pytest.raises(CalibrationError, match=r"128 entries \(0 to 127\)"):
            check_token_ids(torch.tensor(ids), 128)


# ------------------------------------------------------------------------------------- formats, packaged beside others


CHAT = [{"role": "user", "content": "Where is the fox?"}, {"role": "assistant", "content": "It is over the dog."}]
WRITTEN = "[user]Where is the fox?</s>[assistant]It is over the dog.</s>"
ROWS = {
    "messages": {"messages": CHAT},
    "conversations": {
        "conversations": [
            {"from": "human", "value": "Where is the fox?"}, {"from": "gpt", "value": "It is over the dog."}
        ]
    },
    "prompt-completion": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "instruction": {"instruction": "Where is the fox?", "output": "It is over the dog."},
    "question-answer": {"question": "Where is the fox?", "answer": "It is over the dog."},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("folder", [False, True])
def test_rows_that_can_be_trained_on_can_be_calibrated_on(name, folder, tmp_path, make_tokenizer):
    tokenizer, path = make_tokenizer(chat_template=CHAT_TEMPLATE), str(tmp_path / "rows")
    if folder:
        datasets.Dataset.from_list([ROWS[name]] * 20).save_to_disk(path)
    else:
        path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[name]] * 20)
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"text": CHAT}] * 20)
    tokens = load(tokenizer, dataset=path, length=128)
    assert torch.equal(tokens, load(tokenizer, dataset=chats, chat_template=True, length=128))
    assert all(WRITTEN in tokenizer.decode(row) for row in tokens)


def test_instructions_are_texts_where_there_is_no_chat_template(tmp_path, tiny_tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS["instruction"], {**ROWS["instruction"], "input": "Look."}] * 20)
    plain = write_jsonl(
        tmp_path / "plain.jsonl",
        [
            {"text": ALPACA.format(more=more, instruction="Where is the fox?", input=given) + "It is over the dog."}
            for more, given in (
                ("", ""),
                (", paired with an input that provides further context", "### Input:\nLook.\n\n"),
            )
        ]
        * 20,
    )
    assert torch.equal(load(tiny_tokenizer, dataset=path), load(tiny_tokenizer, dataset=plain))
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    check_error(
        "Row 0 of .*chats.jsonl is a chat, but the tokenizer has no chat template", tiny_tokenizer, dataset=path
    )


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_packaged_text_stands_beside_other_sources(template, tmp_path, make_tokenizer):
    tokenizer = make_tokenizer(chat_template=template)
    path = write_jsonl(tmp_path / "own.jsonl", [{"text": "0" * 100}] * 30)
    tokens = load(tokenizer, dataset=[path, "packaged"], num_samples=16)
    packaged = load(tokenizer, num_samples=8)
    assert torch.equal(tokens[1::2], packaged) and {tokenizer.decode(row)[0] for row in tokens[::2]} == {"0"}
    assert torch.equal(load(tokenizer, dataset="packaged"), load(tokenizer))


def test_packaged_text_takes_the_place_of_what_is_missing(tmp_path, make_tokenizer, caplog):
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    path = write_jsonl(tmp_path / "own.jsonl", [{"text": "0" * 100}])
    own = load(tokenizer, dataset=path, num_samples=1, length=16)
    full = 3
    tokens = load(tokenizer, dataset=[path, "packaged"], num_samples=16, length=32)
    mine = [number for number, row in enumerate(tokens) if set(tokenizer.decode(row).replace("</s>", "")) == {"0"}]
    assert len(mine) == full and all(number % 2 == 0 for number in mine) and own.shape == (1, 16)
    assert len({tuple(row) for row in tokens.tolist()}) >= 14
    path = write_jsonl(tmp_path / "word.jsonl", [{"text": "0"}])
    tokens = load(tokenizer, dataset=[path, "packaged"], num_samples=16, length=1000)
    assert len({tuple(row) for row in tokens.tolist()}) == 16 and "word.jsonl has text for 0 of 8" in caplog.text
    assert (tokens == 2).any(1).sum() == 4  # of chats, as without it
    check_error("need", tokenizer, dataset=[path, path])


# ------------------------------------------------------------------------------------- the model's own questions


def test_questions_are_a_source_more(make_tokenizer, tmp_path):
    plain, asked = make_tokenizer(), [f"Question: number {i:05d}?\nAnswer: {i:05d}" for i in range(800)]
    file = write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in words(800)])
    alone = load_tokens(CalibrationConfig(texts=asked, num_samples=4, length=64), plain)

    def shares(dataset, count=8):
        config = CalibrationConfig(dataset=dataset, num_samples=count, length=64, dense_questions=7)
        return [
            "Question" in text or "Answer" in text for text in plain.batch_decode(load_tokens(config, plain, asked))
        ]

    every_fourth = [True, False, False, False]
    assert shares(file) == shares(None) == shares([file, "packaged"]) == every_fourth * 2
    assert shares(file, 3) == every_fourth[:3] and shares([file, "packaged"], 48) == every_fourth * 12
    both = CalibrationConfig(dataset=file, num_samples=16, length=64, dense_questions=7)
    assert torch.equal(load_tokens(both, plain, asked)[::4], alone)
    texts = CalibrationConfig(texts=words(800), num_samples=16, length=64, dense_questions=7)
    assert torch.equal(load_tokens(texts, plain, asked)[::4], alone)
    chatty = make_tokenizer(chat_template=CHAT_TEMPLATE)
    chats = [
        [{"role": "user", "content": f"number {i}?"}, {"role": "assistant", "content": "Yes."}] for i in range(400)
    ]
    found = chatty.batch_decode(load_tokens(both, chatty, chats))
    assert [("[user]" in text or "[assistant]" in text) for text in found] == every_fourth * 4
    mixed = chatty.batch_decode(load_tokens(both, chatty, [*chats, *asked]))  # in turns, in the share of one source
    assert [("[user]" in text or "[assistant]" in text) for text in mixed] == [*every_fourth, *[False] * 4] * 2
    assert [("Question" in text or "Answer" in text) for text in mixed] == [*[False] * 4, *every_fourth] * 2
    assert len(set(mixed)) == 16  # nothing of the others is taken twice
    two = CalibrationConfig(dataset=file, num_samples=2, length=64, dense_questions=7)
    assert "[user]" in chatty.decode(load_tokens(two, chatty, [*chats, *asked])[0])  # no sequence is left for a list


def test_beside_questions_the_others_keep_their_turns(make_tokenizer, tmp_path):
    """What is left of each four sequences is what there would be without questions."""
    plain, file = make_tokenizer(), write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in words(800)])
    for dataset in (None, "packaged", [file, "packaged"], [file, "packaged", file]):
        config = CalibrationConfig(dataset=dataset, num_samples=64, length=32)
        alone = [one.name for one in calibration._turns(config, plain, [])]
        turns = [one.name for one in calibration._turns(config, plain, ["Question: 1?\nAnswer: 1"])]
        others = [name for number, name in enumerate(turns) if number % 4]
        assert len(turns) % 4 == 0 and not len(others) % len(alone)
        assert others == alone * (len(others) // len(alone))


def test_questions_need_a_model_and_text():
    with pytest.raises(CalibrationError, match="`dense_questions` is 3, but no dense model is here"):
        load_tokens(CalibrationConfig(dense_questions=3), object())
    with pytest.raises(ConfigurationError, match="`tokens` and `dense_questions` are both given"):
        CalibrationConfig(tokens=torch.ones(2, 8, dtype=torch.long), dense_questions=3)
    with pytest.raises(ConfigurationError, match="`image_column` and `dense_questions` are both given"):
        CalibrationConfig(image_column="image", dense_questions=3)
    with pytest.raises(CalibrationError, match="`num_samples` is 1, but there are 2 datasets"):
        load_tokens(CalibrationConfig(num_samples=1, dense_questions=3), object(), ["a question"])
    four = CalibrationConfig(dataset=["a.txt", "b.txt", "c.txt", "d.txt"], num_samples=5, dense_questions=3)
    with pytest.raises(CalibrationError, match="`num_samples` is 5, but there are 5 datasets"):
        load_tokens(four, object(), ["a question"])  # two of the five are questions: nothing would be of the last one
