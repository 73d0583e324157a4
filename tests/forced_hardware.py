"""Answers of the hardware questions, forced on any machine: instruction sets and accelerators."""

import torch

from hf_structprune import hardware


def force_bf16_cpu(monkeypatch, has):
    """A machine without accelerator whose CPU has bfloat16 instructions, or has not, for torch and this package."""
    force_no_accelerator(monkeypatch)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has, raising=False)


def force_no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "is_torch_bf16_gpu_available", lambda: False)


def force_accelerator(monkeypatch, bf16):
    """An accelerator that is not CUDA, in which Transformers trains in bfloat16, or does not."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "is_torch_bf16_gpu_available", lambda: bf16)


def force_cuda(monkeypatch, native_bf16, emulated_bf16=True):
    """A CUDA device; whether it has bfloat16, and whether it emulates it otherwise."""
    force_accelerator(monkeypatch, native_bf16 or emulated_bf16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported",
        lambda including_emulation=True: native_bf16 or (including_emulation and emulated_bf16),
    )  # fmt: skip


# What bitsandbytes does with 4-bit weights on a CPU.
FOUR_BIT_CPUS = ("plain", "avx512", "avx512_bf16")


def force_four_bit_cpu(monkeypatch, kind):
    """Makes bitsandbytes take the branch of an instruction set, and compute there what its kernels compute.

    The kernels of AVX512 are in its native library and cannot be called on other machines; what is different in them,
    the place of a row's scales, is done here with the kernel that every CPU has. Repacking is written in Python and is
    simply switched on.
    """
    import bitsandbytes.backends.cpu.ops as ops
    from bitsandbytes.nn import modules

    monkeypatch.setattr(ops, "lib", _Kernels(ops.lib, kind != "plain"))
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: kind == "avx512_bf16")


class _Kernels:
    """bitsandbytes' native library with the 4-bit kernels of a CPU with or without AVX512."""

    def __init__(self, native, avx512):
        self._native, self._avx512 = native, avx512

    def __getattr__(self, name):
        kernel = getattr(self._native, name)
        bits = {"fp32": 32, "bf16": 16, "fp16": 16}.get(name.rsplit("_", 1)[-1])
        if not name.startswith(("cdequantize_blockwise_cpu_nf4", "cdequantize_blockwise_cpu_fp4")):
            return kernel

        def dequantise(packed, scales, out, block, rows, columns):
            number, width, size = rows.value, columns.value, block.value
            one, all_of_it = type(rows)(1), type(columns)(number * width)
            if not self._avx512 or width % 16:
                return kernel(packed, scales, out, block, one, all_of_it)
            for row in range(number):  # float32 scales of 4 bytes; two weights a byte
                begin = [packed.value + row * width // 2, scales.value + 4 * row * (width // size)]
                where = [type(packed)(place) for place in (*begin, out.value + row * width * bits // 8)]
                kernel(*where, block, one, columns)

        return dequantise
