"""ONNX: what the graph computes, with and without a past, and what is refused before anything is written."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import families
import numpy as np
import onnxruntime
import pytest
import torch
from tiny_tokenizers import build_tokenizer

from hf_structprune.errors import CheckpointError, ConfigurationError, ExportError, StructPruneError
from hf_structprune.export import onnx
from hf_structprune.export.onnx import ForwardWithCache, export_onnx, run_graph
from hf_structprune.model.structure import ModelStructure


# Layer 0 has no attention, layer 2 no MLP; the others have other widths and KV heads.
SKIPS = {"attention": [0], "mlp": [2]}


@pytest.fixture(scope="module", autouse=True)
def untraced():
    """pytest would listen to the log in which torch describes each step of tracing, and torch write it for pytest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._logging._internal, "trace_log", logging.Logger("not listened to"))
        yield


def uneven(name, dropped=SKIPS, **changes):
    """A model whose layers differ in width and heads, and lack what is dropped."""
    model = families.make_model(name, **changes)
    kinds = [kind for kind in families.kinds_of(name) if kind != "query_heads"]
    kept, counts = families.random_units(ModelStructure.of(model), kinds, uniform=False)
    gone = {(i, kind) for kind, layers in dropped.items() for i in layers}
    for layer, kind in list(kept):
        if (layer, "mlp" if kind == "mlp_neurons" else "attention") in gone:
            del kept[layer, kind], counts[layer, kind]
    return families.cut(model, kept, counts, "per_layer", dropped)


def padded(batch=3, length=12, padding=4):
    """Tokens and their mask: the first sequence is padded on the left."""
    tokens = families.make_tokens(batch, length, seed=1)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    return tokens, mask


def from_transformers(model, tokens, mask):
    """Logits of each sequence alone, without padding and without a cache."""
    with torch.no_grad():
        return torch.cat(
            [model(t[m.bool()][None], use_cache=False).logits[0] for t, m in zip(tokens, mask, strict=True)]
        )


class Graph:
    """The exported file in ONNX Runtime, with nothing else: NumPy arrays in and out by name."""

    def __init__(self, folder):
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.dtype = np.float16 if self.session.get_outputs()[0].type == "tensor(float16)" else np.float32

    def no_past(self, batch):
        shapes = {name: shape for name, shape in self.inputs.items() if name.startswith("past_key_values.")}
        return {name: np.zeros((batch, shape[1], 0, shape[3]), self.dtype) for name, shape in shapes.items()}

    def run(self, tokens, mask, prompt):
        """Logits by a prefill of `prompt` tokens and one step for each later token."""
        past, logits = self.no_past(len(tokens)), []
        for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))]:
            feed = {"input_ids": tokens[:, start:end].numpy(), "attention_mask": mask[:, :end].numpy(), **past}
            found = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
            past = {name: found[name.replace("past_key_values", "present")] for name in past}
            logits.append(torch.from_numpy(found["logits"]))
        return torch.cat(logits, 1)


@pytest.mark.parametrize(
    "name", ["mistral", "gemma3_text", "phi3", "smollm3", "falcon_7b", "opt", "gpt_neox", "mixtral"]
)
def test_the_forward_with_a_cache_is_that_of_the_model(name):
    model = families.make_model(name)
    tokens, mask = padded()
    forward = ForwardWithCache(model)
    with torch.no_grad():
        found = run_graph(forward, forward.past(len(tokens)), tokens, mask, prompt=9)
    torch.testing.assert_close(found[mask.bool()], from_transformers(model, tokens, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "qwen3_moe"])
def test_layers_without_attention_have_no_past(name):
    model = uneven(name)
    tokens, mask = padded()
    forward = ForwardWithCache(model)
    past = forward.past(len(tokens))
    assert list(past) == ["1", "2"]
    with torch.no_grad():
        found = run_graph(forward, past, tokens, mask, prompt=9)
    torch.testing.assert_close(found[mask.bool()], from_transformers(model, tokens, mask), atol=1e-5, rtol=1e-5)


# Most other families were exported once, see the README; tracing takes seconds a layer.
@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`(model, folder, what was reported)`: a Llama whose layers differ, in full precision."""
    model, folder = uneven("llama", eos_token_id=2, vocab_size=128), tmp_path_factory.mktemp("onnx") / "model"
    return model, folder, export_onnx(model, folder, tokenizer=build_tokenizer())


def check_logits(model, folder, tolerance):
    """In shares of the largest; sizes other than the traced ones (2, 3 and 5): batch, prompt, a past from 0 on."""
    graph = Graph(folder)
    for batch, length, padding, prompt in ((1, 6, 0, 1), (3, 12, 4, 9), (4, 30, 1, 30)):
        tokens, mask = padded(batch, length, padding)
        found, wanted = graph.run(tokens, mask, prompt)[mask.bool()].float(), from_transformers(model, tokens, mask)
        assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


@pytest.mark.slow
def test_onnx_runtime_gives_the_logits_of_transformers(exported):
    model, folder, report = exported
    names = {"config.json", "generation_config.json", "export.json", "model.onnx", "tokenizer.json"}
    assert names < {path.name for path in folder.iterdir()}
    assert report.size == sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert 0 < report.details["difference"] < 1e-5
    assert b"/hf_structprune/" not in (folder / "model.onnx").read_bytes()  # no paths of the machine that wrote it
    check_logits(model, folder, tolerance=1e-5)


@pytest.mark.slow
def test_onnx_runtime_genai_generates_the_same_tokens(exported):
    model, folder, _ = exported
    genai = pytest.importorskip("onnxruntime_genai")
    prompt = families.make_tokens(1, 6, seed=2)
    session = genai.Model(str(folder))
    parameters = genai.GeneratorParams(session)
    parameters.set_search_options(max_length=30)
    generator = genai.Generator(session, parameters)
    generator.append_tokens(prompt.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_length=30, do_sample=False)
    assert len(expected[0]) > 12
    assert list(generator.get_sequence(0)) == [int(token) for token in expected[0] if token != 2]


@pytest.mark.slow
def test_half_precision_of_a_model_without_some_layers(tmp_path):
    model = families.make_model("gemma2", vocab_size=128)  # one layer of three has a sliding window
    model = families.cut(model, {}, {}, "uniform", {"layers": [1, 2]})
    report = export_onnx(model, tmp_path / "out", dtype="fp16")
    assert report.details["dtype"] == "float16" and 1e-5 < report.details["difference"] < 1e-2
    assert model.dtype == torch.float32  # the caller's model is left alone
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    weights = sum(p.numel() for p in model.parameters())
    # Tied embeddings are in the file twice.
    assert 1.9 * weights < (tmp_path / "out" / "model.onnx.data").stat().st_size < 3 * weights
    assert not (tmp_path / "out" / "genai_config.json").exists() and "token that ends" in report.notes[0]
    check_logits(model, tmp_path / "out", tolerance=1e-2)


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
Disk = namedtuple("Disk", "total used free")


@pytest.mark.parametrize(
    "options, error, parts",
    [
        ({"dtype": "bf16"}, ConfigurationError, ["`dtype` is 'bf16'", "fp32, fp16"]),
        ({"output": "a file"}, ConfigurationError, ["is a file"]),
        ({"output": "source"}, ConfigurationError, ["the checkpoint itself"]),
        ({"model": "no/such"}, CheckpointError, ["cannot load", "no/such"]),
    ],
)
def test_what_cannot_be_meant(options, error, parts, tmp_path, tiny_llama):
    (tmp_path / "a file").write_text("mine")
    tiny_llama.save_pretrained(tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    model = tmp_path / options.get("model", "source")
    output = tmp_path / options.get("output", "out")
    with pytest.raises(error) as caught:
        export_onnx(model, output, **{k: v for k, v in options.items() if k == "dtype"})
    assert all(part in str(caught.value) for part in parts), caught.value
    assert sorted(tmp_path.rglob("*")) == before


def test_quantised_models_are_refused(tmp_path, tiny_llama):
    tiny_llama.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTISED}))
    with pytest.raises(ExportError, match="quantised .bitsandbytes."):
        export_onnx(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said_before_the_model_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_structprune.installed.find_spec", lambda name: None)
    with pytest.raises(StructPruneError, match=r'onnxruntime is missing: `pip install "hf-structprune\[onnx\]"`'):
        export_onnx("no/such/model", tmp_path / "out")


def test_too_little_memory_or_disk(monkeypatch, tmp_path, tiny_llama):
    with monkeypatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: namedtuple("Memory", "available")(1000))
        with pytest.raises(ExportError, match="GB of memory"):
            export_onnx(tiny_llama, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(1, 1, 1000))
    with pytest.raises(CheckpointError, match="the disk has"):
        export_onnx(tiny_llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_exported_leaves_nothing(monkeypatch, tmp_path, tiny_llama):
    def fail(*args):
        raise RuntimeError("no such operator\nand a page of details")

    monkeypatch.setattr("transformers.exporters.exporter_onnx.OnnxExporter.export", fail)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="cannot export a LlamaForCausalLM to ONNX: no such operator$"):
        export_onnx(tiny_llama, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]


@pytest.mark.slow
def test_a_graph_of_other_weights_is_not_kept(exported, monkeypatch, tmp_path):
    model, folder, _ = exported

    class Wrong:
        def save_pretrained(self, path):
            shutil.copytree(folder, path, dirs_exist_ok=True)

    monkeypatch.setattr(onnx, "_trace", lambda forward: Wrong())
    export_onnx(model, tmp_path / "right")
    model = copy.deepcopy(model)
    model.get_output_embeddings().weight.data[5, 0] += 1.0
    with pytest.raises(ExportError, match="other logits"):
        export_onnx(model, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


# Runs the exported folder with NumPy, ONNX Runtime and a tokenizer; neither torch nor this package may be imported.
STRANGER = """
import json, sys
sys.modules["hf_structprune"] = sys.modules["torch"] = None
import numpy as np, onnxruntime
from tokenizers import Tokenizer
folder, prompt, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
names = [value.name for value in session.get_outputs()]
past = {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in session.get_inputs() if "past" in v.name}
tokens = Tokenizer.from_file(folder + "/tokenizer.json").encode(prompt).ids
new, first = list(tokens), None
for _ in range(steps):
    feed = {"input_ids": np.array([new]), "attention_mask": np.ones((1, len(tokens)), np.int64), **past}
    found = dict(zip(names, session.run(None, feed)))
    past = {name: found[name.replace("past_key_values", "present")] for name in past}
    first = found["logits"][0, -1].tolist() if first is None else first
    new = [int(found["logits"][0, -1].argmax())]
    tokens += new
print(json.dumps({"tokens": tokens, "logits": first}))
"""


@pytest.mark.slow
def test_a_process_without_torch(exported):
    model, folder, _ = exported
    prompt, steps = "The three primary colours are", 20
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), prompt, str(steps)], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    inputs = build_tokenizer()(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
        logits = model(**inputs).logits[0, -1]
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, atol=1e-3, rtol=1e-4)
    assert found["tokens"] == expected[0].tolist()
