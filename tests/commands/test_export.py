"""`hf-structprune export`: options, errors, and what it prints."""

import json

import pytest
from families import make_model
from gguf import GGUFReader
from test_cli import assert_one_error_line
from vocabularies import byte_level

from hf_structprune.commands import cli
from hf_structprune.commands.options import EXPORT_FORMATS, ExportArguments


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["m"], ["--format is missing"]),
        (["m", "--format", "gguf"], ["--output is missing"]),
        (["m", "--format", "tflite"], ["`format` is 'tflite'", "gguf"]),
        (["m", "--format", "gguf", "--output", "o", "--quant", "q1"], ["`quant` is 'q1'", "q4_k_m"]),
        (["m", "--format", "onnx", "--output", "o", "--quant", "f16"], ["--quant is no option of --format onnx"]),
        (["m", "--format", "onnx", "--output", "o", "--dtype", "bf16"], ["`dtype` is 'bf16'", "fp32, fp16"]),
        (["/no/such/model", "--format", "gguf", "--output", "o"], ["cannot load '/no/such/model'"]),
        (["nowhere/", "--format", "gguf", "--output", "o"], ["cannot load 'nowhere/': there is no such folder"]),
    ],
)
def test_bad_values(argv, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *argv]) == 2
    assert_one_error_line(capsys.readouterr().err, *parts)
    assert not list(tmp_path.iterdir())


def test_an_option_of_another_format(capsys, monkeypatch):
    def without_options(model, output):
        raise AssertionError("is not called")

    monkeypatch.setattr("hf_structprune.export.gguf.export_gguf", without_options)
    assert cli.main(["export", "m", "--format", "gguf", "--output", "o", "--quant", "f16"]) == 2
    assert_one_error_line(capsys.readouterr().err, "--quant is no option of --format gguf")


def test_every_format_has_a_function_with_known_options():
    import importlib
    import inspect
    from dataclasses import fields

    options = {field.name for field in fields(ExportArguments)}
    for name in EXPORT_FORMATS:
        module = importlib.import_module(f"hf_structprune.export.{name}")
        parameters = inspect.signature(getattr(module, f"export_{name}")).parameters
        assert list(parameters)[:2] == ["model", "output"]
        known = {key for key in parameters if key in options} - {"model", "output"}
        assert all(parameters[key].kind is inspect.Parameter.KEYWORD_ONLY for key in known)


def test_gguf(tmp_path, capsys):
    folder, output = tmp_path / "model", tmp_path / "model.gguf"
    make_model("llama", vocab_size=400).save_pretrained(folder)
    argv = ["export", str(folder), "--format", "gguf", "--output", str(output)]
    assert cli.main(argv) == 2
    assert "hf-structprune: error: The model has no tokenizer" in capsys.readouterr().err
    byte_level().save_pretrained(folder)
    make_model("gemma2", vocab_size=400).config.save_pretrained(tmp_path / "gemma")
    assert cli.main(["export", str(tmp_path / "gemma"), *argv[2:]]) == 2  # before weights are looked for
    assert_one_error_line(capsys.readouterr().err, "Gemma2ForCausalLM cannot be written", "LlamaForCausalLM")
    assert cli.main([*argv, "--json", "--quant", "bf16"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["architecture"] == "llama" and data["matrices"] == {"bf16": 23} and data["notes"] == []
    assert data["bytes"] == output.stat().st_size
    assert GGUFReader(output).fields["general.name"].contents() == "model"
    assert cli.main(argv) == 2
    assert_one_error_line(capsys.readouterr().err, f"{output} exists", "--overwrite")
    assert cli.main([*argv, "--overwrite"]) == 0
    assert f"Wrote {output}" in capsys.readouterr().out.replace("\n", "")
    assert GGUFReader(output).fields["general.file_type"].contents() == 1
