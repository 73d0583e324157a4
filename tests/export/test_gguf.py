"""GGUF files read back: with gguf's own reader, and with Transformers, another implementation of the format."""

import ctypes
import json
import shutil
import sys
import types
from collections import namedtuple
from importlib.machinery import ModuleSpec

import gguf
import pytest
import torch
from families import KV_HEADS, LAYERS, cut, logits, make_model, make_tokens, random_units
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import TEXTS, byte_level, sentence_piece

from hf_structprune.errors import ConfigurationError, ExportError, PlaceError, StructPruneError
from hf_structprune.export.gguf import export_gguf
from hf_structprune.model.loading import load_model
from hf_structprune.model.structure import ModelStructure


VOCAB = 400
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def model_of(name, **changes):
    changes = {"vocab_size": VOCAB, **({"sliding_window": None} if name == "mistral" else {}), **changes}
    return make_model(name, **changes)


def without(name, dropped, **changes):
    """A per-layer model without some sublayers."""
    model = model_of(name, **changes)
    return cut(model, {}, {}, "per_layer", dropped)


def pruned(name, kinds, uniform, **changes):
    model = model_of(name, **changes)
    kept, counts = random_units(ModelStructure.of(model), kinds, uniform)
    return cut(model, kept, counts, "uniform" if uniform else "per_layer")


def stored_name(name):
    """The name in the file, by a table of our own."""
    module, _, leaf = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{leaf}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{leaf}"


def in_neighbours(rows, head_dim=8):
    """Row `i` of the first half of a head, and row `i` of the second, side by side."""
    order = [
        start + half * head_dim // 2 + i
        for start in range(0, len(rows), head_dim)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return rows[order]


@pytest.fixture
def export(tmp_path):
    def run(model, tokenizer=None, **options):
        options = {"quant": "f32", **options}
        result = export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer or byte_level(), **options)
        return result, GGUFReader(result.path)

    return run


def value(reader, key):
    return reader.fields[key].contents()


def tensors(reader):
    return {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("name", ["llama", "llama_bias", "mistral", "qwen2", "qwen3"])
def test_every_tensor_is_in_the_file(name, export):
    model = model_of(name, tie_word_embeddings=False)
    result, reader = export(model)
    stored, rotated = tensors(reader), ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
    assert len(stored) == len(model.state_dict())
    for key, tensor in model.state_dict().items():
        expected = in_neighbours(tensor) if key.endswith(rotated) and not name.startswith("qwen") else tensor
        assert torch.equal(torch.tensor(stored[stored_name(key)].data), expected), key
    assert result.size == result.path.stat().st_size


def test_hyperparameters(export):
    model = model_of("mistral", rope_parameters={"rope_theta": 12345.0, "rope_type": "default"}, rms_norm_eps=1e-4)
    _, reader = export(model)
    expected = {
        "general.architecture": "llama", "llama.block_count": LAYERS, "llama.context_length": 64,
        "llama.embedding_length": 32, "llama.feed_forward_length": 48, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": KV_HEADS, "llama.attention.key_length": 8, "llama.attention.value_length": 8,
        "llama.rope.dimension_count": 8, "llama.rope.freq_base": 12345.0, "llama.vocab_size": VOCAB,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-4),
    }  # fmt: skip
    assert {key: value(reader, key) for key in expected} == expected


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_same_model(name, tied, export):
    changes = {"head_dim": 128} if name == "qwen3" else {}  # what Transformers takes the heads of its GGUF files to be
    model, tokenizer = model_of(name, tie_word_embeddings=tied, **changes), byte_level("gpt-2")
    result, reader = export(model, tokenizer)
    assert ("output.weight" in tensors(reader)) is not tied
    where = dict(gguf_file=result.path.name)
    again = AutoModelForCausalLM.from_pretrained(result.path.parent, **where, dtype=torch.float32).eval()
    tokens = make_tokens(2, 12, vocab=VOCAB)
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)
    read = AutoTokenizer.from_pretrained(result.path.parent, **where)
    assert tokenizer.get_vocab().items() <= read.get_vocab().items()
    assert read(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids


def test_a_file_that_holds_the_matrix_of_a_tied_model_twice(export, caplog):
    model = model_of("llama", tie_word_embeddings=False)
    embeddings, head = (one.weight.data for one in (model.get_input_embeddings(), model.get_output_embeddings()))
    for noise, said in ((1.0, False), (0.05, True)):
        embeddings.copy_(head + noise * head.std() * torch.randn_like(head))
        path = export(model)[0].path
        caplog.clear()
        assert load_model(path.parent, gguf_file=path.name).num_parameters() == model.num_parameters()
        assert ("are the same to 5%: the file holds the one matrix" in caplog.text) is said


def test_pruned_heads(export):
    _, reader = export(pruned("mistral", ("query_heads", "mlp_neurons"), True))
    names = ("embedding_length", "attention.head_count", "attention.key_length", "feed_forward_length")
    assert [value(reader, f"llama.{name}") for name in names] == [32, 2, 8, 24]
    assert tensors(reader)["blk.0.attn_q.weight"].data.shape == (16, 32)


def test_qwen2_with_pruned_heads_is_a_llama_with_biases(export):
    model = pruned("qwen2", ("query_heads",), True)
    result, reader = export(model)
    assert result.details["architecture"] == "llama"
    bias = model.model.layers[0].self_attn.q_proj.bias
    assert torch.equal(torch.tensor(tensors(reader)["blk.0.attn_q.bias"].data), in_neighbours(bias.detach()))


def test_layers_that_are_not_alike_are_deci(export):
    model = pruned("llama", ("mlp_neurons", "kv_groups"), False)
    result, reader = export(model)
    layers = model.model.layers
    sizes = {
        "feed_forward_length": [layer.mlp.gate_proj.out_features for layer in layers],
        "attention.head_count": [layer.self_attn.q_proj.out_features // 8 for layer in layers],
        "attention.head_count_kv": [layer.self_attn.k_proj.out_features // 8 for layer in layers],
    }
    assert all(len(set(values)) > 1 for values in sizes.values())
    assert {name: value(reader, f"deci.{name}") for name in sizes} == sizes
    assert result.details["architecture"] == "deci" and any("deci" in note for note in result.notes)


def test_missing_sublayers(export):
    _, reader = export(without("llama", {"attention": [0, 2], "mlp": [1]}))
    assert value(reader, "deci.attention.head_count") == [1, 4, 0]  # llama.cpp refuses a first layer without attention
    assert value(reader, "deci.attention.head_count_kv") == [1, 2, 0]
    assert value(reader, "deci.feed_forward_length") == [48, 32, 48]  # and forgets the attention where there is no MLP
    stored = tensors(reader)
    for name in ("blk.0.attn_q", "blk.0.attn_output", "blk.1.ffn_up", "blk.1.ffn_down"):
        assert not stored[f"{name}.weight"].data.any()
    assert {
        "blk.0.attn_norm.weight",
        "blk.1.ffn_norm.weight",
    } <= stored.keys()  # without which llama.cpp does not load
    assert "blk.2.attn_q.weight" not in stored and "blk.2.attn_norm.weight" not in stored


def test_half_precision_is_exact_for_weights_that_are_half(export):
    model = model_of("llama").half().float()
    assert all(
        torch.equal(torch.tensor(tensor.data).float(), model.get_parameter("lm_head.weight"))
        for tensor in export(model, quant="f16")[1].tensors
        if tensor.name == "output.weight"
    )
    model = model_of("llama").bfloat16()
    result, reader = export(model, quant="bf16")
    read = dequantize(tensors(reader)["output.weight"].data, gguf.GGMLQuantizationType.BF16)
    assert torch.equal(torch.tensor(read), model.lm_head.weight.float())
    assert result.details["matrices"] == {"bf16": 7 * LAYERS + 2}
    assert tensors(reader)["output_norm.weight"].tensor_type.name == "F32"


def test_q8_0(export):
    model = model_of("llama")  # hidden size 32: one block; MLP width 48: none
    result, reader = export(model, quant="q8_0")
    assert result.details["matrices"] == {"q8_0": 6 * LAYERS + 2, "f16": LAYERS}
    assert "Rows of 3 of 23 matrices" in result.notes[0] and "3 as f16" in result.notes[0]
    weight = model.model.layers[1].mlp.up_proj.weight
    read = torch.tensor(dequantize(tensors(reader)["blk.1.ffn_up.weight"].data, gguf.GGMLQuantizationType.Q8_0))
    # Half a step, and what 127 steps lose by the scale that is stored in half precision.
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((read - weight).abs() <= step * 0.563).all() and not torch.equal(read, weight)
    assert value(reader, "general.file_type") == 7


def test_too_large_for_half_precision(export, tmp_path):
    model = model_of("llama")
    model.lm_head.weight.data[0, 0] = 7e4
    with pytest.raises(ExportError, match="output.weight holds 7e.04, too large for f16. Say --quant bf16"):
        export(model, quant="f16")
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_earlier_file(export, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_text("earlier")
    monkeypatch.setattr(
        gguf.GGUFWriter, "write_tensors_to_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        export(model_of("llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_text() == "earlier"


def test_too_little_room(export, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(100_000))
    with pytest.raises(PlaceError, match=r"needs \d.*kB, but the disk has 100kB left"):
        export(model_of("llama"))
    assert not list(tmp_path.iterdir())


LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 1.0], "factor": 1.0,
    "long_factor": [1.0, 1.5, 2.0, 1.0], "attention_factor": 1.0, "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, changes, text",
    [
        ("gemma2", {}, "Gemma2ForCausalLM cannot be written.*LlamaForCausalLM"),
        ("smollm3", {}, "every fourth layer"),
        ("gemma3_text", {}, r"every 6th layer .*those that do are \[1\] of 3"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 3, "query_pre_attn_scalar": 16}, "scalar` 8.*is 16"),
        ("llama", {"hidden_act": "gelu"}, "SiLU; this model's is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
            "'llama3' cannot be written for llama.cpp's qwen2",
        ),
        ("qwen3", {"rope_parameters": LONG}, "'longrope' cannot be written for llama.cpp's qwen3"),
        ("llama", {"rope_parameters": {**LONG, "long_factor": [2.0] * 4}}, "'longrope' cannot be written"),
        ("llama", {"rope_parameters": {**LONG, "attention_factor": 1.2}}, "'longrope' cannot be written"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 1.0,
                                 "original_max_position_embeddings": 16}},
            "`attention_factor` set",
        ),
    ],
)  # fmt: skip
def test_models_that_llama_cpp_computes_differently(name, changes, text, export):
    with pytest.raises(ExportError, match=text):
        export(model_of(name, **changes))


def test_per_layer_models_of_other_families(export):
    with pytest.raises(ExportError, match="layers of this Qwen3ForCausalLM are not alike.*layout='uniform'"):
        export(pruned("qwen3", ("mlp_neurons",), False))


def test_a_sliding_window_limits_the_context(export):
    result, reader = export(model_of("mistral", sliding_window=16))
    assert value(reader, "llama.context_length") == 16
    assert result.notes == ["llama.cpp reads no sliding window here: the context is written as 16 tokens."]


def test_vocabulary(export):
    tokenizer = byte_level("llama-bpe", size=390, bos=True, chat_template="{{ messages }}")
    tokenizer.add_tokens(["<user>"])
    _, reader = export(model_of("llama"), tokenizer)
    tokens, types = (value(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assert tokens == [*tokenizer.convert_ids_to_tokens(range(391)), *(f"[PAD{i}]" for i in range(391, VOCAB))]
    assert types == [3, 3, 3] + [1] * 387 + [4] + [5] * 9  # control, normal, user-defined, unused
    expected = {"model": "gpt2", "pre": "llama-bpe", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
                "add_bos_token": True, "add_eos_token": False}  # fmt: skip
    assert {key: value(reader, f"tokenizer.ggml.{key}") for key in expected} == expected
    assert value(reader, "tokenizer.chat_template") == "{{ messages }}"


def test_scores_of_sentence_piece_are_the_order_of_merges(export):
    tokenizer = sentence_piece(size=395)
    _, reader = export(model_of("llama"), tokenizer)
    scores = dict(zip(*(value(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "scores")), strict=True))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    ordered = [scores["".join(pair)] for pair in merges]
    assert len(ordered) > 40 and ordered == sorted(ordered, reverse=True) and len(set(ordered)) == len(ordered)
    assert scores["q"] < min(ordered)
    types = value(reader, "tokenizer.ggml.token_type")
    assert types[0] == 2 and types[1:3] == [3, 3] and types[3:259] == [6] * 256 and types[259] == 1
    assert value(reader, "tokenizer.ggml.add_space_prefix") is True


def test_other_tokenizers(export, tiny_tokenizer):
    with pytest.raises(ExportError, match="The tokenizer is a WordLevel model"):
        export(model_of("llama"), tiny_tokenizer)
    with pytest.raises(ExportError, match="has a token 399, but the embedding only 64 rows"):
        export(model_of("llama", vocab_size=64))
    from tokenizers import pre_tokenizers

    other = byte_level()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ExportError, match="no tokenizer like this one.*Punctuation.*known are gpt-2, smollm"):
        export(model_of("llama"), other)


def test_bad_arguments(export, tmp_path, monkeypatch):
    model = model_of("llama")
    with pytest.raises(ConfigurationError, match="`quant` is 'q4'; allowed values are f32, f16, bf16, q8_0, q2_k"):
        export(model, quant="q4")
    with pytest.raises(ConfigurationError, match="is a folder"):
        export_gguf(model, tmp_path, tokenizer=byte_level())
    with pytest.raises(ExportError, match="no tokenizer"):
        export_gguf(model, tmp_path / "x.gguf")
    monkeypatch.setattr("hf_structprune.export.gguf.find_spec", lambda _: None)
    with pytest.raises(StructPruneError, match="pip install llama-cpp-python"):
        export(model, quant="q4_k_m")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ExportError, match=r"The model is quantised \(gptq\)"):
        export(model)
    assert not list(tmp_path.iterdir())


def fake_llama_cpp(monkeypatch, status):
    """llama-cpp-python, whose quantiser copies the file; returns what it was asked."""
    calls = []

    def quantise(source, target, parameters):
        calls.append((GGUFReader(source.decode()), parameters._obj.ftype))
        shutil.copy(source.decode(), target.decode())
        return status

    class Parameters(ctypes.Structure):
        _fields_ = [("ftype", ctypes.c_int)]

    module = types.ModuleType("llama_cpp")
    module.__spec__ = ModuleSpec("llama_cpp", None)
    module.llama_model_quantize_default_params, module.llama_model_quantize = Parameters, quantise
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return calls


@pytest.mark.parametrize("dtype, before", [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_llama_cpp_quantises_a_file_that_has_lost_nothing(dtype, before, export, monkeypatch, tmp_path):
    calls = fake_llama_cpp(monkeypatch, 0)
    model = model_of("llama").to(getattr(torch, dtype))
    result, _ = export(model, quant="q4_k_m")
    ((given, file_type),) = calls
    assert file_type == 15 and tensors(given)["output.weight"].tensor_type.name == before
    assert "Rows of 23 of 23 matrices do not divide into the blocks of 256 values of q4_k_m" in result.notes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_llama_cpp_fails(export, monkeypatch, tmp_path):
    fake_llama_cpp(monkeypatch, 1)
    with pytest.raises(ExportError, match="could not quantise whole.gguf"):
        export(model_of("llama"), quant="q4_0")
    assert not list(tmp_path.iterdir())
