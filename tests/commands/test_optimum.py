"""`optimum-cli prune`: registered by an editable install, and by the wheel in an environment of its own."""

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from hf_structprune.commands import cli


pytest.importorskip("optimum.commands.base")

ROOT = Path(__file__).parents[2]
SOURCES = ("hf_structprune", "optimum", "pyproject.toml", "setup.py", "README.md", "LICENSE")
# A command of some other package, in the same namespace.
STRANGER = """
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
class Stranger(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="stranger", help="another command")
REGISTER_COMMANDS = [Stranger]
"""


def run(python, *argv, cwd, **environment):
    command = [str(python), "-m", *argv]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables, timeout=600)


def optimum_cli(python, *argv, cwd, **environment):
    return run(python, "optimum.commands.optimum_cli", *argv, cwd=cwd, **environment)


@pytest.fixture(scope="module")
def other_package(tmp_path_factory):
    """A folder for `sys.path` with a command of another package."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "optimum/commands/register").mkdir(parents=True)
    (folder / "optimum/commands/register/register_stranger.py").write_text(STRANGER)
    return folder


def test_this_installation_registers_beside_others(other_package, tmp_path):
    done = optimum_cli(sys.executable, "--help", cwd=tmp_path, PYTHONPATH=str(other_package))
    assert done.returncode == 0, done.stderr
    assert "prune a model and save the checkpoint" in done.stdout and "another command" in done.stdout


@pytest.fixture
def through_optimum(tmp_path, monkeypatch, capsys):
    """Runs `optimum-cli` in this process, in which all is imported already: exit code, output and errors."""
    from optimum.commands import optimum_cli as entry
    from optimum.commands.register.register_structprune import REGISTER_COMMANDS

    monkeypatch.chdir(tmp_path)
    # Finding them is looked at above; here the file would be found twice where the sources are on the path, too.
    found = [(command, None) for command in REGISTER_COMMANDS]
    monkeypatch.setattr(entry, "load_optimum_namespace_cli_commands", lambda: found)

    def through(*argv):
        monkeypatch.setattr(sys, "argv", [entry.__file__, *argv])
        with pytest.raises(SystemExit) as ended:
            entry.main()
        return ended.value.code, *capsys.readouterr()

    return through


def test_help_is_that_of_our_command(through_optimum, capsys):
    code, shown, said = through_optimum("prune", "--help")
    assert (code, said) == (0, "")
    assert "optimum-cli prune MODEL [options]" in shown and "--calibration-dataset" in shown
    sys.argv[0] = "hf-structprune"
    assert cli.main(["prune", "--help"]) == 0
    assert shown == capsys.readouterr().out.replace("hf-structprune prune", "optimum-cli prune")


def test_a_mistake_is_a_line_of_optimum_cli(through_optimum, tmp_path):
    code, shown, error = through_optimum("prune", "model", "--ratio", "2", "--output-dir", "other")
    assert (code, shown) == (2, "")
    said = "--ratio: `ratio` is 2; it must be a number in [0, 1): 0.3 removes 30 %."
    assert error.startswith(f"optimum-cli: error: argument {said}") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources without asking a package index."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, sources / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = run(sys.executable, "pip", "wheel", *options, "--wheel-dir", str(folder), str(sources), cwd=folder)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, other_package, tmp_path_factory):
    """The interpreter of a fresh environment with the wheel. Other packages are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # Folders in a .pth file come last, and .pth files in them are not read: an editable install is out of sight.
    paths = [*site.getsitepackages(), str(other_package)]
    (packages / "others.pth").write_text("\n".join(paths) + "\n")
    install(python, "install", "--no-deps", "--no-index", "--no-compile", "--quiet", str(wheel))
    return python


def install(python, *argv):
    done = run(sys.executable, "pip", "--python", str(python), *argv, cwd=python.parent)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_puts_one_file_into_the_namespace_of_optimum(wheel):
    names = ZipFile(wheel).namelist()
    assert [name for name in names if name.startswith("optimum")] == [
        "optimum/commands/register/register_structprune.py"
    ]
    assert "hf_structprune/py.typed" in names and not any(name.startswith("tests") for name in names)


@pytest.mark.slow
def test_the_wheel_prunes_through_optimum(python, tiny_llama, tmp_path):
    place = "import hf_structprune, sys; sys.stdout.write(hf_structprune.__file__)"
    found = subprocess.run([python, "-c", place], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert Path(found).is_relative_to(python.parents[1])

    tiny_llama.save_pretrained(tmp_path / "model")
    options = ["--ratio", "0.2", "--criterion", "l2", "--no-compensation", "--output-dir", "out", "--json"]
    done = optimum_cli(python, "prune", *options, "model", cwd=tmp_path)  # options may come before the model
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output_dir"] == "out"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["intermediate_size"] < 48


@pytest.mark.slow
def test_uninstalling_leaves_optimum_as_it_was(python, tmp_path):
    """The last test of this file: what uses the environment comes before."""
    folder = next(python.parents[1].rglob("site-packages"))
    assert (folder / "optimum/commands/register/register_structprune.py").is_file()
    install(python, "uninstall", "--yes", "--quiet", "hf-structprune")
    assert not list((folder / "optimum").rglob("*.py"))
    done = optimum_cli(python, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "another command" in done.stdout and "prune" not in done.stdout
