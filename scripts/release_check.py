"""Builds wheel and sdist, installs each into an environment of its own, and plans and prunes a tiny model with it.

    python scripts/release_check.py                                      # the newest dependencies
    python scripts/release_check.py --constraints constraints-min.txt    # the lowest that pyproject.toml allows
    python scripts/release_check.py --packages-of .venv/bin/python       # those that are installed there: no download

`make release-check` is the first; CONSTRAINTS, PACKAGES_OF and DIST are the options.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
TINY = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

config = LlamaConfig(
    vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=256, eos_token_id=256,
)
alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(sys.argv[1])
"""
LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

dense, pruned = (AutoModelForCausalLM.from_pretrained(folder) for folder in sys.argv[1:])
ids = AutoTokenizer.from_pretrained(sys.argv[2])("one two", return_tensors="pt").input_ids
assert pruned.generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]
assert pruned.num_parameters() < 0.95 * dense.num_parameters(), (pruned.num_parameters(), dense.num_parameters())
assert not any(name.startswith("hf_structprune") for name in sys.modules)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", help="pip's constraints file")
    parser.add_argument("--packages-of", help="an interpreter whose packages are used, ours and its own left out")
    parser.add_argument("--dist", help="folder to keep wheel and sdist in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        found = build(place, options.packages_of)
        for artifact in found:
            check(artifact, place / artifact.suffix[1:], options)
        for artifact in found if options.dist else ():
            Path(options.dist).mkdir(parents=True, exist_ok=True)
            shutil.copy(artifact, options.dist)
    print("All is well.")


def build(place: Path, packages_of: str | None) -> list[Path]:
    """Wheel and sdist, of a copy of what git knows: files that only lie around here are in neither."""
    sources = place / "sources"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, sources / name)
    python = environment(place / "build", packages_of)
    if packages_of is None:
        run(python, "-m", "pip", "install", "--quiet", "build")
        run(python, "-m", "build", "--outdir", str(place / "dist"), str(sources))
    else:  # by the build backend itself, which `build` would call
        made = (
            "import os, setuptools.build_meta as b; os.makedirs('../dist'); b.build_wheel('../dist'); "
            "b.build_sdist('../dist')"
        )
        run(python, "-c", made, cwd=sources)
    found = sorted((place / "dist").iterdir(), key=lambda one: one.suffix, reverse=True)
    assert [one.suffix for one in found] == [".whl", ".gz"], found
    return found


def check(artifact: Path, place: Path, options: argparse.Namespace) -> None:
    """Installs one of them and works with it, in a folder where the sources are not."""
    print(f"== {artifact.name}", flush=True)
    python = environment(place / "venv", options.packages_of)
    install = [python, "-m", "pip", "install", "--quiet"]
    if options.packages_of is not None:
        run(*install, "--no-deps", "--no-build-isolation", "--no-index", str(artifact))
    else:
        constraints = [] if not options.constraints else ["--constraint", str(Path(options.constraints).resolve())]
        run(*install, *constraints, str(artifact))
        run(python, "-m", "pip", "check")
    work = place / "work"
    work.mkdir()
    read = "from importlib.metadata import distribution as d; print(d('hf-structprune').read_text('METADATA'))"
    told = run(python, "-c", read, cwd=work)
    assert "## What can be cut" in told  # README, whose links PyPI cannot follow unless they are whole
    assert not re.search(r"\]\((?!https://|#)[^)\s]+\)", re.sub(r"```.*?```|`[^`\n]*`", "", told, flags=re.DOTALL))
    command = [str(Path(python).parent / "hf-structprune")]
    version = re.search(r'__version__ = "(.+)"', (ROOT / "hf_structprune/installed.py").read_text(encoding="utf-8"))[1]
    assert run(*command, "--version", cwd=work).strip() == f"hf-structprune {version}"
    listed = run(*command, "--help", cwd=work).partition("commands:")[2].partition("options:")[0]
    names = re.findall(r"(?m)^  (\w+)", listed)
    assert len(names) > 10, names
    for name in names:
        assert "--verbose" in run(*command, name, "--help", cwd=work), name
    run(python, "-c", TINY, "dense", cwd=work)
    calibration = ["--calibration-num-samples", "4", "--calibration-length", "64"]
    assert "MLP neurons" in run(*command, "plan", "dense", "--ratio", "0.2", cwd=work)
    run(*command, "prune", "dense", "--ratio", "0.2", "--output-dir", "pruned", *calibration, cwd=work)
    run(python, "-c", LOAD, "dense", "pruned", cwd=work)
    script = "import hf_structprune as h; assert h.__file__.startswith(h.__path__[0]); print(h.__path__[0])"
    assert str(ROOT) not in run(python, "-c", script, cwd=work)


def environment(folder: Path, packages_of: str | None) -> str:
    """The interpreter of a new environment; the packages of another one come behind its own."""
    run(packages_of or sys.executable, "-m", "venv", str(folder))
    python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    if packages_of is not None:
        # That of `venv` (Python < 3.12) is older than what builds the package, and would stand before the others'.
        run(python, "-m", "pip", "uninstall", "--yes", "--quiet", "setuptools")
        site = "import sysconfig; print(sysconfig.get_path('purelib'))"
        other, own = run(packages_of, "-c", site).strip(), run(python, "-c", site).strip()
        Path(own, "others.pth").write_text(f"{other}\n", encoding="utf-8")
    return python


def run(*command: str, cwd: Path | None = None) -> str:
    """What a process prints; it must end well."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]}\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
