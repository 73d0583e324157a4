"""Losses of tokens are of other things where vocabularies differ: words and bytes are compared, or nothing is."""

import pytest
import torch
from families import make_model
from kinds_of_tokenizers import TEXTS, tokenizer_of

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation.perplexity import EvaluationText, measure_perplexity
from hf_structprune.evaluation.results import EvaluationResult
from hf_structprune.evaluation.table import ResultTable
from hf_structprune.hub.card import model_index
from hf_structprune.recovery.measuring import HeldOutText, dense_log_perplexity


ROWS = 1002


@pytest.fixture(scope="module")
def trimmed():
    model, tokenizer = make_model("llama", vocab_size=ROWS), tokenizer_of("byte_level")
    calibration = CalibrationConfig(texts=TEXTS)
    pruner = StructuredPruner(model, PruningConfig(keep={"vocabulary": 512}, calibration=calibration), tokenizer)
    pruner.prune()
    return make_model("llama", vocab_size=ROWS), tokenizer, pruner


def test_tables_compare_words_and_bytes_of_the_same_text(trimmed):
    dense, tokenizer, pruner = trimmed
    text, results = EvaluationText("a", "\n\n".join(TEXTS[:3]), "texts"), []
    for state, model, own in (("dense", dense, tokenizer), ("pruned", pruner.model, pruner.tokenizer)):
        result = EvaluationResult(state, state)
        result.add(*measure_perplexity(model, own, text, window=32, max_windows=9).figures("a"))
        results.append(result)
    rows = {row.name: row.cells[1] for row in ResultTable(results).rows()}
    assert list(rows)[-1] == "perplexity/a" and rows["perplexity/a"].difference is None
    assert rows["bits_per_byte/a"].difference is not None and rows["word_perplexity/a"].ratio is not None
    assert [entry.metric_type for entry in model_index(results[1], trimmed=True)] == ["word_perplexity"]
    assert [entry.metric_type for entry in model_index(results[0])] == ["perplexity"]


def test_recovery_refuses_a_dense_model_with_another_vocabulary(trimmed):
    dense, _, pruner = trimmed
    held_out = HeldOutText(pruner.tokenizer, EvaluationText("a", TEXTS[0], ""), window=16)
    with pytest.raises(ConfigurationError, match="vocabulary of 1002 tokens and the pruned model one of 512"):
        dense_log_perplexity(dense, held_out, vocab_size=pruner.model.config.vocab_size)
    assert torch.isfinite(torch.tensor(dense_log_perplexity(pruner.model, held_out, vocab_size=512)))


def test_the_card_says_which_tokens_went(trimmed, tmp_path):
    pruner = trimmed[2]
    pruner.save_pretrained(tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "Vocabulary: 512 instead of 1,002" in card and "tokens of `texts` stay" in card
