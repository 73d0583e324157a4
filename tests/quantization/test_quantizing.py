"""`quantize` on tiny models: what is written, what goes along, what is refused before any work."""

import json
from collections import namedtuple

import psutil
import pytest
import torch
from families import make_model
from forced_hardware import FOUR_BIT_CPUS, force_four_bit_cpu
from safetensors.torch import load_file
from tiny_tokenizers import build_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_structprune import CalibrationConfig, PruningConfig, QuantizationConfig, StructuredPruner, installed, quantize
from hf_structprune.commands.cli import main
from hf_structprune.errors import CheckpointError, ConfigurationError, StructPruneError, UnsupportedModelError
from hf_structprune.evaluation.evaluator import MODEL
from hf_structprune.evaluation.results import EvaluationResult
from hf_structprune.hub.words import QUANTIZATION_NAME, read_report
from hf_structprune.model.loading import load_model
from hf_structprune.quantization import quantizing
from hf_structprune.quantization.quantizing import BACKENDS, Unquantised
from hf_structprune.recovery.weights import dequantised, is_quantised


IDS = torch.arange(3, 35)[None]
Memory = namedtuple("Memory", "available")


def saved(folder, **settings):
    """A folder with a tiny dense model and its tokenizer."""
    make_model("llama", **settings).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def dense(tmp_path):
    return saved(tmp_path / "dense", hidden_size=64, intermediate_size=96, tie_word_embeddings=True)


@pytest.fixture
def pruned(dense, tmp_path, request):
    """A pruned checkpoint; the last layer stays whole in the layout `per_layer`."""
    layout = getattr(request, "param", "uniform")
    settings = dict(criterion="l2", compensation=False, layout=layout, units=("mlp_neurons",), round_to=32)
    pruner = StructuredPruner.from_pretrained(
        dense, PruningConfig(**settings, protect_last=int(layout == "per_layer"))
    )
    pruner.prune(0.1)
    pruner.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def load(folder):
    return load_model(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def stored(layer):
    """The weight that a quantised linear map stands for."""
    return dequantised(layer).weight if is_quantised(layer) else layer.weight.dequantize()


def steps(weight, bits):
    """The largest rounding error of each weight: half the widest gap between values of its block or row.

    nf4: 0.139 of the block's largest value, and a little for scales that are quantised too. int8: half of 1/127 of the
    row's largest, and a little for the float16 that bitsandbytes rounds through.
    """
    if bits == 4:
        largest = weight.reshape(-1, 64).abs().amax(1, keepdim=True)
        return (0.16 * largest).expand(-1, 64).reshape(weight.shape)
    return (0.6 / 127 * weight.abs().amax(1, keepdim=True)).expand_as(weight)


@pytest.mark.parametrize("pruned", ["uniform", "per_layer"], indirect=True)
@pytest.mark.parametrize(
    ("method", "bits", "near", "cpu"),
    [
        *[("bitsandbytes", 4, 1e-4, cpu) for cpu in FOUR_BIT_CPUS],
        ("bitsandbytes", 8, 0.1, "plain"), ("torchao", 8, 1e-4, None),
    ],
)  # fmt: skip
def test_reloads(method, bits, near, cpu, pruned, tmp_path, monkeypatch):
    """Every weight is within a rounding step, and the model computes with these; int8 also rounds activations."""
    pytest.importorskip(method)
    if cpu is not None:
        force_four_bit_cpu(monkeypatch, cpu)
    result = quantize(pruned, tmp_path / "out", QuantizationConfig(method, bits=bits))
    dense, quantised = load(pruned), load(result.folder)
    layers = [name for name, module in dense.model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == 7 * dense.config.num_hidden_layers
    for name in layers:
        weight, after = dense.model.get_submodule(name).weight, stored(quantised.model.get_submodule(name)).detach()
        assert (weight - after).abs().max() > 0 and ((weight - after).abs() <= steps(weight, bits)).all()
        weight.data.copy_(after)
    one, other = logits(quantised), logits(dense)
    assert (one - other).norm() < near * other.norm()
    config = json.loads((result.folder / "config.json").read_text())
    assert config["hf_structprune"]["base_model"] == "dense"
    per_layer = (pruned / "modeling_structprune.py").is_file()
    assert ("per_layer_config" in config) == per_layer == (result.folder / "modeling_structprune.py").is_file()


def test_a_uniform_checkpoint_is_one_of_transformers_alone(pruned, tmp_path):
    """No code and no configuration of ours, nor a class that only this package gives the auto class."""
    pytest.importorskip("bitsandbytes")
    folder = quantize(pruned, tmp_path / "out", QuantizationConfig("bitsandbytes", bits=8)).folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model) is LlamaForCausalLM and not model.config.is_heterogeneous
    assert not {"auto_map", "per_layer_config"} & json.loads((folder / "config.json").read_text()).keys()
    ours = logits(load(folder))
    assert (logits(model) - ours).norm() < 1e-4 * ours.norm()


@pytest.mark.parametrize(("method", "bits"), [("bitsandbytes", 4), ("bitsandbytes", 8), ("torchao", 8)])
def test_weights_shrink_as_the_method_says(method, bits, dense, tmp_path):
    pytest.importorskip(method)
    result = quantize(dense, tmp_path / "out", QuantizationConfig(method, bits=bits, double_quant=False))
    model = AutoModelForCausalLM.from_pretrained(dense)
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    weights, rows = sum(m.weight.numel() for m in linears), sum(m.out_features for m in linears)
    rest = sum(p.numel() * 4 for p in model.parameters()) - 4 * weights
    # A float32 scale for 64 weights, or for a row; what describes them takes less than 1 kB a layer.
    exact = rest + weights * bits // 8 + 4 * (weights // 64 if bits == 4 else rows)
    tensors = load_file(result.folder / "model.safetensors")
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert exact <= held < exact + 1000 * len(linears)
    assert result.report["weights"]["bytes"] == (result.folder / "model.safetensors").stat().st_size
    assert result.report["weights"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert result.report["weights"]["bytes_before"] == sum(p.numel() * 4 for p in model.parameters())
    assert read_report(result.folder / QUANTIZATION_NAME) == result.report
    assert result.report["model"] == "dense" and str(tmp_path) not in json.dumps(result.report)


@pytest.mark.parametrize(
    ("widths", "inputs", "outputs"),
    [
        (dict(hidden_size=64, intermediate_size=128), None, None),
        (dict(hidden_size=64, intermediate_size=96), "96", None),
        (dict(hidden_size=64, intermediate_size=80), "80", "80"),
    ],
)
def test_widths_that_kernels_of_cpus_cannot_run(widths, inputs, outputs, tmp_path, caplog):
    """Said before the weights are read, in the report, and with the way out; the result is right here all the same."""
    folder = saved(tmp_path / "odd", **widths)
    for bits in (4, 8):
        notes = quantize(folder, tmp_path / f"{bits}", QuantizationConfig(bits=bits)).report["notes"]
        if bits == 8 or inputs is None:
            assert notes == []
            continue
        assert f"{inputs} inputs, no multiples of 64" in notes[0] and "align_to=64" in notes[0]
        assert (f"{outputs} outputs, no multiples of 32" in notes[0]) == (outputs is not None)
        assert "float32" not in notes[0]


def test_the_warning_comes_before_the_weights_are_read(tmp_path, monkeypatch):
    folder, said = saved(tmp_path / "odd", hidden_size=64, intermediate_size=96), []
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(quantizing.logger, "warning", said.append)
    with pytest.raises(CheckpointError, match="no file named model.safetensors"):
        quantize(folder, tmp_path / "out")
    assert len(said) == 1 and "96 inputs, no multiples of 64" in said[0]


def result_of(state, folder, name="evaluation_results.json"):
    EvaluationResult(model=folder.name, state=state).save(folder / name)


def test_what_is_still_true_goes_along(pruned, tmp_path):
    result_of("pruned", pruned)
    result_of("dense", pruned, "evaluation_results_dense.json")
    out = tmp_path / "out"
    out.mkdir()
    result_of("quantised", out)
    (out / "mine.txt").write_text("mine")
    quantize(pruned, out, QuantizationConfig(), overwrite=True)
    names = {path.name for path in out.iterdir()}
    assert {
        "pruning_config.json",
        "pruning_plan.json",
        "generation_config.json",
        "tokenizer.json",
        "mine.txt",
    } <= names
    assert "evaluation_results.json" not in names  # of the model that was there before
    states = {name: EvaluationResult.load(out / name).state for name in names if name.startswith("evaluation_results")}
    assert states == {"evaluation_results_pruned.json": "pruned", "evaluation_results_dense.json": "dense"}


def test_results_of_a_recovered_model_keep_their_state(pruned, tmp_path):
    result_of("recovered", pruned)
    result_of("pruned", pruned, "evaluation_results_pruned.json")
    EvaluationResult(model="older", state="recovered").save(pruned / "evaluation_results_recovered.json")
    quantize(pruned, tmp_path / "out")
    for state in ("recovered", "pruned"):
        found = EvaluationResult.load(tmp_path / "out" / f"evaluation_results_{state}.json")
        assert (found.state, found.model) == (state, "pruned")
    assert not (tmp_path / "out" / "evaluation_results.json").exists()


REFUSED = [
    ({"method": "torchao"}, ConfigurationError, "torchao with 4 bits needs an accelerator"),
    (
        {"method": "gptq"},
        ConfigurationError,
        r"`group_size` is 128, which does not divide the 64 inputs of model.layers.0",
    ),
    ({"method": "gptq", "group_size": 64}, ConfigurationError, "the 96 inputs of .*down_proj. Sizes .*: 32, -1"),
    ({"method": "awq", "group_size": 32}, UnsupportedModelError, "32 outputs, and AWQ takes 64"),
    ({"method": "auto-round"}, ConfigurationError, "`group_size` is 128"),
    ({"device": "cuda:77"}, ConfigurationError, "`device` is 'cuda:77', which cannot be used"),
]


@pytest.mark.parametrize(("values", "error", "message"), REFUSED)
def test_refused_before_any_weight_is_read(values, error, message, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(installed, "find_spec", lambda name: name)
    (dense / "model.safetensors").unlink()
    with pytest.raises(error, match=message):
        quantize(dense, tmp_path / "out", QuantizationConfig(**{"device": "cpu", **values}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pruned", ["per_layer"], indirect=True)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_layers_of_different_widths_are_refused(method, pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(installed, "find_spec", lambda name: name)
    with pytest.raises(UnsupportedModelError, match="layers of different widths"):
        quantize(pruned, tmp_path / "out", QuantizationConfig(method, group_size=32))


@pytest.mark.parametrize("method", BACKENDS)
def test_missing_extras_are_named(method, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    extra = BACKENDS[method].extra
    with pytest.raises(StructPruneError, match=rf'is missing: `pip install "hf-structprune\[{extra}\]"`'):
        quantize(dense, tmp_path / "out", QuantizationConfig(method))


def test_what_is_in_the_way(dense, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="a file"):
        quantize(dense, tmp_path / "file")
    with pytest.raises(ConfigurationError, match="not empty"):
        quantize(dense, dense)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        quantize(tmp_path / "nothing", tmp_path / "out")


def test_quantised_models_are_refused(dense, tmp_path):
    quantize(dense, tmp_path / "once")
    with pytest.raises(CheckpointError, match="is quantised already"):
        quantize(tmp_path / "once", tmp_path / "twice")


def test_too_little_memory_or_disk(dense, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: Memory(1000))
        with pytest.raises(CheckpointError, match="but 0.00 GB of the memory of this machine"):
            quantize(dense, tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(CheckpointError, match="the disk has 1.00kB left"):
        quantize(dense, tmp_path / "out")


def test_memory_is_that_of_the_device(dense, monkeypatch):
    """bitsandbytes needs less than the model; on CUDA the memory that counts is the device's."""
    original, config = Unquantised.read(dense), QuantizationConfig(device="cuda:0")
    backend = BACKENDS["bitsandbytes"](original, config)
    needed = backend.memory()
    assert backend.estimate() < needed < original.bytes
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed, 0))
    quantizing.check_memory(backend)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1, 0))
    with pytest.raises(CheckpointError, match="memory of cuda:0"):
        quantizing.check_memory(backend)
    with pytest.raises(CheckpointError, match="memory of this machine"):  # GPTQ puts one layer at a time on the device
        quantizing.check_memory(BACKENDS["gptq"](original, config))


def test_after_a_failure_the_folder_is_as_it_was(dense, tmp_path, monkeypatch):
    quantize(dense, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def half(self, tokenizer):
        def save(path):
            (path / "model.safetensors").write_bytes(b"half")
            raise OSError("no space")

        return save

    monkeypatch.setattr(quantizing.BACKENDS["bitsandbytes"], "run", half)
    with pytest.raises(CheckpointError, match="is unchanged"):
        quantize(dense, tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out"}


def test_calibration_too_long_for_the_model(dense):
    config = QuantizationConfig("gptq", calibration=CalibrationConfig(length=100_000))
    with pytest.raises(ConfigurationError, match="`calibration.length` is 100000, but the model's context"):
        BACKENDS["gptq"](Unquantised.read(dense), config).calibration(None)


def test_command(dense, tmp_path, capsys):
    out = str(tmp_path / "out")
    argv = ["quantize", str(dense), "--method", "bitsandbytes", "--bits", "8", "--calibration-num-samples", "4"]
    assert main([*argv, "--output-dir", out, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["bits"] == 8 and data["configuration"]["calibration"]["num_samples"] == 4
    assert main([*argv, "--output-dir", out]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*argv, "--bits", "4", "--output-dir", out, "--overwrite"]) == 0
    said = capsys.readouterr()
    assert "change" in said.out and f"{said.out}{said.err}".count("kernels cannot run") == 1  # these widths, on CPUs
    assert main(argv) == 2
    assert "--output-dir is missing" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "bits"), [("bitsandbytes", 4), ("torchao", 8)])
def test_sizes_are_measured_truly(method, bits, dense, tmp_path):
    pytest.importorskip(method)
    from hf_structprune.evaluation.efficiency import EfficiencyConfig, measure_efficiency
    from hf_structprune.model.loading import load_model

    result = quantize(dense, tmp_path / method, QuantizationConfig(method, bits=bits))
    measured = measure_efficiency(load_model(result.folder), EfficiencyConfig(length=8, speed=False))
    figures = {figure.name: figure.value for figure in measured}
    assert figures["efficiency/parameters"] == result.report["weights"]["parameters"]
    # All but the header of the file.
    assert 0 <= result.report["weights"]["bytes"] - figures["efficiency/weight_bytes"] < 30_000


@pytest.mark.parametrize(("method", "bits"), [("bitsandbytes", 4), ("bitsandbytes", 8), ("torchao", 8)])
def test_what_was_quantised_is_evaluated(method, bits, tmp_path):
    """By the command, beside the model before; the same checkpoint has the same name, and no other has it."""
    pytest.importorskip(method)
    dense = saved(tmp_path / "dense", hidden_size=64, intermediate_size=96, vocab_size=128)
    folder, text = (
        quantize(dense, tmp_path / method, QuantizationConfig(method, bits=bits)).folder,
        tmp_path / "own.txt",
    )
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    results = []
    for number, (model, *more) in enumerate([(folder, "--baseline", str(dense)), (folder,), (dense,)]):
        line = ["evaluate", str(model), *more, "--texts", str(text), "--window", "32", "--max-windows", "2"]
        output = tmp_path / f"{number}.json"
        assert main([*line, "--no-efficiency", "--no-samples", "--output", str(output)]) == 0
        results.append(EvaluationResult.load(output))
    first, again, before = (one.settings[MODEL] for one in results)
    assert first == again != before
    assert results[0].figures["perplexity/own"].value == pytest.approx(
        results[2].figures["perplexity/own"].value, rel=0.2
    )
