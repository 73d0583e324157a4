"""Standard scripts on pruned checkpoints, without the Hub."""

import json
import os
import runpy
import shlex
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from processes import forked
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_structprune import PruningConfig, StructuredPruner


RECIPES = Path(__file__).parents[2] / "recipes"
CHATML = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LAYOUTS = {
    "uniform": {"mlp_ratio": 0.3},
    "per_layer": {"layout": "per_layer", "layers": [1], "mlp_ratio": 0.3, "attention_ratio": 0.5},
}
# Put behind the commands of the README: for a tiny model and little time.
SHORT = (
    "--max_length 128 --max_steps 3 --per_device_train_batch_size 4 --learning_rate 1e-2 --use_cpu --bf16 False "
    "--report_to none"
)
NO_PACKAGE = "raise ImportError('hf_structprune is not installed here')"


@pytest.fixture
def world(tmp_path, tiny_llama, make_tokenizer):
    """A dense model, its two pruned checkpoints and rows of chats, as folders."""
    tokenizer = make_tokenizer(chat_template=CHATML)
    tiny_llama.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    for layout, options in LAYOUTS.items():
        config = PruningConfig(criterion="l2", compensation=False, round_to=1, **options)
        pruner = StructuredPruner(
            AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32), config, tokenizer
        )
        pruner.prune()
        pruner.save_pretrained(tmp_path / layout)
    (tmp_path / "rows").mkdir()
    with open(tmp_path / "rows" / "train.jsonl", "w") as file:
        for number in range(32):
            prompt, answer = {"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": "yes"}
            file.write(json.dumps({"prompt": [prompt], "completion": [answer]}) + "\n")
    (tmp_path / "stranger" / "hf_structprune").mkdir(parents=True)
    (tmp_path / "stranger" / "hf_structprune" / "__init__.py").write_text(NO_PACKAGE)
    (tmp_path / "recipes").symlink_to(RECIPES)
    return SimpleNamespace(root=tmp_path, tokenizer=tokenizer)


def read_command(start, layout, more):
    """The words of the command of the README that starts so, on the checkpoint of a layout."""
    text = (RECIPES / "README.md").read_text().replace("\\\n", " ")
    [command] = [line for line in text.splitlines() if line.startswith(start)]
    return [layout if word == "pruned" else word for word in shlex.split(f"{command} {more}")]


def run_without_package(world, start, layout, more):
    """Runs such a command; what it launches is a process of its own, where this package is not installed.

    The command itself does nothing but launch it: it is a fork of this process, where torch is imported already.
    """
    words = read_command(start, layout, more)
    environment = {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(world.root / "stranger"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HF_MODULES_CACHE": str(world.root / "modules"), "HF_DATASETS_CACHE": str(world.root / "datasets"),
    }  # fmt: skip
    [entry] = entry_points(group="console_scripts", name=words[0])

    def command():
        os.chdir(world.root)
        os.environ.update(environment)
        sys.argv[:] = words
        assert not entry.load()()

    assert forked(command) == [0]


def run_script(world, start, layout, more, monkeypatch, processes=1):
    """The Python script of such a command here, or in processes of this one, where everything is imported already."""
    words = read_command(start, layout, more)
    script = next(number for number, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.chdir(world.root)
    monkeypatch.setattr(sys, "argv", words[script:])
    if processes == 1:
        runpy.run_path(words[script], run_name="__main__")
    else:
        assert forked(lambda: runpy.run_path(words[script], run_name="__main__"), count=processes) == [0] * processes


def check_adapter(world, layout, folder):
    """The adapter loads on its base in another process than that of the training, and has learned something."""
    base = AutoModelForCausalLM.from_pretrained(world.root / layout, dtype=torch.float32).eval()
    tokens = torch.arange(4, 24)[None]
    with torch.no_grad():
        before = base(tokens).logits
        after = PeftModel.from_pretrained(base, world.root / folder).eval()(tokens).logits
    assert after.isfinite().all() and (after - before).abs().max() > 1e-3


@pytest.mark.slow
def test_trl_sft_on_a_per_layer_checkpoint(world):
    """Where this package is not installed."""
    run_without_package(world, "trl sft --model_name_or_path per_layer", "per_layer", f"{SHORT} --dtype float32")
    check_adapter(world, "per_layer", "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "layout", "processes"),
    [
        ("python recipes/scripts/train_with_trainer.py", "uniform", 1),
        ("accelerate launch --config_file recipes/accelerate/cpu_2_processes.yaml", "per_layer", 2),
    ],
)
def test_trainer_script(world, start, layout, processes, monkeypatch, capfd):
    run_script(world, start, layout, SHORT, monkeypatch, processes)
    assert capfd.readouterr().out.count("rows (prompt-completion): 32 rows, 32 sequences") == processes
    check_recovered(world, "out")


@pytest.mark.slow
def test_sft_script(world, monkeypatch):
    start = "python recipes/scripts/sft_with_callback.py"
    run_script(world, start, "per_layer", f"{SHORT} --dtype float32", monkeypatch)
    check_recovered(world, "out")


def check_recovered(world, folder):
    report = json.loads((world.root / folder / "recovery.json").read_text())
    assert report["curve"]["dense"] is not None and report["curve"]["points"]
    assert (world.root / folder / "adapter_model.safetensors").is_file()
    recovered = AutoModelForCausalLM.from_pretrained(world.root / folder / "recovered")
    assert not hasattr(recovered, "peft_config")
    assert AutoTokenizer.from_pretrained(world.root / folder / "recovered").chat_template == CHATML


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path):
    config = load_config_from_file(str(path))
    kind = {"fsdp2": "FSDP", "cpu_2_processes": "MULTI_GPU"}.get(path.stem, "DEEPSPEED")
    assert config.distributed_type == kind and config.num_processes > 1
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    elif kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    else:
        assert config.use_cpu and "NOT RUN HERE" not in path.read_text()
    assert ("NOT RUN HERE" in path.read_text()) == (kind != "MULTI_GPU")
