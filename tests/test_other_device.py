"""Pruning on an accelerator: nothing that was made on the CPU meets what is there, and the result is the CPU's."""

import math

import families
import moe_families
import pytest
import torch
from accelerate import dispatch_model
from other_device import DEVICE, OtherDevice, is_other, place, spread
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, StructuredPruner, streaming
from hf_structprune.errors import ConfigurationError, StructPruneError, UnsupportedModelError
from hf_structprune.evaluation.perplexity import window_losses
from hf_structprune.files.rooms import Spill, in_memory, room_needed
from hf_structprune.model import store as store_module
from hf_structprune.model.store import InTurns


# With the number of accelerators. Gemma has tied embeddings and, as many layers share them, two rotary embeddings.
CASES = {
    "default": (1, "llama", 0.1, {}),
    "gradients": (2, "gemma3_text", 0.1, {"criterion": "taylor"}),
    "hidden size": (2, "gemma2", None, {"hidden_size": 24}),
    "experts": (2, "qwen3_moe", None, {"keep": {"experts": 3}, "merge_experts": True}),
    "neurons of experts": (2, "qwen3_moe", None, {"keep": {"expert_neurons": 8}}),
    "layers and neurons, matrices that are transposed": (
        2, "gpt2", 0.4, {"units": ("layers", "mlp_neurons"), "split": {"layers": 0.8, "mlp_neurons": 0.2}},
    ),
}  # fmt: skip


def make(name):
    return (moe_families.make_moe if name in moe_families.CONFIGS else families.make_model)(name)


def pruner_of(model, options):
    return StructuredPruner(model, PruningConfig(round_to=1, calibration=families.calibration(8, 12), **options))


@pytest.mark.parametrize("case", CASES)
def test_pruning_is_the_same_on_other_devices(case):
    devices, name, ratio, options = CASES[case]
    plain = pruner_of(make(name), options)
    expected = plain.prune(ratio).state_dict()
    with OtherDevice() as device:
        model = make(name).to("cuda") if devices == 1 else spread(make(name))
        assert model.device == DEVICE
        pruner = pruner_of(model, options)
        model = pruner.prune(ratio)
        model(families.make_tokens(2, 8).to("cuda"))
    assert {place(one) for one in (*model.parameters(), *model.buffers())} == {*range(devices)}
    assert device.operations > 1000 and pruner.last_plan.to_dict() == plain.last_plan.to_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_a_model_on_two_devices_is_measured_generates_and_is_saved(tmp_path):
    def done(model, folder):
        pruner = pruner_of(model, {"reconstruct": False})  # which a spread model is left without
        model, tokens = pruner.prune(0.1), families.make_tokens(2, 12)
        pruner.save_pretrained(folder)
        losses = window_losses(model, tokens, [11, 7], batch_size=2)
        return losses.tolist(), model.generate(tokens.to(model.device), max_new_tokens=5).tolist()

    expected = done(families.make_model("llama"), tmp_path / "one")
    with OtherDevice():
        assert done(spread(families.make_model("llama")), tmp_path / "two") == expected
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict() for folder in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_parts_that_are_offloaded_are_refused_with_the_way_out(tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{n}": "disk" if n else "cpu" for n in range(3)}
    model = dispatch_model(families.make_model("llama"), device_map, offload_dir=str(tmp_path))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert pruner_of(model, {}).plan(0.1).parameters_after < model.num_parameters()  # by sizes alone
    words = r"`model.layers.1`, `model.layers.2` of this model are on disk.*--offload.*--stream"
    with pytest.raises(UnsupportedModelError, match=words):
        pruner_of(model, {}).prune(0.1)
    for options in ({"allocation": "global", "layout": "per_layer"}, {"units": ("layers",)}):
        with pytest.raises(UnsupportedModelError, match=f"measure.*{words}"):
            pruner_of(model, options).plan(0.4)
    assert all(tensor.is_meta or torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bfloat16_is_multiplied_as_cuda_does():
    with OtherDevice():
        model = pruner_of(families.make_model("llama", dtype=torch.bfloat16).to("cuda"), {}).prune(0.1)
        assert model(families.make_tokens(2, 8).to("cuda")).logits.isfinite().all()
    assert all(map(is_other, model.parameters()))


def test_the_second_device_refuses_what_cuda_refuses():
    with OtherDevice():
        there, here = torch.ones(3).to("cuda"), torch.ones(3)
        assert (there + 1).device == DEVICE and there.cpu().device.type == "cpu" and float(there.sum()) == 3
        assert torch.zeros(2, device=there.device).device == DEVICE and there[torch.tensor([1])].device == DEVICE
        elsewhere = there.to(1)
        assert elsewhere.device == torch.device("cuda", 1) and torch.equal(elsewhere.to(0), there)
        for mix in (
            lambda: there + here,
            lambda: there + elsewhere,
            lambda: here[there.long()],
            lambda: torch.cat([there, here]),
        ):
            with pytest.raises(RuntimeError, match="device|cpu"):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


IN_TURNS = {
    "neurons": ("llama", 0.1, {"units": "mlp_neurons"}),
    "taylor": ("llama", 0.1, {"criterion": "taylor"}),
    "experts": ("qwen3_moe", None, {"keep": {"experts": 3}, "merge_experts": True}),
    "layers, chosen on the CPU": ("gpt2", None, {"num_layers": 1}),
    "in steps, tied": ("gemma2", 0.2, {"units": "mlp_neurons", "iterative_steps": 2}),
}


@pytest.fixture
def room(monkeypatch):
    """Bytes that are free on the second device."""
    free = [10**9]
    monkeypatch.setattr(streaming, "free_memory", lambda device: free[0])
    return free


@pytest.fixture
def turns(monkeypatch):
    """The numbers of the layers that are on the device whenever something is brought there."""
    seen, load = [], InTurns.load

    def watched(store, part):
        load(store, part)
        seen.append([n for n, layer in enumerate(store._layers) if any(map(is_other, layer.parameters()))])

    monkeypatch.setattr(InTurns, "load", watched)
    return seen


@pytest.mark.parametrize("case", IN_TURNS)
def test_layers_in_turns_on_another_device(case, room, turns):
    name, ratio, options = IN_TURNS[case]
    config = PruningConfig(round_to=1, calibration=families.calibration(8, 12), **options)
    plain = StructuredPruner(make(name), config)
    expected = plain.prune(ratio).state_dict()
    with OtherDevice() as device:
        pruner = StructuredPruner(make(name), config, device="cuda")
        model = pruner.prune(ratio)
        model(families.make_tokens(2, 8))
        assert not any(map(is_other, (*model.parameters(), *model.buffers())))
    layers = set(range(len(plain.structure.layers) + len(plain.last_plan.dropped.get("layers", ()))))
    assert device.pinned > 3  # hidden states stay in the machine's memory, from where they are copied
    assert max(map(len, turns)) == 1 and {n for (n,) in filter(None, turns)} == layers and device.operations > 300
    assert pruner.last_plan.to_dict() == plain.last_plan.to_dict() and model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_layers_that_are_read_from_disk_go_to_the_device(room, tmp_path, monkeypatch):
    dense = families.make_model("gemma2")  # tied
    dense.save_pretrained(tmp_path / "dense")
    config = PruningConfig("mlp_neurons", round_to=1, calibration=families.calibration(8, 12))
    monkeypatch.setattr(streaming, "SAVE_EVERY", 0.0)
    StructuredPruner.from_pretrained(tmp_path / "dense", config).prune(0.2, tmp_path / "plain")
    with OtherDevice() as device:
        pruner = StructuredPruner.from_pretrained(tmp_path / "dense", config, stream=True, device="cuda")
        pruner.prune(0.2, tmp_path / "read")
    assert device.operations > 300 and device.pinned > 3
    plain, read = (
        {
            name: tensor
            for file in (tmp_path / folder).glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in ("plain", "read")
    )
    assert plain.keys() == read.keys() and all(torch.equal(plain[name], read[name]) for name in plain)


def test_memory_is_pinned_for_cuda_alone_and_where_it_can_be(caplog):
    with OtherDevice() as device:
        in_memory((2, 3), torch.float32, torch.device("mps"))
        assert not device._modes[0].pinned
        assert in_memory((2, 3), torch.float32, DEVICE).device.type == "cpu" and device._modes[0].pinned == 1
    assert room_needed(5, DEVICE) == 8 and room_needed(8, DEVICE) == 8 and room_needed(5, None) == 5
    if not torch.cuda.is_available():
        assert in_memory((2, 3), torch.float32, DEVICE).shape == (2, 3) and "not pinned" in caplog.text


ON_DISK = {
    "neurons": (True, "qwen2", 0.1, {"units": "mlp_neurons"}),
    "experts": (True, "qwen3_moe", None, {"keep": {"experts": 3}, "merge_experts": True}),
    "neurons of experts": (False, "mixtral", None, {"keep": {"expert_neurons": 8}}),
}


@pytest.mark.parametrize("case", ON_DISK)
def test_hidden_states_are_on_disk_where_the_machine_has_too_little_memory_too(case, room, tmp_path, monkeypatch):
    stream, name, ratio, options = ON_DISK[case]
    shapes, make_room = [], store_module.on_disk
    monkeypatch.setattr(store_module, "on_disk", lambda shape, *a: (shapes.append(shape), make_room(shape, *a))[1])
    dense = make(name)
    dense.save_pretrained(tmp_path / "dense")
    config = PruningConfig(round_to=1, calibration=families.calibration(8, 12), **options)
    expected = StructuredPruner(dense, config).prune(ratio).state_dict()
    with OtherDevice() as device:
        experts = (
            {"experts_implementation": "eager"} if "keep" in options else {}
        )  # others count in ways that only CUDA has
        pruner = StructuredPruner.from_pretrained(
            tmp_path / "dense", config, stream=stream, device="cuda", spill=Spill(0, tmp_path), **experts
        )
        pruner.prune(ratio, tmp_path / "out")
    assert len(shapes) > 3 and {math.prod(shape[:-1]) for shape in shapes} == {8 * 12}
    assert device.operations > 300 and not device.pinned
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_device_that_is_too_small_is_refused_before_anything_changes(room, turns):
    room[0] = 1000
    model = families.make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with OtherDevice():
        pruner = StructuredPruner(model, PruningConfig(calibration=families.calibration(8, 12)), device="cuda")
        with pytest.raises(ConfigurationError, match="of the memory of cuda are needed, and 1"):
            pruner.prune(0.2)
    assert not turns and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "save_pretrained" not in vars(model)  # it is not marked as half-pruned


def test_what_fails_on_the_device_leaves_nothing_there(room, turns):
    model = families.make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(1e38)  # what leaves layer 1 is infinite
    with OtherDevice():
        pruner = StructuredPruner(model, PruningConfig(calibration=families.calibration(8, 12)), device="cuda")
        with pytest.raises(StructPruneError, match="layer 1|inputs of"):
            pruner.prune(0.2)
        assert turns[-1] == [1] and not any(map(is_other, (*model.parameters(), *model.buffers())))


def test_a_model_on_the_device_is_no_model_to_bring_there():
    with OtherDevice():
        model = families.make_model("llama").to("cuda")
        with pytest.raises(ConfigurationError, match="already"):
            StructuredPruner(model, device="cuda")
