import pytest
import torch
from datasets import Dataset

from hf_structprune.errors import ConfigurationError, TextError
from hf_structprune.recovery.data import load_rows, prepare


# Every message ends in `</s>`. The second one marks what assistants say; the third says "!" at the last answer only.
CHATML = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LOOKS_BACK = (
    "{% for m in messages %}[{{ m['role'] }}]{% if loop.last and m['role'] == 'assistant' %}!{% endif %}"
    "{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def say(role, content):
    return {"role": role, "content": content}


CHAT = [say("system", "be"), say("user", "one"), say("assistant", "yes"), say("user", "two"), say("assistant", "no")]
ROWS = {
    "text": [{"text": "some plain text"}, {"text": "more</s>"}],
    "pair": [{"prompt": "two and two", "completion": " is four"}, {"prompt": "", "completion": "alone"}],
    "chat pair": [{"prompt": CHAT[:4], "completion": CHAT[4:]}, {"prompt": CHAT[:2], "completion": CHAT[2:3]}],
}


def trl_prepares(rows, tokenizer, tmp_path, model, **options):
    """What TRL's trainer makes of rows."""
    from trl import SFTConfig, SFTTrainer

    options = {"max_length": 200, "shuffle_dataset": False, **options}
    arguments = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, **options)
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return trainer.train_dataset


def both(dataset):
    return dataset["input_ids"][:], dataset["labels"][:]


def spelled(tokenizer, dataset, learned=True):
    """Texts of the sequences, or of what is learned in them."""
    rows = zip(*both(dataset), strict=True)
    return [
        tokenizer.decode([i for i, label in zip(ids, ls, strict=True) if label != -100 or not learned])
        for ids, ls in rows
    ]


@pytest.mark.parametrize("prompt_loss", [False, True])
@pytest.mark.parametrize("kind", ROWS)
def test_the_same_as_trl(kind, prompt_loss, tmp_path, make_tokenizer, tiny_llama):
    tokenizer = make_tokenizer(bos=True, chat_template=CHATML)
    expected = trl_prepares(
        ROWS[kind], tokenizer, tmp_path, tiny_llama, completion_only_loss=None if not prompt_loss else False
    )
    result, report = prepare(Dataset.from_list(ROWS[kind]), tokenizer, max_length=200, prompt_loss=prompt_loss)
    assert both(result) == both(expected)
    [source] = report.sources
    assert source.tokens == sum(map(len, result["input_ids"]))
    assert source.labelled == sum(label != -100 for labels in result["labels"] for label in labels[1:])


def test_chats_are_the_same_as_trl_with_assistant_only_loss(tmp_path, make_tokenizer, tiny_llama):
    tokenizer = make_tokenizer(chat_template=MARKED)
    rows = [{"messages": CHAT}]
    expected = trl_prepares(rows, tokenizer, tmp_path, tiny_llama, assistant_only_loss=True)
    result, report = prepare(Dataset.from_list(rows), tokenizer, max_length=200)
    assert both(result) == both(expected)
    assert spelled(tokenizer, result) == ["yes</s>no</s>"] and len(report.notes) <= 1


@pytest.mark.parametrize(("template", "last"), [(CHATML, "no</s>\n"), (LOOKS_BACK, "!no</s>\n")])
def test_every_answer_of_a_chat_without_marks_is_an_example(template, last, make_tokenizer):
    tokenizer = make_tokenizer(chat_template=template)
    rows = Dataset.from_list([{"messages": [*CHAT, say("user", "and?")]}] * 2)
    result, report = prepare(rows, tokenizer, max_length=200)
    assert spelled(tokenizer, result) == [last.replace("no", "yes"), last] * 2
    assert [len(ids) for ids in result["input_ids"][:2]] == [
        len(tokenizer.apply_chat_template(CHAT[:turns])["input_ids"]) for turns in (3, 5)
    ]
    assert report.notes[-1].startswith("every answer of 2 chats is an example of its own")
    result, _ = prepare(rows, tokenizer, max_length=200, prompt_loss=True)
    assert both(result)[0] == both(result)[1] and len(result) == 2


def test_a_chat_of_one_answer_is_prompt_and_completion(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=LOOKS_BACK)
    rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    result, report = prepare(Dataset.from_list(rows), tokenizer, max_length=200)
    assert spelled(tokenizer, result) == ["!a</s>\n"]
    assert spelled(tokenizer, result, learned=False) == ["[user]q</s>\n[assistant]!a</s>\n"]
    assert len(report.notes) == 1  # about the pad token
    opened = [{"conversations": [{"from": "gpt", "value": "hi"}]}, *rows]  # an answer to nothing is none
    result, report = prepare(Dataset.from_list(opened), tokenizer, max_length=200)
    assert len(result) == 1 and report.sources[0].empty == 1


def test_instructions_with_and_without_chat_template(make_tokenizer):
    rows = Dataset.from_list([{"instruction": "add", "context": "2, 2", "response": "4"}])
    tokenizer = make_tokenizer(chat_template=CHATML)
    result, _ = prepare(rows, tokenizer, max_length=500)
    assert spelled(tokenizer, result, learned=False) == ["[user]add\n\n2, 2</s>\n[assistant]4</s>\n"]
    assert spelled(tokenizer, result) == ["4</s>\n"]
    tokenizer = make_tokenizer()
    result, _ = prepare(rows, tokenizer, max_length=500)
    assert spelled(tokenizer, result, learned=False)[0].endswith("### Input:\n2, 2\n\n### Response:\n4</s>")
    assert spelled(tokenizer, result) == ["4</s>"]


def test_long_texts_are_split_and_nothing_is_lost(make_tokenizer):
    tokenizer = make_tokenizer()
    rows = ["abcdefghij" * 3, "short", "x" * 15, "y" * 16]  # with `</s>`: 31, 6, 16 and 17 tokens
    result, report = prepare(Dataset.from_dict({"text": rows}), tokenizer, max_length=16)
    [source] = report.sources
    pieces = spelled(tokenizer, result)
    assert pieces == ["abcdefghijabcdef", "ghijabcdefghij</s>", "short</s>", "x" * 15 + "</s>", "y" * 16]
    assert (source.rows, source.split, source.sequences, source.truncated, source.dropped) == (4, 2, 5, 0, 0)


def test_long_answers_are_cut_and_those_without_answer_dropped(make_tokenizer, caplog):
    rows = [
        {"prompt": "p" * 10, "completion": "c" * 20},
        {"prompt": "p" * 16, "completion": "c"},
        {"prompt": "p" * 4, "completion": "c"},
        {"prompt": "p", "completion": ""},
    ]
    tokenizer = make_tokenizer()
    result, report = prepare(Dataset.from_list(rows), tokenizer, max_length=16)
    assert spelled(tokenizer, result) == ["c" * 6, "c</s>"]
    [source] = report.sources
    assert (source.rows, source.truncated, source.dropped, source.empty, source.sequences) == (4, 1, 1, 1, 2)
    assert (source.tokens, source.labelled) == (16 + 6, 6 + 2)
    assert report.lines()[0] == (
        "data (prompt-completion): 4 rows, 2 sequences, 22 tokens, 8 of them learned; "
        "rows 1 empty, 1 dropped, 1 truncated"
    )
    words = "of data 1 rows are dropped because their prompts alone fill `max_length` 16: set it higher"
    assert words in report.lines()[-1] and words[1:] in caplog.text
    with pytest.raises(TextError, match="nothing to learn in the data.* prompts alone fill `max_length` 16"):
        prepare(Dataset.from_list(rows[1:2]), tokenizer, max_length=16)


@pytest.mark.parametrize("turns", [3, 5])
def test_a_chat_template_that_never_ends_an_answer_is_noted(make_tokenizer, turns):
    rows = Dataset.from_list([{"messages": CHAT[:turns]}] * 2)
    never = CHATML.replace("</s>", "")
    for template, options, noted in (
        (CHATML, {}, False), (MARKED, {}, False), (never, {}, True), (never.replace("\n", "|"), {}, True),
        (never, {"prompt_loss": True}, True), (CHATML, {"prompt_loss": True}, False),
        (never.replace("\n", "|"), {"stops": [3, ord("|") - 32 + 4]}, False),  # the model stops there as well
    ):  # fmt: skip
        _, report = prepare(rows, make_tokenizer(chat_template=template), **{"max_length": 200, **options})
        found = [note for note in report.notes if "never writes '</s>' after an answer" in note]
        assert len(found) == noted, (template, options)
    plain = Dataset.from_list([{"text": "no chat"}])
    assert not any("never" in note for note in prepare(plain, make_tokenizer(), max_length=200)[1].notes)


def test_a_mix_is_what_its_parts_are(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=CHATML)
    parts = [ROWS["text"], ROWS["pair"], ROWS["chat pair"], [{"messages": CHAT}], [{"question": "q", "answer": "a"}]]
    alone = [
        row for part in parts for row in zip(*both(prepare(load_rows(part), tokenizer, max_length=99)[0]), strict=True)
    ]
    result, report = prepare(load_rows(parts), tokenizer, max_length=99)
    assert sorted(zip(*both(result), strict=True)) == sorted(alone)
    assert [(one.name, one.format, one.rows) for one in report.sources] == [
        ("data", "text", 2), ("data (2)", "prompt-completion", 2), ("data (3)", "prompt-completion", 2),
        ("data (4)", "messages", 1), ("data (5)", "question-answer", 1),
    ]  # fmt: skip


def test_packing_keeps_every_sequence(make_tokenizer):
    tokenizer = make_tokenizer()
    rows = Dataset.from_list(
        [{"prompt": "p" * (i % 7), "completion": chr(97 + i % 26) * (1 + i % 11)} for i in range(60)]
    )
    loose, _ = prepare(rows, tokenizer, max_length=32)
    packed, report = prepare(rows, tokenizer, max_length=32, packing=True, seed=1)
    assert report.packed == len(packed) < len(loose)
    assert max(map(len, packed["input_ids"])) <= 32
    unpacked = []
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            unpacked.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
        assert start == len(row["input_ids"])
    assert sorted(unpacked) == sorted(zip(*both(loose), strict=True))
    assert "packed into" in report.lines()[1]


def test_trl_trains_on_the_result(tmp_path, make_tokenizer, tiny_llama):
    """As it is, and packed as one row without padding."""
    from trl import SFTConfig, SFTTrainer

    tokenizer = make_tokenizer(chat_template=CHATML)
    rows = load_rows([ROWS["text"], ROWS["chat pair"]])
    for packing in (False, True):
        data, report = prepare(rows, tokenizer, max_length=64, packing=packing)
        more = {"padding_free": True, "max_length": None} if packing else {"max_length": 64}
        arguments = SFTConfig(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=8,
            report_to="none",
            use_cpu=True,
            bf16=False,
            **more,
        )
        trainer = SFTTrainer(tiny_llama, arguments, train_dataset=data, processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        assert int((batch["labels"][:, 1:] != -100).sum()) == sum(one.labelled for one in report.sources)
        trainer.train()


def test_without_pad_token_the_end_token_is_one_and_the_vocabulary_stays(make_tokenizer):
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    _, report = prepare(Dataset.from_list(ROWS["text"]), tokenizer, max_length=32)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and len(tokenizer) == size
    assert report.notes == ["no pad token in the tokenizer: '</s>' takes its place, and is not learned there"]
    _, report = prepare(Dataset.from_list(ROWS["text"]), tokenizer, max_length=32)
    assert report.notes == []


def test_faults(make_tokenizer):
    rows, tokenizer = Dataset.from_list(ROWS["text"]), make_tokenizer()
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        prepare(rows, None, max_length=32)
    with pytest.raises(ConfigurationError, match="`max_length` is 512, but the model takes at most 256 tokens"):
        prepare(rows, tokenizer, max_length=512, context=256)
    with pytest.raises(ConfigurationError, match="no end-of-sequence token"):
        prepare(rows, make_tokenizer(eos=False), max_length=32)
    with pytest.raises(TextError, match="no rows"):
        prepare(Dataset.from_dict({"text": []}), tokenizer, max_length=32)
    with pytest.raises(
        TextError, match="nothing to learn in the data. data .text.: 2 rows, 0 sequences.*rows 2 empty"
    ):
        prepare(Dataset.from_dict({"text": ["", " "]}), tokenizer, max_length=32)
    with pytest.raises(TextError, match="data has the columns 'body'"):
        prepare(Dataset.from_dict({"body": ["x"]}), tokenizer, max_length=32)
    with pytest.raises(TextError, match="Row 0 of data, format messages: it is a chat, but .* no chat template"):
        prepare(Dataset.from_list([{"messages": CHAT}]), tokenizer, max_length=32)
    strict = make_tokenizer(chat_template="{{ raise_exception('only users') }}")
    with pytest.raises(TextError, match="the chat template cannot write it: only users"):
        prepare(Dataset.from_list([{"messages": CHAT}]), strict, max_length=32)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_examples_do_not_see_each_other(attention, make_tokenizer, tiny_llama):
    """The loss of all tokens is that of the loose sequences."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = make_tokenizer()
    rows = [{"prompt": "p" * (i % 7), "completion": chr(97 + i % 26) * (1 + i % 11)} for i in range(30)]
    tiny_llama.set_attn_implementation(attention)
    totals = []
    for packing in (False, True):
        data, report = prepare(Dataset.from_list(rows), tokenizer, max_length=32, packing=packing)
        collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packing)
        batch = collator([data[i] for i in range(len(data))])
        with torch.no_grad():
            totals.append(float(tiny_llama(**batch, use_cache=False).loss) * report.sources[0].labelled)
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
