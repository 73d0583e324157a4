"""benchmarks/accelerator.py in its small form, on the CPU: that it runs from end to end, and past what fails."""

import json
import runpy
import sys
from pathlib import Path

import pytest


pytest.importorskip("trl")
pytest.importorskip("bitsandbytes")

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """What is in the script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield runpy.run_path(str(FOLDER / "accelerator.py"))
    for name in ("core", "streaming"):
        del sys.modules[name]


def run(script, output, *options):
    options = ("--small", "--device", "cpu", "--dtype", "fp32", "--output", str(output), *options)
    return script["main"](list(options)), json.loads(output.read_text())["steps"]


def test_every_step_runs(script, tmp_path):
    status, steps = run(script, tmp_path / "out.json")
    assert status == 0 and not any("error" in step for step in steps.values()), steps
    ways = ("default", "taylor", "layers")
    assert {"forward", "dense", "evaluate", "recover", "nf4"} < set(steps)
    for way in ways:
        assert steps[f"quality, {way}"]["reloaded_differs_by"] == 0 and steps[f"quality, {way}"]["perplexity"] > 1
        speed = steps[f"prune, {way}"]
        assert speed["removed"] > 0.1 and speed["forwards"] > 1 and speed["decode_tokens_per_second"] > 0
    widths = {name.removeprefix("width, "): step["width"] for name, step in steps.items() if "width" in name}
    assert widths["tensor-cores"] % 64 == 0 and widths["gptq-128"] % 128 == 0 and widths["exact"] % 8
    assert steps["nf4"]["bytes"] < steps["nf4"]["bytes_before"] and steps["recover"]["steps"] == 2


def test_a_step_that_fails_is_recorded_and_the_next_one_begins(script, tmp_path, monkeypatch):
    def fails(self):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(script["Benchmark"], "forward", fails)
    status, steps = run(script, tmp_path / "out.json", "--only", "forward", "width, exact", "nf4")
    assert status == 1 and list(steps) == ["forward", "width, exact", "nf4"]
    assert "illegal memory access" in steps["forward"]["error"] and "fails" in steps["forward"]["traceback"]
    assert steps["width, exact"]["width"] > 0 and "no pruned checkpoint" in steps["nf4"]["error"]


def test_no_step_begins_when_the_time_is_over(script, tmp_path):
    status, steps = run(script, tmp_path / "out.json", "--minutes", "0")
    assert status == 1 and len(steps) > 10 and all("were over" in step["error"] for step in steps.values())
