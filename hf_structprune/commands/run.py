"""`hf-structprune run RECIPE`: prunes, recovers, measures all sides, writes the card and, if asked to, pushes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration import CONFIG_NAME, PruningConfig
from ..errors import ConfigurationError
from ..evaluation import EfficiencyConfig, EvaluationResult, ResultTable, evaluate
from ..evaluation.pictures import draw_widths
from ..evaluation.results import RESULTS_NAME
from ..files import write_text
from ..hub import push_folder, write_card
from ..hub.contents import DENSE_RESULTS_NAME, WIDTHS_NAME, Contents
from ..hub.origin import Origin
from ..plan import PruningPlan
from ..recipe import RECIPE_NAME, Recipe, RecoverySection
from .arguments import parse
from .benchmark import take_turns_apart
from .common import ModelArguments, check_output_dir, check_ratio, console, load_pruner, load_to_plan, speaking
from .demo_model import find_model
from .recipe_recovery import check_section, recover_section, recovered_already
from .subjects import Subject


if TYPE_CHECKING:
    from ..pruner import StructuredPruner

TURNS = 3


@dataclass
class RunArguments:
    """Options of `run`.

    Args:
        recipe (`str`): A YAML file with the sections model, output_dir, prune, recover, evaluate and
            push.
        push (`bool`): Push the result to the repository that the recipe's section `push` names.
        overwrite (`bool`): Do everything again even if the folders hold checkpoints.
        dry_run (`bool`): Check the recipe and print its plan; loads no weights.
    """

    recipe: str
    push: bool = False
    overwrite: bool = False
    dry_run: bool = False


def run(argv: Sequence[str]) -> None:
    """Runs the steps that are not done yet."""
    description = "Run RECIPE: prune, recover, measure, write the card, push. What is done already is not done again."
    (arguments,) = parse(argv, "run", description, RunArguments)
    recipe = Recipe.load(arguments.recipe)
    check_ratio(recipe.ratio, recipe.pruning)
    if arguments.push and not recipe.push.get("repo_id"):
        raise ConfigurationError(f"{arguments.recipe} names no `repo_id` in its section `push`.")
    if recipe.evaluation is not None:
        dataclasses.replace(recipe.evaluation, efficiency=False).load()  # mistakes show before any work
    if recipe.recovery is not None:
        check_section(recipe.recovery)
    options = {name: value for name, value in recipe.model.items() if name != "model"}
    source = dataclasses.replace(find_model(recipe.model["model"]), **options)
    if arguments.dry_run:
        console().print(load_to_plan(source, recipe.pruning, recipe.ratio).plan(recipe.ratio).table())
    else:
        _Run(recipe, source, arguments).all()


class _Run:
    """The steps of one recipe, each of which looks whether it is done."""

    def __init__(self, recipe: Recipe, source: ModelArguments, arguments: RunArguments) -> None:
        self.recipe, self.source, self.again = recipe, source, arguments.overwrite
        self.push = arguments.push
        self.folder = Path(recipe.output_dir)
        self.base = recipe.model["model"]
        self.out = console()

    def all(self) -> None:
        """Every step, in order."""
        pruned, measured = self._is_pruned(), self.recipe.evaluation is None or self._is_measured()
        pruner = None if pruned and measured else load_pruner(self.source, self.recipe.pruning)
        if not measured:
            self.out.print(f"Measuring {self.base} ...")
            self._evaluate(pruner, self._dense_results(), self.base, "dense")
        if not pruned:
            self.out.print(f"Pruning {self.base} ...")
            if self.source.model != self.base:  # the card names the model, not the cache it was read from
                pruner.origin = Origin.of(self.base)
            pruner.prune(self.recipe.ratio)
            pruner.save_pretrained(self.folder)
        del pruner
        if self.recipe.evaluation is not None:
            if not measured:
                shutil.copyfile(self._dense_results(), self.folder / DENSE_RESULTS_NAME)
            self._evaluate_folder(self.folder, "pruned")
            self._time()
        self._describe(self.folder)
        if self.recipe.recovery is not None:
            self._recover(self.recipe.recovery)
        if self.push:
            self.out.print(f"Pushed: {push_folder(self._final(), **self.recipe.push).commit_url}")

    def _recover(self, section: RecoverySection) -> None:
        """Trains the pruned checkpoint and measures and describes what came out."""
        folder = Path(section.output_dir)
        if not recovered_already(section, self.again):
            self.out.print(f"Recovering {self.folder} ...")
            with speaking():
                recover_section(section, self.folder, self.source, self.base, self.again)
        if self.recipe.evaluation is not None:
            self._evaluate_folder(folder, "recovered")
        self._describe(folder)

    def _final(self) -> Path:
        """The checkpoint that the recipe is about."""
        return self.folder if self.recipe.recovery is None else Path(self.recipe.recovery.output_dir)

    def _is_pruned(self) -> bool:
        """Whether the folder holds the checkpoint already.

        Raises:
            ConfigurationError: It holds something else.
        """
        if self.again or not (self.folder / CONFIG_NAME).exists():
            check_output_dir(str(self.folder), self.again)
            return False
        plan, config = PruningPlan.load(self.folder), PruningConfig.load(self.folder)
        if config != self.recipe.pruning or plan.ratio_requested != self.recipe.ratio:
            raise ConfigurationError(
                f"{self.folder} holds a checkpoint that was pruned with other settings; choose another `output_dir` "
                "or say --overwrite."
            )
        return True

    def _is_measured(self) -> bool:
        return not self.again and (self.folder / DENSE_RESULTS_NAME).exists()

    def _dense_results(self) -> Path:
        """Where the dense model's results are kept while they are measured; other recipes may use the same file."""
        return Path(self.recipe.dense_results or f"{self.folder}-dense.json")

    def _evaluate(self, pruner: StructuredPruner, output: Path, name: str, state: str) -> None:
        config = dataclasses.replace(self.recipe.evaluation, efficiency=False)  # see `_time`
        evaluate(
            pruner.model, pruner.tokenizer, config, name=name, state=state,
            base_model=None if state == "dense" else self.base, output=output, overwrite=self.again,
        )  # fmt: skip

    def _evaluate_folder(self, folder: Path, state: str) -> None:
        """Measures a checkpoint as its users will load it."""
        self.out.print(f"Measuring {folder} ...")
        pruner = load_pruner(self._result(folder))
        self._evaluate(pruner, folder / RESULTS_NAME, folder.name, state)

    def _time(self) -> None:
        """Size, memory and speed of both sides, in turns; recipes share other dense results, not these."""
        files = [self.folder / DENSE_RESULTS_NAME, self.folder / RESULTS_NAME]
        results = [EvaluationResult.load(file) for file in files]
        if not self.recipe.evaluation.efficiency or all("efficiency/parameters" in r.figures for r in results):
            return
        self.out.print("Measuring size, memory and speed of both ...")
        subjects = [Subject(self.source, "dense", None), Subject(self._result(self.folder), "pruned", self.base)]
        timed = take_turns_apart(subjects, EfficiencyConfig(seed=self.recipe.evaluation.seed), TURNS)
        for file, result, figures in zip(files, results, timed, strict=True):
            result.add(*figures.figures.values())
            result.save(file)

    def _result(self, folder: Path) -> ModelArguments:
        """A checkpoint, on the devices that the recipe names."""
        return ModelArguments(str(folder), device=self.source.device, device_map=self.source.device_map)

    def _describe(self, folder: Path) -> None:
        """Picture, recipe and card in the folder, table on the screen."""
        draw_widths(PruningPlan.load(folder), folder / WIDTHS_NAME)
        write_text(folder / RECIPE_NAME, self.recipe.text)
        write_card(folder)
        if self.recipe.evaluation is not None:
            contents = Contents.read(folder)
            self.out.print(ResultTable(contents.results).to_rich())
        self.out.print(f"Checkpoint, results and card are in {folder}/")
