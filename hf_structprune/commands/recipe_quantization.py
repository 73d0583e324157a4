"""The section `quantize` of a recipe."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigurationError
from ..hub.origin import public_config
from ..hub.quantization import read_quantization
from ..model.target import target_of
from ..quantization.backend import Source
from ..quantization.methods import BACKENDS
from ..quantization.quantizing import quantize
from ..units.kinds import DEPTH_UNITS
from .common import ModelArguments, load_shapes, load_to_plan, plans_by_shapes
from .recipe import QuantizationSection, Recipe


def check_section(section: QuantizationSection, recipe: Recipe, source: ModelArguments) -> None:
    """Finds out before any work whether the model can be quantised, as far as shapes tell.

    The shapes are those of the plan if it can be made without weights, else those of the dense model, which are right
    where layers go and nothing else; `check_folder` looks at what was pruned in fact.

    Raises:
        StructPruneError: An extra is missing, or the settings do not fit the device or the model.
    """
    if plans_by_shapes(recipe.pruning, recipe.ratio):
        pruner = load_to_plan(source, recipe.pruning, recipe.ratio)
        plan = pruner.plan(recipe.ratio)
        if plan.hidden is None:  # the plan is for the model after its residual stream is cut
            shapes = target_of(pruner.model, pruner.structure, plan).skeleton()
            _check(section, Source(source.model, shapes, source.trust_remote_code))
    elif not set(recipe.pruning.units) - set(DEPTH_UNITS):
        _check(section, Source(source.model, load_shapes(source).model, source.trust_remote_code))


def check_folder(section: QuantizationSection, pruned: ModelArguments) -> None:
    """The same for the pruned checkpoint, before a training that would be in vain."""
    _check(section, Source.read(pruned.model, pruned.trust_remote_code))


def _check(section: QuantizationSection, source: Source) -> None:
    BACKENDS[section.config.method].check(source, section.config)


def quantised_already(section: QuantizationSection, again: bool) -> bool:
    """Whether the folder holds what this section makes.

    Raises:
        ConfigurationError: It holds what other settings have made.
    """
    report = None if again else read_quantization(Path(section.output_dir))
    if report is None:
        return False
    if report["configuration"] != public_config(section.config).to_dict():
        raise ConfigurationError(
            f"{section.output_dir} holds a checkpoint that was quantised with other settings; choose another "
            "`output_dir` in the section `quantize`, or say --overwrite."
        )
    return True


def quantise_section(section: QuantizationSection, source: ModelArguments, again: bool) -> None:
    """Quantises the checkpoint of the step before."""
    quantize(
        source.model, section.output_dir, section.config, overwrite=again, trust_remote_code=source.trust_remote_code
    )
