"""llama.cpp's own quantisation, through the package llama-cpp-python."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

from ..errors import ExportError, StructPruneError


def need_llama_cpp() -> None:
    """Makes sure that the package is installed.

    Raises:
        StructPruneError: It is not; says how to install it.
    """
    if find_spec("llama_cpp") is None:
        raise StructPruneError(
            "Types besides f32, f16, bf16 and q8_0 are made by llama.cpp, which is missing: `pip install "
            "llama-cpp-python` (which compiles it)."
        )


def quantise(source: Path, target: Path, file_type: int) -> None:
    """Writes a GGUF file with the weights of another one in fewer bits.

    Args:
        source: A file in f32, f16 or bf16.
        target: The file to write.
        file_type: Number of the type in llama.cpp's `llama_ftype`.

    Raises:
        ExportError: llama.cpp reports a failure.
    """
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) != 0:
        raise ExportError(f"llama.cpp could not quantise {source.name}; what it says is on stderr.")
