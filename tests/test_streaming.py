"""Pruning from disk to disk gives what pruning in memory gives, bit for bit, with a layer or two in memory."""

import copy
import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from families import calibration, make_model, make_tokens
from moe_families import make_moe
from processes import forked
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from vocabularies import byte_level

from hf_structprune import PruningConfig, StructuredPruner, streaming
from hf_structprune.commands import cli
from hf_structprune.errors import (
    CheckpointError,
    ConfigurationError,
    PlaceError,
    StructPruneError,
    UnsupportedModelError,
)
from hf_structprune.files.rooms import Spill, on_disk
from hf_structprune.model import store
from hf_structprune.model.store import OnDisk
from hf_structprune.refit import reconstruction
from hf_structprune.refit.layer_by_layer import MATRICES


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if ".safetensors" not in path.name}


def assert_same(one: Path, other: Path) -> None:
    """The same tensors, configuration, plan, card and files beside them."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert texts(one) == texts(other)


def save(model, folder: Path, **options) -> Path:
    model.save_pretrained(folder / "dense", **options)
    return folder / "dense"


def config(**options) -> PruningConfig:
    return PruningConfig(calibration=calibration(), **options)


def prune_both(dense: Path, ratio, loading=None, spill=None, **options) -> tuple[Path, Path]:
    """Folders of the same name that the model was pruned into, in memory and from disk."""
    folders = dense.parent / "memory" / "out", dense.parent / "disk" / "out"
    for stream, folder in zip(({}, {"stream": True, "spill": spill}), folders, strict=True):
        pruner = StructuredPruner.from_pretrained(dense, config(**options), **stream, **(loading or {}))
        pruner.prune(copy.deepcopy(ratio), folder)
    assert [path.name for path in folders[1].parent.iterdir()] == ["out"]
    return folders


CASES = {
    "llama": (lambda: make_model("llama"), 0.1, {"units": "mlp_neurons"}),
    "tied in bf16": (
        lambda: make_model("llama", dtype=torch.bfloat16, tie_word_embeddings=True), 0.1,
        {"units": "mlp_neurons", "reconstruct": True},
    ),
    "gemma2 heads": (lambda: make_model("gemma2"), 0.1, {"units": ("kv_groups", "mlp_neurons")}),
    "gpt2 per layer": (lambda: make_model("gpt2"), 0.05, {"units": ("kv_groups",), "layout": "per_layer"}),
    "phi3 by weights": (lambda: make_model("phi3"), 0.1, {"criterion": "l2", "compensation": False}),
    "falcon by inputs": (lambda: make_model("falcon"), 0.1, {"criterion": "wanda", "compensation": False}),
    "layers": (lambda: make_model("qwen2"), None, {"units": ("layers",), "layers": [0, 1]}),
    "layers and neurons": (lambda: make_model("llama"), 0.5, {"units": ("layers", "mlp_neurons"), "keep_first": 2}),
    "sublayers": (lambda: make_model("qwen2"), None, {"units": ("mlp",), "layers": [1], "layout": "per_layer"}),
    "block by angles": (
        lambda: make_model("llama", num_hidden_layers=5), None,
        {"units": ("layers",), "num_layers": 2, "depth_criterion": "angular"},
    ),
    "sublayers by influence": (
        lambda: make_model("gemma2"), 0.2,
        {"units": ("attention", "mlp"), "depth_criterion": "block_influence", "layout": "per_layer"},
    ),
    "layers by weights": (
        lambda: make_moe("qwen3_moe"), None, {"units": ("layers",), "num_layers": 1, "depth_criterion": "magnitude"},
    ),
    "qwen3_moe": (lambda: make_moe("qwen3_moe"), 0.1,
                  {"units": ("experts",), "merge_experts": True, "reconstruct": True}),
    "gpt_oss": (lambda: make_moe("gpt_oss"), 0.1, {"units": ("experts",)}),
    "mixtral": (lambda: make_moe("mixtral"), 0.3,
                {"units": ("expert_neurons",), "round_to": 1, "reconstruct": True}),
}  # fmt: skip


SPILLED = (
    "block by angles",
    "tied in bf16",
    "gemma2 heads",
    "falcon by inputs",
    "layers and neurons",
    "qwen3_moe",
    "mixtral",
)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(reconstruction, "STEPS", 4)


@pytest.fixture
def mapped(monkeypatch):
    """Shapes of what is kept on disk."""
    seen = []
    monkeypatch.setattr(store, "on_disk", lambda shape, *where: (seen.append(shape), on_disk(shape, *where))[1])
    return seen


@pytest.mark.parametrize("name", CASES)
def test_result_is_that_of_memory(tmp_path, name, mapped):
    make, ratio, options = CASES[name]
    shards = {"max_shard_size": "20KB"} if name in ("llama", "qwen3_moe") else {}
    spill = Spill(0) if name in SPILLED else None
    memory, disk = prune_both(save(make(), tmp_path, **shards), ratio, spill=spill, **options)
    assert_same(memory, disk)
    assert len(mapped) > 2 if spill else not mapped
    if name in ("llama", "sublayers"):
        loaded = [
            AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True)(make_tokens(2)) for f in (memory, disk)
        ]
        assert torch.equal(loaded[0].logits, loaded[1].logits)


def test_plan_with_chosen_units_and_another_dtype(tmp_path):
    dense = save(make_model("qwen3", dtype=torch.bfloat16), tmp_path)
    pruner = StructuredPruner.from_pretrained(dense, config(criterion="taylor"))
    pruner.prune(0.1)
    memory, disk = prune_both(dense, pruner.last_plan, {"dtype": torch.float32}, criterion="taylor")
    assert_same(memory, disk)
    assert {tensor.dtype for tensor in tensors(disk).values()} == {torch.float32}


@pytest.mark.parametrize("equal", [True, False])
def test_tie_that_the_checkpoint_stores_twice(tmp_path, equal):
    dense = save(make_model("llama", tie_word_embeddings=True), tmp_path)
    stored = load_file(dense / "model.safetensors")
    embedding = stored["model.embed_tokens.weight"]
    stored["lm_head.weight"] = embedding.clone() if equal else embedding.flip(0).contiguous()
    save_file(stored, dense / "model.safetensors", metadata={"format": "pt"})
    memory, disk = prune_both(dense, 0.1, units="mlp_neurons")
    assert_same(memory, disk)
    assert ("lm_head.weight" in tensors(disk)) != equal


def test_layers_are_in_memory_one_or_two_at_a_time(tmp_path, monkeypatch):
    dense, held, most = save(make_model("llama", num_hidden_layers=6), tmp_path), [], []
    load, free = OnDisk.load, OnDisk.free

    def check(store):
        names = (name for name, tensor in store.model.state_dict().items() if tensor.device.type != "meta")
        there = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
        most.append(len(there))
        assert there <= set(held)

    def watched_load(self, part):
        held.append(part)
        load(self, part)
        check(self)

    def watched_free(self, part):
        free(self, part)
        held.remove(part)
        check(self)

    monkeypatch.setattr(OnDisk, "load", watched_load)
    monkeypatch.setattr(OnDisk, "free", watched_free)
    pruner = StructuredPruner.from_pretrained(dense, config(keep_first=5), stream=True)
    model = pruner.prune(None, tmp_path / "out")
    assert not held and max(most) == 2  # a layer, and the dropped one behind it
    most.clear()
    chosen = config(units=("attention", "mlp"), layout="per_layer", depth_criterion="block_influence")
    assert StructuredPruner.from_pretrained(dense, chosen, stream=True).plan(0.3).dropped
    assert not held and max(most) == 1
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    with pytest.raises(StructPruneError, match="load it from"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "ratio", "words"),
    [
        ({"criterion": "taylor"}, 0.1, "gradients"),
        ({"allocation": "search", "layout": "per_layer"}, 0.1, "'search'"),
        ({"units": ("layers",)}, 0.4, "'exchange', which measures the loss .* memory for the weights, besides"),
        ({"units": ("layers",), "depth_criterion": "taylor"}, 0.4, "weights, and room for gradients"),
        ({"units": ("hidden",)}, 0.1, "hidden size"),
        ({"iterative_steps": 2}, 0.1, "iterative_steps"),
    ],
)
def test_what_needs_the_whole_model_is_refused(tmp_path, options, ratio, words):
    pruner = StructuredPruner.from_pretrained(save(make_model("llama"), tmp_path), config(**options), stream=True)
    for act in (pruner.plan, lambda ratio: pruner.prune(ratio, tmp_path / "out")):
        with pytest.raises(ConfigurationError, match=words) as refused:
            act(ratio)
        assert "What streams" in str(refused.value)
    assert not (tmp_path / "out").exists()


def _damage(stored: dict[str, torch.Tensor], how: str) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    if how == "lacks":
        del stored[name]
    elif how == "not name":
        stored["model.layers.7.mlp.down_proj.weight"] = stored[name].clone()
    elif how == "shape":
        stored[name] = stored[name][:, :5].contiguous()
    else:
        stored[name][0, 0] = torch.nan


@pytest.mark.parametrize("how", ["lacks", "not name", "shape", "not finite"])
def test_damaged_weights_leave_no_folder(tmp_path, how):
    dense = save(make_model("llama"), tmp_path)
    stored = load_file(dense / "model.safetensors")
    _damage(stored, how)
    save_file(stored, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CheckpointError, UnsupportedModelError), match=how):
        StructuredPruner.from_pretrained(dense, config(), stream=True).prune(0.1, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_what_cannot_be_read_layer_by_layer(tmp_path):
    dense = save(make_model("llama"), tmp_path)
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="safetensors"):
        StructuredPruner.from_pretrained(dense, config(), stream=True)
    with pytest.raises(ConfigurationError, match="device_map"):
        StructuredPruner.from_pretrained(dense, config(), stream=True, device_map="auto")
    with pytest.raises(ConfigurationError, match="stream"):
        StructuredPruner.from_pretrained(make_model("llama"), config(), stream=True)


def test_too_little_memory_is_refused_before_work(tmp_path, monkeypatch):
    pruner = StructuredPruner.from_pretrained(save(make_model("llama"), tmp_path), config(), stream=True)
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(ConfigurationError, match="of memory are needed, and 1.00kB are free"):
        pruner.prune(0.1, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="output_dir"):
        pruner.prune(0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_hidden_states_go_to_disk_above_a_limit(tmp_path, monkeypatch, mapped, caplog):
    dense, rooms = save(make_model("llama"), tmp_path), tmp_path / "rooms"
    rooms.mkdir()

    def prune(spill):
        mapped.clear()
        caplog.clear()
        pruner = StructuredPruner.from_pretrained(dense, config(), stream=True, spill=spill)
        memory, states = pruner._streaming.memory_needed(pruner.plan(0.1), pruner.config, pruner.structure)
        pruner.prune(0.1, tmp_path / "out", resume=False)
        return memory, states

    memory, states = prune(None)
    assert not mapped and "hidden states" not in caplog.text
    in_words = tqdm.format_sizeof(memory + states, "B")
    assert f"About {in_words} of memory" in caplog.text
    prune(Spill(states / 1e6, rooms))
    assert not mapped  # as much as there may be
    prune(Spill(states / 1e6 - 1e-6, rooms))
    tokens, width = config().calibration.tokens.numel(), make_model("llama").config.hidden_size
    assert {shape for shape in mapped if shape[1] == width} == {(tokens, width)} and not any(rooms.iterdir())
    for words in (f"About {tqdm.format_sizeof(memory, 'B')} of memory", f"disk in {rooms} ", "for hidden states"):
        assert words in caplog.text
    kept = sum(math.prod(shape) for shape in mapped) * 4
    assert 0 < states < kept  # not all of them at once
    # On one disk there must be room for both, and for the state of the run.
    disk = psutil.disk_usage(tmp_path)._replace(free=pruned_size(dense) + states // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    with pytest.raises(PlaceError, match="the disk has"):
        prune(Spill(0, rooms))
    monkeypatch.undo()
    with pytest.raises(ConfigurationError, match="not there"):
        Spill(folder=tmp_path / "nothing")
    with pytest.raises(ConfigurationError, match="above"):
        Spill(-1)
    with pytest.raises(ConfigurationError, match="`stream`"):
        StructuredPruner.from_pretrained(dense, config(), spill=Spill(0))


def pruned_size(dense: Path) -> int:
    return StructuredPruner.from_pretrained(dense, config(), stream=True).plan(0.1).bytes_after


def test_no_room_for_hidden_states(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PlaceError, match="No space left"):
        on_disk((2, 3), torch.float32, tmp_path)
    monkeypatch.undo()
    assert on_disk((0, 3), torch.bfloat16, tmp_path).shape == (0, 3)
    tensor = on_disk((2, 3), torch.bfloat16, tmp_path)
    tensor.copy_(torch.arange(6.0).view(2, 3))
    assert tensor.dtype == torch.bfloat16 and tensor[1].tolist() == [3, 4, 5] and not any(tmp_path.iterdir())


def test_command(tmp_path, capsys):
    dense = save(make_model("llama"), tmp_path)
    argv = ["prune", str(dense), "--ratio", "0.1", "--criterion", "l2", "--no-compensation", "--json"]
    argv += ["--output-dir", str(tmp_path / "out"), "--spill-above", "0", "--spill-dir", str(tmp_path)]
    assert cli.main(argv) != 0
    assert "for --stream" in capsys.readouterr().err
    assert cli.main([*argv, "--stream"]) == 0
    assert json.loads(capsys.readouterr().out)["ratio"] == pytest.approx(0.1, abs=0.05)
    assert len(tensors(tmp_path / "out")) == len(tensors(dense))
    assert cli.main(["prune", str(dense), "--num-layers", "1", "--stream", "--output-dir", str(tmp_path / "no")]) != 0
    assert "What streams" in capsys.readouterr().err
    argv = ["plan", str(dense), "--num-layers", "1", "--units", "layers", "--depth-criterion", "magnitude", "--json"]
    plans = []
    for how in ([], ["--stream"]):
        assert cli.main([*argv, *how]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1] and plans[0]["dropped"]
    assert cli.main([*argv, "--stream", "--estimate"]) != 0


def test_what_is_announced_is_what_is_done(tmp_path):
    """Second moments are counted where there are any, and experts that are read while nothing is re-fitted."""

    def needed(model, **options):
        pruner = StructuredPruner.from_pretrained(save(model, tmp_path), config(**options), stream=True)
        return pruner._streaming.memory_needed(pruner.plan(0.1), pruner.config, pruner.structure)[0], pruner

    model = make_model("llama", intermediate_size=4096)
    width = 4096**2 * 4
    assert needed(model)[0] > MATRICES * width
    assert needed(model, criterion="wanda", compensation=False)[0] < width
    assert needed(model, criterion="obs", compensation=False)[0] > MATRICES * width
    memory, pruner = needed(make_moe("qwen3_moe"), units=("experts",))
    store = pruner._streaming.store
    assert memory >= store.size("outside") + store.size(0) + 2 * store.merged_size(0)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["llama", "layers and neurons", "qwen3_moe", "by weights"])
@pytest.mark.parametrize("last", [1, 2])
def test_resumed_run_gives_the_same(tmp_path, monkeypatch, name, last):
    make, ratio, options = CASES[name] if name in CASES else (CASES["llama"][0], 0.1, {"criterion": "l2"})
    dense, folder = save(make(), tmp_path), tmp_path / "disk" / "out"
    undisturbed = tmp_path / "whole" / "out"
    StructuredPruner.from_pretrained(dense, config(**options), stream=True).prune(ratio, undisturbed)
    monkeypatch.setattr(streaming, "SAVE_EVERY", 0)
    put, saves = OnDisk.put, []

    def kill(self, part):
        put(self, part)
        saves.append(part)
        if len(saves) == last:
            monkeypatch.setattr(streaming, "SAVE_EVERY", 1e9)  # the last layer is done, and its state is not saved
        if len(saves) > last:
            raise Killed

    monkeypatch.setattr(OnDisk, "put", kill)
    if last == 1:
        monkeypatch.setattr(streaming, "SAVE_EVERY", 0)
    with pytest.raises(Killed):
        StructuredPruner.from_pretrained(dense, config(**options), stream=True).prune(ratio, folder)
    monkeypatch.setattr(OnDisk, "put", put)
    assert not folder.exists()
    spill = Spill(0) if name in ("layers and neurons", "qwen3_moe") else None  # states may be kept elsewhere now
    pruner = StructuredPruner.from_pretrained(dense, config(**options), stream=True, spill=spill)
    if last == 2:
        with pytest.raises(ConfigurationError, match="interrupted"):
            pruner.prune(ratio, folder)
    pruner.prune(ratio, folder, resume=True)
    assert_same(undisturbed, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def _killed(place, name: str, time: int, argv: list[str]) -> list[int]:
    """Runs a command in another process, which is killed when it calls a function so many times; gives its code."""
    function, calls = getattr(place, name), []

    def kill(*args):
        calls.append(1)
        if len(calls) == time:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    with mock.patch.object(place, name, kill):
        return forked(cli.main, argv)


def test_process_that_is_killed_twice_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streaming, "SAVE_EVERY", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those of OpenMP do not survive a fork
    make_model("llama", vocab_size=416, num_hidden_layers=4).save_pretrained(tmp_path / "dense")
    byte_level("smollm", 400).save_pretrained(tmp_path / "dense")
    argv = ["prune", str(tmp_path / "dense"), "--ratio", "0.1", "--stream", "--spill-above", "0"]
    argv += ["--calibration-num-samples", "8", "--calibration-length", "16", "--output-dir"]
    whole, folder = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    assert cli.main([*argv, str(whole)]) == 0
    # While the second state is written, with its weights on disk; then behind the third layer, before it is saved.
    assert _killed(streaming.os, "replace", 2, [*argv, str(folder)]) == [-signal.SIGKILL]
    assert not folder.exists() and cli.main([*argv, str(folder)]) != 0
    assert "--resume" in capsys.readouterr().err
    assert _killed(OnDisk, "put", 2, [*argv, str(folder), "--resume"]) == [-signal.SIGKILL]
    assert not folder.exists()
    loaded, load = [], OnDisk.load
    monkeypatch.setattr(OnDisk, "load", lambda self, part: (loaded.append(part), load(self, part))[1])
    assert cli.main([*argv, str(folder), "--resume"]) == 0
    torch.set_num_threads(threads)
    files = [{path.name: path.read_bytes() for path in place.iterdir()} for place in (whole, folder)]
    assert files[0] == files[1] and sum(".safetensors" in name for name in files[0]) > 4
    assert loaded.count(1) < loaded.count(2)  # two layers were done
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_state_of_another_job_is_refused(tmp_path, monkeypatch):
    dense, folder = save(make_model("llama"), tmp_path), tmp_path / "out"
    monkeypatch.setattr(streaming, "SAVE_EVERY", 0)
    monkeypatch.setattr(OnDisk, "finish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        StructuredPruner.from_pretrained(dense, config(), stream=True).prune(0.1, folder)
    monkeypatch.undo()
    other_text = PruningConfig(calibration=calibration(seed=1))
    for job, ratio in ((config(seed=1), 0.1), (config(), 0.2), (other_text, 0.1)):
        with pytest.raises(ConfigurationError, match="another job|other text"):
            StructuredPruner.from_pretrained(dense, job, stream=True).prune(ratio, folder, resume=True)
    # The same job by its words, but what the words stand for has changed.
    monkeypatch.setattr("hf_structprune.pruner.load_tokens", lambda *_: make_tokens(16, 16, 1))
    with pytest.raises(ConfigurationError, match="other text"):
        StructuredPruner.from_pretrained(dense, config(), stream=True).prune(0.1, folder, resume=True)
    monkeypatch.undo()
    argv = ["prune", str(dense), "--ratio", "0.1", "--criterion", "l2", "--no-compensation", "--stream"]
    argv += ["--output-dir", str(folder)]
    assert cli.main(argv) != 0
    assert cli.main([*argv, "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


def test_experts_that_are_stored_one_by_one_are_there_several_times_while_they_are_read(tmp_path):
    model = make_moe("qwen3_moe")
    model.save_pretrained(tmp_path)
    streaming = StructuredPruner.from_pretrained(tmp_path, stream=True)._streaming
    experts = sum(p.numel() * p.element_size() for p in model.model.layers[0].mlp.experts.parameters())
    assert streaming.store.merged_size(0) == experts
    make_model("llama").save_pretrained(tmp_path / "llama")
    dense = StructuredPruner.from_pretrained(tmp_path / "llama", stream=True)._streaming
    assert dense.store.merged_size(0) == 0
