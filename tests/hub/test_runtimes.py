"""Cards give lines for runtimes where models of the type were run without such units: by the tests that ran them."""

import importlib.util
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from hf_structprune import PruningPlan
from hf_structprune.commands.arguments import parse
from hf_structprune.commands.options import ExportArguments
from hf_structprune.hub import runtimes, write_card
from hf_structprune.hub.contents import Contents


EXPORT = Path(__file__).parents[1] / "export"
TYPES = {"llama_bias": "llama"}


@pytest.fixture
def cases(monkeypatch):
    """`(type, kinds)` of each model that a test file of a runtime compares with Transformers."""
    monkeypatch.syspath_prepend(str(EXPORT))

    def read(name, table):
        spec = importlib.util.spec_from_file_location(name, EXPORT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return getattr(module, table)

    return read


def by_type(cases):
    found = defaultdict(set)
    for name, kinds in cases:
        found[TYPES.get(name, name)] |= set(kinds)
    return dict(found)


def test_what_is_said_of_vllm_and_mlx_is_what_their_tests_run(cases):
    found = cases("test_vllm", "CASES")
    plain = [case.keywords for name, case in found.items() if name != "vocabulary" and "deci" not in name]
    assert by_type([*((one["name"], one["keep"]) for one in plain), ("llama", ["vocabulary"])]) == runtimes.VLLM
    deci = [case.keywords for name, case in found.items() if "deci" in name]
    assert by_type((one["name"], one.get("keep") or one["units"]) for one in deci) == runtimes.DECI
    assert by_type(cases("test_mlx", "PLAIN").values()) == runtimes.MLX


def test_only_what_was_run_with_these_units_gone_is_named(folder):
    write_card(folder, name="me/small")
    contents = Contents(folder)
    lines = runtimes.other_runtimes(contents, "me/small")
    assert [line.partition("  # ")[2].partition(",")[0] for line in lines] == [
        "vLLM", "llama.cpp", "ONNX Runtime", "OpenVINO", "MLX",
    ]  # fmt: skip
    for line in lines:
        assert line in (folder / "README.md").read_text()
        command = shlex.split(line, comments=True)
        if command[0] == "hf-structprune":
            (options,) = parse(command[2:], command[1], "", ExportArguments)
            assert options.model == "me/small" and options.format in ("gguf", "onnx")
    contents.plan.removed["vocabulary"] = 1
    assert [line.split()[0] for line in runtimes.other_runtimes(contents, "m")] == ["vllm"]
    contents.model_config["model_type"] = "dbrx"
    assert runtimes.other_runtimes(contents, "m") == []


def test_a_runtime_that_will_not_load_it_is_not_named(folder):
    contents = Contents(folder)
    contents.plan.warnings.append("this llama will not load in vLLM 0.32, mlx-lm 0.32, where MLX does; llama.cpp does")
    names = [line.partition("  # ")[2] for line in runtimes.other_runtimes(contents, "m")]
    assert "vLLM" not in names and "llama.cpp" in names


def test_layers_that_differ(per_layer_pruner, tmp_path):
    per_layer_pruner.save_pretrained(tmp_path / "small")
    assert PruningPlan.load(tmp_path / "small").layout == "per_layer"
    lines = runtimes.other_runtimes(Contents(tmp_path / "small"), "small")
    assert [line.partition("  # ")[2] for line in lines] == ["vLLM", "llama.cpp", "ONNX Runtime"]
    assert "deci" in lines[0] and "--trust-remote-code" in lines[0]
