"""Checkpoints: they load where nothing of ours is installed, bit for bit, or they do not come to be."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.errors import CheckpointError
from hf_structprune.files.writing import write_folder


TOKENS = families.make_tokens(2, 12)
MODELING_FILE = "modeling_structprune.py"
BIG = dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
# Name: family, changes of its configuration, options of pruning.
UNIFORM = {
    "llama": ("llama", {}, dict(mlp_ratio=0.3)),
    "llama as mistral": ("llama", BIG, dict(attention_ratio=0.25, mlp_ratio=0.3)),
    "qwen3": ("qwen3", {}, dict(units=("kv_groups", "mlp_neurons"), attention_ratio=0.5, mlp_ratio=0.3)),
    "gpt2": ("gpt2", {}, dict(mlp_ratio=0.3)),
    "tied gemma2": ("gemma2", dict(tie_word_embeddings=True), dict(attention_ratio=0.5, mlp_ratio=0.3)),
}
_SOME = dict(layout="per_layer", layers=[0, 2], attention_ratio=0.5, mlp_ratio=0.3)
PER_LAYER = {
    "llama": ("llama", {}, dict(layout="per_layer", layers=[1], mlp_ratio=0.3)),
    "llama heads": ("llama", {}, _SOME),
    "gpt2 heads": ("gpt2", {}, _SOME),
    "phi3 heads": ("phi3", {}, _SOME),
    "opt heads": ("opt", {}, _SOME),
    "tied gemma3": ("gemma3_text", dict(tie_word_embeddings=True), _SOME),
}
# Sublayers that some layers lack.
SKIPPED = dict.fromkeys(("llama", "opt", "gpt2", "gemma2", "mixtral", "qwen3_moe"), {"attention": [0], "mlp": [1]})
SKIPPED = {f"{name} skips": (name, dropped) for name, dropped in SKIPPED.items()}
SKIPPED["attention skips"] = ("llama", {"attention": [0]})
UNEQUAL = [*PER_LAYER, *SKIPPED]
AGAIN = ("llama heads", "phi3 heads", "tied gemma3", "llama skips", "mixtral skips")  # saved again by a stranger

# Runs in an interpreter in which `import hf_structprune` fails. Argument: a JSON file of jobs.
STRANGER = """
import json, sys
sys.modules["hf_structprune"] = None
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
tokens, report = torch.load(sys.argv[2]), {}
for job in json.load(open(sys.argv[1])):
    try:
        cls = LlamaForCausalLM if job.get("stock") else AutoModelForCausalLM
        options = {"trust_remote_code": True} if job.get("trust") else {}
        model = cls.from_pretrained(job["folder"], **options).eval()
        with torch.no_grad():
            torch.save(model(tokens, use_cache=False).logits, job["out"])
        if job.get("again"):
            model.save_pretrained(job["again"])
        report[job["name"]] = type(model).__name__
    except Exception as error:
        report[job["name"]] = f"error {type(error).__name__}: {error}"
assert sys.modules["hf_structprune"] is None
json.dump(report, open(sys.argv[3], "w"))
"""


def prune(case, tokenizer=None):
    family, changes, options = case
    config = PruningConfig(round_to=1, calibration=families.calibration(), **options)
    pruner = StructuredPruner(families.make_model(family, **changes), config, tokenizer)
    pruner.prune()
    return pruner


def stranger(folder, jobs):
    """Loads folders in a process that has Transformers only; class names or errors by job name."""
    paths = [folder / name for name in ("jobs.json", "tokens.pt", "report.json")]
    paths[0].write_text(json.dumps(jobs))
    torch.save(TOKENS, paths[1])
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *map(str, paths)], env=environment, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(paths[2].read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All checkpoints, and what a process without this package makes of them."""
    root = tmp_path_factory.mktemp("checkpoints")
    models, jobs = {}, []
    for layout, name in [*(("uniform", name) for name in UNIFORM), *(("per_layer", name) for name in UNEQUAL)]:
        folder = root / layout / name.replace(" ", "_")
        if name in SKIPPED:
            family, dropped = SKIPPED[name]
            model = families.cut(families.make_model(family), {}, {}, layout, dropped)
            model.save_pretrained(folder)
        else:
            pruner = prune((UNIFORM if layout == "uniform" else PER_LAYER)[name])
            pruner.save_pretrained(folder)
            model = pruner.model
        models[layout, name] = model, folder
        job = dict(name=f"{layout} {name}", folder=str(folder), out=str(folder) + ".pt")
        if layout == "per_layer":
            jobs.append(dict(job, name=f"auto {name}"))
            again = str(folder) + "_again"
            if name in AGAIN:
                jobs.append(dict(job, name=f"again {name}", folder=again, out=job["out"] + "2", trust=True))
            jobs.insert(0, dict(job, trust=True, again=again if name in AGAIN else None))
        else:
            jobs.append(job)
    for name in ("llama", "llama skips"):
        _, folder = models["per_layer", name]
        jobs.append(dict(name=f"stock {name}", folder=str(folder), out=str(root / "none.pt"), stock=True))
    return SimpleNamespace(models=models, report=stranger(root, jobs), root=root)


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform_checkpoints_load_with_transformers_alone_bit_for_bit(world, name):
    model, folder = world.models["uniform", name]
    assert world.report[f"uniform {name}"] == type(model).__name__
    assert torch.equal(torch.load(f"{folder}.pt"), families.logits(model, TOKENS))
    assert not (folder / MODELING_FILE).exists()
    assert not {"auto_map", "per_layer_config"} & set(json.loads((folder / "config.json").read_text()))


def test_llama_head_counts_that_do_not_divide_are_written_as_mistral_with_the_same_logits(world):
    model, folder = world.models["uniform", "llama as mistral"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "mistral" and config["sliding_window"] is None
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (6, 3, 8)
    # The same weights in a Llama that is built around the check of its configuration.
    llama = LlamaForCausalLM(families.make_config("llama", **BIG))
    for layer in llama.model.layers:
        attention = layer.self_attn
        for part, rows in ((attention.q_proj, 48), (attention.k_proj, 24), (attention.v_proj, 24)):
            part.weight = torch.nn.Parameter(torch.empty(rows, 64))
        attention.o_proj.weight = torch.nn.Parameter(torch.empty(64, 48))
        width = config["intermediate_size"]
        layer.mlp.gate_proj.weight = torch.nn.Parameter(torch.empty(width, 64))
        layer.mlp.up_proj.weight = torch.nn.Parameter(torch.empty(width, 64))
        layer.mlp.down_proj.weight = torch.nn.Parameter(torch.empty(64, width))
    llama.load_state_dict(model.state_dict())
    assert torch.equal(families.logits(llama.eval(), TOKENS), families.logits(model, TOKENS))


@pytest.mark.parametrize("name", UNEQUAL)
def test_per_layer_checkpoints_load_with_remote_code_and_nothing_of_ours(world, name):
    model, folder = world.models["per_layer", name]
    assert world.report[f"per_layer {name}"] == type(model).__name__
    assert torch.equal(torch.load(f"{folder}.pt"), families.logits(model, TOKENS))


@pytest.mark.parametrize("name", AGAIN)
def test_what_a_stranger_saves_again_loads_again(world, name):
    model, folder = world.models["per_layer", name]
    again = Path(f"{folder}_again")
    assert (again / MODELING_FILE).read_text() == (folder / MODELING_FILE).read_text()
    assert world.report[f"again {name}"] == type(model).__name__
    assert torch.equal(torch.load(f"{folder}.pt2"), families.logits(model, TOKENS))


@pytest.mark.parametrize("name", UNEQUAL)
def test_per_layer_checkpoints_do_not_load_half_without_remote_code(world, name):
    assert world.report[f"auto {name}"].startswith("error")
    assert name not in SKIPPED or "AmbiguousGlobalPerLayerAttributeError" in world.report[f"auto {name}"]


@pytest.mark.parametrize("name", ["llama", "llama skips"])
def test_the_stock_class_refuses_a_per_layer_checkpoint(world, name):
    assert world.report[f"stock {name}"].startswith("error")


@pytest.mark.parametrize("name", UNEQUAL)
def test_per_layer_checkpoints_load_after_importing_this_package(world, name):
    model, folder = world.models["per_layer", name]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert torch.equal(families.logits(loaded, TOKENS), families.logits(model, TOKENS))
    prompt = TOKENS[:1]
    assert torch.equal(families.greedy(loaded, prompt, True), families.greedy(loaded, prompt, False))
    assert torch.equal(families.greedy(loaded, prompt, True), families.greedy(model, prompt, True))


@pytest.mark.parametrize(
    "layout, name", [("per_layer", "llama heads"), ("per_layer", "gpt2 heads"), ("uniform", "qwen3")]
)
def test_checkpoints_load_through_the_pruner_and_can_be_pruned_again(world, layout, name):
    model, folder = world.models[layout, name]
    config = PruningConfig(layout=layout, criterion="l1", round_to=1, calibration=families.calibration())
    pruner = StructuredPruner.from_pretrained(folder, config)
    assert torch.equal(families.logits(pruner.model, TOKENS), families.logits(model, TOKENS))
    assert families.count(pruner.prune(0.1)) < families.count(model)


@pytest.mark.parametrize("name", ["llama heads", "gpt2 heads"])
def test_saving_a_per_layer_model_again_keeps_what_it_takes_to_load(world, name, tmp_path):
    model, folder = world.models["per_layer", name]
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    one, other = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert one["auto_map"] == other["auto_map"] and one["per_layer_config"] == other["per_layer_config"]
    assert (tmp_path / "again" / MODELING_FILE).read_text() == (folder / MODELING_FILE).read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(families.logits(loaded, TOKENS), families.logits(model, TOKENS))


def test_per_layer_configuration_names_the_widths_of_each_layer(world):
    _, folder = world.models["per_layer", "llama"]
    config = AutoConfig.from_pretrained(folder)
    assert [config.per_layer_config[i].intermediate_size for i in range(3)] == [48, 33, 48]


def without_a_tensor(folder, target):
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    name = next(name for name in tensors if "up_proj" in name)
    del tensors[name]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return name


def test_a_per_layer_checkpoint_that_lacks_a_tensor_raises(world, tmp_path):
    name = without_a_tensor(world.models["per_layer", "llama"][1], tmp_path / "broken")
    with pytest.raises(RuntimeError, match=name):
        AutoModelForCausalLM.from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize("layout", ["per_layer", "uniform"])
def test_the_pruner_refuses_a_checkpoint_that_lacks_a_tensor(world, tmp_path, layout):
    name = without_a_tensor(world.models[layout, "llama"][1], tmp_path / "broken")
    with pytest.raises((RuntimeError, CheckpointError), match=name):
        StructuredPruner.from_pretrained(tmp_path / "broken")


def test_attention_implementation_reaches_every_layer(world):
    _, folder = world.models["per_layer", "llama heads"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = families.logits(model, TOKENS)
    model.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}
    torch.testing.assert_close(families.logits(model, TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_generation_config_tokenizer_plan_and_configuration_travel(tmp_path, tiny_tokenizer):
    family, changes, options = UNIFORM["llama"]
    model = families.make_model(family, vocab_size=128, **changes)
    model.generation_config.repetition_penalty = 1.25
    config = PruningConfig(criterion="l1", compensation=False, **options)
    pruner = StructuredPruner(model, config, tiny_tokenizer)
    pruner.prune()
    pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.repetition_penalty == 1.25
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a plan")["input_ids"] == tiny_tokenizer("a plan")["input_ids"]
    assert PruningPlan.load(tmp_path / "out") == pruner.last_plan
    assert PruningConfig.load(tmp_path / "out") == config
    assert StructuredPruner.from_pretrained(tmp_path / "out").tokenizer is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_the_dtype_travels(tmp_path, dtype, layout):
    config = PruningConfig(criterion="l1", compensation=False, layout=layout)
    pruner = StructuredPruner(families.make_model("llama", dtype), config)
    model = pruner.prune(0.2)
    pruner.save_pretrained(tmp_path / "out")
    loaded = StructuredPruner.from_pretrained(tmp_path / "out").model
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(families.logits(loaded, TOKENS), families.logits(model, TOKENS))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def pruned(tiny_tokenizer):
    pruner = StructuredPruner(
        families.make_model("llama"), PruningConfig(criterion="l1", compensation=False), tiny_tokenizer
    )
    pruner.prune(0.2)
    return pruner


@pytest.mark.parametrize(
    "failure, raised", [(OSError("disk full"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_write_that_fails_or_is_interrupted_leaves_nothing(tmp_path, pruned, monkeypatch, failure, raised):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(pruned.tokenizer, "save_pretrained", fail)
    with pytest.raises(raised):
        pruned.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "failure, raised", [(OSError("disk full"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_write_that_fails_leaves_the_older_checkpoint(tmp_path, pruned, monkeypatch, failure, raised):
    pruned.save_pretrained(tmp_path / "out")
    before = contents(tmp_path / "out")

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(pruned.tokenizer, "save_pretrained", fail)
    with pytest.raises(raised):
        pruned.save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_disk_space_raises_before_anything_is_written(tmp_path, pruned, monkeypatch):
    needed = pruned.last_plan.bytes_after
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    monkeypatch.setattr(pruned.model, "save_pretrained", lambda *a, **k: pytest.fail("written anyway"))
    with pytest.raises(CheckpointError, match=r"needs \d.*kB, but the disk has \d.*kB left"):
        pruned.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_overwritten_by_a_folder(tmp_path, pruned):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        pruned.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_weights_of_an_earlier_checkpoint_go_and_other_files_stay(tmp_path, pruned, world):
    shutil.copytree(world.models["per_layer", "llama"][1], tmp_path / "out")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("old shard")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    pruned.save_pretrained(tmp_path / "out")
    names = set(contents(tmp_path / "out"))
    assert "notes.txt" in names and "model-00001-of-00002.safetensors" not in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(families.logits(loaded, TOKENS), families.logits(pruned.model, TOKENS))


def test_sharded_checkpoints_replace_whole_ones(tmp_path, pruned):
    pruned.save_pretrained(tmp_path / "out")
    pruned.save_pretrained(tmp_path / "out", max_shard_size="40KB")
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors*")}
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(families.logits(loaded, TOKENS), families.logits(pruned.model, TOKENS))


def test_missing_parent_folders_are_made(tmp_path):
    write_folder(tmp_path / "a" / "b", lambda path: (path / "file").write_text("x"))
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
