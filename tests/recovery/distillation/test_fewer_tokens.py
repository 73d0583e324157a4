"""A student with fewer tokens than its teacher: the teacher reads its ids, and tokens count as what spells them."""

import json
import random
from collections import defaultdict

import pytest
import torch
from kinds_of_tokenizers import MAKERS, TEXTS, tokenizer_of
from tiny_distillation import make_llama, make_trainer

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.errors import ConfigurationError
from hf_structprune.recovery import DistillationConfig, RecoveryConfig, recover
from hf_structprune.recovery.distillation.losses import Head, HeadPredictions, Targets, distillation_loss
from hf_structprune.recovery.distillation.teacher import load_teacher
from hf_structprune.vocabulary.relating import TokenMap, related
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
    tokens = related(small, dense, len(order) + 3, len(dense) + 5)
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


def test_merged_logits_are_sums_of_probabilities():
    torch.manual_seed(0)
    small = torch.randint(-1, 6, (40,))
    tokens, logits = TokenMap(torch.arange(7), small), 5 * torch.randn(9, 40, dtype=torch.float64)
    got = tokens.merged(logits).softmax(-1)
    for row, probabilities in zip(logits, got, strict=True):
        sums = defaultdict(float)
        for place, value in zip(small.tolist(), row.exp().tolist(), strict=True):
            sums[place] += value
        whole = sum(value for place, value in sums.items() if place >= 0)
        assert probabilities.tolist() == pytest.approx([sums[place] / whole for place in range(7)], abs=1e-12)


def test_loss_is_that_of_the_merged_predictions():
    torch.manual_seed(0)
    student, teacher = torch.randn(11, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    mine, theirs = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    tokens = TokenMap(torch.arange(11), torch.arange(20) % 11)
    targets = Targets(torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool), torch.full((5,), -100))
    known = HeadPredictions(theirs, Head(teacher, tokens=tokens))
    found = distillation_loss(mine, Head(student), known, targets, temperature=2.0, chunk=2)["loss"]
    merged = torch.zeros(5, 11, dtype=torch.float64).index_add_(1, tokens.small, (theirs @ teacher.T).exp()).log()
    own, target = ((x / 2.0).log_softmax(-1) for x in (mine @ student.T, merged))
    kl = (target.exp() * (target - own)).sum(-1)[targets.followed]
    assert float(found) == pytest.approx(4.0 * float(kl.mean()), abs=1e-12)


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


def test_the_teacher_reads_the_students_ids(folders):
    small = StructuredPruner.from_pretrained(folders / "small")
    teacher = load_teacher(folders / "dense", small.model, DistillationConfig(), tokenizer=small.tokenizer)
    ids = torch.tensor([small.tokenizer(TEXTS[0])["input_ids"][:20]])
    lesson = teacher.lesson({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool)).predictions
    texts = small.tokenizer.convert_ids_to_tokens(ids[0])
    dense = StructuredPruner.from_pretrained(folders / "dense")
    read = torch.tensor([dense.tokenizer.convert_tokens_to_ids(texts)])
    logits = dense.model(read).logits[0]
    got = lesson.head.logits(lesson.hidden)
    assert got.shape == (20, 640)
    kept = [dense.tokenizer.get_vocab()[token] for token in small.tokenizer.convert_ids_to_tokens(range(640))]
    assert (got >= logits[:, kept] - 1e-4).all()  # each with what it begins
    assert (got.logsumexp(-1) - logits.logsumexp(-1)).abs().max() < 1e-4  # and nothing is lost
    with pytest.raises(ConfigurationError, match="the student 640"):
        load_teacher(dense.model, small.model, DistillationConfig())


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


def test_recovery_from_the_dense_model(folders, tmp_path):
    rows = [{"instruction": f"Say {n}.", "context": "", "response": TEXTS[0][n : n + 80]} for n in range(12)]
    (tmp_path / "watched.txt").write_text(TEXTS[1])
    config = RecoveryConfig(
        method="distill", rank=4, alpha=8, max_length=64, batch_size=4, micro_batch_size=2, max_steps=4, window=32,
        evaluations=2, max_windows=2, precision="fp32", learning_rate=3e-3, text=str(tmp_path / "watched.txt"),
    )  # fmt: skip
    result = recover(folders / "small", rows, tmp_path / "out", config, teacher=folders / "dense")
    assert result.report["teacher"] == "dense" and result.recovered is None
    assert len(StructuredPruner.from_pretrained(tmp_path / "out").tokenizer) == 640
