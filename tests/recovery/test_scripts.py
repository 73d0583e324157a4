"""Standard scripts on pruned checkpoints, each in a process of its own, without the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
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
STEPS = "--max_steps 3 --per_device_train_batch_size 4 --learning_rate 1e-2 --use_cpu --bf16 False --report_to none"
TRL = (
    f"--use_peft --lora_r 8 --lora_alpha 16 --lora_target_modules all-linear --max_length 128 --dtype float32 {STEPS}"
)
# Runs a module in an interpreter in which `import hf_structprune` fails, and so do all that this one starts.
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
    return SimpleNamespace(root=tmp_path, tokenizer=tokenizer)


def run(world, *command, installed=True):
    path = [str(RECIPES.parent)] if installed else [str(world.root / "stranger")]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path),
        "HF_MODULES_CACHE": str(world.root / "modules"), "HF_DATASETS_CACHE": str(world.root / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=world.root, env=environment, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def check_adapter(world, layout, folder):
    """The adapter loads on its base in another process than that of the training, and has learned something."""
    base = AutoModelForCausalLM.from_pretrained(world.root / layout, dtype=torch.float32).eval()
    tokens = torch.arange(4, 24)[None]
    with torch.no_grad():
        before = base(tokens).logits
        after = PeftModel.from_pretrained(base, world.root / folder).eval()(tokens).logits
    assert after.isfinite().all() and (after - before).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trl_sft(world, layout):
    """`trl sft` as it stands in recipes/README.md, where this package is not installed."""
    trust = ["--trust_remote_code"] if layout == "per_layer" else []
    run(
        world, Path(sys.executable).with_name("trl"), "sft", "--model_name_or_path", layout, "--dataset_name", "rows",
        *TRL.split(), *trust, "--output_dir", "out", installed=False,
    )  # fmt: skip
    check_adapter(world, layout, "out")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trainer_script(world, layout):
    said = run(
        world, RECIPES / "scripts" / "train_with_trainer.py", "--model", layout, "--data", "rows",
        "--dense", "dense", "--max_length", 128, *STEPS.split(), "--output_dir", "out",
    )  # fmt: skip
    assert "rows (prompt-completion): 32 rows, 32 sequences" in said
    check_recovered(world, "out")


@pytest.mark.slow
def test_sft_script(world):
    run(
        world, RECIPES / "scripts" / "sft_with_callback.py", "--model_name_or_path", "per_layer",
        "--dataset_name", "rows", "--dense", "dense", *TRL.split(), "--output_dir", "out",
    )  # fmt: skip
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
    kind = {"fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}.get(
        path.stem, "MULTI_CPU"
    )
    assert config.distributed_type == kind and config.num_processes > 1
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    elif kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    else:
        assert config.use_cpu and "NOT RUN HERE" not in path.read_text()
    assert ("NOT RUN HERE" in path.read_text()) == (kind != "MULTI_CPU")
