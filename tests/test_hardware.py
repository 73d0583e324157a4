"""Every branch on device, dtype and platform that no other test takes, forced on any machine.

Instruction sets are in `test_four_bit.py`, the precision of training in `recovery/test_training.py` and
`recovery/test_default_precision.py`, memory of CUDA devices in `evaluation/test_memory.py`.
"""

import random
import sys
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import make_model
from forced_hardware import force_accelerator, force_cuda, force_no_accelerator

from hf_structprune import QuantizationConfig, hardware
from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation import efficiency
from hf_structprune.evaluation.results import describe_environment, model_fingerprint
from hf_structprune.hardware import release_memory
from hf_structprune.model import rebuild as checkpoint
from hf_structprune.model.target import Target
from hf_structprune.quantization.quantizing import Awq, Backend, TorchAo
from hf_structprune.recovery.callback import mixed_precision
from hf_structprune.recovery.configuration import RecoveryConfig
from hf_structprune.recovery.distillation.losses import CACHED_LOGITS, rows_at_once
from hf_structprune.recovery.distillation.teacher import ModelTeacher
from hf_structprune.recovery.measuring import without_trace
from hf_structprune.stats import moments as statistics


CPU, CUDA, MPS, META = map(torch.device, ("cpu", "cuda:1", "mps", "meta"))
Properties = namedtuple("Properties", "name total_memory")


def on(device, dtype=torch.float32):
    """What looks like a model on a device."""
    return SimpleNamespace(device=device, dtype=dtype)


def test_the_device_that_is_computed_on(monkeypatch):
    force_no_accelerator(monkeypatch)
    assert (hardware.default_device(), hardware.cuda_devices()) == ("cpu", [])
    assert not hardware.has_accelerator() and TorchAo(None, QuantizationConfig()).device == "cpu"
    force_accelerator(monkeypatch, True)
    assert hardware.has_accelerator() and hardware.default_device() == "cpu"
    force_cuda(monkeypatch, True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.default_device() == TorchAo(None, QuantizationConfig()).device == "cuda"
    assert hardware.cuda_devices() == [torch.device("cuda:0"), CUDA]
    assert TorchAo(None, QuantizationConfig(device="cpu")).device == "cpu"


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_is_what_is_left(monkeypatch, tmp_path, version):
    files = dict(zip(("limit", "used", "details"), hardware._CONTAINERS[2 - version], strict=False))
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    there = hardware.psutil.virtual_memory()
    monkeypatch.setattr("psutil.virtual_memory", lambda: there._replace(available=5000))
    assert hardware.memory_left() == 5000
    (tmp_path / "memory").mkdir()
    name = "inactive_file" if version == 2 else "total_inactive_file"
    for limit, left in (("4000", 1700), ("9" * 18, 5000), ("max", 5000), ("2000", 0)):
        for key, text in (("limit", limit), ("used", "2600"), ("details", f"anon 1\n{name} 300\n")):
            (tmp_path / files[key]).write_text(text)
        assert hardware.memory_left() == left


def test_free_memory_is_known_of_cuda_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 8))
    assert [hardware.free_memory(device) for device in (CUDA, CPU, MPS)] == [7, None, None]


def test_other_accelerators_are_waited_for_too(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    monkeypatch.setattr(torch.cpu, "synchronize", lambda: waited.append("cpu"))
    hardware.synchronize([MPS, CPU, META])
    assert waited == ["mps", "cpu"]


def test_memory_is_given_back_where_there_is_cuda(monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(True))
    force_no_accelerator(monkeypatch)
    release_memory()
    assert given == []
    force_cuda(monkeypatch, True)
    release_memory()
    assert given == [True]


def test_the_generators_of_cuda_go_on_as_before(monkeypatch):
    force_cuda(monkeypatch, True)
    states = {torch.device("cuda:0"): 10, CUDA: 11}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(ZeroDivisionError), without_trace():
        states.update(dict.fromkeys(states, 0))
        random.random(), np.random.rand(), torch.rand(1)
        raise ZeroDivisionError
    assert list(states.values()) == [10, 11]
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_devices_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties(f"GPU {device.index}", 5))
    assert efficiency.where(on(CUDA, torch.bfloat16)) == "bfloat16 on GPU 1"
    assert efficiency.where(on(MPS)) == "float32 on mps"
    assert efficiency.where(on(CPU)) == f"float32 on cpu ({torch.get_num_threads()} threads)"
    cpu, cuda, mps = (describe_environment(device)["hardware"] for device in (CPU, CUDA, MPS))
    assert (cuda["device"], cuda["type"], cuda["device_memory"]) == ("GPU 1", "cuda", 5)
    assert mps["device"] == f"mps of {cpu['device']}" and "device_memory" not in mps
    assert cpu["cpu"] == cuda["cpu"] == mps["cpu"]


def test_peak_memory_of_other_systems(monkeypatch, tmp_path):
    def peak(system):
        monkeypatch.setattr(sys, "platform", system)
        with efficiency.peak_memory({CPU}) as found:
            pass
        return found.value, found.method.partition("(")[2]

    resource = pytest.importorskip("resource")
    monkeypatch.setattr(efficiency, "_CLEAR", tmp_path / "no" / "clear_refs")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3))
    assert peak("linux") == (3 * 1024, "ru_maxrss, since the process started)")
    assert peak("darwin")[0] == 3  # which counts bytes
    assert peak("win32")[0] is None


def test_weights_that_are_not_here_have_no_fingerprint_of_their_own():
    model, other = make_model("llama"), make_model("llama")
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    assert model_fingerprint(model) != model_fingerprint(other)
    for one in (model, other):
        one.lm_head.to("meta")
    assert model_fingerprint(model) == model_fingerprint(other)


class Matrix:
    """What looks like a matrix on CUDA."""

    dtype, device, T = torch.bfloat16, CUDA, "transposed"


def test_on_cuda_products_in_bfloat16_come_in_float32(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: asked.append((a, b, out_dtype)) or "product")
    matrix = Matrix()
    assert statistics._product(matrix, matrix) == "product"
    assert asked == [("transposed", matrix, torch.float32)]


def test_on_other_accelerators_products_are_taken_in_float32():
    a, b = (
        torch.empty(5, 3, dtype=torch.bfloat16, device="meta"),
        torch.empty(5, 2, dtype=torch.bfloat16, device="meta"),
    )
    product = statistics._product(a, b)
    assert product.dtype == torch.float32 and product.shape == (3, 2)


def test_logits_come_in_blocks_on_a_cpu_only():
    here, there = torch.empty(40, 2**15), torch.empty(40, 2**15, device="meta")
    assert rows_at_once(here) == CACHED_LOGITS // 2**15 < 40
    assert rows_at_once(torch.empty(2, 2 * CACHED_LOGITS)) == 1
    assert rows_at_once(there) == 40


@pytest.mark.parametrize(
    ("bf16", "fp16", "dtype"),
    [(True, False, torch.bfloat16), (False, True, torch.float16), (False, False, None)],
)
def test_the_dtype_of_mixed_precision(bf16, fp16, dtype):
    assert mixed_precision(SimpleNamespace(bf16=bf16, fp16=fp16)) is dtype


@pytest.mark.parametrize(
    ("method", "precision", "dtype"),
    [
        ("lora", "bf16", torch.bfloat16), ("lora", "fp16", torch.float32), ("lora", "fp32", torch.float32),
        ("full", "bf16", torch.float32), ("full", "fp16", torch.float32), ("distill", "bf16", torch.bfloat16),
        ("qlora", "bf16", torch.bfloat16), ("qlora", "fp16", torch.float16), ("qlora", "fp32", torch.float32),
    ],
)  # fmt: skip
def test_a_student_is_loaded_in_the_dtype_of_its_training(method, precision, dtype, monkeypatch):
    """What is trained is in float32; so is what adapters are put on if float16 is computed in."""
    from hf_structprune.recovery import recovering

    force_accelerator(monkeypatch, True)
    loaded = []
    for name in ("load_model", "load_quantised"):
        monkeypatch.setattr(
            recovering, name, lambda model, *places, dtype=None, **options: loaded.append(dtype or places[-1])
        )
    recovering.load_student("pruned", RecoveryConfig(method=method, precision=precision), False)
    assert loaded == [dtype]


@pytest.mark.parametrize(
    ("changes", "moved"), [({}, True), ({"is_quantized": True}, False), ({"hf_device_map": {"": 0}}, False)]
)
def test_a_teacher_goes_to_the_student_unless_it_was_placed(changes, moved, monkeypatch):
    model, seen = make_model("llama"), []
    for name, value in changes.items():
        monkeypatch.setattr(model, name, value, raising=False)
    monkeypatch.setattr(model, "to", seen.append)
    ModelTeacher(model).to(CUDA)
    assert seen == ([CUDA] if moved else [])


@pytest.mark.parametrize(
    ("device_map", "spread"), [(None, False), ({"model": 0}, False), ({"model": 0, "lm_head": 1}, True)]
)
def test_a_model_over_several_devices_is_spread_again(device_map, spread, monkeypatch):
    import accelerate

    like, seen = make_model("llama"), []
    if device_map is not None:
        like.hf_device_map = device_map
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, *given, **named: seen.append(named) or model)
    checkpoint.assemble(Target(type(like), like.config), like.state_dict(), dict(like.named_buffers()), like)
    # Else the cache would be moved from layer to layer.
    assert seen == ([{"device_map": device_map, "skip_keys": like._skip_keys_device_placement}] if spread else [])


def test_awq_computes_in_16_bits_and_packs_where_it_is():
    dtypes = {torch.float32: torch.float16, torch.float16: torch.float16, torch.bfloat16: torch.bfloat16}
    for given, chosen in dtypes.items():
        assert Awq(SimpleNamespace(shapes=on(CPU, given)), None).dtype is chosen
    kernels = {"cuda:1": "auto", "cpu": "awq_torch"}
    for device, kernel in kernels.items():
        assert Awq(None, QuantizationConfig("awq", device=device)).kernel == kernel


def test_torchao_with_4_bits_needs_an_accelerator(monkeypatch):
    monkeypatch.setattr(Backend, "check", lambda self: None)  # there is none here
    source = SimpleNamespace(linears={"map": (64, 256)})
    for device in ("cuda:0", "xpu"):
        TorchAo(source, QuantizationConfig("torchao", device=device)).check()
    with pytest.raises(ConfigurationError, match="needs an accelerator .* or choose bitsandbytes"):
        TorchAo(source, QuantizationConfig("torchao", device="cpu")).check()


@pytest.mark.parametrize(("fp16", "stops"), [(True, False), (False, True)])
def test_fp16_skips_gradients_that_are_no_numbers(fp16, stops):
    """The scaler of float16 tries larger and larger factors; a loss that is no number stops either."""
    from hf_structprune.recovery import LoraRecoveryCallback

    callback = LoraRecoveryCallback()
    callback._active = True
    args, state = SimpleNamespace(fp16=fp16), SimpleNamespace(global_step=3)
    for name, ends in (("grad_norm", stops), ("loss", True)):
        control, callback.stopped = SimpleNamespace(should_training_stop=False), None
        callback.on_log(args, state, control, logs={name: float("inf")})
        assert control.should_training_stop == ends
