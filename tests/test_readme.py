"""README's figures are those of the files that benchmarks wrote."""

import json
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "readme_figures.py"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def figures():
    spec = spec_from_file_location("readme_figures", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flat(text):
    return " ".join(text.split())


def test_the_first_table(figures):
    rows = json.loads(figures.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert figures.quality_table(rows, figures.dense_parameters()) in README


def test_the_picture(figures, tmp_path):
    pytest.importorskip("matplotlib")
    rows = json.loads(figures.RESULTS.read_text(encoding="utf-8"))["rows"]
    figures.draw(rows, figures.dense_parameters(), tmp_path / "quality.svg")
    assert f"]({figures.PICTURE.relative_to(ROOT)})" in README
    # Words and figures; where they stand depends on fonts and on the version of matplotlib.
    drawn, shown = (
        re.findall(r"<text[^>]*>([^<]*)<", path.read_text()) for path in (tmp_path / "quality.svg", figures.PICTURE)
    )
    assert sorted(drawn) == sorted(shown) and {"20.4", "29.5", "24.9"} <= {*shown}


def test_what_recovery_gives_back(figures):
    assert figures.recovery_words() in flat(README)
    assert f"fewer tokens and widths by layer: {figures.nearer_words()}." in flat(README)


def test_what_fewer_tokens_of_gemma_cost(figures):
    rows = json.loads((figures.RESULTS.parent / "vocabulary-gemma3-270m.json").read_text(encoding="utf-8"))["rows"]
    dense, half = (next(row for row in rows if row["keep"] == keep) for keep in (262_144, 131_072))
    more = sorted(
        half["texts"][name]["perplexity"] / dense["texts"][name]["perplexity"] - 1 for name in dense["texts"]
    )
    low, high = (round(100 * share) for share in more)
    assert f"({half['ratio']:.0%} of Gemma-3-270M: perplexity + {low} to {high} %)".replace("%", " %", 1) in README


def test_numbers_of_types(figures):
    found = re.search(r"Of the (\d+ types) .*? (MLP neurons or experts .*? layers in \d+):", flat(README))
    assert f"Of the {found[1]}, {found[2]}" == figures.type_words()


def test_it_is_short():
    assert len(README.encode()) <= 9000


@pytest.mark.slow
def test_the_small_form_measures(figures):
    done = subprocess.run([sys.executable, SCRIPT, "--small"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    head, _, parameters, perplexity = (line.split(" | ") for line in done.stdout.splitlines())
    assert head[1:] == ["dense", "10 % |"] and perplexity[0] == "| perplexity, WikiText-2 sample"
    assert all(float(value.rstrip(" |")) > 100 for value in perplexity[1:])
