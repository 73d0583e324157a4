"""4-bit layers of bitsandbytes: the same numbers on every CPU, whatever its instruction set makes of them."""

import pytest
import torch
from forced_hardware import FOUR_BIT_CPUS, force_four_bit_cpu
from torch import nn


bnb = pytest.importorskip("bitsandbytes")

from hf_structprune.errors import CheckpointError  # noqa: E402
from hf_structprune.model.measuring import measuring  # noqa: E402
from hf_structprune.quantization.four_bit import compute_as_stored, stored_weight  # noqa: E402


def layer(inputs, outputs, double=False, dtype=torch.float32, bias=True, kind="nf4"):
    """A quantised layer and the one before."""
    torch.manual_seed(0)
    dense = nn.Linear(inputs, outputs, bias)
    quantised = bnb.nn.Linear4bit(
        inputs, outputs, bias, compute_dtype=dtype, compress_statistics=double, quant_type=kind
    )
    quantised.load_state_dict(dense.state_dict())
    return quantised.to("cpu").eval(), dense


def by_hand(quantised):
    """The weight from its parts: two values a byte, a scale for 64 of them."""
    weight = quantised.weight
    state, packed = weight.quant_state, weight.data.reshape(-1)
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    values = state.code[torch.stack([packed >> 4, packed & 15], 1).reshape(-1).long()][: state.shape.numel()]
    return (values * scales.repeat_interleave(64)[: values.numel()]).reshape(state.shape)


SHAPES = [(64, 32), (96, 32), (80, 48), (32, 20), (75, 6)]  # blocks fit; end in the middle; rows of odd length


@pytest.mark.parametrize("cpu", FOUR_BIT_CPUS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_the_weight_and_the_product(cpu, double, inputs, outputs, monkeypatch):
    force_four_bit_cpu(monkeypatch, cpu)
    quantised, dense = layer(inputs, outputs, double)
    wanted = by_hand(quantised)
    compute_as_stored(quantised)
    assert isinstance(quantised, bnb.nn.Linear4bit) and type(quantised) is not bnb.nn.Linear4bit
    assert torch.allclose(stored_weight(quantised.weight), wanted, rtol=1e-5, atol=1e-6)
    saved = {name: value.clone() for name, value in quantised.state_dict().items()}
    x = torch.randn(3, inputs)
    with torch.no_grad():
        assert torch.allclose(quantised(x), x @ wanted.T + dense.bias, atol=1e-5)
    after = quantised.state_dict()  # using it changes nothing that is saved
    assert after.keys() == saved.keys() and all(torch.equal(after[name], saved[name]) for name in saved)
    x.requires_grad_()
    quantised(x).sum().backward()
    assert torch.allclose(x.grad, wanted.sum(0).expand_as(x), atol=1e-5)


def test_the_branches_are_forced(monkeypatch):
    """What bitsandbytes' own layers do there; where this fails, bitsandbytes has been mended."""
    force_four_bit_cpu(monkeypatch, "avx512")
    quantised, dense = layer(96, 32)
    x = torch.randn(3, 96)
    with torch.no_grad():
        own = quantised(x)
        compute_as_stored(quantised)
        assert (own - quantised(x)).norm() > 0.01 * own.norm()
    force_four_bit_cpu(monkeypatch, "avx512_bf16")
    with torch.no_grad(), pytest.raises(RuntimeError, match="is invalid for input of size"):
        layer(32, 32)[0](x[:, :32])
    fits, _ = layer(64, 32)
    with torch.no_grad():
        fits(x[:, :64])
    assert fits.weight.quant_state.packing_format_for_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_in_the_dtype_of_the_layer(dtype):
    quantised, _ = layer(64, 32, dtype=dtype)
    compute_as_stored(quantised)
    x = torch.randn(3, 64)
    with torch.no_grad():
        wanted = (x.to(dtype) @ by_hand(quantised).to(dtype).T + quantised.bias.to(dtype)).float()
        assert quantised(x).dtype == torch.float32
        assert torch.allclose(quantised(x), wanted, atol={4: 1e-6}.get(dtype.itemsize, 2e-2))


def test_without_a_dtype_it_takes_that_of_the_input():
    quantised, _ = layer(64, 32, dtype=None, bias=False, kind="fp4")
    compute_as_stored(quantised)
    with torch.no_grad():
        output = quantised(torch.randn(3, 64, dtype=torch.bfloat16))
    assert output.dtype == quantised.compute_dtype == torch.bfloat16


def test_on_other_devices_bitsandbytes_computes(monkeypatch):
    quantised, _ = layer(64, 32)
    compute_as_stored(quantised)
    seen = []
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: seen.append(x.device.type))
    quantised(torch.empty(3, 64, device="meta"))
    assert seen == ["meta"]


def test_measuring_leaves_the_layers_of_others_as_they_were(monkeypatch):
    force_four_bit_cpu(monkeypatch, "avx512_bf16")
    fits, _ = layer(64, 32)
    with torch.no_grad(), pytest.raises(ZeroDivisionError), measuring(fits):
        fits(torch.randn(3, 64))
        raise ZeroDivisionError
    assert type(fits) is bnb.nn.Linear4bit and not hasattr(fits.weight.quant_state, "packing_format_for_cpu")


def test_a_weight_that_is_not_quantised_yet():
    with pytest.raises(CheckpointError, match="no quantisation state"):
        stored_weight(bnb.nn.Linear4bit(64, 32).weight)
