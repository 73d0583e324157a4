"""SmolLM2-135M-Instruct, pruned and quantised, loaded in a fresh process by Transformers: perplexity of a text."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_structprune import CalibrationConfig, QuantizationConfig, quantize
from hf_structprune.quantization.quantizing import BACKENDS


pytestmark = pytest.mark.slow

# Perplexity over that of the model before. Measured, uniform and per layer: nf4 1.32 and 1.24, int8 of bitsandbytes
# 1.00 and 1.03, torchao 0.99 and 0.99; uniform GPTQ 1.34. AWQ and AutoRound were seen to be below their limits.
# The model is small, and was rounded to 4 bits of another kind before. A corrupt checkpoint is off by factors of a
# thousand.
BOUNDS = {
    ("bitsandbytes", 4): 1.45,
    ("bitsandbytes", 8): 1.05,
    ("torchao", 8): 1.02,
    ("gptq", 4): 1.45,
    ("awq", 4): 1.3,
    ("auto-round", 4): 1.3,
}
CALIBRATED = ("gptq", "awq", "auto-round")
PROGRAM = """
import json, math, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

text, folders, ours = json.loads(sys.argv[1])
if ours:
    import hf_structprune
ids = AutoTokenizer.from_pretrained(folders[0])(text, return_tensors="pt")["input_ids"][:, :128]
result = []
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits.float()
    result.append(math.exp(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])))
assert ours or "hf_structprune" not in sys.modules
print(json.dumps(result))
"""


def perplexities(folders, per_layer):
    """Perplexity of each folder's model on the beginning of the packaged WikiText-2 sample, in a new process."""
    from hf_structprune.data import wikitext2_sample

    text = wikitext2_sample().read_text(encoding="utf-8")[:4000]
    argument = json.dumps([text, list(map(str, folders)), per_layer])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)) if per_layer else ""}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, env=environment, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture
def in_float32(tmp_path):
    """Copies a checkpoint in float32, which CPUs without bfloat16 instructions compute in several times faster."""

    def copy(source):
        folder = tmp_path / "float32"
        shutil.copytree(source, folder)
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
        return folder

    return copy


def check(source, tmp_path, methods, per_layer):
    calibration = CalibrationConfig(num_samples=8, length=128)
    folders = [source]
    for method, bits in methods:
        config = QuantizationConfig(method, bits=bits, group_size=64, iterations=10, calibration=calibration)
        folders.append(quantize(source, tmp_path / f"{method}-{bits}", config).folder)
    before, *after = perplexities(folders, per_layer)
    ratios = {method: value / before for method, value in zip(methods, after, strict=True)}
    print(f"perplexity over that before: {ratios}")
    assert all(1 / BOUNDS[method] < ratio < BOUNDS[method] for method, ratio in ratios.items()), ratios


# What rounds while it loads; tiny models of both layouts go through all of them in `test_quantizing.py`.
def test_per_layer_checkpoints(per_layer_smollm2, in_float32, tmp_path):
    check(in_float32(per_layer_smollm2), tmp_path, [("bitsandbytes", 4), ("torchao", 8)], per_layer=True)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, which must stay empty."""
    monkeypatch.setenv("GPTQMODEL_DISABLE_PACK_EXT", "1")  # compiling it takes longer than packing without it
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield
    assert not any((tmp_path / "elsewhere").iterdir())


def needs(method):
    package = BACKENDS[method].packages[0]
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")


@pytest.mark.parametrize("method", [pytest.param(name, marks=needs(name)) for name in CALIBRATED])
def test_methods_with_calibration(method, pruned_smollm2, in_float32, tmp_path, elsewhere):
    check(in_float32(pruned_smollm2), tmp_path, [(method, 4)], per_layer=False)


@needs("auto-round")
def test_auto_round_with_layers_of_different_widths(per_layer_smollm2, in_float32, tmp_path, elsewhere):
    check(in_float32(per_layer_smollm2), tmp_path, [("auto-round", 4)], per_layer=True)
