"""GGUF, the format of llama.cpp: architecture, hyperparameters and tensors of a model, and its vocabulary."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import ConfigurationError, ExportError, StructPruneError
from ..files.writing import appearing, check_place
from ..installed import need
from ..progress import enabled
from .common import EMBEDDINGS, Block, Exported, State, class_name, llama_layers, load_source, pad_layer
from .gguf_gemma3 import ARCHITECTURE as GEMMA3
from .gguf_gemma3 import check_gemma3, rope_of


try:
    import gguf
except ImportError:  # see `need` in `export_gguf`
    gguf = None

# Types that the `gguf` package writes ...
WRITTEN = ("f32", "f16", "bf16", "q8_0")
# ... and those that llama.cpp makes itself out of such a file.
QUANTISED = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m",
    "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
# What llama.cpp is given to quantise: the type the weights are in, so that nothing is lost before.
_LOSSLESS = {torch.float16: "f16", torch.bfloat16: "bf16"}


def export_gguf(
    model: str | os.PathLike | PreTrainedModel,
    output: str | os.PathLike,
    *,
    quant: str = "f16",
    tokenizer: Any = None,
    stream: bool = False,
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
        stream: Read a layer of the checkpoint when its turn comes; the file is the same.
        trust_remote_code: Run modelling code that comes with the model.

    Raises:
        ConfigurationError: There is no such type.
        ExportError: The model, its layers, its rotary positions or its tokenizer have nothing like them in llama.cpp.
        PlaceError: The output cannot be written, or there is too little room.
    """
    if quant not in WRITTEN + QUANTISED:
        raise ConfigurationError(f"`quant` is {quant!r}; allowed values are {', '.join(WRITTEN + QUANTISED)}.")
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
    options = {"stream": stream, "check": _architecture_of, "trust_remote_code": trust_remote_code}
    model, tokenizer, store = load_source(model, tokenizer, **options)
    architecture, state, blocks, head_dim = _as_llama_cpp_reads(model)
    written = quant if quant in WRITTEN else _LOSSLESS.get(model.dtype, "f32")
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_name(name)
    # What llama.cpp calls files of such matrices.
    types = {q: gguf.LlamaFileType[f"{'ALL' if q == 'f32' else 'MOSTLY'}_{q.upper()}"] for q in (written, quant)}
    writer.add_file_type(types[written])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_hyperparameters(writer, model.config, blocks, head_dim)
    notes = _add_vocabulary(writer, tokenizer, model.config)
    with nullcontext() if store is None else store.reading() as read:
        if store is not None:
            dense, before, _ = llama_layers(model)
            read = partial(_padded, read, dense, before, blocks, head_dim)
        _add_tensors(writer, model.config, state, head_dim, written, read or state.__getitem__)
        size = sum(tensor.nbytes for tensor in writer.tensors[0].values())
        matrices = _write(writer, output, size, written, quant, types[quant])
    notes += _remarks(model.config, architecture, quant, matrices)
    kinds = dict(Counter(kind for kind, _ in matrices))
    details = {"quant": quant, "architecture": architecture, "matrices": kinds}
    return Exported(output, output.stat().st_size, details, notes)


def _write(writer: Any, output: Path, size: int, written: str, quant: str, file_type: int) -> list[tuple[str, int]]:
    """Writes the file; gives the types of its matrices, and the lengths of their rows."""
    with appearing(output, size * (1 if written == quant else 2)) as path:
        first = path if written == quant else path.with_name("whole.gguf")
        with closing(writer):
            writer.write_header_to_file(first)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file(progress=enabled())
        if first != path:
            _quantise(first, path, file_type)
        tensors = gguf.GGUFReader(path).tensors
        return [(t.tensor_type.name.lower(), int(t.shape[0])) for t in tensors if len(t.shape) > 1]


def _padded(
    read: Callable[[str], torch.Tensor], dense: State, before: list[Block], after: list[Block], head_dim: int,
    name: str,
) -> torch.Tensor:  # fmt: skip
    """One tensor of a model that is read from disk, padded like that of one in memory; of others the names count."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is None or before[int(layer[1])] == after[int(layer[1])]:
        return read(name)
    state = {other: None for other in dense if not other.startswith(layer[0])}
    state[EMBEDDINGS] = torch.empty(1, dense[EMBEDDINGS].shape[1], dtype=dense[EMBEDDINGS].dtype)
    state |= {name: read(name)} if name in dense else {}
    pad_layer(state, int(layer[1]), before[int(layer[1])], after[int(layer[1])], head_dim)
    return state[name]


def _quantise(whole: Path, target: Path, file_type: int) -> None:
    """Lets llama.cpp write a file (f32, f16 or bf16) in fewer bits."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(target).encode(), ctypes.byref(parameters)) != 0:
        raise ExportError(f"llama.cpp could not quantise {whole.name}; what it says is on stderr.")


def _remarks(config: PreTrainedConfig, architecture: str, quant: str, matrices: list[tuple[str, int]]) -> list[str]:
    """What came out otherwise than asked; of each matrix the type and the length of its rows are given."""
    notes = []
    if architecture == "deci":
        notes.append("The layers are not alike: written for llama.cpp's architecture deci.")
    context = _context(config)
    if context < config.max_position_embeddings:
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


# The architecture of each class of Transformers. The tensors of each are those of a Llama, and norms of queries and
# keys (qwen3, gemma3), norms behind sublayers (gemma3) or biases (qwen2).
ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3", "SmolLM3ForCausalLM": "smollm3", "GraniteForCausalLM": "granite",
    "Gemma3ForCausalLM": GEMMA3,
}  # fmt: skip
# Those that rotate neighbouring rows of queries and keys, where Transformers rotates the first half of a head with the
# second. They are also those that read factors of the rotary frequencies from a tensor.
_ROTATES_NEIGHBOURS = ("llama", "deci", "smollm3", "granite")
# Configuration values of Granite and the names of llama.cpp.
_GRANITE = {
    "attention_multiplier": "attention_scale", "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
}  # fmt: skip
# Neurons of the MLP that stands for none. A block of `q8_0` is that wide.
_DUMMY_WIDTH = 32


def _architecture_of(config: PreTrainedConfig) -> str:
    """The architecture if all layers are alike; refuses what llama.cpp reads, but computes otherwise."""
    name = class_name(config)
    if name not in ARCHITECTURES:
        raise ExportError(
            f"{name} cannot be written as GGUF here; what can be: {', '.join(ARCHITECTURES)}. For others take "
            "convert_hf_to_gguf.py of llama.cpp, which reads checkpoints whose layers are alike."
        )
    if ARCHITECTURES[name] == GEMMA3:
        check_gemma3(config)
    elif config.hidden_act not in ("silu", "swish"):
        raise ExportError(f"llama.cpp computes the MLP of a {name} with SiLU; this model's is {config.hidden_act!r}.")
    if name == "SmolLM3ForCausalLM":
        rotated = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != rotated:
            raise ExportError(
                "llama.cpp leaves every fourth layer of a SmolLM3 without rotary positions, but the layers without "
                f"them here are {[i for i, rope in enumerate(config.no_rope_layers) if not rope]}: drop no layers, or "
                "four neighbouring ones at a time."
            )
    return ARCHITECTURES[name]


def _as_llama_cpp_reads(model: PreTrainedModel) -> tuple[str, State, list[Block], int]:
    """The architecture, the tensors by their names in Transformers, the sizes of each layer and that of a head.

    Layers that are not alike need the architecture `deci`, the only one of llama.cpp with sizes for every layer. It
    reads a layer without attention, but not as the first one, and forgets the attention of a layer without MLP: these
    get a sublayer of zeros, which adds nothing to the residual stream either. `qwen2` knows no head count that does
    not multiply to the hidden size and no factors of frequencies; such a model is written as a `llama` with biases.
    """
    architecture, (state, blocks, head_dim) = _architecture_of(model.config), llama_layers(model)
    if len(set(blocks)) > 1 or not (blocks[0].heads and blocks[0].width):
        if architecture not in ("llama", "qwen2"):  # which compute what deci computes, biases included
            raise ExportError(
                f"The layers of this {class_name(model.config)} are not alike, and llama.cpp reads such layers of "
                "Llama, Mistral and Qwen2 models only. Prune with layout='uniform'."
            )
        whole = [replace(block, width=block.width or _DUMMY_WIDTH) for block in blocks]
        if not whole[0].heads:
            whole[0] = replace(whole[0], kv_heads=1, group=1)
        for layer, (old, new) in enumerate(zip(blocks, whole, strict=True)):
            pad_layer(state, layer, old, new, head_dim)
        return "deci", state, whole, head_dim
    rotated = rope_of(model.config).get("rope_type")
    if architecture == "qwen2" and (blocks[0].heads * head_dim != model.config.hidden_size or rotated == "longrope"):
        architecture = "llama"
    return architecture, state, blocks, head_dim


def _context(config: PreTrainedConfig) -> int:
    """Tokens up to which llama.cpp computes what Transformers does: it reads a sliding window of a Gemma 3 alone."""
    sliding, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if ARCHITECTURES[class_name(config)] == GEMMA3:
        return config.max_position_embeddings
    if sliding and (types is None or "sliding_attention" in types):
        return min(config.max_position_embeddings, sliding)
    return config.max_position_embeddings


def _add_hyperparameters(writer: Any, config: PreTrainedConfig, blocks: list[Block], head_dim: int) -> None:
    sizes = {
        "feed_forward_length": [block.width for block in blocks], "head_count": [block.heads for block in blocks],
        "head_count_kv": [block.kv_heads for block in blocks],
    }  # fmt: skip
    values = {
        "vocab_size": config.vocab_size, "context_length": _context(config), "embedding_length": config.hidden_size,
        "block_count": len(blocks), "key_length": head_dim, "value_length": head_dim,
        "layer_norm_rms_eps": config.rms_norm_eps, "rope_dimension_count": head_dim,
        **{name: counts if writer.arch == "deci" else counts[0] for name, counts in sizes.items()},
        **{name: getattr(config, key) for key, name in _GRANITE.items() if writer.arch == "granite"},
        **({"sliding_window": config.sliding_window} if writer.arch == GEMMA3 else {}),
    }  # fmt: skip
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    _add_rope(writer, config)


def _add_rope(writer: Any, config: PreTrainedConfig) -> None:
    """Writes how positions are rotated; refuses what llama.cpp would compute differently."""
    rope = rope_of(config)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError("llama.cpp rotates whole heads of this architecture; here only a part of each is rotated.")
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    yarn = kind == "yarn" and writer.arch != GEMMA3  # whose windows would be stretched as well
    if kind == "linear" or yarn:
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if yarn:  # as both compute it by default; other settings mean something else there
        stated = {key for key, value in rope.items() if value is not None}
        other = sorted({"attention_factor", "mscale", "mscale_all_dim", "truncate"} & stated)
        if other:
            raise ExportError(f"YaRN with `{other[0]}` set cannot be written for llama.cpp.")
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)
    elif kind == "llama3" and writer.arch in _ROTATES_NEIGHBOURS:  # by what each pair's frequency is divided
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        steps = torch.arange(len(frequencies), dtype=torch.float32) / len(frequencies)
        writer.add_tensor("rope_freqs.weight", ((1.0 / rope["rope_theta"] ** steps) / frequencies).numpy())
    elif kind == "longrope" and writer.arch in _ROTATES_NEIGHBOURS and _is_one_list(rope):
        writer.add_tensor("rope_freqs.weight", torch.tensor(rope["short_factor"], dtype=torch.float32).numpy())
    elif kind not in ("default", "linear"):
        raise ExportError(
            f"Rotary positions of type {kind!r} cannot be written for llama.cpp's {writer.arch}; those that can are "
            "default, linear and (but of Gemma 3) yarn, and for models like Llama llama3 and one list of frequencies "
            "for all lengths (longrope), as smaller heads have."
        )


def _is_one_list(rope: dict[str, Any]) -> bool:
    """Whether longrope says nothing but the frequencies, whatever the length of the text."""
    return rope["short_factor"] == rope["long_factor"] and rope.get("attention_factor") == 1.0


def _add_tensors(
    writer: Any, config: PreTrainedConfig, state: State, head_dim: int, quant: str, read: Callable[[str], torch.Tensor]
) -> None:
    """Gives the tensors to the writer, which reads one at a time, by its name, when it writes them.

    Matrices are stored in the type that is asked for, or in half precision where rows do not divide into its blocks;
    vectors in float32, as llama.cpp wants them.
    """
    from gguf.lazy import LazyNumpyTensor
    from gguf.quants import quantize

    asked = gguf.GGMLQuantizationType[quant.upper()]
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == writer.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in state.items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ExportError(f"llama.cpp's {writer.arch} has no tensor for `{name}`.")
        kind = asked if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[asked][0] == 0 else gguf.GGMLQuantizationType.F16
        kind = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else kind
        rotated = name.rpartition(".")[0].endswith(("q_proj", "k_proj")) and writer.arch in _ROTATES_NEIGHBOURS
        shift = float(writer.arch == GEMMA3 and name.endswith("norm.weight"))  # Transformers adds 1 to what it stores
        values = partial(_values, stored, partial(read, name), kind, head_dim if rotated else None, shift)
        meta = LazyNumpyTensor.meta_with_dtype_and_shape(np.float32, tuple(tensor.shape))
        writer.add_tensor(stored, quantize(LazyNumpyTensor(meta=meta, func=values), kind), raw_dtype=kind)


def _values(
    name: str, read: Callable[[], torch.Tensor], kind: Any, head_dim: int | None, shift: float = 0.0
) -> np.ndarray:
    """The float32 values of a tensor of the file; rotary rows in the order of rotation by neighbours.

    Transformers rotates row `i` of a head with row `i + head_dim / 2`; in the result these two are neighbours.
    """
    values = read().detach().to("cpu", torch.float32).contiguous() + shift
    if kind.name == "F16" and values.abs().max() > torch.finfo(torch.float16).max:
        raise ExportError(f"{name} holds {values.abs().max():.4g}, too large for f16. Say --quant bf16.")
    if head_dim is not None:
        values = values.reshape(-1, 2, head_dim // 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
    return values.numpy()


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
# Ways to split text before byte-pair encoding, and whether whole words of the vocabulary skip the merges: the name of
# the same in llama.cpp. `byte-level` is the expression built into the tokenizers library.
_SPLITS = {
    (("byte-level",), False): "gpt-2",
    (("digits", "byte-level"), False): "smollm",
    ((rf"{_CONTRACTIONS}|{_LETTERS}{{1,3}}{_TAIL}",), True): "llama-bpe",
    ((rf"{_CONTRACTIONS}|{_LETTERS}{{1,3}}{_TAIL}",), False): "smaug-bpe",
    ((rf"{_CONTRACTIONS}|{_LETTERS}{_TAIL}",), False): "qwen2",
    (
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        True,
    ): "tekken",
}  # fmt: skip
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def _add_vocabulary(writer: Any, tokenizer: Any, config: PreTrainedConfig) -> list[str]:
    """Writes tokens, merges, special tokens and the chat template; says what llama.cpp does otherwise.

    Known are fast tokenizers: byte-level BPE (Llama 3, Qwen, SmolLM, Mistral Nemo), and BPE with byte fallback as
    SentencePiece has it (Llama 2, Mistral).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{type(tokenizer).__name__} is no fast tokenizer; llama.cpp's vocabulary is made from one.")
    description = json.loads(backend.to_str())
    kind, split = _kind_of(description)
    tokens, types = _tokens(tokenizer, description, config.vocab_size)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        # SentencePiece's scores: of two possible merges the one whose result has the higher score comes first. Single
        # characters, which no merge gives, are the lowest.
        merges = description["model"]["merges"]
        ranks = {"".join(pair): rank for rank, pair in reversed([*enumerate(merges)])}
        pairs = zip(tokens, types, strict=True)
        writer.add_token_scores([
            float(-ranks.get(token, len(merges))) if kind == gguf.TokenType.NORMAL else 0.0 for token, kind in pairs
        ])  # fmt: skip
        first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False)[:1])
        writer.add_add_space_prefix(first[0].startswith(_SPACE))
    _add_special(writer, tokenizer, with_merges=kind != "llama")
    normalises = "NFC" in json.dumps(description["normalizer"])
    return ["Text is not normalised to NFC by llama.cpp, as this tokenizer does it."] if normalises else []


def _kind_of(description: dict[str, Any]) -> tuple[str, str]:
    """Kind of tokenizer and kind of splitting, by llama.cpp's names."""
    model, normalizer = description["model"], description["normalizer"]
    if model["type"] != "BPE":
        raise ExportError(f"The tokenizer is a {model['type']} model; what can be written as GGUF is BPE.")
    steps = {step["type"] for step in _sequence(normalizer, "normalizers")}
    splits = _splitting(description["pre_tokenizer"])
    whole = splits in ((), ("unknown Metaspace",)) or _finds_nothing(description)
    if model.get("byte_fallback") and steps <= {"Prepend", "Replace"} and whole:
        return "llama", "default"
    key = (splits, bool(model.get("ignore_merges")))
    if model.get("byte_fallback") or key not in _SPLITS or not steps <= {"NFC"}:
        raise ExportError(
            f"llama.cpp has no tokenizer like this one, whose text is normalised by {json.dumps(normalizer)} and "
            f"split by {json.dumps(description['pre_tokenizer'])}; known are {', '.join(_SPLITS.values())}, and "
            "SentencePiece's BPE."
        )
    return "gpt2", _SPLITS[key]


def _finds_nothing(description: dict[str, Any]) -> bool:
    """Whether text is split where something stands that the normalizer has replaced, as Gemma's is at spaces."""
    replaced = [step.get("pattern") for step in _sequence(description["normalizer"], "normalizers")]
    split = description["pre_tokenizer"] or {}
    return split.get("type") == "Split" and "String" in split["pattern"] and split["pattern"] in replaced


def _splitting(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The steps that split text in words of `_SPLITS`, or in words that are not there."""
    steps = []
    for step in _sequence(pre_tokenizer, "pretokenizers"):
        kind = step["type"]
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            steps += ["byte-level"] if step["use_regex"] else []
        elif kind == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(step["pattern"].get("Regex", "?"))
        else:
            steps.append(f"unknown {kind}")
    return tuple(steps)


def _sequence(description: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    return [] if description is None else description.get(name, [description])


def _tokens(tokenizer: Any, description: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token and its type; rows of the embedding without a token get one that is never used."""
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(texts) >= size:
        raise ExportError(
            f"The tokenizer has a token {max(texts)}, but the embedding only {size} rows; resize the embedding."
        )
    special = {token["id"]: token["special"] for token in description["added_tokens"]}
    fallback, unknown = description["model"].get("byte_fallback"), description["model"].get("unk_token")
    tokens, types = [texts.get(number, f"[PAD{number}]") for number in range(size)], []
    for number, text in enumerate(tokens):
        kind = gguf.TokenType.NORMAL if number in texts else gguf.TokenType.UNUSED
        if fallback and text == unknown:
            kind = gguf.TokenType.UNKNOWN
        elif number in special:
            kind = gguf.TokenType.CONTROL if special[number] else gguf.TokenType.USER_DEFINED
            tokens[number] = text.replace(_SPACE, " ") if fallback and not special[number] else text
        elif fallback and re.fullmatch("<0x..>", text):
            kind = gguf.TokenType.BYTE
        types.append(kind)
    return tokens, types


def _add_special(writer: Any, tokenizer: Any, with_merges: bool) -> None:
    """Merges, special tokens, which of them are put around a text, and the chat template."""
    bare, full = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    before, after = full[:start], full[start + len(bare) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise ExportError(
            f"The tokenizer puts {tokenizer.convert_ids_to_tokens(before + after)} around a text; llama.cpp puts the "
            "tokens for begin and end only."
        )
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = gguf.SpecialVocab(folder, load_merges=with_merges, special_token_types=("bos", "eos", "unk", "pad"))
    special.add_special_token = {"bos": bool(before), "eos": bool(after)}
    special.add_to_gguf(writer, quiet=True)
