"""`quantize`: a model in fewer bits, by a library of the field, as a checkpoint that Transformers loads."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel, TorchAoConfig, set_seed
from transformers.utils import logging

from ..alignment import dividing_group_sizes
from ..errors import CheckpointError, ConfigurationError, UnsupportedModelError
from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..files.reading import read_json_object
from ..files.writing import check_folder, check_room, write_folder, write_text
from ..hardware import check_device, default_device, free_memory, memory_left
from ..hub.checkpoint import STILL_TRUE, copy_files, write_card_from
from ..hub.contents import CARD_NAME, check_card, check_own_files, is_pruned, read_text
from ..hub.older import write_for_older
from ..hub.origin import public_config
from ..hub.words import PICTURE_NAME, QUANTIZATION_NAME, RECOVERY_NAME, SCHEMA_VERSION
from ..installed import need, versions
from ..model.loading import load_config, load_model, load_tokenizer, shapes_of
from ..model.measuring import context_length
from ..model.per_layer import needs_per_layer_class
from ..text.calibration import check_token_ids, load_tokens
from .configuration import QuantizationConfig


logger = logging.get_logger(__name__)

Save = Callable[[Path], None]


@dataclass(frozen=True)
class Unquantised:
    """A model (folder or Hub id) that is not quantised yet; `shapes` is it on the meta device, in its dtype."""

    name: str
    shapes: PreTrainedModel
    trust_remote_code: bool = False

    @classmethod
    def read(cls, name: str | os.PathLike, trust_remote_code: bool = False) -> Unquantised:
        """Reads the configuration; raises a `CheckpointError` without such a model, or if it is quantised already."""
        name, remote = str(name), {"trust_remote_code": trust_remote_code}
        config = load_config(name, **remote)
        if getattr(config, "quantization_config", None) is not None:
            raise CheckpointError(f"{name} is quantised already: give the checkpoint as it was before.")
        return cls(name, shapes_of(config, name, dtype=config.dtype or torch.float32, **remote), trust_remote_code)

    @property
    def folder(self) -> Path | None:
        """Where it is; `None` for one on the Hub."""
        return Path(self.name) if Path(self.name).is_dir() else None

    @property
    def bytes(self) -> int:
        """Bytes of all parameters in the dtype of the checkpoint."""
        return self.shapes.get_memory_footprint(return_buffers=False)

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name and shape `(outputs, inputs)` of every linear map that is quantised: all but the head."""
        head = self.shapes.get_output_embeddings()
        return {
            name: (module.out_features, module.in_features)
            for name, module in self.shapes.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }

    def load(self, **options: Any) -> PreTrainedModel:
        """The model with its weights."""
        options |= {"dtype": self.shapes.dtype, "trust_remote_code": self.trust_remote_code}
        return load_model(self.name, **options)


class Backend:
    """A method of quantisation, for a model and the settings that are asked for."""

    packages: tuple[str, ...] = ()  # what has to be installed, by the names that are imported
    libraries: tuple[str, ...] = ()  # distributions whose versions are reported
    extra: str = ""  # of this package, that installs them
    # Whether weights are rounded on the device as soon as they are read; else the CPU holds the whole model, and the
    # device gets parts of it.
    while_loading: bool = False

    def __init__(self, original: Unquantised, config: QuantizationConfig):
        self.original, self.config = original, config

    @property
    def device(self) -> str:
        """What is computed on."""
        return self.config.device or default_device()

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale, as reported; `None` where the method has no such choice."""
        return self.config.group_size

    def check(self) -> None:
        """Refuses what does not fit each other and can be refused before a weight is read, and missing packages."""
        need(*self.packages, extra=self.extra)
        check_device(self.config.device)

    def check_groups(self, whole_row: bool = True) -> None:
        """Refuses a group size that some layer's inputs are no multiple of; -1 is a whole row, where there is that."""
        size = self.config.group_size
        for name, (_, columns) in self.original.linears.items():
            if (size == -1 and not whole_row) or (size != -1 and columns % size):
                fitting = [*map(str, dividing_group_sizes(inputs for _, inputs in self.original.linears.values()))]
                fitting += ["-1 (a whole row)"] if whole_row else []
                sizes = f"Sizes that divide all layers: {', '.join(fitting)}. " if fitting else ""
                raise ConfigurationError(
                    f"`group_size` is {size}, which does not divide the {columns} inputs of {name}. {sizes}"
                    "`PruningConfig(align_to=...)` prunes to widths that group sizes divide."
                )

    def estimate(self, group: int | None = None) -> int:
        """About how many bytes will be written: of a group, its weights, a scale and a zero point of 4 bytes."""
        shapes, group = self.original.linears.values(), group or self.group_size or -1
        weights = sum(rows * columns for rows, columns in shapes)
        groups = weights / group if group > 0 else sum(rows for rows, _ in shapes)
        rest = self.original.bytes - weights * self.original.shapes.dtype.itemsize
        return int(rest + weights * self.config.bits / 8 + groups * 4)

    def memory(self) -> int:
        """About how many bytes the weights take at most: 176 MB for 432 MB of SmolLM2, nf4 or int8 of bitsandbytes."""
        if not self.while_loading:
            return self.original.bytes
        return self.estimate() + max(p.numel() * p.element_size() for p in self.original.shapes.parameters())

    def notes(self) -> list[str]:
        """What a user of the result has to know."""
        return []

    def run(self, tokenizer: Any) -> Save:
        """Quantises the model; gives what writes it into a folder, as the library itself saves it."""
        raise NotImplementedError

    def calibration(self, tokenizer: Any) -> torch.LongTensor:
        """Token ids of shape `(num_samples, length)` for the methods that look at activations."""
        asked, context = self.config.calibration, context_length(self.original.shapes)
        if context is not None and asked.length > context:
            raise ConfigurationError(
                f"`calibration.length` is {asked.length}, but the model's context is {context} tokens."
            )
        tokens = load_tokens(asked, tokenizer)
        check_token_ids(tokens, self.original.shapes.get_input_embeddings().weight.shape[0])
        return tokens


class BitsAndBytes(Backend):
    """bitsandbytes: nf4 or fp4 in blocks of 64 weights, or int8 with a scale a row.

    https://huggingface.co/papers/2305.14314. The weights are saved as they were rounded: `load_model` keeps
    bitsandbytes from repacking them on a CPU.
    """

    packages = libraries = ("bitsandbytes",)
    extra = "bitsandbytes"
    while_loading = True
    group_size = None

    def estimate(self, group: int | None = None) -> int:
        return super().estimate(64 if self.config.bits == 4 else None)

    def notes(self) -> list[str]:
        widths = []
        for number, what, multiple in ((1, "inputs", 64), (0, "outputs", 32)):  # what 4-bit kernels of CPUs want
            odd = sorted({shape[number] for shape in self.original.linears.values() if shape[number] % multiple})
            shown = ", ".join([*map(str, odd[:5]), *(["..."] if len(odd) > 5 else [])])
            widths += [f"{shown} {what}, no multiples of {multiple}"] if odd else []
        if self.config.bits == 8 or not widths:
            return []
        return [
            f"It has layers with {' and '.join(widths)}. bitsandbytes' 4-bit kernels cannot run these on CPUs with "
            "AVX512-BF16 or AMX (an error at first use), and with plain AVX512 they compute wrong numbers if 64 does "
            "not divide the inputs. This package's commands and `hf_structprune.model.loading.load_model` compute "
            "rightly on every CPU, and other devices have no such limits, nor have 8 bits. "
            "`PruningConfig(align_to=64)` prunes to widths that run everywhere."
        ]

    def run(self, tokenizer: Any) -> Save:
        config, settings = self.config, {"load_in_8bit": True}
        if config.bits == 4:
            settings = {
                "load_in_4bit": True, "bnb_4bit_quant_type": config.four_bit_type,
                "bnb_4bit_use_double_quant": config.double_quant, "bnb_4bit_compute_dtype": self.original.shapes.dtype,
            }  # fmt: skip
        settings = BitsAndBytesConfig(**settings)
        return self.original.load(device_map={"": self.device}, quantization_config=settings).save_pretrained


class TorchAo(Backend):
    """torchao, weight-only: int8 with a scale a row, or int4 in groups. https://huggingface.co/papers/2507.16099"""

    packages = libraries = ("torchao",)
    extra = "torchao"
    while_loading = True

    @property
    def group_size(self) -> int | None:
        return self.config.group_size if self.config.bits == 4 else None

    def check(self) -> None:
        super().check()
        if self.config.bits == 4:
            if torch.device(self.device).type == "cpu":
                raise ConfigurationError(
                    "torchao with 4 bits needs an accelerator (CUDA or XPU), and the device is the CPU: set `bits=8`, "
                    "or choose bitsandbytes, which has 4 bits."
                )
            self.check_groups(whole_row=False)

    def run(self, tokenizer: Any) -> Save:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

        size = self.group_size
        settings = TorchAoConfig(Int8WeightOnlyConfig() if size is None else Int4WeightOnlyConfig(group_size=size))
        return self.original.load(device_map={"": self.device}, quantization_config=settings).save_pretrained


class AutoRound(Backend):
    """auto-round: rounding up or down is learnt by signed gradients. https://huggingface.co/papers/2309.05516

    In its own format, which Transformers loads where auto-round is installed.
    """

    packages = ("auto_round",)
    libraries = ("auto-round",)
    extra = "auto-round"

    def check(self) -> None:
        super().check()
        self.check_groups()

    def run(self, tokenizer: Any) -> Save:
        from auto_round import AutoRound as Rounding

        config, rows = self.config, self.calibration(tokenizer)
        rounding = Rounding(
            self.original.load(), tokenizer, bits=config.bits, group_size=config.group_size, sym=config.sym,
            iters=config.iterations, seed=config.seed, device_map=self.device,
            dataset=list(rows.split(config.calibration.batch_size)),
            seqlen=rows.shape[1], nsamples=rows.shape[0], batch_size=config.calibration.batch_size,
        )  # fmt: skip
        rounding.quantize()
        return lambda path: rounding.save_quantized(str(path), format="auto_round", inplace=True)


class Gptq(Backend):
    """GPTQ by GPTQModel, on a CPU too: columns are rounded one after the other, and later ones make up for it.

    https://huggingface.co/papers/2210.17323. Transformers loads the result through Optimum and GPTQModel.
    """

    # Our own wheel puts a folder `optimum` there: only what is in it tells whether Optimum is installed.
    packages, libraries = ("gptqmodel", "optimum.gptq"), ("gptqmodel", "optimum")
    extra = "gptq"
    kernel = "auto"  # that packs the weights, by GPTQModel's name

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is not quantised."""
        return self.original.shapes.dtype

    def check(self) -> None:
        super().check()
        self.check_groups()
        for name, shape in self.original.linears.items():
            if any(width % 32 for width in shape):
                raise UnsupportedModelError(
                    f"{name} has {shape[0]} outputs and {shape[1]} inputs; GPTQModel packs weights where both are "
                    "multiples of 32: choose bitsandbytes, or prune with `PruningConfig(align_to=32)`."
                )
        if needs_per_layer_class(self.original.shapes.config):
            raise UnsupportedModelError(
                f"{self.original.name} has layers of different widths, which GPTQModel builds all alike: quantise it "
                "with bitsandbytes or torchao, or prune with `layout='uniform'`."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What GPTQModel calls the method."""
        return {"quant_method": "gptq", "desc_act": self.config.desc_act}

    def run(self, tokenizer: Any) -> Save:
        if (os.cpu_count() or 1) < 4:  # GPTQModel 7.6 starts half as many threads as cores and fails with one
            os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

        config, original, rows = self.config, self.original, self.calibration(tokenizer)
        settings = {"bits": config.bits, "group_size": config.group_size, "sym": config.sym, **self.settings}
        model = GPTQModel.load(
            original.name, QuantizeConfig(**settings, device=self.device),
            trust_remote_code=original.trust_remote_code, dtype=self.dtype,
        )  # fmt: skip
        with _logs_elsewhere():
            model.quantize(
                [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows.tolist()],
                batch_size=config.calibration.batch_size, tokenizer=copy.deepcopy(tokenizer),
                backend=BACKEND(self.kernel),
            )  # fmt: skip

        def save(path: Path) -> None:
            model.save(str(path))
            self._restore(path)

        return save

    def _restore(self, path: Path) -> None:
        """Puts back what GPTQModel changes: it sets a padding token, and names a temporary folder of this machine."""

        def without_paths(settings: dict[str, Any]) -> dict[str, Any]:
            meta = {key: value for key, value in settings.get("meta", {}).items() if not key.endswith("_path")}
            return {**settings, "meta": meta}

        config, file = copy.deepcopy(self.original.shapes.config), path / "quantize_config.json"
        config.dtype = self.dtype
        config.quantization_config = without_paths(read_json_object(path / "config.json")["quantization_config"])
        config.save_pretrained(path)
        if file.is_file():
            write_text(file, json.dumps(without_paths(read_json_object(file)), indent=2) + "\n")
        try:
            GenerationConfig.from_pretrained(self.original.name).save_pretrained(path)
        except OSError:  # the model has none, and Transformers makes one from its configuration
            (path / "generation_config.json").unlink(missing_ok=True)


@contextmanager
def _logs_elsewhere() -> Iterator[None]:
    """GPTQModel 7.6 writes a folder `logs` where the user happens to be, and has no option against it."""
    from gptqmodel.looper import loop_processor

    before = getattr(loop_processor, "_PROJECT_LOG_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        loop_processor._PROJECT_LOG_DIR = Path(folder)
        try:
            yield
        finally:
            loop_processor._PROJECT_LOG_DIR = before


class Awq(Gptq):
    """AWQ by GPTQModel: weights that meet large inputs are scaled up before all are rounded.

    https://huggingface.co/papers/2306.00978
    """

    extra = "awq"
    settings = {"quant_method": "awq", "format": "gemm"}

    @property
    def kernel(self) -> str:
        return "auto" if self.device.startswith("cuda") else "awq_torch"

    @property
    def dtype(self) -> torch.dtype:  # its kernels compute in 16 bits only
        return torch.float16 if super().dtype == torch.float32 else super().dtype

    def check(self) -> None:
        super().check()
        for name, (rows, _) in self.original.linears.items():
            if rows % 64:  # GPTQModel searches for the best clipping of so many outputs at once
                raise UnsupportedModelError(
                    f"{name} has {rows} outputs, and AWQ takes 64 at once: prune to widths that are multiples of 64, "
                    "or choose gptq."
                )


BACKENDS: dict[str, type[Backend]] = {
    "bitsandbytes": BitsAndBytes, "torchao": TorchAo, "gptq": Gptq, "awq": Awq, "auto-round": AutoRound,
}  # fmt: skip


def backend_of(original: Unquantised, config: QuantizationConfig) -> Backend:
    """The method that a configuration names, after its check, see `Backend.check`."""
    backend = BACKENDS[config.method](original, config)
    backend.check()
    return backend


@dataclass(frozen=True)
class QuantizationResult:
    """The quantised checkpoint and what `quantization.json` in it says."""

    folder: Path
    report: dict[str, Any]


def quantize(
    model: str | os.PathLike,
    output_dir: str | os.PathLike,
    config: QuantizationConfig | None = None,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> QuantizationResult:
    """Quantises a checkpoint (folder or Hub id), pruned by this package or not, and saves it as its library does.

    `AutoModelForCausalLM.from_pretrained` loads the result where the library is installed; checkpoints whose layers
    differ in width need `import hf_structprune` or `trust_remote_code=True` as before. The default is bitsandbytes'
    nf4. With `overwrite`, what is in `output_dir` is replaced.

    Raises:
        ConfigurationError: The settings, the model and the device do not fit each other, or there is something in
            `output_dir`.
        CheckpointError: The model or a file beside it cannot be read, it is quantised already, or there is too little
            memory or disk.
        StructPruneError: A package is missing.
    """
    check_folder(output_dir)
    config, folder = config or QuantizationConfig(), Path(output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigurationError(f"{folder} is not empty; choose another `output_dir` or say `overwrite`.")
    original = Unquantised.read(model, trust_remote_code)
    backend = backend_of(original, config)
    if original.folder is not None:
        check_own_files(original.folder)
    check_card(folder)
    check_room(folder, backend.estimate())
    check_memory(backend)
    for note in backend.notes():
        logger.warning(note)
    set_seed(config.seed)
    tokenizer = load_tokenizer(original.name, trust_remote_code=trust_remote_code)
    save = backend.run(tokenizer)
    report = {
        "schema_version": SCHEMA_VERSION, "method": config.method, "bits": config.bits,
        "group_size": backend.group_size, "configuration": public_config(config).to_dict(),
        "model": original.name if original.folder is None else original.folder.absolute().name,  # never its path
        "versions": {**versions(), **{library: version(library) for library in backend.libraries}},
        "weights": {"parameters": original.shapes.num_parameters(), "bytes": None, "bytes_before": original.bytes},
        "notes": backend.notes(),
    }  # fmt: skip
    previous = read_text(folder / CARD_NAME)

    def write(path: Path) -> None:
        save(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        write_for_older(path, original.shapes.config)
        report["weights"]["bytes"] = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        write_text(path / QUANTIZATION_NAME, json.dumps(report, indent=1) + "\n")
        if original.folder is None:
            return
        # What was measured before comes along under the name of its state, as do how it was pruned and recovered.
        for results in sorted(original.folder.glob("evaluation_results*.json"), reverse=True):
            state = EvaluationResult.load(results).state
            if results.name in (RESULTS_NAME, f"evaluation_results_{state}.json"):
                shutil.copyfile(results, path / f"evaluation_results_{state}.json")
        if is_pruned(original.folder):
            copy_files(original.folder, path, (*STILL_TRUE, RECOVERY_NAME, PICTURE_NAME))
            write_card_from(original.folder, path, folder, previous)

    write_folder(folder, write, size=backend.estimate())
    return QuantizationResult(folder, report)


def check_memory(backend: Backend) -> None:
    """Refuses a model that does not fit in memory while it is quantised."""
    device, needed = torch.device(backend.device), backend.memory()
    where, free = f"of {device}", free_memory(device) if backend.while_loading else None
    if free is None:
        where, free = "of this machine", memory_left()
    if needed > free:
        raise CheckpointError(
            f"{backend.original.name} needs about {needed / 1e9:.2f} GB to be quantised by {backend.config.method}, "
            f"but {free / 1e9:.2f} GB of the memory {where} are free: quantise it on a larger one."
        )
