import pytest
import torch
from families import HEAD_DIM, HEADS, LAYERS, cut, make_model, random_units
from transformers import MambaConfig, MambaForCausalLM

from hf_structprune.evaluation import efficiency as memory
from hf_structprune.evaluation.efficiency import cache_growth, memory_in_use, peak_memory, weight_bytes
from hf_structprune.model.structure import ModelStructure


# KV heads that end up in the cache; Falcon's new architecture repeats its two for all query heads.
CACHED = {"gpt_neox": HEADS, "opt": HEADS, "gpt2": HEADS, "falcon": HEADS, "falcon_7b": 1}


def test_weight_bytes_by_dtype():
    model = make_model("llama", tie_word_embeddings=False).to(torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(model) == {"bfloat16": 2 * count}
    model.lm_head.float()
    head = model.lm_head.weight.numel()
    assert weight_bytes(model) == {"bfloat16": 2 * (count - head), "float32": 4 * head}


def test_tied_weights_count_once():
    model = make_model("llama", tie_word_embeddings=True)
    assert weight_bytes(model) == {"float32": 4 * sum(parameter.numel() for parameter in model.parameters())}


def test_quantised_weights_count_as_they_are_stored():
    class Quantised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(16, 4, dtype=torch.int32))
            self.register_buffer("scales", torch.zeros(16, 2, dtype=torch.float16))
            self.register_buffer("scratch", torch.zeros(1000), persistent=False)

    assert weight_bytes(Quantised()) == {"int32": 256, "float16": 64}


def test_loading_reads_all_of_a_mapped_file(tmp_path, monkeypatch):
    size, cpu = 100_000_000, {torch.device("cpu")}
    (tmp_path / "weights").write_bytes(bytes(size))
    model = torch.nn.Module()
    model.register_buffer("weight", torch.from_file(str(tmp_path / "weights"), size=size // 2, dtype=torch.bfloat16))
    model.register_buffer("scale", torch.tensor(1.0).to(torch.float8_e4m3fn))
    monkeypatch.setattr(memory, "load_model", lambda *_, **__: model)
    before = memory_in_use(cpu)
    memory._load("folder", "auto", "cpu", 1, {})
    assert memory_in_use(cpu) - before > size * 0.8


class Packed(torch.Tensor):
    """A wrapper that stands for float32 values and holds bytes and scales, as quantisers make them."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, (data.shape[0], 2 * data.shape[1]), dtype=torch.float32)

    def __init__(self, data, scale):
        self.data_, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data_", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["data_"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return args[0] if function is torch.ops.aten.detach.default else NotImplemented


def test_wrapped_tensors_count_as_what_is_inside():
    module = torch.nn.Linear(8, 6, bias=False)
    packed = Packed(torch.zeros(6, 4, dtype=torch.uint8), torch.ones(6, dtype=torch.bfloat16))
    module.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert weight_bytes(module) == {"uint8": 24, "bfloat16": 12}


@pytest.mark.parametrize("name", ["llama", "gemma2", *CACHED])
def test_cache_growth_equals_hand_count(name):
    growth = cache_growth(make_model(name))
    expected = 2 * CACHED.get(name, 2) * HEAD_DIM * 4  # keys and values, float32
    assert [size for size, _ in growth] == [expected] * LAYERS


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_cache_of_a_long_text(name):
    """As many tokens later, with windows of 8 full, only the layers without a window grow."""
    model = make_model(name)
    growth = cache_growth(model)
    windows = {"llama": [None] * 3, "gemma2": [8, None, 8], "mistral": [8] * 3}[name]
    assert [window for _, window in growth] == windows

    def held(tokens):
        layers = model(torch.zeros((1, tokens), dtype=torch.long), use_cache=True).past_key_values.layers
        return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))

    with torch.no_grad():
        assert held(31) - held(30) == sum(size for size, window in growth if window is None)
        assert held(5) == 5 * sum(size for size, _ in growth)


def test_cache_of_layers_of_different_widths():
    model = make_model("llama", torch.bfloat16)
    kept, counts = random_units(ModelStructure.of(model), ("kv_groups",), uniform=False)
    model = cut(model, kept, counts, "per_layer")
    heads = [layer.self_attn.k_proj.out_features // HEAD_DIM for layer in model.model.layers]
    assert sorted(set(heads)) == [1, 2]
    assert cache_growth(model) == [(2 * count * HEAD_DIM * 2, None) for count in heads]


def test_a_model_without_keys_and_values_has_no_cache_growth():
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert cache_growth(MambaForCausalLM(config)) == []


def test_peak_of_the_process():
    cpu, size = {torch.device("cpu")}, 200_000_000
    with peak_memory(cpu) as peak:
        torch.ones(size, dtype=torch.uint8)
    if "reset before" not in peak.method:
        pytest.skip("the kernel does not let a process reset its peak")
    assert size * 0.9 < peak.value - peak.before < size * 1.5
    with peak_memory(cpu) as second:
        pass
    assert second.value < peak.value - size * 0.9  # the first peak was forgotten
    assert abs(memory_in_use(cpu) - second.before) < size / 2


def test_peak_of_cuda_devices(monkeypatch):
    """The allocator's own figures are summed over the devices of the model."""
    calls = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: calls.append((name, device.index)))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 + device.index)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100 + device.index)
    with peak_memory({torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")}) as peak:
        assert set(calls) == {(n, i) for n in ("synchronize", "reset_peak_memory_stats") for i in (0, 1)}
    assert (peak.before, peak.value) == (21, 201) and "CUDA allocator" in peak.method


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_of_a_real_gpu():
    device = torch.device("cuda:0")
    with peak_memory({device}) as peak:
        torch.ones(64 * 2**20, dtype=torch.uint8, device=device)
    assert peak.value - peak.before >= 64 * 2**20
