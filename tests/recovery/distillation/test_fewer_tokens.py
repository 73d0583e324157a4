"""A student with fewer tokens than its teacher: the teacher reads its ids, and tokens count as what spells them."""

import json
import random
from dataclasses import replace

import pytest
import torch
from kinds_of_tokenizers import FOREIGN, MAKERS, TEXTS, tokenizer_of
from safetensors.torch import load_file
from tiny_distillation import make_llama, make_trainer

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.errors import ConfigurationError
from hf_structprune.recovery import DistillationConfig, RecoveryConfig, recover
from hf_structprune.recovery.callback import LoraRecoveryCallback
from hf_structprune.recovery.distillation.fewer_tokens import known_targets, split_batch
from hf_structprune.recovery.distillation.losses import (
    Head,
    HeadPredictions,
    Targets,
    batch_targets,
    distillation_loss,
)
from hf_structprune.recovery.distillation.teacher import load_teacher, record_outputs
from hf_structprune.vocabulary.aligning import Reader
from hf_structprune.vocabulary.relating import TokenMap, prefixes_of, related
from hf_structprune.vocabulary.tokenizers import trimmed_tokenizer, vocabulary_of


def trimmed(kind, seed=0):
    """A tokenizer with half of the tokens, and the old ids of its tokens."""
    dense = tokenizer_of(kind)
    vocabulary = vocabulary_of(dense)
    ranked = random.Random(seed).sample(sorted(vocabulary.tokens), len(vocabulary.tokens))
    least = len(vocabulary.fixed)
    return trimmed_tokenizer(dense, vocabulary.choose(ranked, (least + len(ranked)) // 2))


@pytest.mark.parametrize("kind", MAKERS)
def test_tokens_are_spelled_as_the_tokenizer_splits_them(kind):
    dense, (small, order) = tokenizer_of(kind), trimmed(kind)
    tokens = related(small, dense, len(order) + 3, len(dense) + 5).tokens
    assert tokens.dense[: len(order)].tolist() == order and tokens.dense[len(order) :].tolist() == [-1] * 3
    assert tokens.small[len(dense) :].tolist() == [-1] * 5
    model, number = small.backend_tokenizer.model, 0
    for token, old in dense.get_vocab().items():
        if old in order:
            assert tokens.small[old] == order.index(old)
        elif not token.startswith("##") and kind != "suffix":  # which the model of a tokenizer takes for whole words
            assert vocabulary_of(small).spelled(token) == [piece.id for piece in model.tokenize(token)]
            number += 1
    assert number > 50 or kind == "suffix"
    prefix = vocabulary_of(small)._model.get("continuing_subword_prefix") or ""
    for token in set(dense.get_vocab()) - set(small.get_vocab()):
        first, *others = small.convert_ids_to_tokens(vocabulary_of(small).spelled(token))
        if not any(part.startswith("<0x") for part in (first, *others)):
            assert token == first + "".join(part.removeprefix(prefix) for part in others)
            assert all(part.startswith(prefix) for part in others)


def test_other_tokenizers_are_not_related():
    small, order = trimmed("byte_level")
    assert related(small, tokenizer_of("byte_fallback"), len(order), 2000) is None
    assert related(tokenizer_of("byte_level"), small, 2000, 2000) is None  # which has fewer
    assert related(small, tokenizer_of("byte_level"), len(order), 500) is None  # rows are missing


def toy(seed=0, rows=40, few=7):
    """A map of made-up spellings, some of them beginnings of others, and the spellings."""
    draw = random.Random(seed)
    spelled = {n: [n] if n < few else [draw.randrange(3) for _ in range(draw.randint(2, 4))] for n in range(rows)}
    spelled[rows - 1] = []  # nothing spells it
    return TokenMap.of(torch.arange(few), spelled, rows), spelled


def begun(spelled, probabilities, prefix, few):
    """By hand: what the next piece is after a prefix, where a token goes on that has begun with it."""
    masses = [0.0] * few
    for number, pieces in spelled.items():
        if len(pieces) > len(prefix) and tuple(pieces[: len(prefix)]) == prefix:
            masses[pieces[len(prefix)]] += probabilities[number].item()
    return torch.tensor(masses, dtype=torch.float64) / sum(masses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_logits_are_sums_of_probabilities(dtype):
    torch.manual_seed(0)
    tokens, spelled = toy()
    prefixes = prefixes_of(spelled)
    assert len(prefixes) > 20 and sorted(prefixes.values()) == list(range(1, len(prefixes) + 1))
    rows = [(), *prefixes, ()]
    logits = (60 * torch.randn(len(rows), 40)).to(dtype)  # so that some masses are tiny beside the whole
    got = tokens.merged(logits, torch.tensor([prefixes.get(row, 0) for row in rows])).softmax(-1)
    for place, row in enumerate(rows):
        inside = [n for n, pieces in spelled.items() if len(pieces) > len(row) and tuple(pieces[: len(row)]) == row]
        exact = (logits[place].double() - logits[place][inside].max().double()).exp()
        assert (got[place] - begun(spelled, exact, row, 7)).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)
    hot = tokens.merged(logits, torch.full((len(rows),), 1)) / 100.0  # temperature: what cannot be stays so
    assert ((hot.softmax(-1) > 0) == (begun(spelled, torch.ones(40), next(iter(prefixes)), 7) > 0)).all()


def test_over_a_text_the_targets_are_what_comes_next():
    # All texts of two dense tokens with their probabilities. What the second piece is after a first one, by counting,
    # is the mean of the targets there: each text says by its own tokens whether the first piece was a token.
    torch.manual_seed(0)
    tokens, spelled = toy()
    del spelled[39]
    prefixes, first = prefixes_of(spelled), torch.randn(39, dtype=torch.float64).softmax(0)
    second = torch.randn(39, 39, dtype=torch.float64).softmax(-1)
    never = torch.full((39, 1), -torch.inf, dtype=torch.float64)
    boundary = tokens.merged(torch.cat([second.log(), never], 1), torch.zeros(39, dtype=torch.long)).softmax(-1)
    for piece in range(7):
        counted, mean = torch.zeros(2, 7, dtype=torch.float64)
        for one, pieces in spelled.items():
            if pieces[0] != piece:
                continue
            if len(pieces) > 1:
                counted[pieces[1]] += first[one]
                row = torch.cat([first.log(), never[0]])[None]
                mean += first[one] * tokens.merged(row, torch.tensor([prefixes[(piece,)]])).softmax(-1)[0]
            else:
                mean += first[one] * boundary[one]
                for other, others in spelled.items():
                    counted[others[0]] += first[one] * second[one, other]
        assert (counted - mean).abs().max() < 1e-12


def test_loss_is_that_of_the_merged_predictions():
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 8, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    mine, theirs = torch.randn(5, 8, dtype=torch.float64).requires_grad_(), torch.randn(5, 8, dtype=torch.float64)
    tokens, spelled = toy()
    rows = [(), next(iter(prefixes_of(spelled))), (), (2,), ()]
    prefixes = torch.tensor([prefixes_of(spelled).get(row, 0) for row in rows])
    targets = Targets(torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool), torch.full((5,), -100))
    known = HeadPredictions(theirs, Head(teacher), tokens, prefixes)
    found = distillation_loss(mine, Head(student), known, targets, temperature=2.0, chunk=2)["loss"]
    probabilities = (theirs @ teacher.T).softmax(-1)
    merged = torch.stack([begun(spelled, p, row, 7) for p, row in zip(probabilities, rows, strict=True)])
    own, target = (mine @ student.T / 2.0).log_softmax(-1), (merged.log() / 2.0).softmax(-1)
    kl = (torch.xlogy(target, target) - target * own).sum(-1)[targets.followed]
    assert found.item() == pytest.approx(4.0 * kl.mean().item(), abs=1e-12)
    got, wanted = (torch.autograd.grad(loss, mine)[0] for loss in (found, 4.0 * kl.mean()))
    assert (got - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("kind", MAKERS)
def test_the_dense_model_reads_its_own_tokens(kind):
    dense, (small, order) = tokenizer_of(kind), trimmed(kind)
    relation = related(small, dense, len(order), len(dense))
    reader, known, total = Reader(relation, small, dense), 0, 0
    numbers = {number: prefix for prefix, number in prefixes_of(relation.spelled).items()}
    for text in [TEXTS[0][:500], *FOREIGN, "<s>cut" + TEXTS[4][:90] + "</s>"]:
        whole = small(text, add_special_tokens=False)["input_ids"]
        assert reader.read(tuple(whole)).ids == dense(text, add_special_tokens=False)["input_ids"]
        for ids in (whole, whole[3:], whole[:-2]):  # cut inside of words too
            reading = reader.read(tuple(ids))
            assert joined(dense, reading.ids) == joined(small, ids)
            for place, after in enumerate(ids[1:]):
                if not reading.known[place]:
                    continue
                spelled = relation.spelled[reading.ids[reading.rows[place] + 1]]
                prefix = numbers.get(reading.prefixes[place], ())
                assert spelled[len(prefix)] == after and prefix == tuple(ids[place + 1 - len(prefix) : place + 1])
                # what comes before is the same text
                before = ids[: place + 1 - len(prefix)]
                assert joined(dense, reading.ids[: reading.rows[place] + 1]) == joined(small, before)
                assert reading.ends[place] == (not prefix)
            known, total = known + sum(reading.known), total + len(ids)
    assert known / total > 0.8 and any(reading.prefixes)


def joined(tokenizer, ids):
    """The text of tokens, without the marks of their place in a word."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return b"".join(bytes([int(t[3:5], 16)]) if t.startswith("<0x") else t.removeprefix("##").encode() for t in tokens)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model and the same one with fewer tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("fewer"), tokenizer_of("byte_level")
    model = make_llama(48, 1)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    config = PruningConfig(units="vocabulary", calibration=CalibrationConfig(texts=TEXTS, num_samples=4, length=16))
    pruner = StructuredPruner.from_pretrained(folder / "dense", config=config)
    pruner.config = PruningConfig(keep={"vocabulary": 640}, calibration=config.calibration)
    pruner.prune()
    pruner.save_pretrained(folder / "small")
    return folder


def test_what_the_teacher_says_of_packed_and_padded_batches(folders):
    small, dense = (StructuredPruner.from_pretrained(folders / name) for name in ("small", "dense"))
    teacher = load_teacher(folders / "dense", small.model, DistillationConfig(), tokenizer=small.tokenizer)
    rows = [small.tokenizer(text[:length])["input_ids"] for text, length in zip(TEXTS, (60, 25, 40), strict=False)]
    relation = related(small.tokenizer, dense.tokenizer, 640, len(dense.tokenizer))
    wanted, known = [], []
    for ids in rows:  # one by one and by hand
        reading = teacher.tokens.read(tuple(ids))
        assert reading.ids == dense.tokenizer.convert_tokens_to_ids(
            dense.tokenizer.convert_ids_to_tokens(dense.tokenizer(small.tokenizer.decode(ids[1:-1]))["input_ids"])
        )
        probabilities = dense.model(torch.tensor([reading.ids])).logits[0].double().softmax(-1)
        numbers = {number: prefix for prefix, number in prefixes_of(relation.spelled).items()} | {0: ()}
        for row, number in zip(reading.rows, reading.prefixes, strict=True):
            wanted.append(begun(relation.spelled, probabilities[row], numbers[number], 640))
        known.append(reading.known)
        assert max(reading.prefixes) > 0
    for packed in (False, True):
        made = collator(packed)([{"input_ids": ids} for ids in rows])
        positions = torch.ones_like(made["input_ids"], dtype=torch.bool) if packed else made["attention_mask"].bool()
        lesson = teacher.lesson(made, positions).predictions
        got = lesson.logits(slice(None)).double().softmax(-1)
        assert got.shape == (sum(map(len, rows)), 640)
        assert (got - torch.stack(wanted)).abs().max() < 1e-5
        targets = known_targets(batch_targets(made, True), teacher.tokens, made)
        flat = targets.followed[positions].tolist()
        assert flat == [k and i < len(row) - 1 for row in known for i, k in enumerate(row)]
    with pytest.raises(ConfigurationError, match="the student 640"):
        load_teacher(dense.model, small.model, DistillationConfig())


def collator(packed):
    return pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForLanguageModeling(0, padding_free=packed)


def test_states_are_compared_where_a_dense_token_ends(folders):
    small = StructuredPruner.from_pretrained(folders / "small")
    config = DistillationConfig(hidden_weight=1.0)
    teacher = load_teacher(folders / "dense", small.model, config, tokenizer=small.tokenizer)
    made = collator(True)([{"input_ids": small.tokenizer(text[:60])["input_ids"]} for text in TEXTS[:2]])
    positions = torch.ones_like(made["input_ids"], dtype=torch.bool)
    lesson = teacher.lesson(made, positions)
    assert lesson.same_place.any() and not lesson.same_place.all()
    ends = [end for _, _, ids in split_batch(made) for end in teacher.tokens.read(tuple(ids.tolist())).ends]
    assert lesson.same_place.tolist() == ends
    assert {len(state) for state in lesson.states.values()} == {len(lesson.same_place)}
    # Where no token went the text is read alike, and the small model's states are the dense one's.
    words = (small.tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in " ".join(TEXTS).split())
    ids = next(ids for ids in words if len(ids) > 2 and all(teacher.tokens.read(tuple(ids)).ends))
    batch = {"input_ids": torch.tensor([ids])}
    same = teacher.lesson(batch, torch.ones(1, len(ids), dtype=torch.bool))
    with record_outputs(teacher.terms.modules(small.model, 0)) as states, torch.no_grad():
        small.model(**batch)
    assert len(states) == 2 and all((same.states[name] - one[0]).abs().max() < 1e-4 for name, one in states.items())


def test_cached_predictions_are_those_of_the_model(folders, tmp_path):
    losses = []
    for cache in (None, str(tmp_path / "cache")):
        small = StructuredPruner.from_pretrained(folders / "small")
        config = DistillationConfig(cache=cache, top_k=640)
        teacher = load_teacher(folders / "dense", small.model, config, tokenizer=small.tokenizer)
        trainer = make_trainer(tmp_path / "run", small.tokenizer, small.model, teacher, config=config)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3) and losses[0] > 0.01
    assert "tokens" in json.loads((tmp_path / "cache" / "cache.json").read_text())


def test_nothing_to_follow_is_refused(folders, tmp_path, monkeypatch):
    small = StructuredPruner.from_pretrained(folders / "small")
    teacher = load_teacher(folders / "dense", small.model, DistillationConfig(), tokenizer=small.tokenizer)
    trainer = make_trainer(tmp_path / "run", small.tokenizer, small.model, teacher, config=DistillationConfig())
    read = teacher.tokens.read
    monkeypatch.setattr(teacher.tokens, "read", lambda ids: read(ids)._replace(known=[False] * len(ids)))
    with pytest.raises(ConfigurationError, match="not found again"):
        trainer.train()


def test_recovery_from_the_dense_model(folders, tmp_path, monkeypatch):
    rows = [{"instruction": f"Say {n}.", "context": "", "response": TEXTS[0][n : n + 80]} for n in range(12)]
    (tmp_path / "watched.txt").write_text(TEXTS[1])
    config = RecoveryConfig(
        method="distill", rank=4, alpha=8, max_length=64, batch_size=4, micro_batch_size=2, max_steps=4, window=32,
        evaluations=2, max_windows=2, precision="fp32", learning_rate=3e-3, text=str(tmp_path / "watched.txt"),
        save_steps=2,
    )  # fmt: skip

    def train(name, **options):
        teacher = folders / "dense"
        return recover(folders / "small", rows, tmp_path / name, config, teacher=teacher, **options)

    result = train("whole")
    assert result.report["teacher"] == "dense" and result.recovered is None
    assert len(StructuredPruner.from_pretrained(tmp_path / "whole").tokenizer) == 640
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LoraRecoveryCallback, "on_step_begin", interrupt)
        train("parts")
    train("parts", resume=True)
    last = "checkpoint-4/adapter_model.safetensors"
    whole, parts = (load_file(tmp_path / f"{name}-training" / last) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_embeddings_are_trained_where_tokens_are_spelled_by_others_now(folders, tmp_path):
    rows = [{"text": TEXTS[0][n : n + 80]} for n in range(12)]
    (tmp_path / "watched.txt").write_text(TEXTS[1])
    config = RecoveryConfig(
        method="distill", weights="full", max_length=64, batch_size=4, micro_batch_size=2, max_steps=2, window=32,
        evaluations=1, max_windows=2, precision="fp32", learning_rate=1e-3, text=str(tmp_path / "watched.txt"),
    )  # fmt: skip
    held = recover(folders / "small", rows, tmp_path / "held", replace(config, train_embeddings=False),
                   teacher=folders / "dense")  # fmt: skip
    made = recover(folders / "small", rows, tmp_path / "made", config, teacher=folders / "dense")
    assert made.report["configuration"]["train_embeddings"] is None  # what was asked for
    assert held.report["training"]["trainable_parameters"] < made.report["training"]["trainable_parameters"]


def interrupt(self, args, state, control, **more):
    if state.global_step == 2:
        raise KeyboardInterrupt
