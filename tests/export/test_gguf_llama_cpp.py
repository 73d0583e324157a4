"""GGUF files in llama.cpp itself: the same tokens, the same distributions, the same text.

xllamacpp brings llama.cpp compiled and is installed for the tests; what is asked of it is asked of llama-cpp-python,
too, where that is installed: all of it passed with 0.3.36 compiled, which takes minutes.
"""

import math

import pytest
import torch
from families import cut, make_model, make_tokens, random_units
from llama_runtime import RUNTIMES
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import SPLITS, TEXTS, byte_level, sentence_piece

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.data import wikitext2_sample
from hf_structprune.export.gguf import QUANTISED, export_gguf
from hf_structprune.model.structure import ModelStructure


VOCAB = 400
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
PROMPTS = ["The capital of France is", "def add(a, b):\n    return", "The three primary colours are"]


@pytest.fixture(params=RUNTIMES, ids=lambda runtime: runtime.package)
def runtime(request):
    pytest.importorskip(request.param.package)
    return request.param


def model_of(name, **changes):
    return make_model(name, vocab_size=VOCAB, **({"sliding_window": None} if name == "mistral" else {}), **changes)


def pruned(name, kinds=(), dropped=None, **changes):
    """Random units of the kinds are cut, other numbers of them in each layer if they are not to be uniform."""
    model, uniform = model_of(name, **changes), "uniform" in kinds
    kept, counts = random_units(ModelStructure.of(model), [kind for kind in kinds if kind != "uniform"], uniform)
    return cut(model, kept, counts, "uniform" if uniform else "per_layer", dropped)


def scaled(name, **rope):
    return model_of(name, rope_parameters={"rope_theta": 1e4, "original_max_position_embeddings": 16, **rope})


def small_heads(name, **options):
    config = PruningConfig(keep={"head_dim": 4}, head_dim_criterion="magnitude", compensation=False, **options)
    return StructuredPruner(model_of(name), config).prune()


def narrow(name, **changes):
    config = PruningConfig(keep={"hidden": 24}, hidden_criterion="magnitude", compensation=False, round_to=1)
    return StructuredPruner(model_of(name, **changes), config).prune()


GEMMA3 = dict(num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"])
ALIKE = ("uniform", "kv_groups", "mlp_neurons")
MODELS = {
    "llama": lambda: model_of("llama"),
    "tied llama": lambda: model_of("llama", tie_word_embeddings=True),
    "llama with biases": lambda: model_of("llama_bias"),
    "mistral": lambda: model_of("mistral"),
    "qwen2": lambda: model_of("qwen2"),
    "qwen3": lambda: model_of("qwen3"),
    "smollm3": lambda: model_of("smollm3", no_rope_layers=[1, 1, 1, 0], num_hidden_layers=4),
    "granite": lambda: model_of("granite"),
    "gemma3": lambda: model_of("gemma3_text", **GEMMA3),
    "linear positions": lambda: scaled("qwen2", rope_type="linear", factor=4.0),
    "yarn": lambda: scaled("qwen2", rope_type="yarn", factor=4.0),
    "llama3 positions": lambda: scaled("llama", **LLAMA3),
    "mistral, heads": lambda: pruned("mistral", ("uniform", "query_heads", "mlp_neurons")),
    "llama, heads": lambda: pruned("llama", ("uniform", "kv_groups", "mlp_neurons")),
    "qwen2, heads": lambda: pruned("qwen2", ("uniform", "query_heads")),
    "qwen3, heads": lambda: pruned("qwen3", ("uniform", "query_heads")),
    "qwen3, heads wider than the hidden size": lambda: pruned("qwen3", ALIKE, {"layers": [1]}, head_dim=16),
    "smollm3, heads": lambda: pruned("smollm3", ALIKE, num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0]),
    "granite, heads": lambda: pruned("granite", ALIKE),
    "gemma3, heads, fewer layers": lambda: pruned(
        "gemma3_text", ("uniform", "query_heads", "mlp_neurons"), {"layers": [5]}, **GEMMA3
    ),
    "llama, hidden size": lambda: narrow("llama"),
    "qwen2, hidden size": lambda: narrow("qwen2"),
    "qwen3, hidden size": lambda: narrow("qwen3"),
    "gemma3, hidden size": lambda: narrow("gemma3_text", **GEMMA3),
    "llama, smaller heads": lambda: small_heads("llama"),
    "qwen2, smaller heads": lambda: small_heads("qwen2"),
    "granite, smaller heads": lambda: small_heads("granite"),
    "llama, layers differ": lambda: pruned("llama", ("mlp_neurons", "kv_groups")),
    "llama with biases, layers differ": lambda: pruned("llama_bias", ("mlp_neurons", "kv_groups")),
    "qwen2, layers differ": lambda: pruned("qwen2", ("mlp_neurons", "kv_groups")),
    "no attention at the ends": lambda: pruned("llama", dropped={"attention": [0, 2]}),
    "no attention within": lambda: pruned("mistral", dropped={"attention": [1]}),
    "no MLP at the ends": lambda: pruned("llama", dropped={"mlp": [0, 2]}),
    "no MLP within": lambda: pruned("qwen2", dropped={"mlp": [1]}),
    "neither": lambda: pruned("llama", dropped={"attention": [1], "mlp": [1]}),
}


def gelu_of_llama_cpp(x):
    """On a CPU it looks values up in a table in half precision: what is near the border of two entries may differ."""
    return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


@pytest.mark.parametrize("name", MODELS)
def test_the_same_distribution(name, runtime, tmp_path):
    """Every token of the vocabulary, after 1, 7 and 40 tokens."""
    model = MODELS[name]()
    llama = runtime(export_gguf(model, tmp_path / "m.gguf", tokenizer=byte_level(), quant="f32").path)
    gelus = [module for module in model.modules() if type(module).__name__ == "GELUTanh"]
    for gelu in gelus:
        gelu.forward = gelu_of_llama_cpp
    for length in (1, 7, 40):
        tokens = make_tokens(1, length, vocab=VOCAB)
        with torch.no_grad():
            expected = model(tokens).logits[0, -1].double().log_softmax(-1)
        got = torch.as_tensor(llama.distribution(tokens[0].tolist(), VOCAB))
        torch.testing.assert_close(got, expected, atol=5e-3 if gelus else 5e-5, rtol=0)


@pytest.mark.parametrize("split", [*SPLITS, "SentencePiece", "SentencePiece without prefix", "SentencePiece of Gemma"])
def test_the_same_tokens(split, runtime, tmp_path):
    if split in SPLITS:
        tokenizer = byte_level(split, bos=split == "llama-bpe")
    else:
        tokenizer = sentence_piece(prefix=split == "SentencePiece")
    if split == "SentencePiece of Gemma":  # which splits at spaces once there are none
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    model = make_model("llama", vocab_size=len(tokenizer))
    llama = runtime(export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer).path)
    for text in [*TEXTS, "\n".join(TEXTS), "  two  spaces ", "<s>the dog</s> and the fox"]:
        assert llama.tokenize(text) == tokenizer.encode(text), text


@pytest.fixture(scope="module")
def real(per_layer_smollm2, tmp_path_factory):
    """The model and its tokenizer in Transformers, and the file; its weights fit half precision exactly."""
    file = export_gguf(per_layer_smollm2, tmp_path_factory.mktemp("gguf") / "m.gguf").path
    model = AutoModelForCausalLM.from_pretrained(per_layer_smollm2, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(per_layer_smollm2), file


@pytest.mark.slow
def test_a_real_model_answers_the_same(real, runtime):
    model, tokenizer, file = real
    llama = runtime(file)
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(tokens, max_new_tokens=12, do_sample=False)[0, tokens.shape[1] :].tolist()
        assert llama.tokenize(prompt) == tokens[0].tolist()
        assert llama.greedy(tokens[0].tolist(), 12) == expected, prompt


@pytest.mark.slow
@pytest.mark.parametrize("quant, bound", [("q8_0", 0.02), ("q4_0", 0.4), ("q4_k_m", 0.06)])
def test_quantised(quant, bound, real, per_layer_smollm2, runtime, tmp_path):
    if quant in QUANTISED:
        pytest.importorskip("llama_cpp")
    result = export_gguf(per_layer_smollm2, tmp_path / "m.gguf", quant=quant)
    ours, theirs = perplexities(*real[:2], runtime(result.path))
    print(f"perplexity: Transformers {ours:.3f}, {quant} {theirs:.3f}, {result.size / 1e6:.1f} MB, {result}")
    assert theirs == pytest.approx(ours, rel=bound)


def perplexities(model, tokenizer, llama, length=96):
    """Of two windows of WikiText-2 in Transformers and in llama.cpp, letters of one byte alone."""
    text = wikitext2_sample().read_text(encoding="utf-8")[:20_000].encode("ascii", "ignore").decode()
    tokens, losses = tokenizer(text).input_ids, ([], [])
    for start in (500, 2500):
        window = tokens[start : start + length]
        with torch.no_grad():
            scores = model(torch.tensor([window])).logits[0, :-1].double().log_softmax(-1)
        losses[0].extend(-row[token].item() for row, token in zip(scores, window[1:], strict=True))
        losses[1].extend(-value for value in llama.likelihoods(window))
    return [math.exp(sum(values) / len(values)) for values in losses]
