"""What the subcommands share: options about the model, loading it, printing results."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from ..checks import check_fields
from ..config import PruningConfig
from ..errors import ConfigurationError, StructPruneError
from ..files.folders import check_folder


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ..plan import PruningPlan
    from ..pruner import StructuredPruner


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class ModelArguments:
    """The model and how to load it.

    Args:
        model (`str`): Id of a model on the Hub, or a folder.
        dtype (`str`): `bf16`, `fp16`, `fp32`, or `auto` for the one it was saved in.
        device (`str`, *optional*): `cpu`, `cuda`, `cuda:1`, `mps`. Default: the CPU.
        device_map (`str`, *optional*): `auto` spreads the layers over what there is, through accelerate.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        subfolder (`str`, *optional*): A folder in the repository or folder that holds the model.
        variant (`str`, *optional*): Which of several versions of the weights, for example `fp16` for
            `model.fp16.safetensors`.
        gguf_file (`str`, *optional*): A GGUF file of the repository or folder to read the weights from.
        trust_remote_code (`bool`): Run modelling code that comes with the model.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    model: str
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype not in {"auto", *DTYPES, *DTYPES.values()}:
            raise ConfigurationError(f"`dtype` is {self.dtype!r}; allowed values are auto, {', '.join(DTYPES)}.")
        if self.device is not None and self.device_map is not None:
            raise ConfigurationError("`device` and `device_map` are both given; give one of them.")

    def loading_options(self) -> dict[str, Any]:
        """The keyword arguments for `from_pretrained`."""
        options = {
            "dtype": DTYPES.get(self.dtype, self.dtype),
            "device_map": self.device_map,
            "revision": self.revision,
            "subfolder": self.subfolder,
            "variant": self.variant,
            "gguf_file": self.gguf_file,
            "trust_remote_code": self.trust_remote_code or None,
        }
        return {name: value for name, value in options.items() if value is not None}


def load_pruner(arguments: ModelArguments, config: PruningConfig | None = None) -> StructuredPruner:
    """Loads the model that the options name.

    Raises:
        StructPruneError: There is no such model, it cannot be read, or the device is not there.
    """
    from ..pruner import StructuredPruner

    check_device(arguments.device)
    pruner = StructuredPruner.from_pretrained(arguments.model, config, **arguments.loading_options())
    if arguments.device is not None:
        pruner.model.to(arguments.device)
    return pruner


def load_for_measuring(arguments: ModelArguments) -> tuple[PreTrainedModel, Any]:
    """A model as it is, quantised ones too, and its tokenizer.

    Raises:
        StructPruneError: There is no such model, it cannot be read, it has no tokenizer, or the device is not there.
    """
    from ..model.loading import load_model, load_tokenizer

    check_device(arguments.device)
    options = arguments.loading_options()
    model, tokenizer = load_model(arguments.model, **options), load_tokenizer(arguments.model, **options)
    if tokenizer is None:
        raise StructPruneError(f"{arguments.model} has no tokenizer, without which nothing can be measured.")
    return (model if arguments.device is None else model.to(arguments.device)), tokenizer


def load_config(arguments: ModelArguments) -> PretrainedConfig:
    """The configuration of a model alone, which also tells whether there is such a model."""
    from ..model.loading import load_config as load

    return load(arguments.model, **arguments.loading_options())


def load_shapes(arguments: ModelArguments, config: PruningConfig | None = None) -> StructuredPruner:
    """The model on the meta device: only its configuration is read, which is enough to inspect it and to plan."""
    import torch

    from ..model.loading import refuse_quantised, shapes_of
    from ..pruner import StructuredPruner

    check_device(arguments.device)
    model_config = load_config(arguments)
    refuse_quantised(model_config, arguments.model)
    if arguments.dtype != "auto":
        dtype = arguments.loading_options()["dtype"]
    else:  # as `loading.load_model` does it
        dtype = torch.bfloat16 if arguments.gguf_file else model_config.dtype
    remote = arguments.trust_remote_code
    model = shapes_of(model_config, arguments.model, dtype=dtype, trust_remote_code=remote)
    return StructuredPruner.from_pretrained(model, config)


def load_to_plan(arguments: ModelArguments, config: PruningConfig, ratio: float | None) -> StructuredPruner:
    """The model on the meta device where its shapes are enough to plan, else with its weights.

    Only choices between layers look at the weights.
    """
    return (load_shapes if plans_by_shapes(config, ratio) else load_pruner)(arguments, config)


def plans_by_shapes(config: PruningConfig, ratio: float | None) -> bool:
    """Whether a plan can be made without the weights."""
    return config.allocation == "uniform" and not config.chooses_depth(ratio)


def check_device(name: str | None) -> None:
    """Refuses a device that does not exist here."""
    import torch

    if name is None:
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def check_ratio(ratio: float | None, config: PruningConfig) -> None:
    """Refuses a ratio that cannot be meant, before any work is done; names the options."""
    if ratio is None and config.needs_ratio:
        raise ConfigurationError(
            "--ratio is missing; 0.3 removes 30 %. Instead of it --attention-ratio and --mlp-ratio, --num-layers, "
            "--keep-first or --hidden-size say how much goes."
        )
    if ratio is not None and not config.takes_ratio:
        names = ("attention_ratio", "mlp_ratio", "num_layers", "keep_first", "hidden_size")
        stated = [f"--{name.replace('_', '-')}" for name in names if getattr(config, name) is not None]
        raise ConfigurationError(f"--ratio and {' / '.join(stated)} are both given; give one or the other.")


def check_output_dir(path: str, overwrite: bool) -> None:
    """Refuses to write over something, or where nothing can be written, before any work is done."""
    folder = Path(path)
    check_folder(path)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigurationError(f"{path} is not empty; choose another --output-dir or say --overwrite.")


def default_window(model: PreTrainedModel, protocol: str = "paper") -> int:
    """The protocol's window for perplexity, or the model's context where that is shorter."""
    from ..evaluation.protocols import find_protocol

    return find_protocol(protocol).window_for(model)


def plan_summary(plan: PruningPlan) -> dict[str, Any]:
    """The figures of a plan, without the list of its groups."""
    names = ("ratio_requested", "ratio", "layout", "dropped", "removed", "warnings")
    sizes = [f"{name}_{when}" for name in ("parameters", "bytes", "macs") for when in ("before", "after")]
    return {name: getattr(plan, name) for name in (*names, *sizes)}


@contextlib.contextmanager
def results_only_on_stdout() -> Iterator[None]:
    """Sends what libraries print while they work to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def speaking() -> Iterator[None]:
    """Lets the package say on stderr what it does; as a library it says only what is amiss."""
    logger, handler = logging.getLogger(__name__.partition(".")[0]), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def console() -> Console:
    """A console on stdout, wide enough for the tables when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, soft_wrap=False)


def show(as_json: bool, data: dict[str, Any], *tables: RenderableType) -> None:
    """Prints a result: the data as JSON, or the tables for people."""
    if as_json:
        print(json.dumps(data))
        return
    out = console()
    for table in tables:
        out.print(table)
