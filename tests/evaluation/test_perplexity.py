import importlib
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Cohere2Config, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig
from transformers.utils import logging

from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation import perplexity, read_text
from hf_structprune.evaluation.perplexity import EvaluationText, bos_for, measure_perplexity
from hf_structprune.recovery.measuring import HeldOutText


# The package exports a function of the module's name, so an attribute path does not reach the module.
module = importlib.import_module("hf_structprune.model.measuring")

TEXT = "The quick brown fox jumps over the lazy dog, and 0123456789 more. " * 10  # 660 tokens
SIZES = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=None, tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "llama": (LlamaConfig(**SIZES), True),
    "llama_tied": (LlamaConfig(**SIZES | {"tie_word_embeddings": True}), True),
    "gpt2": (GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=256), True),
    "gemma2": (Gemma2Config(**SIZES, final_logit_softcapping=2.0), False),
    "granite": (GraniteConfig(**SIZES, logits_scaling=4.0), False),
    "granite_unscaled": (GraniteConfig(**SIZES, logits_scaling=1.0), True),
    "cohere2": (Cohere2Config(**SIZES, logit_scale=0.25), False),
}


def build(name):
    config, plain = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # logits that are far from uniform, and beyond the cap
    return model, plain


def brute_force(model, tokenizer, text, window, chosen=None):
    """Mean over the windows' own mean losses, from the model's full logits."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
    losses = []
    model.eval()
    with torch.no_grad():
        for row in windows if chosen is None else [windows[i] for i in chosen]:
            logits = model(row[None]).logits[0].double()
            losses.append(cross_entropy(logits[:-1], row[1:]).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_logits", [2**24, 128 * 7, 1])
def test_equals_brute_force_in_every_family(name, max_logits, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", max_logits)
    model, _ = build(name)
    expected = brute_force(model, tiny_tokenizer, TEXT, 64)
    assert expected > 5.2 or name == "gemma2"  # not a model that gives every token the same probability
    result = perplexity(model, tiny_tokenizer, TEXT, window=64, batch_size=3)
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert (result.windows, result.window, result.tokens) == (10, 64, 10 * 63)


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_heads_are_recognised(name):
    model, plain = build(name)
    ids = torch.arange(3, 19)[None]
    assert module.has_plain_head(model.eval(), ids) is plain


def test_plain_head_needs_no_full_logits(tiny_llama, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", 128 * 20)
    sizes = []
    tiny_llama.lm_head.register_forward_hook(lambda _, args, out: sizes.append(out.numel()))
    perplexity(tiny_llama, tiny_tokenizer, TEXT, window=64, batch_size=4)
    assert max(sizes) == 128 * 20


def test_evenly_spaced_windows(tiny_llama, tiny_tokenizer):
    result = perplexity(tiny_llama, tiny_tokenizer, TEXT, window=64, max_windows=4)
    expected = brute_force(tiny_llama, tiny_tokenizer, TEXT, 64, chosen=[0, 2, 5, 7])
    assert result.nll == pytest.approx(expected, rel=1e-6)
    assert result.windows == 4 and result.protocol.startswith("4 non-overlapping windows of 64 tokens, 63 ")
    whole = perplexity(tiny_llama, tiny_tokenizer, TEXT, window=64, max_windows=99)
    assert whole == perplexity(tiny_llama, tiny_tokenizer, TEXT, window=64)


def test_text_is_tokenised_once_with_the_default_bos(tiny_llama, make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    result = perplexity(tiny_llama, tokenizer, ["ab" * 40, "cd" * 40], window=32)
    assert tokenizer("x")["input_ids"][0] == 1
    assert result.nll == pytest.approx(
        brute_force(tiny_llama, tokenizer, "ab" * 40 + "\n\n" + "cd" * 40, 32), rel=1e-6
    )


def test_gemma_gets_bos_in_every_window_as_by_lm_eval(tiny_llama, make_tokenizer):
    tokenizer, text = make_tokenizer(bos=True), EvaluationText("a", TEXT, "")
    tiny_llama.config.model_type = "gemma3_text"  # the exception is made by this name
    result = measure_perplexity(tiny_llama, tokenizer, text, window=64)
    assert result.protocol.endswith("BOS in each")
    assert result == measure_perplexity(tiny_llama, tokenizer, text, window=64, bos=True)
    assert measure_perplexity(tiny_llama, tokenizer, text, window=64, bos=False).protocol.endswith("no BOS")
    held_out = HeldOutText(tokenizer, text, window=64, max_windows=None, bos=bos_for(tiny_llama, tokenizer))
    assert held_out.measure(tiny_llama) == pytest.approx(result.nll, rel=1e-6) and held_out.describe()["bos"]
    for model_type, beginning in (("llama", True), ("gemma3_text", False)):
        tiny_llama.config.model_type = model_type
        assert bos_for(tiny_llama, make_tokenizer(bos=beginning)) is None


def test_bfloat16_likelihood_is_taken_in_float32(tiny_llama, tiny_tokenizer):
    model = tiny_llama.to(torch.bfloat16)
    result = perplexity(model, tiny_tokenizer, TEXT, window=64)
    assert result.nll == pytest.approx(brute_force(model, tiny_tokenizer, TEXT, 64), rel=1e-4)


def test_packaged_text_is_the_default(tiny_llama, tiny_tokenizer):
    from hf_structprune.data import wikitext2_sample

    expected = perplexity(tiny_llama, tiny_tokenizer, read_text(wikitext2_sample()), window=64, max_windows=3)
    assert perplexity(tiny_llama, tiny_tokenizer, window=64, max_windows=3) == expected


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_gradients_are_restored(tiny_llama, tiny_tokenizer, training):
    tiny_llama.train(training)
    tiny_llama.model.layers[1].eval()  # a part that somebody froze
    before = [m.training for m in tiny_llama.modules()]
    perplexity(tiny_llama, tiny_tokenizer, TEXT, window=64)
    assert [m.training for m in tiny_llama.modules()] == before
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_an_error(tiny_llama, tiny_tokenizer):
    tiny_llama.train()
    tiny_llama.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        perplexity(tiny_llama, tiny_tokenizer, TEXT, window=64)
    assert tiny_llama.training


def test_dropout_is_off(tiny_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, attention_dropout=0.5)
    model = AutoModelForCausalLM.from_config(config).train()
    first = perplexity(model, tiny_tokenizer, TEXT, window=64)
    assert first == perplexity(model, tiny_tokenizer, TEXT, window=64)


def test_progress_bar_follows_transformers(tiny_llama, tiny_tokenizer, capsys):
    was_enabled = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar()
        perplexity(tiny_llama, tiny_tokenizer, TEXT, window=64)
        assert "Perplexity" in capsys.readouterr().err
        logging.disable_progress_bar()
        perplexity(tiny_llama, tiny_tokenizer, TEXT, window=64)
        assert "Perplexity" not in capsys.readouterr().err
    finally:
        (logging.enable_progress_bar if was_enabled else logging.disable_progress_bar)()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 257}, "`window` is 257, but the model's context is 256"),
        ({"window": 1}, "`window` is 1; it must be an integer of at least 2"),
        ({"window": 64, "max_windows": 0}, "`max_windows` is 0"),
        ({"window": 64, "batch_size": 0}, "`batch_size` is 0"),
        ({"window": 200, "text": "short"}, "`window` is 200, but the text has only 5 tokens"),
        ({"window": 200, "text": []}, "only 0 tokens"),
    ],
)
def test_errors(tiny_llama, tiny_tokenizer, options, match):
    with pytest.raises(ConfigurationError, match=match):
        perplexity(tiny_llama, tiny_tokenizer, **{"text": TEXT} | options)
