"""What of a model runs on text alone, and what sequences are filled up with."""

from types import SimpleNamespace

import pytest
import seeing_families
import torch

from hf_structprune.evaluation import EfficiencyConfig, measure_efficiency, perplexity
from hf_structprune.evaluation.answers import answer_all
from hf_structprune.evaluation.generation import generate_samples
from hf_structprune.model.writing import for_text, padding_of
from hf_structprune.recovery import kept_batches
from hf_structprune.recovery.own_questions import chats_of, made_up
from hf_structprune.recovery.own_text import Writer


TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_what_runs_without_a_picture_is_left_as_it_is(tiny_llama):
    for model in (tiny_llama, seeing_families.build_seeing("qwen3_vl")):
        assert for_text(model) is model


@pytest.mark.parametrize("family", ["blip-2", "instructblip", "llama4"])
def test_a_model_that_fails_without_a_picture_is_measured_and_writes(family, make_tokenizer, tmp_path, monkeypatch):
    """BLIP's `forward` wants pixels, and Llama 4's asks for what it has seen: their text decoders do it."""
    monkeypatch.setattr(kept_batches, "cached_assets_path", lambda *_, **__: tmp_path / "cache")
    monkeypatch.setitem(seeing_families.SEEING[family][0], "max_position_embeddings", 4096)
    model, tokenizer = seeing_families.build_seeing(family), make_tokenizer(chat_template=TEMPLATE)
    model.generation_config.eos_token_id = [7, 9]
    ids = torch.tensor([[1, 5, 6, 8]])
    with pytest.raises((TypeError, AttributeError)):
        model(input_ids=ids)
    decoder = for_text(model)
    assert decoder is not model and decoder.generation_config.eos_token_id == [7, 9] and not decoder.training
    assert {p.data_ptr() for p in decoder.parameters()} < {p.data_ptr() for p in model.parameters()}  # none is copied
    text = "The quick brown fox jumps over the lazy dog. " * 20
    found = perplexity(model, tokenizer, text, window=32, max_windows=2)
    assert found.perplexity == pytest.approx(perplexity(decoder, tokenizer, text, window=32, max_windows=2).perplexity)
    figures = measure_efficiency(model, EfficiencyConfig(length=4, new_tokens=3, warmup=0, repeats=1))
    assert {"efficiency/macs_with_attention", "efficiency/kv_cache_bytes_per_token", "efficiency/peak_memory"} <= {
        figure.name for figure in figures
    }
    assert made_up(model, tokenizer, 3, seed=0) == {}  # it writes what holds no question
    assert len(chats_of(model, tokenizer, ["What is it?", "Is it so?"])) <= 2
    (said,) = answer_all(model, tokenizer, ["What is it?"], 4)
    (sample,) = generate_samples(model, tokenizer, "What is it?", max_new_tokens=4)
    assert (said.ended or len(said.ids) == 4) and 0 < sample["tokens"] <= 4
    writer = Writer(model, tokenizer, ["The"], 12, seed=0)
    assert len(writer.batch(0)) == writer.size


def test_any_token_fills_up():
    some = [SimpleNamespace(pad_token_id=pad, eos_token_id=end) for pad, end in ((0, 2), (None, 2), (None, None))]
    assert [padding_of(tokenizer) for tokenizer in some] == [0, 2, 0]
