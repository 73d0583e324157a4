"""GGUF, the format of llama.cpp."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils.logging import is_progress_bar_enabled

from ..errors import ConfigurationError, ExportError, StructPruneError
from ..files.places import check_place
from ..files.writing import appearing
from ..installed import need
from .common import Exported, load_source
from .gguf_model import Layout, StoredTensor, check, context_of, layout_of, stored_tensors, write_metadata
from .gguf_vocab import write_vocabulary


if TYPE_CHECKING:
    pass

# Types that the `gguf` package writes, with their numbers in llama.cpp's `llama_ftype` ...
WRITTEN = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
# ... and those that llama.cpp makes itself out of such a file.
QUANTISED = {
    "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_0": 2, "q4_1": 3, "q4_k_s": 14, "q4_k_m": 15, "q5_0": 8,
    "q5_1": 9, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30,
}  # fmt: skip
# What llama.cpp is given to quantise: the type the weights are in, so that nothing is lost before.
_LOSSLESS = {torch.float16: "f16", torch.bfloat16: "bf16"}


def export_gguf(
    model: str | os.PathLike | PreTrainedModel,
    output: str | os.PathLike,
    *,
    quant: str = "f16",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Writes a model as one GGUF file, which llama.cpp and what is built on it read.

    Layers that differ in widths or heads, or lack a sublayer, are written under llama.cpp's architecture `deci`.

    Args:
        model: A checkpoint (folder or id of the Hub), or a model.
        output: The file; it appears complete or not at all.
        quant: Type of the matrices: `f32`, `f16`, `bf16` or `q8_0`, which need the package `gguf`, or one of
            `QUANTISED` such as `q4_k_m`, which llama.cpp makes itself. Vectors are float32.
        tokenizer: Tokenizer to use instead of the model's own.
        trust_remote_code: Run modelling code that comes with the model.

    Returns:
        The file, with `details` of its architecture and of how many matrices are of which type.

    Raises:
        ConfigurationError: There is no such type.
        ExportError: The model, its layers, its rotary positions or its tokenizer have nothing like them in llama.cpp.
        PlaceError: The output cannot be written, or there is too little room.
    """
    if quant not in {**WRITTEN, **QUANTISED}:
        allowed = ", ".join((*WRITTEN, *QUANTISED))
        raise ConfigurationError(f"`quant` is {quant!r}; allowed values are {allowed}.")
    need("gguf", extra="gguf")
    if quant in QUANTISED and find_spec("llama_cpp") is None:
        raise StructPruneError(
            "Types besides f32, f16, bf16 and q8_0 are made by llama.cpp, which is missing: `pip install "
            "llama-cpp-python` (which compiles it)."
        )
    check_place(output, file=True)
    output = Path(output)
    loaded = isinstance(model, PreTrainedModel)
    name = Path(model.config._name_or_path or "model" if loaded else model).absolute().name
    model, tokenizer = load_source(model, tokenizer, check=check, trust_remote_code=trust_remote_code)
    layout = layout_of(model)
    written = quant if quant in WRITTEN else _LOSSLESS.get(next(model.parameters()).dtype, "f32")
    tensors = stored_tensors(model, layout, written)
    size = sum(tensor.size for tensor in tensors)
    with appearing(output, size * (1 if written == quant else 2)) as path:
        first = path if written == quant else path.with_name("whole.gguf")
        notes = _write(first, model, tokenizer, layout, tensors, WRITTEN[written], name)
        if first != path:
            _quantise(first, path, QUANTISED[quant])
        matrices = _matrices(path)
    notes += _remarks(model, layout, quant, matrices)
    kinds = dict(Counter(kind for kind, _ in matrices))
    details = {"quant": quant, "architecture": layout.architecture, "matrices": kinds}
    return Exported(output, output.stat().st_size, details, notes)


def _write(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    layout: Layout,
    tensors: list[StoredTensor],
    file_type: int,
    name: str,
) -> list[str]:
    """Writes the file, one tensor in memory at a time."""
    from gguf import GGML_QUANT_VERSION, GGUFWriter

    writer = GGUFWriter(path, layout.architecture)
    try:
        write_metadata(writer, model.config, layout, name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        notes = write_vocabulary(writer, tokenizer, model.config)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, float, tensor.size, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tqdm(tensors, desc=path.name, disable=not is_progress_bar_enabled()):
            writer.write_tensor_data(tensor.encode())
    finally:
        writer.close()
    return notes


def _matrices(path: Path) -> list[tuple[str, int]]:
    """Type and length of the rows of every matrix of a file."""
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    return [(t.tensor_type.name.lower(), int(t.shape[0])) for t in tensors if len(t.shape) > 1]


def _remarks(model: PreTrainedModel, layout: Layout, quant: str, matrices: list[tuple[str, int]]) -> list[str]:
    """What came out otherwise than asked."""
    notes = []
    if layout.architecture == "deci":
        notes.append("The layers are not alike: written for llama.cpp's architecture deci.")
    context = context_of(model.config)
    if context < model.config.max_position_embeddings:
        notes.append(f"llama.cpp reads no sliding window here: the context is written as {context} tokens.")
    # How many neighbouring values of a row share what the type says of its blocks.
    block = 1 if quant in ("f32", "f16", "bf16") else 256 if "_k" in quant or quant == "iq4_xs" else 32
    unfit = Counter(kind for kind, row in matrices if row % block)
    if unfit:
        kinds = ", ".join(f"{count} as {kind}" for kind, count in unfit.items())
        notes.append(
            f"Rows of {unfit.total()} of {len(matrices)} matrices do not divide into the blocks of {block} values of "
            f"{quant}; they are stored in more bits, {kinds}. `round_to={block}` gives MLP widths that do."
        )
    return notes


def _quantise(source: Path, target: Path, file_type: int) -> None:
    """Lets llama.cpp write a file (f32, f16 or bf16) in fewer bits, a type of its `llama_ftype`."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) != 0:
        raise ExportError(f"llama.cpp could not quantise {source.name}; what it says is on stderr.")
